"""A comparison at toy size: what is shared, a kill, a row that fails, the pages, equal time, a mismatched corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simlm import compare
from simlm.cli import app
from simlm.pipeline import run_step
from simlm.recipe import Recipe, load_recipe
from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"
QUICK = [
    "generator.training.max_steps=2",
    "generator.held_out_passages=0",
    "pretrain.training.max_steps=2",
    "retriever1.training.max_steps=2",
    "retriever1.dev={num_queries=0}",
]


def changes(folder: Path, *more: str) -> list[str]:
    places = [f"data.path={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / 'run'))}"]
    grid = ['compare.objectives=["replaced_lm", "none"]', "compare.replace_rates=[]", "compare.generators=[]", "compare.seeds=[1, 2]"]
    return [*TINY, *QUICK, "pretrain.probe.num_passages=4", *places, *grid, *more]


def toy(folder: Path, *more: str) -> Recipe:
    return load_recipe(RECIPE, changes(folder, *more))


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "compare" / "comparison.json").read_text(encoding="utf-8"))
    return found


def test_a_comparison_survives_a_kill_and_a_row_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    done: list[str] = []
    kills = [1]

    def killed_at_the_last_search(plan: Any, step: Any, *rest: Any) -> tuple[float, int]:
        if "retriever1_run" in step.name and sum("retriever1_run" in name for name in done) == 2 and kills:
            kills.clear()
            raise KeyboardInterrupt
        done.append(step.name)
        return run_step(plan, step, *rest)

    # A head that takes the states behind layer 7 of an encoder of two layers: only this row fails.
    grid = ('compare.objectives=["replaced_lm", "none", "condenser"]', "compare.generators=['frozen']", "pretrain.skip_layer=7")
    monkeypatch.setattr(compare, "run_step", killed_at_the_last_search)
    with pytest.raises(KeyboardInterrupt):
        compare.compare_objectives(toy(tmp_path, *grid), quiet=True)
    assert len(list((tmp_path / "run" / "compare" / "measured").glob("*.json"))) == 3, "two rows and BM25"
    before = len(done)

    arguments = [part for change in changes(tmp_path, *grid) for part in ("--set", change)]
    again = CliRunner().invoke(app, ["compare-objectives", str(RECIPE), *arguments])
    assert again.exit_code == 1, again.output
    assert "pretrain.skip_layer" in again.output
    assert [name.split("/")[-1].split("-")[0] for name in done[before:]] == ["pretrained", "retriever1_run"], "the failed row and the rest"
    assert len(set(done)) == len(done) - 1, "only the failed step was begun twice"

    content = results(tmp_path)
    assert content["cells"] == {"wanted": 4, "done": 3, "failed": 1}
    main, none, condenser = content["tables"][0]["rows"]
    assert (main["num_seeds"], none["num_seeds"], condenser["num_seeds"]) == (2, 1, 0)
    assert "skip_layer" in condenser["errors"]["1"]
    assert main["probe"] is not None
    assert main["cost"]["tokens_per_second"] > 0
    assert main["cost"]["peak_memory_bytes"] > 0
    assert main["spread"]["RR@10"] is not None
    assert none["cost"]["tokens"] is None
    assert content["tables"][1]["rows"][0]["mean"] == main["mean"], "frozen is replaced_lm"
    kept = {path.name.split("-")[0] for path in (tmp_path / "run" / "compare" / "steps").iterdir() if not path.name.startswith(".")}
    assert kept == {"pretrained", "retriever1"}, "vectors, indexes and runs are dropped"
    page = (tmp_path / "run" / "compare" / "comparison.html").read_text(encoding="utf-8")
    assert "condenser, seed 1: " in page
    assert "| replaced\\_lm | 2/2 |" in (tmp_path / "run" / "compare" / "comparison.md").read_text(encoding="utf-8")

    plan = CliRunner().invoke(app, ["compare-objectives", str(RECIPE), "--plan", *arguments])
    assert plan.exit_code == 0, plan.output
    assert "1 of 4 trainings are to be done" in plan.output


def test_equal_time_on_two_corpora(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    write_beir(tmp_path / "other", num_passages=48, seed=3, splits=())
    grid = (
        'compare.objectives=["bow"]',
        'compare.main="bow"',
        "compare.seeds=[1]",
        'compare.budget="time"',
        "compare.calibration_steps=3",
        "compare.keep_models=false",
        f"compare.mismatched={{dataset='beir', path='{tmp_path / 'other'}'}}",
    )
    recipe = toy(tmp_path, *grid)
    compare.compare_objectives(recipe, quiet=True)
    timed = sorted((tmp_path / "run" / "compare" / "calibration").iterdir())
    assert len(timed) == 2, "bow on each corpus"
    before = [file.stat().st_mtime_ns for file in timed]
    content = results(tmp_path)
    assert content["cells"] == {"wanted": 2, "done": 2, "failed": 0}
    corpus = content["tables"][1]
    assert [row["name"] for row in corpus["rows"]] == ["matched", "mismatched"]
    assert corpus["rows"][0]["mean"] == content["tables"][0]["rows"][0]["mean"], "matched is the main row"
    seconds = {(found := json.loads(file.read_text(encoding="utf-8")))["row"]: found["seconds_per_step"] for file in timed}
    steps = corpus["rows"][1]["cost"]["num_steps"]
    assert steps == max(1, round(2 * seconds["bow"] / seconds["mismatched"]))
    names = {path.name.split("-")[0] for path in (tmp_path / "run" / "compare" / "steps").iterdir()}
    assert names == {"other_store"}, "keep_models = false"
    assert (tmp_path / "run" / "store").is_dir()

    compare.compare_objectives(recipe, quiet=True)
    assert [file.stat().st_mtime_ns for file in timed] == before
    assert results(tmp_path)["tables"] == content["tables"]
