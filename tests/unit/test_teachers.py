"""Teachers' scores for training groups: one or several, looked up and combined, with numbers that can be checked by hand."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from simlm.data import teachers
from simlm.data.groups import TrainingGroups
from simlm.data.teachers import TeacherGroups, combine_teachers, teacher_groups
from simlm.errors import DataError, ShapeError
from simlm.rankings import Groups, Run, offsets_of

ROOT = math.sqrt(1.5)


def floats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


# --- several teachers


def test_one_teacher_keeps_its_scores() -> None:
    scores = floats([4.0, -1.0, 0.5, 2.0, 2.0, 7.0])
    np.testing.assert_allclose(combine_teachers(scores, np.array([0, 3, 5, 6])), scores[0], rtol=1e-6)


def test_two_teachers_by_hand() -> None:
    # Deviations: (0, 1, 2) sqrt(2/3), (10, 40, 10) sqrt(200). Standardised: sqrt(3/2) (-1, 0, 1) and (-1, 2, -1) / sqrt(2).
    combined = combine_teachers(floats([0.0, 1.0, 2.0], [10.0, 40.0, 10.0]), np.array([0, 3]))
    scale = (math.sqrt(2 / 3) + math.sqrt(200)) / 2
    middle = (1.0 + 20.0) / 2
    standard = [(-ROOT - 1 / math.sqrt(2)) / 2, math.sqrt(2) / 2, (ROOT - 1 / math.sqrt(2)) / 2]
    np.testing.assert_allclose(combined, [middle + scale * value for value in standard], rtol=1e-6)


def test_a_loud_teacher_counts_no_more_than_a_quiet_one() -> None:
    quiet, loud = [0.0, 1.0, 2.0], [200.0, 0.0, 100.0]
    one = combine_teachers(floats(quiet, loud), np.array([0, 3]))
    other = combine_teachers(floats(quiet, [value * 10 for value in loud]), np.array([0, 3]))
    np.testing.assert_allclose((one - one.mean()) / one.std(), (other - other.mean()) / other.std(), rtol=1e-5)


def test_agreeing_teachers_keep_the_spread_they_agree_on() -> None:
    combined = combine_teachers(floats([3.0, 1.0], [3.0, 1.0], [3.0, 1.0]), np.array([0, 2]))
    np.testing.assert_allclose(combined, [3.0, 1.0], rtol=1e-6)


def test_a_constant_list_is_harmless() -> None:
    # Of the first list the second teacher says nothing; of the second list neither does.
    combined = combine_teachers(floats([5.0, 1.0, 0.1, 0.1], [0.1, 0.1, 0.3, 0.3]), np.array([0, 2, 4]))
    np.testing.assert_allclose(combined[:2], [5.0, 1.0], rtol=1e-6)
    assert combined[2] == combined[3] == pytest.approx(0.2)


def test_lists_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 11)).astype(np.float32)
    whole = combine_teachers(scores, np.array([0, 4, 5, 11]))
    parts = [combine_teachers(scores[:, begin:end], np.array([0, end - begin])) for begin, end in ((0, 4), (4, 5), (5, 11))]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-6)
    np.testing.assert_allclose(combine_teachers(scores[::-1], np.array([0, 4, 5, 11])), whole, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_combined() -> None:
    with pytest.raises(DataError, match="not a finite number"):
        combine_teachers(floats([1.0, np.nan]), np.array([0, 2]))
    for offsets in ([0, 3], [0, 2, 2], [1, 2]):
        with pytest.raises(ShapeError, match="each list needs one or more"):
            combine_teachers(floats([1.0, 2.0]), np.array(offsets))


# --- groups


def make_groups(positives: list[list[int]], negatives: list[list[int]]) -> Groups:
    """Query rows 10, 11 ...; the miner's scores are the rows."""
    flat_positives = np.array([row for rows in positives for row in rows], dtype=np.int64)
    flat_negatives = np.array([row for rows in negatives for row in rows], dtype=np.int64)
    return Groups(
        "train",
        np.arange(len(positives), dtype=np.int64) + 10,
        offsets_of([len(rows) for rows in positives]),
        flat_positives,
        flat_positives.astype(np.float32),
        offsets_of([len(rows) for rows in negatives]),
        flat_negatives,
        flat_negatives.astype(np.float32),
    )


def teacher_run(lists: dict[int, dict[int, float]]) -> Run:
    return Run.from_lists("train", list(lists), [(list(scores), list(scores.values())) for scores in lists.values()])


def taught(groups: Groups, *lists: dict[int, dict[int, float]], folder: Path | None = None) -> TeacherGroups:
    runs = [teacher_run(each) for each in lists]
    return teacher_groups(groups, runs, query_id=lambda row: f"q{row}", passage_id=lambda row: f"p{row}", folder=folder)


TWO = make_groups([[0], [1]], [[5, 6, 7], [8]])


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_the_teachers_scores_take_the_place_of_the_miners(block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(teachers, "BLOCK_PAIRS", block)
    for folder in (None, tmp_path / "scores"):
        # Two negatives deep, in another order, with a passage and a query that no group has.
        found = taught(TWO, {12: {0: 9.0}, 11: {8: -1.0, 1: 4.0}, 10: {0: 2.0, 99: 8.0, 6: 1.0, 5: -3.0}}, folder=folder)
        assert (found.depth, found.num_constant, found.num_bare) == (2, 0, 0)
        groups = found.groups
        assert groups.query_rows.tolist() == [10, 11]
        assert [groups.positives(0)[0].tolist(), groups.positives(0)[1].tolist()] == [[0], [2.0]]
        assert [groups.negatives(0)[0].tolist(), groups.negatives(0)[1].tolist()] == [[5, 6], [-3.0, 1.0]]
        assert [groups.positives(1)[1].tolist(), groups.negatives(1)[1].tolist()] == [[4.0], [-1.0]]
        assert groups.negatives(1)[0].tolist() == [8]


def test_several_positives() -> None:
    found = taught(make_groups([[0, 3], [1]], [[5], [8]]), {10: {0: 2.0, 3: 2.5, 5: 1.0}, 11: {1: 4.0, 8: 3.0}})
    assert [array.tolist() for array in found.groups.positives(0)] == [[0, 3], [2.0, 2.5]]


def test_several_teachers_are_combined_as_deep_as_the_shallowest_goes() -> None:
    deep = {10: {0: 2.0, 5: 0.0, 6: 1.0, 7: 5.0}, 11: {1: 4.0, 8: 2.0}}
    shallow = {10: {0: 20.0, 5: 10.0, 6: 0.0}, 11: {1: 3.0, 8: 3.0}}
    found = taught(TWO, deep, shallow)
    assert (found.depth, found.num_constant) == (2, 0)
    expected = combine_teachers(floats([2.0, 0.0, 1.0], [20.0, 10.0, 0.0]), np.array([0, 3]))
    np.testing.assert_allclose(np.concatenate([found.groups.positives(0)[1], found.groups.negatives(0)[1]]), expected, rtol=1e-6)
    # Of query 11 the second says nothing.
    assert [found.groups.positives(1)[1].tolist(), found.groups.negatives(1)[1].tolist()] == [[4.0], [2.0]]


@pytest.mark.parametrize("block", [1, 1000])
def test_missing_pairs_are_listed(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "BLOCK_PAIRS", block)
    with pytest.raises(DataError, match=r"the teacher's run .* no score for 2 pairs .*\(q10, p5\), \(q11, p1\);"):
        taught(TWO, {10: {0: 2.0, 6: 1.0}, 11: {8: 1.0}})
    with pytest.raises(DataError, match=r"no score for 2 pairs .*\(q11, p1\), \(q11, p8\);"):
        taught(TWO, {10: {0: 2.0, 5: 1.0}})
    with pytest.raises(DataError, match=r"teacher 2's run .* no score for 1 pairs .*\(q11, p1\);"):
        taught(TWO, {10: {0: 2.0, 5: 1.0}, 11: {1: 0.0, 8: 1.0}}, {10: {0: 2.0, 5: 1.0}, 11: {8: 1.0}})
    with pytest.raises(DataError, match=r"0 queries\) has no score for 2 pairs .*\(q10, p0\), \(q11, p1\);"):
        taught(TWO, {})
    many = make_groups([[0]], [list(range(1, 12))])
    with pytest.raises(DataError, match=r"no score for 10 pairs .*\(q10, p1\), .*\(q10, p5\) \.\.\.;"):
        taught(many, {10: {0: 2.0, 11: 1.0}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_listed(value: float) -> None:
    with pytest.raises(DataError, match=r"1 scores of the teacher are not finite numbers: \(q10, p5\);"):
        taught(TWO, {10: {0: 2.0, 5: value}, 11: {1: 1.0, 8: 0.0}})


def test_constant_scores() -> None:
    found = taught(TWO, {10: {0: 2.0, 5: 2.0}, 11: {1: 1.0, 8: 0.0}})
    assert found.num_constant == 1
    with pytest.raises(DataError, match="the teacher gives all passages of a query the same score, for every query"):
        taught(TWO, {10: {0: 2.0, 5: 2.0}, 11: {1: 1.0, 8: 1.0}})
    with pytest.raises(DataError, match="teacher 2 gives all passages"):
        taught(TWO, {10: {0: 2.0, 5: 1.0}, 11: {1: 1.0, 8: 0.0}}, {10: {0: 2.0, 5: 2.0}, 11: {1: 1.0, 8: 1.0}})


def test_queries_without_a_negative_are_left_out_and_counted() -> None:
    some = make_groups([[0], [1, 2], [3]], [[], [8, 9], []])
    found = taught(some, {10: {0: 1.0}, 11: {1: 4.0, 2: 3.0, 8: 2.0, 9: 1.0}, 12: {3: 0.0}})
    assert (found.num_bare, found.num_constant, len(found.groups)) == (2, 0, 1)
    assert found.groups.query_rows.tolist() == [11]
    assert [array.tolist() for array in found.groups.positives(0)] == [[1, 2], [4.0, 3.0]]
    assert [array.tolist() for array in found.groups.negatives(0)] == [[8, 9], [2.0, 1.0]]


def test_nothing_left_to_compare() -> None:
    with pytest.raises(DataError, match="none of the 2 training queries has a negative passage with a teacher's score"):
        taught(make_groups([[0], [1]], [[], []]), {10: {0: 1.0}, 11: {1: 2.0}})
    with pytest.raises(DataError, match="none of the 2 training queries"):
        taught(TWO, {10: {0: 1.0}, 11: {1: 2.0}})


def test_a_group_without_its_positive() -> None:
    with pytest.raises(DataError, match="1 groups have no positive passage, the first is of query 'q11'"):
        taught(make_groups([[0], []], [[5], [8]]), {10: {0: 1.0, 5: 0.0}, 11: {8: 2.0}})


# --- deep lists


def deep_groups(folder: Path, num_queries: int, depth: int) -> tuple[Groups, Run]:
    """Saved and memory-mapped; query q's negatives are passages 1 to `depth`, its positive is 0, a passage's score is its row."""
    rows = np.tile(np.arange(1, depth + 1), num_queries)
    queries = np.arange(num_queries)
    offsets = offsets_of([depth] * num_queries)
    nothing = np.full(len(rows), np.nan, np.float32)
    Groups(
        "train", queries, np.arange(num_queries + 1), np.zeros(num_queries, np.int64), nothing[:num_queries], offsets, rows, nothing
    ).save(folder / "groups")
    every = np.tile(np.arange(depth, -1, -1), num_queries)
    Run("train", queries, offsets_of([depth + 1] * num_queries), every, every.astype(np.float32)).save(folder / "teacher")
    return Groups.load(folder / "groups"), Run.load(folder / "teacher", "train")


@pytest.mark.parametrize("scored", [2000, 1500])
def test_deep_lists_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: int) -> None:
    groups, teacher = deep_groups(tmp_path, 400, 2000)
    if scored < 2000:  # the teacher knows the first negatives only, so that the lists have to be cut
        kept = np.tile(np.arange(2001) >= 2000 - scored, 400)
        rows = np.asarray(teacher.passage_rows)[kept]
        Run("train", np.arange(400), offsets_of([scored + 1] * 400), rows, rows.astype(np.float32)).save(tmp_path / "teacher")
        teacher = Run.load(tmp_path / "teacher", "train")
    monkeypatch.setattr(teachers, "BLOCK_PAIRS", 10_000)
    tracemalloc.start()
    found = teacher_groups(groups, [teacher], query_id=str, passage_id=str, folder=tmp_path / "work")
    steps = TrainingGroups(found.groups, num_passages=2001, group_size=25, queries_per_step=8, seed=1)
    for step in range(3):
        chosen = steps.step(step)
        np.testing.assert_array_equal(chosen.scores, chosen.passage_rows.astype(np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.depth == scored
    assert peak < 4 << 20  # the groups and the teacher's run are 9.6 MB each
    assert np.shares_memory(found.groups.negative_rows, groups.negative_rows) == (scored == 2000)


def test_small_groups_walk_through_a_deep_list_epoch_by_epoch(tmp_path: Path) -> None:
    groups, teacher = deep_groups(tmp_path, 3, 2000)
    found = teacher_groups(groups, [teacher], query_id=str, passage_id=str)
    steps = TrainingGroups(found.groups, num_passages=2001, group_size=25, queries_per_step=3, seed=1)
    seen = [steps.choose(1, epoch) for epoch in range(84)]  # 24 new ones an epoch: 83 epochs and a third for all 2,000
    walked = np.concatenate([rows[1:] for rows, _ in seen])
    assert sorted(walked[:2000].tolist()) == list(range(1, 2001))
    assert walked[2000:].tolist() == walked[:16].tolist()
    for rows, scores in seen:
        assert rows[0] == 0 and scores.tolist() == rows.tolist()
