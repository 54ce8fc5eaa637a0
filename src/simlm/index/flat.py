"""Exact inner-product search: every passage is compared with every query. The oracle that other indexes are measured against.

Vectors stay on disk, memory-mapped, and go past the queries in blocks; of each block only what beats a query's current depth-th best is
kept. The queries x corpus matrix never exists. Runs on the accelerator where there is one.
Products are made in tiles whose bounds are multiples of TILE, counted from the first query and the first passage, so that a score does not
depend on how much memory there is: libraries round differently for matrices of other shapes.
Shapes: Q queries, P passages of a block, K depth, D embedding dim, N corpus rows, C candidates, W most candidates of one query.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.index.results import NO_ROW, Results
from simlm.index.stored import DTYPES, StoredVectors, store_vectors
from simlm.index.vectors import CUT, Option, SourceVectors, checked_mask, checked_queries, filled_options, rescoring
from simlm.rankings import Floats

if TYPE_CHECKING:
    from torch import Tensor

MEMORY_BYTES = 256 * 2**20
"""What one search may take besides its queries and results: a block in fp32, scores of a tile, and candidates."""
TILE = 1024
"""Queries, and passages, of one matrix product."""
LANES = 32
"""A tile has a multiple of so many passages: libraries round the last few differently, and equal passages must have equal scores."""
QUERIES_AT_ONCE = 4 * TILE
"""For which the vectors are read once."""
BYTES_PER_CANDIDATE = 64
"""Where it was found, its query and key, and the key in a matrix and in a copy of which the best are taken."""
LAST_ROW = 2**32 - 1
NOTHING = -(2**63)
"""The key of no passage, below all others."""


class FlatIndex:
    """Queries are float32 [Q, D] of unit length. Vectors are stored as float32, float16 or int8; scores are computed in float32."""

    takes: ClassVar[Literal["vectors"]] = "vectors"
    OPTIONS: ClassVar[dict[str, Option]] = CUT | {"dtype": ("as_encoded", ("as_encoded", *DTYPES))} | rescoring()

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self._cut = int(info.get("cut", info["dim"]))
        self.vectors = StoredVectors(folder, info.get("count"), self._cut)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, queries_QD: Floats, depth: int, *, allowed: NDArray[np.bool_] | None = None, memory_bytes: int = MEMORY_BYTES
    ) -> Results:
        """(scores float32 [Q, K], passage rows int64 [Q, K]), best first; equal scores: smaller row first; -inf and -1 past the corpus.

        allowed: bool [N], the passages that may be results; none = all. memory_bytes: see MEMORY_BYTES; at least a tile is taken, and
        the results do not depend on it.
        """
        queries_QD = checked_queries(queries_QD, int(self.info["dim"]), self._cut)
        if allowed is not None:
            allowed = checked_mask(allowed, len(self))
        parts = [
            self._search(queries_QD[start : start + QUERIES_AT_ONCE], depth, allowed, memory_bytes)
            for start in range(0, max(len(queries_QD), 1), QUERIES_AT_ONCE)
        ]
        return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])

    def _search(self, queries_QD: Floats, depth: int, allowed: NDArray[np.bool_] | None, memory_bytes: int) -> Results:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        queries = torch.from_numpy(queries_QD).to(device)
        best_QK = torch.full((len(queries), depth), NOTHING, dtype=torch.int64, device=device)
        largest = _block_passages(min(len(queries), TILE), depth, queries_QD.shape[1], memory_bytes)
        start = 0
        while start < len(self):
            # A block as long as what has been seen brings about `depth` new candidates a query, if the corpus is in no particular order.
            size = min(max(start, TILE), largest, len(self) - start)
            block_PD = torch.from_numpy(self.vectors.block(start, start + size)).to(device)
            allowed_P = None if allowed is None else torch.from_numpy(np.ascontiguousarray(allowed[start : start + size])).to(device)
            for first in range(0, len(queries), TILE):
                part = slice(first, first + TILE)
                best_QK[part] = _merge(best_QK[part], queries[part], block_PD, allowed_P, start)
            start += size
        return _unpacked(best_QK.sort(dim=1, descending=True).values if device.type == "cuda" else _sorted(best_QK))

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the vectors into `folder` (linked where they stay as they are); seed is not used, nothing is random."""
        chosen = filled_options("flat", options, cls.OPTIONS)
        source = SourceVectors(vectors, chosen["dim"])
        dtype = str(source.stored_ND.dtype) if chosen["dtype"] == "as_encoded" else chosen["dtype"]
        store_vectors(source, folder, dtype)
        return source.facts() | {"dtype": dtype}


def _block_passages(num_queries: int, depth: int, dim: int, memory_bytes: int) -> int:
    """Passages of a block, whole tiles: each may be a candidate of every query of a tile, but a block of one tile is always taken."""
    left = memory_bytes - num_queries * ((4 + 1) * TILE + 2 * 8 * depth)
    return max(left // (BYTES_PER_CANDIDATE * max(num_queries, 1) + 4 * dim) // TILE, 1) * TILE


# A key is a score and a row in one int64: the greater key has the higher score, or the smaller row where scores are equal. So the best
# of any keys are simply the greatest, and no two are equal.


def _packed(scores_C: Tensor, rows_C: Tensor) -> Tensor:
    import torch

    bits_C = (scores_C + 0.0).view(torch.int32)  # -0.0 becomes 0.0, to which it is equal
    ordered_C = bits_C ^ ((bits_C >> 31) & 0x7FFFFFFF)
    return (ordered_C.to(torch.int64) << 32) | (LAST_ROW - rows_C)


def _unpacked(best_QK: Tensor) -> Results:
    import torch

    ordered_QK = (best_QK >> 32).to(torch.int32)
    scores_QK = (ordered_QK ^ ((ordered_QK >> 31) & 0x7FFFFFFF)).view(torch.float32)
    rows_QK = LAST_ROW - (best_QK & LAST_ROW)
    nothing_QK = best_QK == NOTHING
    scores_QK = torch.where(nothing_QK, -torch.inf, scores_QK)
    return scores_QK.cpu().numpy(), torch.where(nothing_QK, NO_ROW, rows_QK).cpu().numpy()


def _sorted(keys_QK: Tensor) -> Tensor:
    """Greatest first. numpy sorts rows of integers several times as fast as torch."""
    import torch

    return torch.from_numpy(np.sort(keys_QK.numpy(), axis=1)[:, ::-1].copy())


def _greatest(keys_QC: Tensor, depth: int) -> Tensor:
    """The `depth` greatest keys of each query, the least of them first, the others in any order."""
    import torch

    if keys_QC.device.type != "cpu":
        return keys_QC.topk(depth, dim=1).values.flip(1)
    count = keys_QC.shape[1]
    return torch.from_numpy(np.partition(keys_QC.numpy(), count - depth, axis=1)[:, count - depth :])


def _merge(best_QK: Tensor, queries_QD: Tensor, block_PD: Tensor, allowed_P: Tensor | None, start: int) -> Tensor:
    """The K greatest keys of those so far and of a block that begins at row `start`, the least first."""
    import torch

    depth = best_QK.shape[1]
    if start == 0:
        keys_QC = torch.cat([best_QK, *_all_keys(queries_QD, block_PD, allowed_P)], dim=1)
        return _greatest(keys_QC, depth)
    least_Q1 = torch.from_numpy(_unpacked(best_QK[:, :1])[0]).to(best_QK.device)
    tiles = _candidates(queries_QD, block_PD, allowed_P, least_Q1, start)
    counts = [torch.bincount(query_C, minlength=len(best_QK)) for query_C, _ in tiles]
    width = int(torch.stack(counts).sum(dim=0).max()) if len(best_QK) else 0
    if width == 0:
        return best_QK
    new_QW = best_QK.new_full((len(best_QK), width), NOTHING)
    filled_Q = torch.zeros_like(counts[0])
    for (query_C, key_C), counts_Q in zip(tiles, counts, strict=True):
        # A tile's candidates are in the order of their queries.
        place_C = torch.arange(len(query_C), device=query_C.device) + (filled_Q - (counts_Q.cumsum(0) - counts_Q))[query_C]
        new_QW[query_C, place_C] = key_C
        filled_Q += counts_Q
    return _greatest(torch.cat([best_QK, new_QW], dim=1), depth)


def _scores(queries_QD: Tensor, block_PD: Tensor, allowed_P: Tensor | None, begin: int) -> Tensor:
    """Scores [Q, P] of the tile that begins at place `begin` of a block; -inf for what is not allowed."""
    from torch.nn.functional import pad

    tile_PD = block_PD[begin : begin + TILE]
    count, missing = len(tile_PD), -len(tile_PD) % LANES
    tile_PD = pad(tile_PD, (0, 0, 0, missing)) if missing else tile_PD
    scores_QP = (queries_QD @ tile_PD.T)[:, :count].contiguous()
    return scores_QP if allowed_P is None else scores_QP.masked_fill_(~allowed_P[begin : begin + TILE], -float("inf"))


def _all_keys(queries_QD: Tensor, block_PD: Tensor, allowed_P: Tensor | None) -> list[Tensor]:
    import torch

    keys = []
    for begin in range(0, len(block_PD), TILE):
        scores_QP = _scores(queries_QD, block_PD, allowed_P, begin)
        rows_P = torch.arange(begin, begin + scores_QP.shape[1], device=scores_QP.device)
        keys.append(torch.where(scores_QP > -torch.inf, _packed(scores_QP, rows_P), NOTHING))
    return keys


def _candidates(
    queries_QD: Tensor, block_PD: Tensor, allowed_P: Tensor | None, least_Q1: Tensor, start: int
) -> list[tuple[Tensor, Tensor]]:
    """Query and key of every passage of a block that scores above `least`, tile by tile, in the order of queries within a tile.

    Equal to the K-th best so far is not better: rows only grow.
    """
    import torch

    tiles = []
    for begin in range(0, len(block_PD), TILE):
        scores_QP = _scores(queries_QD, block_PD, allowed_P, begin)
        above_QP = scores_QP > least_Q1
        if above_QP.device.type == "cpu":
            # numpy's is four times as fast as torch's where few are True.
            flat_C = torch.from_numpy(np.flatnonzero(above_QP.numpy()))
        else:
            flat_C = above_QP.view(-1).nonzero().squeeze(1)
        query_C = flat_C // scores_QP.shape[1]
        row_C = flat_C - query_C * scores_QP.shape[1] + (start + begin)
        tiles.append((query_C, _packed(scores_QP.view(-1)[flat_C], row_C)))
    return tiles
