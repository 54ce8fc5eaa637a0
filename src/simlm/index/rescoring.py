"""Candidates of a small index, scored again with better vectors that stay on disk.

The index in memory may be coarse (one bit a number, a few bytes a vector, the first numbers only): it only has to have the right passages
among its best `rescore` x depth. These are scored with the whole vectors of the folder `rescoring/`, of which the few rows that are
needed are read. Scores are exact inner products with those vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from simlm.index.results import NO_ROW, Results, best_of_candidates, no_results
from simlm.index.stored import StoredVectors
from simlm.index.vectors import Option, checked_queries
from simlm.rankings import Floats

FOLDER = "rescoring"


class _Candidates(Protocol):
    info: dict[str, Any]

    def __len__(self) -> int: ...

    def search(self, queries: Floats, depth: int, /, *, allowed: NDArray[np.bool_] | None = None) -> Results: ...


class RescoredIndex:
    """An index of vectors whose candidates are scored again. Queries are float32 [Q, D] of unit length."""

    takes: ClassVar[Literal["vectors", "text"]] = "vectors"
    OPTIONS: ClassVar[dict[str, Option]] = {}

    def __init__(self, candidates: _Candidates, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self.candidates = candidates
        self.vectors = StoredVectors(folder / FOLDER, int(info["count"]), int(info["dim"]))

    def __len__(self) -> int:
        return len(self.candidates)

    def search(self, queries_QD: Floats, depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 past the end.

        allowed: bool [N], the passages that may be results; none = all.
        """
        queries_QD = checked_queries(queries_QD, int(self.info["dim"]))
        fetched = min(depth * int(self.info["rescore"]), len(self))
        _, candidates_QC = self.candidates.search(queries_QD, fetched, allowed=allowed)
        scores_QK, rows_QK = no_results(len(queries_QD), depth)
        for place, query_D in enumerate(queries_QD):
            candidates = np.sort(candidates_QC[place][candidates_QC[place] != NO_ROW])
            rows, scores = best_of_candidates(candidates, self.vectors.scores(query_D, candidates), depth)
            rows_QK[place, : len(rows)] = rows
            scores_QK[place, : len(scores)] = scores
        return scores_QK, rows_QK
