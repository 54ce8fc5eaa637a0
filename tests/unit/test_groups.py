"""Training groups: what a step has is a function of (seed, step), and every number here can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from simlm.data.groups import Ambiguous, TrainingGroups, share_of_rank
from simlm.errors import DataError, RecipeError
from simlm.rankings import Groups, offsets_of


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


@pytest.mark.parametrize(("length", "group_size"), [(7, 3), (7, 4), (5, 6), (4, 5), (1, 2), (9, 2), (10, 4)])
def test_each_negative_is_seen_within_a_round_and_none_twice_before_all(length: int, group_size: int) -> None:
    made = make_groups([[0]], [list(range(10, 10 + length))])
    groups = make(made, group_size=group_size)
    wanted = group_size - 1
    for first in (0, 3):
        walked = [groups.choose(0, first + epoch)[0][1:].tolist() for epoch in range(-(-length // wanted))]
        assert {row for rows in walked for row in rows} == set(range(10, 10 + length))
        assert all(len(set(rows)) == min(wanted, length) for rows in walked)
    flat = [row for epoch in range(3 * length) for row in groups.choose(0, epoch)[0][1:].tolist()]
    for start in range(0, len(flat) - length + 1, length):
        assert len(set(flat[start : start + length])) == length


def scored(scores: list[float], positive: float | list[float], **sources: object) -> Groups:
    """One query with positives 0, 1 ... and negatives 10, 11 ... of these scores."""
    positives = positive if isinstance(positive, list) else [positive]
    return Groups(
        "train",
        np.array([10]),
        offsets_of([len(positives)]),
        np.arange(len(positives)),
        np.array(positives, dtype=np.float32),
        offsets_of([len(scores)]),
        np.arange(10, 10 + len(scores)),
        np.array(scores, dtype=np.float32),
        **sources,  # type: ignore[arg-type]
    )


def test_ambiguous_weights_by_hand() -> None:
    # Scores 1, 3, 5, 7: standard deviation sqrt(5). The positive scores 5, so z = -4, -2, 0, 2 over sqrt(5); z^2 = 3.2, 0.8, 0, 0.8.
    groups = scored([7, 5, 3, 1], 5.0)
    np.testing.assert_allclose(Ambiguous(0.5, 0.0).log_weights(groups, 0, 0), [-0.4, 0.0, -0.4, -1.6], atol=1e-12)
    # b moves the top: at z = b = 2 / sqrt(5) it is the negative that scores 7.
    np.testing.assert_allclose(Ambiguous(1.0, 2 / 5**0.5).log_weights(groups, 0, 0), [0.0, -0.8, -3.2, -7.2], atol=1e-12)


def test_ambiguous_weights_do_not_depend_on_the_scale_of_the_scores() -> None:
    weights = Ambiguous(0.5, 0.3).log_weights(scored([7, 5, 3, 1], 5.0), 0, 0)
    np.testing.assert_allclose(Ambiguous(0.5, 0.3).log_weights(scored([107, 105, 103, 101], 105.0), 0, 0), weights, atol=1e-9)
    np.testing.assert_allclose(Ambiguous(0.5, 0.3).log_weights(scored([0.7, 0.5, 0.3, 0.1], 0.5), 0, 0), weights, atol=1e-5)


def test_ambiguous_weights_where_something_is_missing() -> None:
    # The positive is not in the run: taken to score like the last candidate. Equal scores: all alike, and no division by zero.
    unknown = Ambiguous(0.5, 0.0).log_weights(scored([7, 5, 3, 1], float("nan")), 0, 0)
    np.testing.assert_allclose(unknown, [-3.6, -1.6, -0.4, 0.0], atol=1e-12)
    assert Ambiguous(0.5, 0.0).log_weights(scored([2, 2, 2], 9.0), 0, 0).tolist() == [0.0, 0.0, 0.0]
    assert Ambiguous(0.5, 0.0).log_weights(scored([2], 9.0), 0, 0).tolist() == [0.0]
    assert Ambiguous(0.5, 0.0).log_weights(scored([], 9.0), 0, 0).tolist() == []


def test_ambiguous_weights_go_by_the_positive_of_the_group() -> None:
    groups = scored([7, 5, 3, 1], [7.0, 1.0])
    assert int(np.argmax(Ambiguous(0.5, 0.0).log_weights(groups, 0, 0))) == 0
    assert int(np.argmax(Ambiguous(0.5, 0.0).log_weights(groups, 0, 1))) == 3


def test_ambiguous_weights_compare_scores_of_one_run_only() -> None:
    # From the first run: 7 and 1 (deviation 3), the positive scores 7; from the second: 0.7 and 0.1 (0.3), the positive scores 0.1.
    sources = {"negative_sources": np.array([0, 1, 0, 1], dtype=np.int8), "source_positive_scores": np.array([[7.0], [0.1]], np.float32)}
    groups = scored([7, 0.7, 1, 0.1], 7.0, **sources)
    np.testing.assert_allclose(Ambiguous(0.5, 0.0).log_weights(groups, 0, 0), [0.0, -2.0, -2.0, 0.0], atol=1e-6)


def test_ambiguous_draws_follow_the_weights() -> None:
    groups = scored([7, 5, 3, 1], 5.0)
    drawn = make(groups, group_size=2, sampling=Ambiguous(0.5, 0.0))
    counts = np.bincount([int(drawn.choose(0, epoch)[0][1]) - 10 for epoch in range(8000)], minlength=4)
    expected = np.exp([-0.4, 0.0, -0.4, -1.6])
    np.testing.assert_allclose(counts / 8000, expected / expected.sum(), atol=0.02)
    # Two of a group: the second follows the weights of what is left.
    pairs = [tuple(make(groups, group_size=3, sampling=Ambiguous(0.5, 0.0)).choose(0, epoch)[0][1:] - 10) for epoch in range(4000)]
    after_the_top = np.bincount([second for first, second in pairs if first == 1], minlength=4)
    rest = expected.copy()
    rest[1] = 0.0
    np.testing.assert_allclose(after_the_top / after_the_top.sum(), rest / rest.sum(), atol=0.04)


def test_ambiguous_draws_have_no_negative_twice_and_are_a_function_of_seed_epoch_and_query() -> None:
    groups = make(FIVE, group_size=5, sampling=Ambiguous(0.02, 0.0))
    for epoch in range(20):
        rows, scores = groups.choose(1, epoch)
        assert len(set(rows.tolist())) == 5
        np.testing.assert_array_equal(scores, rows.astype(np.float32) + 0.5)
        np.testing.assert_array_equal(make(FIVE, group_size=5, sampling=Ambiguous(0.02, 0.0)).choose(1, epoch)[0], rows)
    epochs = {tuple(groups.choose(1, epoch)[0]) for epoch in range(20)}
    assert len(epochs) > 4
    reseeded = make(FIVE, group_size=5, sampling=Ambiguous(0.02, 0.0), seed=8)
    assert any((reseeded.choose(1, epoch)[0] != groups.choose(1, epoch)[0]).any() for epoch in range(5))
    assert any((groups.choose(0, epoch)[0][1:] - 10 != groups.choose(1, epoch)[0][1:] - 20).any() for epoch in range(5))


def test_ambiguous_draws_from_short_and_empty_lists() -> None:
    made = make_groups([[0], [1]], [[5, 6], []])
    groups = make(made, num_passages=9, group_size=5, sampling=Ambiguous(0.5, 0.0))
    rows = groups.choose(0, 0)[0][1:].tolist()
    assert sorted(rows) == [5, 5, 6, 6] and rows[:2] == rows[2:]
    assert np.isnan(groups.choose(1, 0)[1][1:]).all()  # random passages, as for the walk


def test_ambiguous_draws_need_scores() -> None:
    with pytest.raises(DataError, match="a negative of query row 10 has none"):
        make(scored([2.0, float("nan")], 9.0), sampling=Ambiguous(0.5, 0.0))


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


def test_a_distilled_query_needs_a_scored_negative() -> None:
    with pytest.raises(DataError, match="1 training queries have no negative passage with a teacher's score"):
        make(make_groups([[0], [1]], [[5], []]), fill_with_random=False)
