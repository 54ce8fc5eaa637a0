"""Reciprocal rank fusion by hand, and the choice of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from simlm.evaluation.measures import evaluate_queries
from simlm.index import hybrid
from simlm.index.hybrid import WEIGHTS, fuse_lists, fuse_runs, tune_weight
from simlm.rankings import Run


def run_of(lists: dict[int, Sequence[int]]) -> Run:
    """Query row -> passage rows, best first; scores 10, 9, 8 ..."""
    return Run.from_lists("dev", list(lists), [(rows, list(range(10, 10 - len(rows), -1))) for rows in lists.values()])


def listed(rows: Sequence[int]) -> tuple[list[int], list[float]]:
    """Passage rows with scores 10, 9, 8 ..."""
    return list(rows), [10.0 - place for place in range(len(rows))]


def lists_of(run: Run) -> dict[int, list[int]]:
    return {query: rows.tolist() for query, rows, _ in run}


def test_equal_weights_by_hand() -> None:
    rows, scores = fuse_lists(listed([5, 2, 9]), listed([2, 7]), dense_weight=0.5, constant=60, depth=10)
    assert rows.tolist() == [2, 5, 7, 9]
    assert scores == pytest.approx([0.5 / 62 + 0.5 / 61, 0.5 / 61, 0.5 / 62, 0.5 / 63])
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32


def test_a_quarter_by_hand() -> None:
    rows, scores = fuse_lists(listed([5, 2, 9]), listed([2, 7]), dense_weight=0.25, constant=1, depth=3)
    assert rows.tolist() == [2, 7, 5]
    assert scores == pytest.approx([0.25 / 3 + 0.75 / 2, 0.75 / 3, 0.25 / 2])


@pytest.mark.parametrize(("weight", "expected"), [(0.0, [2, 7]), (1.0, [5, 2, 9])])
def test_at_the_ends_one_list_is_left(weight: float, expected: list[int]) -> None:
    rows, _ = fuse_lists(listed([5, 2, 9]), listed([2, 7]), dense_weight=weight, constant=60, depth=10)
    assert rows.tolist() == expected


def test_equal_scores_are_ordered_by_row_at_the_cut_too() -> None:
    rows, scores = fuse_lists(listed([8, 4]), listed([3, 6]), dense_weight=0.5, constant=60, depth=10)
    assert rows.tolist() == [3, 8, 4, 6]
    assert scores[0] == scores[1]
    assert fuse_lists(listed([8, 4]), listed([3, 6]), dense_weight=0.5, constant=60, depth=1)[0].tolist() == [3]


@pytest.mark.parametrize(("dense", "bm25", "expected"), [([], [], []), ([4], [], [4]), ([], [6, 1], [6, 1])])
def test_empty_lists(dense: list[int], bm25: list[int], expected: list[int]) -> None:
    assert fuse_lists(listed(dense), listed(bm25), dense_weight=0.5, constant=60, depth=5)[0].tolist() == expected


def test_runs_by_hand() -> None:
    dense = run_of({4: [1, 2], 0: [5, 2, 9], 7: []})
    bm25 = run_of({0: [2, 7], 9: [3], 7: []})
    fused = fuse_runs(dense, bm25, dense_weight=0.5, constant=60, depth=3)
    assert fused.split == "dev"
    assert lists_of(fused) == {0: [2, 5, 7], 4: [1, 2], 7: [], 9: [3]}
    assert fused.query_rows.tolist() == [0, 4, 7, 9]
    assert fused.ranked(0)[1] == pytest.approx([0.5 / 62 + 0.5 / 61, 0.5 / 61, 0.5 / 62])


def random_runs(num_queries: int = 12) -> tuple[Run, Run]:
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        lists = {query: rng.permutation(40)[: rng.integers(0, 25)].tolist() for query in range(num_queries) if rng.random() < 0.9}
        parts.append(run_of(lists))
    return parts[0], parts[1]


@pytest.mark.parametrize("at_once", [1, 3, 512])
def test_runs_are_fused_query_by_query(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(hybrid, "QUERIES_AT_ONCE", at_once)
    dense, bm25 = random_runs()
    fused = fuse_runs(dense, bm25, dense_weight=0.3, constant=60, depth=15)
    dense_lists, bm25_lists = lists_of(dense), lists_of(bm25)
    assert fused.query_rows.tolist() == sorted({*dense_lists, *bm25_lists})
    for query, rows, scores in fused:
        expected = fuse_lists(
            listed(dense_lists.get(query, [])), listed(bm25_lists.get(query, [])), dense_weight=0.3, constant=60, depth=15
        )
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(scores, expected[1])


def test_weight_0_and_1_are_the_single_runs() -> None:
    dense, bm25 = random_runs()
    for weight, single in ((1.0, dense), (0.0, bm25)):
        fused = lists_of(fuse_runs(dense, bm25, dense_weight=weight, constant=60, depth=100))
        assert {query: rows for query, rows in fused.items() if rows} == {q: rows for q, rows in lists_of(single).items() if rows}


def test_runs_without_queries() -> None:
    empty = Run.from_lists("dev", [], [])
    fused = fuse_runs(empty, empty, dense_weight=0.5, constant=60, depth=10)
    assert len(fused) == 0
    assert fused.offsets.tolist() == [0]


def test_dense_is_better() -> None:
    # Query 0: the relevant passage 9 is first for dense, and 1 for BM25, which comes before it wherever scores are equal.
    weight, curve = tune_weight(run_of({0: [9]}), run_of({0: [1]}), {0: {9: 1}}, constant=60)
    assert weight == 0.55
    assert curve == {tried: pytest.approx(0.0 if tried == 0 else 0.5 if tried <= 0.5 else 1.0) for tried in WEIGHTS}


def test_bm25_is_better() -> None:
    weight, curve = tune_weight(run_of({0: [1]}), run_of({0: [9]}), {0: {9: 1}}, constant=60)
    assert weight == 0.45
    assert curve == {tried: pytest.approx(0.0 if tried == 1 else 0.5 if tried >= 0.5 else 1.0) for tried in WEIGHTS}


def test_equal_values_give_equal_weights() -> None:
    weight, curve = tune_weight(run_of({0: [9, 1]}), run_of({0: [9, 1]}), {0: {9: 1}}, constant=60)
    assert weight == 0.5
    assert set(curve.values()) == {1.0}


def test_every_judged_query_counts() -> None:
    # Query 1 is in neither run, query 2 has no relevant passage, query 3 is not judged.
    runs = run_of({0: [9], 2: [4], 3: [5]}), run_of({0: [9], 2: [4], 3: [5]})
    qrels = {0: {9: 2, 4: 0}, 1: {9: 1}, 2: {4: 0}, 3: {}}
    assert tune_weight(*runs, qrels, constant=60)[1][0.5] == pytest.approx(1 / 3)


def test_ranks_past_ten_do_not_count() -> None:
    same = run_of({0: list(range(11))})
    assert tune_weight(same, same, {0: {10: 1}}, constant=60)[1][0.5] == 0
    assert tune_weight(same, same, {0: {9: 1}}, constant=60)[1][0.5] == pytest.approx(0.1)


@pytest.mark.parametrize("at_once", [1, 5, 512])
def test_the_curve_is_what_the_fused_runs_measure(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(hybrid, "QUERIES_AT_ONCE", at_once)
    dense, bm25 = random_runs()
    rng = np.random.default_rng(1)
    qrels = {query: {int(row): 1 for row in rng.integers(0, 40, 3)} | {0: 0} for query in range(14)}
    weight, curve = tune_weight(dense, bm25, qrels, constant=60)
    for tried, value in curve.items():
        fused = lists_of(fuse_runs(dense, bm25, dense_weight=tried, constant=60, depth=100))
        assert value == pytest.approx(evaluate_queries(fused, qrels, ["RR@10"]).averages()["RR@10"])
    assert curve[weight] == pytest.approx(max(curve.values()))


def test_scores_by_hand() -> None:
    # Dense: 4, 2, 0 have a standard deviation of sqrt(8/3); BM25 finds one, 97 zeros beside 3: mean .03, deviation sqrt(.09 - .0009).
    dense, bm25 = ([5, 2, 9], [4.0, 2.0, 0.0]), ([2], [3.0])
    rows, scores = fuse_lists(dense, bm25, dense_weight=0.5, constant=60, depth=10, method="score")
    spread, of_one = (8 / 3) ** 0.5, (9 / 100 - 0.03**2) ** 0.5
    assert rows.tolist() == [2, 5, 9]
    assert scores == pytest.approx(
        [0.5 * (2 / spread + 3 / of_one) + hybrid.FOUND, 0.5 * (4 / spread + hybrid.FOUND), 0.5 * hybrid.FOUND], rel=1e-5
    )


def test_scores_do_not_change_with_shift_scale_or_depth_of_the_dense_run() -> None:
    rng = np.random.default_rng(0)
    rows, scores = np.arange(400), np.sort(rng.normal(size=400).astype(np.float32))[::-1]
    bm25 = (list(range(200, 350)), np.sort(rng.gamma(2.0, size=150))[::-1].tolist())
    whole = fuse_lists((rows, scores), bm25, dense_weight=0.5, constant=60, depth=40, method="score")[0]
    moved = fuse_lists((rows, 7 * scores - 3), bm25, dense_weight=0.5, constant=60, depth=40, method="score")[0]
    assert moved.tolist() == whole.tolist()
    head = fuse_lists((rows[:200], scores[:200]), bm25, dense_weight=1.0, constant=60, depth=40, method="score")[0]
    assert head.tolist() == list(range(40))


def test_equal_scores_are_all_found_and_say_nothing() -> None:
    rows, scores = fuse_lists(([4, 7], [1.0, 1.0]), ([7, 9], [2.0, 1.0]), dense_weight=0.5, constant=60, depth=5, method="score")
    assert rows.tolist() == [7, 9, 4]
    assert scores[-1] == pytest.approx(0.5 * hybrid.FOUND)


def test_a_list_deeper_than_the_head_is_measured_against_its_own_lowest() -> None:
    # BM25 with more than STANDARD_DEPTH results: its lowest score, not 0, is where what it does not find stands.
    count = hybrid.STANDARD_DEPTH + 20
    bm25 = (list(range(count)), [50.0] + [10.0] * (count - 1))
    spread = float(np.std([50.0] + [10.0] * (hybrid.STANDARD_DEPTH - 1)))
    rows, scores = fuse_lists(([], []), bm25, dense_weight=0.0, constant=60, depth=2, method="score")
    assert rows.tolist() == [0, 1]
    assert scores == pytest.approx([40 / spread + hybrid.FOUND, hybrid.FOUND])


@pytest.mark.parametrize("method", ["rank", "score"])
def test_the_weight_of_either_method_is_that_of_the_best_fused_run(method: hybrid.Method) -> None:
    rng = np.random.default_rng(3)
    lists = [
        Run.from_lists("dev", range(30), [(rng.permutation(60)[:20].tolist(), rng.random(20).tolist()) for _ in range(30)])
        for _ in range(2)
    ]
    qrels = {query: {int(rng.integers(60)): 1} for query in range(30)}
    weight, curve = tune_weight(lists[0], lists[1], qrels, constant=60, method=method)
    for tried, expected in curve.items():
        fused = fuse_runs(lists[0], lists[1], dense_weight=tried, constant=60, depth=10, method=method)
        found = [next((1 / (place + 1) for place, row in enumerate(rows) if int(row) in qrels[query]), 0.0) for query, rows, _ in fused]
        assert sum(found) / 30 == pytest.approx(expected)
    assert curve[weight] == max(curve.values())
