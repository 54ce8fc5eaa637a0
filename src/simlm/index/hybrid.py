"""A dense run and a BM25 run fused: w x what the dense run says of a passage + (1 - w) x what BM25 says.

"rank": 1 / (c + rank); Cormack, Clarke and Buettcher, SIGIR 2009 (c = 60, equal weights). Ranks start at 1.
"score": the score in standard deviations of the run's first STANDARD_DEPTH scores for the query, above its lowest (a sum of standardised
scores as in arXiv 2210.11934, shifted within the query, which changes no order). BM25's lowest is 0 where it finds fewer passages.
A passage that one of the two does not have gets nothing for it; one whose score is 0 (found by a part of weight 0 only) is no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simlm.rankings import Floats, Ints, Run, offsets_of

Doubles = NDArray[np.float64]
QUERIES_AT_ONCE = 512
"""Fused together; bounds the memory at about 100 MB for two runs of depth 1000."""
CUTOFF = 10
"""Of the measure that the weight is tuned on, RR@10."""
WEIGHTS = tuple(step / 20 for step in range(21))
EQUAL_WEIGHT = 0.5
STANDARD_DEPTH = 100
"""Scores that the standard deviation of "score" is taken of: the head of a list is alike whatever its depth."""
FOUND = 1e-3
"""What the lowest-scored passage of a list has above one that the list does not have, in standard deviations."""
Method = Literal["rank", "score"]


def fuse_lists(
    dense: tuple[Sequence[int] | Ints, Sequence[float] | Floats],
    bm25: tuple[Sequence[int] | Ints, Sequence[float] | Floats],
    *,
    dense_weight: float,
    constant: float,
    depth: int,
    method: Method = "rank",
) -> tuple[Ints, Floats]:
    """(rows, scores) of one query from two lists of (passage rows, scores), best first; equal scores: smaller row first."""
    query = np.zeros(1, np.int64)
    runs = [
        Run("test", query, offsets_of([len(rows)]), np.asarray(rows, np.int64), np.asarray(scores, np.float32))
        for rows, scores in (dense, bm25)
    ]
    fused = fuse_runs(runs[0], runs[1], dense_weight=dense_weight, constant=constant, depth=depth, method=method)
    return fused.passage_rows, fused.scores


def fuse_runs(dense: Run, bm25: Run, *, dense_weight: float, constant: float, depth: int, method: Method = "rank") -> Run:
    """The fused run of every query that either has, in the order of query rows. constant: of "rank" only."""
    query_rows, pools = _pools(dense, bm25, constant, method)
    counts = np.zeros(len(query_rows), dtype=np.int64)
    all_rows: list[Ints] = [np.empty(0, np.int64)]
    all_scores: list[Floats] = [np.empty(0, np.float32)]
    for pool in pools:
        positions, rows, scores = pool.ranked(dense_weight, depth)
        np.add.at(counts, positions, 1)
        all_rows.append(rows)
        all_scores.append(scores.astype(np.float32))
    return Run(dense.split, query_rows, offsets_of(counts), np.concatenate(all_rows), np.concatenate(all_scores))


def tune_weight(
    dense: Run, bm25: Run, qrels: dict[int, dict[int, int]], *, constant: float, method: Method = "rank"
) -> tuple[float, dict[float, float]]:
    """The weight of the dense run with the best RR@10, and RR@10 of every weight tried (0 to 1 in steps of 0.05).

    Equal values: the weight nearest to 0.5, then the smaller. Every judged query counts; a grade above 0 is relevant.
    """
    relevant = {query: [row for row, grade in grades.items() if grade > 0] for query, grades in qrels.items() if grades}
    query_rows, pools = _pools(dense, bm25, constant, method)
    position_of = {int(query): position for position, query in enumerate(query_rows)}
    wanted = [(position_of[query], row) for query, rows in relevant.items() if query in position_of for row in rows]
    keys = np.array(sorted(position * _STRIDE + row for position, row in wanted), dtype=np.int64)
    sums = np.zeros(len(WEIGHTS))
    for pool in pools:
        is_relevant = np.isin(pool.positions * _STRIDE + pool.rows, keys)
        if is_relevant.any():
            for place, weight in enumerate(WEIGHTS):
                sums[place] += pool.reciprocal_ranks(weight, is_relevant)
    curve = {weight: float(total) / max(len(relevant), 1) for weight, total in zip(WEIGHTS, sums, strict=True)}
    best = max(curve.values())
    # The same ranks can add up to sums that differ in the last bit.
    ties = [weight for weight, value in curve.items() if value >= best - 1e-12]
    return min(ties, key=lambda weight: (round(abs(weight - EQUAL_WEIGHT), 9), weight)), curve


_STRIDE = 1 << 40
"""More than there are passages: (query position, passage row) as one number."""

_Entries = tuple[Ints, Ints, Doubles]
"""Query positions, passage rows and what the list says of each, above 0, of a list or of several."""


@dataclass(frozen=True)
class _Pool:
    """Every (query, passage) that either run has, ordered by query position, then passage row.

    dense, bm25: what the run says of the passage, 0 where it does not have it.
    """

    positions: Ints
    rows: Ints
    dense: Doubles
    bm25: Doubles

    def scores(self, weight: float) -> Doubles:
        scores: Doubles = weight * self.dense + (1.0 - weight) * self.bm25
        return scores

    def ranked(self, weight: float, depth: int) -> tuple[Ints, Ints, Doubles]:
        """(query positions, rows, scores), best first within a query, at most `depth` each."""
        # In fp32 as they are kept: what is equal there is ordered by row, as in any other run.
        scores = self.scores(weight).astype(np.float32)
        order = np.lexsort((-scores, self.positions))
        order = order[scores[order] > 0]
        order = order[_ranks(self.positions[order]) <= depth]
        return self.positions[order], self.rows[order], scores[order].astype(np.float64)

    def reciprocal_ranks(self, weight: float, is_relevant: NDArray[np.bool_]) -> float:
        """Sum over the queries of 1 / rank of the best relevant passage, 0 beyond the cut-off."""
        scores = self.scores(weight).astype(np.float32)
        first = np.flatnonzero(np.diff(self.positions, prepend=-1))
        # Rank of the best relevant passage = how many come before it; relevant ones of score 0 were not found.
        best = np.maximum.reduceat(np.where(is_relevant, scores, 0.0), first)
        query = np.cumsum(np.diff(self.positions, prepend=-1) != 0) - 1
        is_best = is_relevant & (scores == best[query]) & (scores > 0)
        best_row = np.minimum.reduceat(np.where(is_best, self.rows, _STRIDE), first)
        before = (scores > best[query]) | ((scores == best[query]) & (self.rows < best_row[query]))
        ranks = np.add.reduceat(before.astype(np.int64), first) + 1
        found = (best > 0) & (ranks <= CUTOFF)
        return float((1.0 / ranks[found]).sum())


def _pools(dense: Run, bm25: Run, constant: float, method: Method) -> tuple[Ints, Iterator[_Pool]]:
    """Query rows of both runs together, sorted, and the pools of QUERIES_AT_ONCE of them each (query positions count through all)."""
    query_rows: Ints = np.union1d(np.asarray(dense.query_rows), np.asarray(bm25.query_rows)).astype(np.int64)
    return query_rows, (
        _pooled(_entries(dense, query_rows, start, constant, method), _entries(bm25, query_rows, start, constant, method, least=0.0))
        for start in range(0, len(query_rows), QUERIES_AT_ONCE)
    )


def _entries(part: Run, query_rows: Ints, start: int, constant: float, method: Method, *, least: float | None = None) -> _Entries:
    """Entries of a run for the queries query_rows[start : start + QUERIES_AT_ONCE]. least: score of what it does not find, if known."""
    chosen = query_rows[start : start + QUERIES_AT_ONCE]
    places = np.flatnonzero(np.isin(part.query_rows, chosen))
    lengths = np.diff(part.offsets)[places]
    ranks = np.arange(1, int(lengths.sum()) + 1, dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = np.repeat(part.offsets[places], lengths) + ranks - 1
    positions = np.repeat(start + np.searchsorted(chosen, part.query_rows[places]), lengths).astype(np.int64)
    said: Doubles = 1.0 / (constant + ranks) if method == "rank" else _standard(np.asarray(part.scores[values]), lengths, least)
    return positions, np.asarray(part.passage_rows[values]), said


def _standard(scores: Floats, lengths: Ints, least: float | None) -> Doubles:
    """Scores of lists, end to end, in standard deviations of the first STANDARD_DEPTH of each list above its lowest; all FOUND or more.

    A list shorter than that is filled up with `least`, where it is known, which then is its lowest too.
    """
    standard = np.empty(len(scores))
    stop = 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        own = scores[start:stop].astype(np.float64)
        missing = STANDARD_DEPTH - length if least is not None else 0
        head = own[:STANDARD_DEPTH] if missing <= 0 else np.append(own, np.full(missing, least))
        spread = float(head.std()) if length else 0.0
        lowest = least if least is not None and missing > 0 else float(own.min(initial=np.inf))
        standard[start:stop] = FOUND + ((own - lowest) / spread if spread > 0 else 0.0)
    return standard


def _pooled(dense: _Entries, bm25: _Entries) -> _Pool:
    num_dense = len(dense[0])
    keys = np.concatenate([dense[0], bm25[0]]) * _STRIDE + np.concatenate([dense[1], bm25[1]])
    unique, place = np.unique(keys, return_inverse=True)
    values = np.zeros((2, len(unique)))
    values[0, place[:num_dense]] = dense[2]
    values[1, place[num_dense:]] = bm25[2]
    return _Pool(unique // _STRIDE, unique % _STRIDE, values[0], values[1])


def _ranks(positions: Ints) -> Ints:
    """1, 2, 3 ... within each run of equal positions."""
    first = np.flatnonzero(np.diff(positions, prepend=-1))
    lengths = np.diff(np.append(first, len(positions)))
    ranks: Ints = np.arange(1, len(positions) + 1) - np.repeat(first, lengths)
    return ranks
