"""Training groups: what a step has is a function of (seed, step), and every number here can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from simlm.data.groups import TrainingGroups, share_of_rank, teacher_groups
from simlm.errors import DataError, RecipeError
from simlm.rankings import Groups, Run, offsets_of


def make_groups(positives: list[list[int]], negatives: list[list[int]]) -> Groups:
    flat_positives = np.array([row for rows in positives for row in rows], dtype=np.int64)
    flat_negatives = np.array([row for rows in negatives for row in rows], dtype=np.int64)
    return Groups(
        "train",
        np.arange(len(positives), dtype=np.int64) + 10,
        offsets_of([len(rows) for rows in positives]),
        flat_positives,
        flat_positives.astype(np.float32) + 0.5,
        offsets_of([len(rows) for rows in negatives]),
        flat_negatives,
        flat_negatives.astype(np.float32) + 0.5,
    )


def make(groups: Groups, **options: object) -> TrainingGroups:
    return TrainingGroups(groups, **({"num_passages": 100, "group_size": 3, "queries_per_step": 2, "seed": 7} | options))  # type: ignore[arg-type]


FIVE = make_groups([[0], [1], [2], [3], [4, 5]], [list(range(10 * q + 10, 10 * q + 16)) for q in range(5)])


def test_an_epoch_has_every_query_once_and_goes_on_into_the_next() -> None:
    groups = make(FIVE)
    seen = np.concatenate([groups.step(step).positions for step in range(5)])  # 5 steps of 2 queries = 2 epochs of 5
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert np.concatenate([groups.step(step).epochs for step in range(5)]).tolist() == [0] * 5 + [1] * 5
    assert seen[:5].tolist() != seen[5:].tolist() or seen[:5].tolist() != [0, 1, 2, 3, 4]


def test_a_step_is_a_function_of_the_seed_and_the_step() -> None:
    one, other = make(FIVE), make(FIVE)
    other.step(4)
    for step in (0, 3):
        np.testing.assert_array_equal(one.step(step).passage_rows, other.step(step).passage_rows)
        np.testing.assert_array_equal(one.step(step).query_rows, other.step(step).query_rows)
    reseeded = make(FIVE, seed=8)
    assert any((one.step(s).passage_rows != reseeded.step(s).passage_rows).any() for s in range(3))


def test_rows_and_scores_belong_together() -> None:
    step = make(FIVE).step(1)
    assert step.passage_rows.shape == (2, 3)
    np.testing.assert_array_equal(step.query_rows, step.positions + 10)
    np.testing.assert_array_equal(step.scores, step.passage_rows.astype(np.float32) + 0.5)
    for position, rows in zip(step.positions, step.passage_rows, strict=True):
        assert rows[0] in FIVE.positives(int(position))[0]
        assert set(rows[1:]) <= set(FIVE.negatives(int(position))[0])


def test_negatives_do_not_come_again_before_all_have_been_seen() -> None:
    groups = make(FIVE)  # 6 candidates, 2 an epoch: 3 epochs a round
    walked = np.concatenate([groups.choose(0, epoch)[0][1:] for epoch in range(6)])
    assert sorted(walked[:6]) == sorted(walked[6:]) == [10, 11, 12, 13, 14, 15]


def test_positives_take_turns() -> None:
    groups = make(FIVE)
    turns = [int(groups.choose(4, epoch)[0][0]) for epoch in range(4)]
    assert sorted(turns[:2]) == [4, 5] and turns[:2] == turns[2:]


def test_short_lists_are_gone_through_again() -> None:
    groups = make(make_groups([[0], [1]], [[5], [6, 7, 8, 9]]), group_size=4)
    assert groups.choose(0, 0)[0].tolist() == [0, 5, 5, 5]
    assert (groups.num_short, groups.num_bare) == (1, 0)


def test_no_candidates_random_passages_that_are_not_relevant() -> None:
    groups = make(make_groups([[0], [1]], [[], [2]]), num_passages=5, group_size=4, judged={10: {3: 1, 4: 0}})
    rows, scores = groups.choose(0, 0)
    assert rows[0] == 0 and sorted(rows[1:]) == [1, 2, 4]  # 0 and 3 are relevant, 4 is judged not to be
    assert np.isnan(scores[1:]).all()
    assert groups.num_bare == 1
    assert groups.choose(0, 0)[0].tolist() == rows.tolist()


def test_a_corpus_of_one_passage_is_refused() -> None:
    with pytest.raises(DataError, match="corpus of 1 passages has none that is not relevant"):
        make(make_groups([[0], [0]], [[], []]), num_passages=1)
    alone = make(make_groups([[0], [0]], [[], []]), num_passages=1, group_size=1)
    assert alone.step(0).passage_rows.tolist() == [[0], [0]]


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match="no training groups"):
        make(make_groups([], []))
    with pytest.raises(DataError, match="1 training groups have no positive, the first is of query row 11"):
        make(make_groups([[0], []], [[1], [1]]))


def test_more_queries_a_step_than_there_are() -> None:
    assert make(FIVE, queries_per_step=64).queries_per_step == 5
    assert make(FIVE, queries_per_step=64, num_ranks=2).queries_per_step == 4
    with pytest.raises(DataError, match="cannot be shared by 8 processes"):
        make(FIVE, queries_per_step=64, num_ranks=8)


def test_processes_share_a_step_evenly_or_not_at_all() -> None:
    assert [share_of_rank(6, rank, 3) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(RecipeError, match="multiple of 3"):
        share_of_rank(64, 0, 3)
    with pytest.raises(RecipeError, match="multiple of 2"):
        make(FIVE, queries_per_step=3, num_ranks=2)


def test_relevant_passages_are_no_negatives() -> None:
    # Query 0: positive 0, passage 1 judged relevant. Query 1: positive 1. Query 2: positive 2.
    made = make_groups([[0], [1], [2]], [[5], [6], [0]])
    groups = make(made, group_size=2, queries_per_step=3, judged={10: {0: 1, 1: 2}, 11: {2: 0}})
    step = groups.step(0)
    order = step.positions.tolist()
    excluded_QP, excluded_QQ = groups.excluded(step)
    first, second, third = (order.index(query) for query in range(3))
    expected = np.zeros((3, 6), dtype=bool)
    expected[first, 2 * second] = True  # passage 1 is relevant to query 0
    expected[first, 2 * third + 1] = True  # query 2's negative is query 0's own positive
    np.testing.assert_array_equal(excluded_QP, expected)
    pairs = np.eye(3, dtype=bool)
    pairs[first, second] = pairs[second, first] = True
    np.testing.assert_array_equal(excluded_QQ, pairs)


# --- teacher scores


def teacher_run(lists: dict[int, dict[int, float]]) -> Run:
    return Run.from_lists("train", list(lists), [(list(scores), list(scores.values())) for scores in lists.values()])


def taught(groups: Groups, lists: dict[int, dict[int, float]]) -> Groups:
    return teacher_groups(groups, teacher_run(lists), query_id=lambda row: f"q{row}", passage_id=lambda row: f"p{row}").groups


TWO = make_groups([[0], [1]], [[5, 6, 7], [8]])


def test_teacher_scores_take_the_place_of_the_miners() -> None:
    found = teacher_groups(
        TWO, teacher_run({11: {8: -1.0, 1: 4.0}, 10: {0: 2.0, 6: 1.0, 5: -3.0}}), query_id=str, passage_id=str
    )  # two negatives deep, in another order
    assert (found.depth, found.num_constant) == (2, 0)
    assert found.groups.negatives(0)[0].tolist() == [5, 6]
    assert found.groups.negatives(0)[1].tolist() == [-3.0, 1.0]
    assert found.groups.positives(1)[1].tolist() == [4.0]
    assert found.groups.negatives(1)[1].tolist() == [-1.0]


def test_missing_pairs_are_listed() -> None:
    with pytest.raises(DataError, match=r"no score for 2 pairs .*\(q10, p5\), \(q11, p1\)"):
        taught(TWO, {10: {0: 2.0, 6: 1.0}, 11: {8: 1.0}})
    with pytest.raises(DataError, match=r"no score for 2 pairs .*\(q11, p1\), \(q11, p8\)"):
        taught(TWO, {10: {0: 2.0, 5: 1.0}})


def test_scores_that_are_not_finite_are_listed() -> None:
    with pytest.raises(DataError, match=r"1 teacher scores are not finite numbers: \(q10, p5\)"):
        taught(TWO, {10: {0: 2.0, 5: float("nan")}, 11: {1: 1.0, 8: 0.0}})


def test_constant_scores() -> None:
    found = teacher_groups(TWO, teacher_run({10: {0: 2.0, 5: 2.0}, 11: {1: 1.0, 8: 0.0}}), query_id=str, passage_id=str)
    assert found.num_constant == 1
    with pytest.raises(DataError, match="same score, for every query"):
        taught(TWO, {10: {0: 2.0, 5: 2.0}, 11: {1: 1.0, 8: 1.0}})


def test_a_distilled_query_needs_a_scored_negative() -> None:
    with pytest.raises(DataError, match="1 training queries have no negative passage with a teacher's score"):
        make(make_groups([[0], [1]], [[5], []]), fill_with_random=False)
