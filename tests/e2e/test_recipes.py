"""Every recipe of the project, run from end to end at toy size by the same code path."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import simlm
from simlm.pipeline import make_plan, run_recipe
from simlm.recipe import load_recipe
from tests.toy.corpus import TINY, write_beir, write_msmarco

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = ["bm25", "start", "retriever1", "retriever2", "reranker", "distilled", "hybrid"]


def overrides(name: str, folder: Path) -> list[str]:
    changes = [*TINY, f"output={json.dumps(str(folder / 'run'))}"]
    if name == "msmarco_base":
        return [*changes, f"data.path={json.dumps(str(write_msmarco(folder / 'data')))}", "data.dev_fraction=0.2"]
    if name == "quickstart":
        return [
            *changes,
            'data.options={packages=["json", "logging", "argparse"], train_queries=40, dev_queries=8, test_queries=12, max_passages=100}',
            # The toy model starts from scratch, so it has no negatives to begin with.
            "retriever1_mining.mix={}",
        ]
    if name == "no_labels":
        changes += ["pseudo_queries.num_queries=120", 'consistency.by="bm25"', 'hybrid_teacher.dense="best"']
    if name == "compare_rerankers":
        changes += ["skip=[]", 'reranker.compare=["pretrained"]']
    return [*changes, f"data.path={json.dumps(str(write_beir(folder / 'data')))}"]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipe_runs_at_toy_size(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides(name, tmp_path))
    folder = run_recipe(recipe, quiet=True)
    metrics = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    # A model that starts from scratch has no `start` row: there is nothing to measure as it is.
    compared = [f"reranker_from_{initial}" for initial in recipe.reranker.compare]
    after = ROWS.index("reranker") + 1
    assert [row["name"] for row in metrics["rows"]] == [row for row in [*ROWS[:after], *compared, *ROWS[after:]] if row != "start"]
    for row in metrics["rows"]:
        for measure in recipe.evaluate.measures:
            assert 0.0 <= row["measures"][measure] <= 1.0
        assert row["bytes_per_passage"] > 0
        assert row["milliseconds_per_query"] > 0
    assert (folder / "report" / "report.html").stat().st_size > 5_000
    assert "distilled" in (folder / "report" / "report.md").read_text(encoding="utf-8")

    plan = make_plan(recipe)
    assert {plan.state(step)[0] for step in plan.steps} == {"done"}
    started = time.monotonic()
    before = (folder / "report" / "manifest.json").stat().st_mtime_ns
    run_recipe(recipe, quiet=True)
    assert (folder / "report" / "manifest.json").stat().st_mtime_ns == before
    assert time.monotonic() - started < 5

    retriever = simlm.load_retriever(folder / "distilled")
    assert retriever.encode_queries(["what is this"]).shape == (1, 32)
    for mode in ("dense", "bm25", "hybrid"):
        results = simlm.open_run(folder, mode=mode, rerank=mode == "hybrid").search("what is json with logging", depth=3)
        assert [result.rank for result in results] == list(range(1, len(results) + 1))
