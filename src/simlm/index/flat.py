"""Exact inner-product search: every passage is compared with every query. The oracle that other indexes are measured against.

Vectors stay on disk, memory-mapped, and go past the queries in blocks; of each block only what beats a query's current depth-th best is
looked at. The queries x corpus matrix never exists. Runs on the accelerator where there is one.
Shapes: Q queries, P passages of a block, K depth, D embedding dim, N corpus rows, W passages of a block that are new candidates.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from simlm.index.results import NO_ROW, Results
from simlm.index.vectors import checked_queries, filled_options, open_vectors, vector_facts
from simlm.rankings import Floats

if TYPE_CHECKING:
    from torch import Tensor

VECTORS = "vectors.npy"
MEMORY_BYTES = 256 * 2**20
"""What one search may take besides its queries and results: scores of a block, the block in fp32, and the candidates."""
QUERIES_AT_ONCE = 4096
BYTES_PER_SCORE = 4 + 1 + 12
"""Of a block: the score, whether it is a candidate, and (at worst, each is one) candidate score and row."""


class FlatIndex:
    """Queries are float32 [Q, D] of unit length. Vectors are stored as float32 or float16; scores are computed in float32."""

    takes: ClassVar[Literal["vectors"]] = "vectors"
    OPTIONS: ClassVar[dict[str, tuple[int, int]]] = {}

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self.vectors_ND = open_vectors(folder / VECTORS)

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def search(self, queries_QD: Floats, depth: int, *, memory_bytes: int = MEMORY_BYTES) -> Results:
        """(scores float32 [Q, K], passage rows int64 [Q, K]), best first; equal scores: smaller row first; -inf and -1 past the corpus.

        memory_bytes: see MEMORY_BYTES. At least a block of one passage is taken.
        """
        queries_QD = checked_queries(queries_QD, int(self.info["dim"]))
        parts = [
            self._search(queries_QD[start : start + QUERIES_AT_ONCE], depth, memory_bytes)
            for start in range(0, max(len(queries_QD), 1), QUERIES_AT_ONCE)
        ]
        return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])

    def _search(self, queries_QD: Floats, depth: int, memory_bytes: int) -> Results:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        queries = torch.from_numpy(queries_QD).to(device)
        best_QK = torch.full((len(queries), depth), -torch.inf, device=device)
        rows_QK = torch.full((len(queries), depth), NO_ROW, dtype=torch.int64, device=device)
        largest = max(memory_bytes // (BYTES_PER_SCORE * max(len(queries), 1) + 4 * queries_QD.shape[1]), 1)
        start = 0
        while start < len(self):
            # A block as long as what has been seen brings about `depth` new candidates a query, if the corpus is in no particular order.
            size = min(max(start, depth, 1024), largest, len(self) - start)
            block_PD = torch.from_numpy(np.array(self.vectors_ND[start : start + size], dtype=np.float32)).to(device)
            best_QK, rows_QK = _merge(best_QK, rows_QK, queries @ block_PD.T, start)
            start += size
        return best_QK.cpu().numpy(), rows_QK.cpu().numpy()

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Link the vectors into `folder` (copy them where the file system cannot link); seed is not used, nothing is random."""
        filled_options("flat", options, cls.OPTIONS)
        vectors_ND = open_vectors(vectors)
        place = folder / VECTORS
        place.unlink(missing_ok=True)
        try:
            os.link(vectors, place)
        except OSError:
            shutil.copyfile(vectors, place)
        return vector_facts(vectors_ND) | {"dtype": str(vectors_ND.dtype)}


def _merge(best_QK: Tensor, rows_QK: Tensor, scores_QP: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The best K of those so far and of a block that begins at row `start`, best first, equal scores by row."""
    import torch

    # Equal to the K-th best so far is not better: rows only grow.
    new_QP = scores_QP > best_QK[:, -1:]
    counts_Q = new_QP.sum(dim=1)
    width = int(counts_Q.max()) if len(counts_Q) else 0
    if width == 0:
        return best_QK, rows_QK
    query, column = new_QP.nonzero(as_tuple=True)
    place = torch.arange(len(query), device=query.device) - (counts_Q.cumsum(0) - counts_Q)[query]
    new_best_QW = best_QK.new_full((len(best_QK), width), -torch.inf)
    new_rows_QW = rows_QK.new_full((len(rows_QK), width), NO_ROW)
    new_best_QW[query, place] = scores_QP[query, column]
    new_rows_QW[query, place] = column + start
    # Both parts are in the order of rows where scores are equal, so a stable sort keeps that order.
    best, order = torch.cat([best_QK, new_best_QW], dim=1).sort(dim=1, descending=True, stable=True)
    depth = best_QK.shape[1]
    rows = torch.cat([rows_QK, new_rows_QW], dim=1).gather(1, order[:, :depth])
    return best[:, :depth].contiguous(), rows
