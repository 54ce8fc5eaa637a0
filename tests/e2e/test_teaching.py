"""Teacher against student in a whole run: what is decided is what is distilled, and a changed decision re-does nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from simlm.artifacts import read_manifest
from simlm.pipeline import make_plan, run_recipe
from simlm.recipe import load_recipe
from simlm.training import teaching
from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"


def run(folder: Path, *changes: str) -> dict[str, Any]:
    """Facts of the comparison and of the distilled retriever, and the report's metrics."""
    if not (folder / "data").exists():
        write_beir(folder / "data")
    paths = [f"output={json.dumps(str(folder / 'run'))}", f"data.path={json.dumps(str(folder / 'data'))}"]
    recipe = load_recipe(RECIPE, [*TINY, *paths, 'skip=["pretrain", "start"]', 'distilled.initial="retriever2"', *changes])
    done = run_recipe(recipe, quiet=True)
    plan = make_plan(recipe)
    assert {plan.state(step)[0] for step in plan.steps} == {"done"}
    metrics = json.loads((done / "report" / "metrics.json").read_text(encoding="utf-8"))
    return {"check": read_manifest(done / "teacher_check").facts, "distilled": read_manifest(done / "distilled").facts, "metrics": metrics}


@pytest.mark.slow
def test_each_decision_is_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any lower value counts as worse: three steps prove nothing.
    monkeypatch.setattr(teaching, "SIGNIFICANT", 2.0)
    found = run(tmp_path, 'teacher.if_worse="skip"')
    check = found["check"]
    assert (check["measured_on"], check["num_queries"], check["training_groups"]["num_queries"]) == ("dev", 20, 80)
    worse = check["teacher"] < check["student"]
    assert (check["outcome"], check["action"]) == (("worse", "skip") if worse else ("better", "teach"))
    assert found["distilled"]["distilled"] is not worse
    assert found["metrics"]["teaching"]["action"] == check["action"]
    first = load_file(tmp_path / "run" / "distilled" / "model.safetensors")
    before = load_file(tmp_path / "run" / "retriever2" / "model.safetensors")
    assert all((first[name] == before[name]).all() for name in before) == worse

    scored = read_manifest(tmp_path / "run" / "dev_teacher_scores").created
    mixed = run(tmp_path, "teacher.interpolate=true")
    assert read_manifest(tmp_path / "run" / "dev_teacher_scores").created == scored
    check, distilled = mixed["check"], mixed["distilled"]
    best = max(check["curve"].values())
    assert check["curve"][f"{check['teacher_weight']:.2f}"] == check["mixture"] == best >= max(check["teacher"], check["student"])
    action = {0.0: "skip", 1.0: "teach"}.get(check["teacher_weight"], "mix")
    assert check["action"] == action and distilled["distilled"] == (action != "skip")
    if action == "mix":
        assert distilled["teacher_weight"] == check["teacher_weight"] and check["sharpness"] > 0

    went_on = run(tmp_path, 'teacher.if_worse="go_on"', "teacher.num_queries=24")
    assert (went_on["check"]["action"], went_on["distilled"]["num_groups"]) == ("teach", 24)
    assert read_manifest(tmp_path / "run" / "teacher_scores").facts["num_queries"] == 24
    assert read_manifest(tmp_path / "run" / "teacher_scores").facts["num_known_pairs"] > 0
