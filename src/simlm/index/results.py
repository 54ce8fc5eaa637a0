"""What a search returns: two matrices, and how the best of many candidates are chosen.

Shapes: Q queries, K depth. Missing results are row -1 with score -inf, always at the end of a row.
"""

from __future__ import annotations

import numpy as np

from simlm.rankings import Floats, Ints

Results = tuple[Floats, Ints]
NO_ROW = -1


def no_results(num_queries: int, depth: int) -> Results:
    """(scores, rows), both [Q, K], all missing."""
    return np.full((num_queries, depth), -np.inf, dtype=np.float32), np.full((num_queries, depth), NO_ROW, dtype=np.int64)


def best_of_candidates(rows: Ints, scores: Floats, depth: int) -> tuple[Ints, Floats]:
    """The best `depth` of one query's candidates, best first; equal scores: smaller row first, at the cut too.

    rows: increasing.
    """
    if len(rows) > depth:
        # Everything at least as good as the depth-th best, which may be more than `depth` where scores are equal.
        last = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        chosen = np.flatnonzero(scores >= last)
        rows, scores = rows[chosen], scores[chosen]
    order = np.argsort(-scores, kind="stable")[:depth]
    return rows[order], scores[order]
