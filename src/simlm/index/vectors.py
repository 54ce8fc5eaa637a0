"""What the indexes of vectors share: options, the vectors they are built from, and checks of queries.

Shapes: Q queries, N passages, D embedding dim, S numbers of a vector that are kept.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.errors import RecipeError, ShapeError, nearest
from simlm.index.results import Results, no_results
from simlm.rankings import Floats, Ints

Option = tuple[int, int] | tuple[str, tuple[str, ...]] | tuple[str, None]
"""(default, smallest value) of a whole number, (default, possible values) of a name, or (default, None) of any text."""

CUT: dict[str, Option] = {"dim": (0, 0)}
"""Only the first so many numbers of each vector, at unit length again (Matryoshka models lose little); 0 = all."""

BLOCK_PASSAGES = 65_536
"""Read at once while an index is built."""
SAMPLED_AT_ONCE = 4_096
"""Rows of a sample read before their pages leave the process; the system may map 64 KiB around each."""


def rescoring(default: int = 0) -> dict[str, Option]:
    """Options of an index whose best `rescore` x depth candidates are scored again with better vectors; 0 = as the index scores them."""
    return {"rescore": (default, 0), "rescore_dtype": ("int8", ("int8", "float16", "float32"))}


def checked_queries(queries_QD: Floats, dim: int, cut: int = 0) -> Floats:
    """The queries as contiguous float32, cut to `cut` numbers if that is not 0; ShapeError unless they are [Q, dim]."""
    queries = np.ascontiguousarray(queries_QD, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ShapeError(f"queries of shape {queries.shape} for an index of dimension {dim}; [Q, {dim}] was expected")
    return shortened(queries, cut)


def shortened(vectors_ND: NDArray[np.floating[Any]], size: int) -> Floats:
    """float32 [N, S]: the first `size` numbers of each vector, at unit length again; the vectors as they are for 0 or the whole size.

    A vector of which nothing but zeros is left stays zero. Equals losses.compression.cut, without torch.
    """
    if size in (0, vectors_ND.shape[1]):
        return np.ascontiguousarray(vectors_ND, dtype=np.float32)
    first_NS: Floats = np.array(vectors_ND[:, :size], dtype=np.float32)
    first_NS /= np.maximum(np.linalg.norm(first_NS, axis=1, keepdims=True), np.float32(1e-12))
    return first_NS


def checked_mask(allowed: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The mask; ShapeError unless it is bool [count]."""
    mask = np.asarray(allowed)
    if mask.dtype != np.bool_ or mask.shape != (count,):
        raise ShapeError(f"allowed: {mask.dtype} of shape {mask.shape}; bool [{count}], one value a passage, was expected")
    return mask


def ordered(scores_QK: Floats, rows_QK: Ints) -> Results:
    """Best first, equal scores by row. What is missing has score -inf, and row -1 at the end."""
    order = np.lexsort((rows_QK, -scores_QK), axis=-1)
    return np.take_along_axis(scores_QK, order, axis=-1), np.take_along_axis(rows_QK, order, axis=-1)


def padded(scores_QK: Floats, rows_QK: Ints, depth: int) -> Results:
    """Filled up to `depth` columns with what is missing."""
    scores, rows = no_results(len(scores_QK), depth)
    scores[:, : scores_QK.shape[1]] = scores_QK
    rows[:, : rows_QK.shape[1]] = rows_QK
    return scores, rows


def open_vectors(file: Path) -> NDArray[np.floating[Any]]:
    """The vectors, memory-mapped; ShapeError unless the file holds float32 or float16 [N, D]."""
    vectors_ND: NDArray[np.floating[Any]] = np.load(file, mmap_mode="r", allow_pickle=False)
    if vectors_ND.ndim != 2 or vectors_ND.dtype not in (np.float32, np.float16):
        raise ShapeError(f"{file}: {vectors_ND.dtype} of shape {vectors_ND.shape}; float32 or float16 [N, D] was expected")
    return vectors_ND


def forget_pages(mapping: mmap.mmap | None) -> None:
    """Let the pages of a mapped file that were read leave this process; they are read again when they are asked for.

    They would count as its memory until the system needs room. Nothing happens where the system cannot do that.
    """
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


class SourceVectors:
    """Passage vectors on disk that an index is built from, read block by block as float32, cut to `dim` numbers.

    dim: of the vectors as they are read; whole_dim: as they are in the file. Raises RecipeError if there are fewer numbers than `cut`.
    """

    def __init__(self, file: Path, cut: int = 0) -> None:
        self.file = file
        self.stored_ND = open_vectors(file)
        self.whole_dim = int(self.stored_ND.shape[1])
        self.dim = cut or self.whole_dim
        if cut > self.whole_dim:
            raise RecipeError(f"index.options.dim: {cut} of vectors that have {self.whole_dim} numbers; at most all of them")

    def __len__(self) -> int:
        return int(self.stored_ND.shape[0])

    def block(self, start: int, stop: int) -> Floats:
        """float32 [stop - start, dim]"""
        return shortened(self.stored_ND[start:stop], self.dim)

    def blocks(self) -> Iterator[Floats]:
        """All of them in turn, BLOCK_PASSAGES at a time; what was read does not stay in memory."""
        for start in range(0, len(self), BLOCK_PASSAGES):
            yield self.block(start, start + BLOCK_PASSAGES)
            self._forget()

    def sample(self, size: int, rng: np.random.Generator) -> Floats:
        """float32 [size, dim]: distinct rows, in the order of the file; all of them if there are no more."""
        rows = np.sort(rng.choice(len(self), min(size, len(self)), replace=False))
        sampled = np.empty((len(rows), self.dim), dtype=np.float32)
        for start in range(0, len(rows), SAMPLED_AT_ONCE):
            part = slice(start, start + SAMPLED_AT_ONCE)
            sampled[part] = shortened(self.stored_ND[rows[part]], self.dim)
            self._forget()
        return sampled

    def _forget(self) -> None:
        forget_pages(getattr(self.stored_ND, "_mmap", None))

    def facts(self) -> dict[str, Any]:
        """What `index.json` says of the vectors: how many, of what dimension the queries are, and how much of it is indexed."""
        return {"count": len(self), "dim": self.whole_dim, "cut": self.dim}


def filled_options(name: str, given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """The options of an index type, defaults filled in.

    Raises RecipeError for an unknown option, or for a value that is not one of those it may have.
    """
    for key, value in given.items():
        if key not in known:
            listed = f"known: {', '.join(known)}" if known else "it has none"
            raise RecipeError(f"index.options.{key}: unknown option of a {name} index{nearest(key, known)} ({listed})")
        bound = known[key][1]
        if bound is None:
            if not isinstance(value, str):
                raise RecipeError(f"index.options.{key}: found {value!r}; a text was expected")
        elif isinstance(bound, tuple):
            if value not in bound:
                raise RecipeError(f"index.options.{key}: found {value!r}{nearest(str(value), bound)} (known: {', '.join(bound)})")
        elif isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise RecipeError(f"index.options.{key}: found {value!r}; a whole number of {bound} or more was expected")
    return {key: default for key, (default, _) in known.items()} | dict(given)
