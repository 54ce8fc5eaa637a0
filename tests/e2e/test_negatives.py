"""Two rounds on mixed, filtered and ambiguous negatives, from end to end at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from simlm.negative_report import negative_reports
from simlm.pipeline import make_plan, run_recipe
from simlm.rankings import Groups, Run
from simlm.recipe import load_recipe
from simlm.searcher import open_run
from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"
CHANGES = [
    "rounds=2",
    "retriever2_mining.mix={bm25=0.5, dense=0.5}",
    "retriever2_mining.below_positive=0.95",
    "retriever2.negatives=ambiguous",
    'distilled_mining={teacher="reranker", teacher_margin=0.0}',
    "distilled.negatives=ambiguous",
    "distilled.ambiguous_a=0.1",
    'skip=["pretrain", "start"]',
]


def test_two_rounds_on_mixed_and_filtered_negatives(tmp_path: Path) -> None:
    places = [f"output={json.dumps(str(tmp_path / 'run'))}", f"data.path={json.dumps(str(write_beir(tmp_path / 'data')))}"]
    recipe = load_recipe(RECIPE, [*TINY, *places, *CHANGES])
    folder = run_recipe(recipe, quiet=True)
    plan = make_plan(recipe)
    assert {plan.state(step)[0] for step in plan.steps} == {"done"}

    mixed = Groups.load(folder / "retriever2_groups")
    assert mixed.negative_sources is not None and set(np.asarray(mixed.negative_sources).tolist()) == {0, 1}
    for position in range(len(mixed)):  # no negative above 95% of its positive, each by the run that it is from
        scores = mixed.negatives(position)[1]
        for places_of_run, positives in mixed.by_source(position):
            known = positives[np.isfinite(positives)]
            if len(known):
                ceiling = float(known.min()) - 0.05 * abs(float(known.min()))
                assert (np.asarray(scores)[places_of_run] <= ceiling).all()

    filtered, taught = Groups.load(folder / "distilled_groups"), Run.load(folder / "teacher_scores", "train")
    place_of = {int(query): place for place, query in enumerate(taught.query_rows)}
    for position, query in enumerate(np.asarray(filtered.query_rows).tolist()):
        score_of = dict(zip(*(part.tolist() for part in taught.ranked(place_of[query])), strict=True))
        lowest = min(score_of[row] for row in filtered.positives(position)[0].tolist())
        assert all(score_of[row] <= lowest for row in filtered.negatives(position)[0].tolist())

    rows = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))["rows"]
    labels = {row["name"]: row["label"] for row in rows}
    assert labels["retriever2_round2"] == "Retriever 2, round 2"
    assert list(labels)[:4] == ["bm25", "retriever1", "retriever2", "retriever2_round2"]
    found = {report.content["name"]: report.content for report in negative_reports(folder)}
    assert list(found) == ["bm25_groups", "retriever1_groups", "retriever2_groups", "retriever2_round2_groups", "distilled_groups"]
    assert [run["name"] for run in found["retriever2_groups"]["runs"]] == ["bm25", "dense"]
    assert found["distilled_groups"]["suspects"]["by"] == "teacher"
    assert found["distilled_groups"]["suspects"]["num_negatives"] == 0  # they have been dropped
    assert found["retriever2_groups"]["runs"][1]["effective"][0]["temperature"] == recipe.retriever2.temperature
    assert len(open_run(folder, retriever="retriever2_round2").search("what is json", depth=3)) == 3
