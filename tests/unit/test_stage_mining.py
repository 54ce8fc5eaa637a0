"""mine_negatives: what is left out, in which order, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.artifacts import build_artifact, open_artifact
from simlm.errors import DataError
from simlm.progress import Progress
from simlm.rankings import Groups, Run
from simlm.recipe import MiningSettings
from simlm.stages import Context, mine_negatives
from simlm.stages.mine_negatives import mine, normalised
from tests.conftest import build_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

Facts = dict[str, int | float]


def mined(
    lists: dict[int, list[int]],
    qrels: dict[int, dict[int, int]],
    *,
    scores: dict[int, list[float]] | None = None,
    copies: dict[int, int] | None = None,
    **settings: Any,
) -> tuple[Groups, Facts]:
    """Groups of made lists, query -> passages best first, with scores 10, 9, 8 ... unless given.

    copies: passage -> passage of equal text.
    """
    given = scores or {query: [10.0 - rank for rank in range(len(rows))] for query, rows in lists.items()}
    run = Run.from_lists("train", list(lists), [(rows, given[query]) for query, rows in lists.items()])
    digests = {row: str((copies or {}).get(row, row)).encode() for row in range(100)}
    return mine(run, qrels, digests, MiningSettings(**settings))


def negatives_of(groups: Groups) -> dict[int, list[int]]:
    return {int(query): groups.negatives(place)[0].tolist() for place, query in enumerate(groups.query_rows)}


def positives_of(groups: Groups) -> dict[int, list[int]]:
    return {int(query): groups.positives(place)[0].tolist() for place, query in enumerate(groups.query_rows)}


def test_positives_are_left_out_and_scores_kept() -> None:
    groups, facts = mined({4: [7, 2, 9, 3], 0: [1, 5]}, {4: {9: 1, 2: 2}, 0: {8: 1}})
    assert groups.split == "train"
    assert groups.query_rows.tolist() == [4, 0]
    assert positives_of(groups) == {4: [2, 9], 0: [8]}
    assert negatives_of(groups) == {4: [7, 3], 0: [1, 5]}
    assert groups.positives(0)[1].tolist() == [9.0, 8.0]
    assert np.isnan(groups.positives(1)[1]).all()  # not in the run
    assert groups.negatives(0)[1].tolist() == [10.0, 7.0]
    assert facts == {
        "num_queries": 2,
        "num_groups": 2,
        "num_negatives": 4,
        "negatives_per_query": 2.0,
        "num_positives_left_out": 2,
        "num_copies_left_out": 0,
        "num_without_positive": 0,
        "num_without_negatives": 0,
        "positive_in_run": 0.5,
    }


def test_judged_not_relevant_is_a_negative() -> None:
    groups, _ = mined({0: [7, 2, 3]}, {0: {9: 1, 2: 0, 3: -1}})
    assert positives_of(groups) == {0: [9]}
    assert negatives_of(groups) == {0: [7, 2, 3]}


def test_copies_of_a_positive_are_left_out() -> None:
    # 3 has the text of 9; 5 and 7 have one text too, but not a positive's. A judged copy is a positive, and counted as such.
    groups, facts = mined({0: [3, 5, 7, 9]}, {0: {9: 1}}, copies={3: 9, 7: 5})
    assert negatives_of(groups) == {0: [5, 7]}
    assert (facts["num_positives_left_out"], facts["num_copies_left_out"]) == (1, 1)
    groups, facts = mined({0: [3, 5]}, {0: {9: 1, 3: 1}}, copies={3: 9})
    assert negatives_of(groups) == {0: [5]}
    assert (facts["num_positives_left_out"], facts["num_copies_left_out"]) == (1, 0)


def test_depth_then_skip_top_then_num_negatives() -> None:
    run = {0: [9, 1, 2, 3, 4, 5, 6]}
    qrels = {0: {9: 1}}
    assert negatives_of(mined(run, qrels, depth=4)[0]) == {0: [1, 2, 3]}
    assert negatives_of(mined(run, qrels, skip_top=2)[0]) == {0: [3, 4, 5, 6]}  # of the candidates, positives not counted
    assert negatives_of(mined(run, qrels, num_negatives=2)[0]) == {0: [1, 2]}
    assert negatives_of(mined(run, qrels, depth=6, skip_top=1, num_negatives=3)[0]) == {0: [2, 3, 4]}


def test_below_a_share_of_the_positive() -> None:
    # The positive scores 8: 0.95 of it is 7.6, which a negative may reach.
    scores = {0: [10.0, 8.0, 7.7, 7.6, 7.5]}
    groups, facts = mined({0: [1, 9, 2, 3, 4]}, {0: {9: 1}}, scores=scores, below_positive=0.95)
    assert negatives_of(groups) == {0: [3, 4]}
    assert (facts["num_above_ceiling"], facts["num_without_ceiling"]) == (2, 0)


def test_the_lowest_of_several_positives_counts() -> None:
    scores = {0: [10.0, 8.0, 6.0, 5.0, 4.0]}
    groups, _ = mined({0: [9, 1, 8, 2, 3]}, {0: {8: 1, 9: 1}}, scores=scores, below_positive=1.0)
    assert negatives_of(groups) == {0: [2, 3]}


def test_negative_scores_have_a_ceiling_below_the_positive() -> None:
    # -2 lowered by a twentieth of its size: -2.1.
    scores = {0: [-1.0, -2.0, -2.05, -2.2]}
    groups, _ = mined({0: [1, 9, 2, 3]}, {0: {9: 1}}, scores=scores, below_positive=0.95)
    assert negatives_of(groups) == {0: [3]}


def test_a_positive_below_the_depth_still_sets_the_ceiling() -> None:
    groups, _ = mined({0: [1, 2, 3, 9]}, {0: {9: 1}}, depth=3, below_positive=1.2)
    # Scores 10, 9, 8, and 7 of the positive: 8.4.
    assert negatives_of(groups) == {0: [3]}


def test_without_a_positive_in_the_run_there_is_no_ceiling() -> None:
    groups, facts = mined({0: [1, 2], 1: [3, 9]}, {0: {9: 1}, 1: {9: 1}}, below_positive=0.5)
    assert negatives_of(groups) == {0: [1, 2]}  # query 1 has nothing below 4.5
    assert (facts["num_without_ceiling"], facts["num_above_ceiling"], facts["num_without_negatives"]) == (1, 1, 1)


def test_ceiling_follows_skip_top() -> None:
    groups, _ = mined({0: [1, 2, 9, 3, 4]}, {0: {9: 1}}, skip_top=3, below_positive=1.0)
    assert negatives_of(groups) == {0: [4]}  # 1, 2 and 3 are skipped first


def test_queries_that_become_no_groups() -> None:
    lists = {0: [1, 2], 1: [1, 2], 2: [9], 3: [], 4: [1]}
    qrels = {0: {}, 1: {1: 0}, 2: {9: 1}, 3: {9: 1}, 4: {9: 1}, 5: {9: 1}, 6: {}}
    groups, facts = mined(lists, qrels)
    assert negatives_of(groups) == {4: [1]}
    assert facts["num_queries"] == 7  # 5 and 6 are judged but not in the run
    assert facts["num_without_positive"] == 3  # 0, 1, 6
    assert facts["num_without_negatives"] == 3  # 2, 3, 5
    assert facts["num_groups"] == 1
    assert facts["positive_in_run"] == 0.25  # query 2, of 2, 3, 4 and 5


def test_nothing_at_all() -> None:
    groups, facts = mined({}, {})
    assert len(groups) == 0
    assert facts["negatives_per_query"] == 0.0


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("Red  apple\n", "red apple", True),
        ("\uff32ed apple", "red apple", True),  # full-width letter
        ("STRASSE", "stra\u00dfe", True),
        ("red apple.", "red apple", False),
        ("", "   ", True),
    ],
)
def test_texts_that_count_as_equal(left: str, right: str, equal: bool) -> None:
    assert (normalised(left) == normalised(right)) == equal


@pytest.fixture
def store(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> Store:
    """Passage 1 is a copy of 0 but for case, title and spaces; query a has 0, b is judged not relevant only, c has 3."""
    texts = ["The red apple.", "the RED  apple.", "A green apple.", "Some other fruit.", "A pear."]
    passages = [{"_id": f"p{row}", "title": f"Title {row}", "text": text} for row, text in enumerate(texts)]
    queries = [{"_id": name, "text": f"query {name}"} for name in "abc"]
    return build_store(tmp_path / "store", tiny_wordpiece, passages, queries, {"train": [("a", "p0", 1), ("b", "p2", 0), ("c", "p3", 1)]})


def mine_stage(path: Path, store: Store, lists: list[list[int]], settings: MiningSettings) -> dict[str, Any]:
    with build_artifact(path / "run", kind="run") as builder:
        ranked = [(rows, [float(-rank) for rank in range(len(rows))]) for rows in lists]
        Run.from_lists("train", range(len(lists)), ranked).save(builder.work)
    with build_artifact(path / "groups", kind="groups") as builder:
        mine_negatives.run(settings, {"store": store.path, "run": path / "run"}, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def test_stage(tmp_path: Path, store: Store) -> None:
    facts = mine_stage(tmp_path, store, [[1, 2, 0, 4], [0, 1], [3]], MiningSettings())
    groups = Groups.load(open_artifact(tmp_path / "groups", "groups").path)
    assert positives_of(groups) == {0: [0]}
    assert negatives_of(groups) == {0: [2, 4]}
    assert facts["num_copies_left_out"] == 1
    assert facts["num_without_positive"] == 1
    assert facts["num_without_negatives"] == 1
    assert facts["num_queries"] == 3
    assert open_artifact(tmp_path / "groups").manifest.facts == facts


def test_stage_without_any_group_says_why(tmp_path: Path, store: Store) -> None:
    with pytest.raises(DataError, match="of 3 queries 1 have no relevant passage and 2 no candidate"):
        mine_stage(tmp_path, store, [[0, 1], [2], []], MiningSettings())
    assert not (tmp_path / "groups").exists()


def test_stage_says_how_many_were_left_out(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    mine_stage(tmp_path, store, [[2], [2], [4]], MiningSettings())
    capsys.readouterr()
    with build_artifact(tmp_path / "again", kind="groups") as builder:
        inputs = {"store": store.path, "run": tmp_path / "run"}
        mine_negatives.run(MiningSettings(), inputs, Context(builder, 0, Progress()))
    assert "mined 1.0 negatives a query for 2 queries; 1 queries left out: 1 without a relevant passage" in capsys.readouterr().err
