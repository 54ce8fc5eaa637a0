"""What the indexes of vectors share: checks of queries, of the vectors' file and of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.errors import RecipeError, ShapeError, nearest
from simlm.rankings import Floats


def checked_queries(queries_QD: Floats, dim: int) -> Floats:
    """The queries as contiguous float32; ShapeError unless they are [Q, dim]."""
    queries = np.ascontiguousarray(queries_QD, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ShapeError(f"queries of shape {queries.shape} for an index of dimension {dim}; [Q, {dim}] was expected")
    return queries


def open_vectors(file: Path) -> NDArray[np.floating[Any]]:
    """The vectors, memory-mapped; ShapeError unless the file holds float32 or float16 [N, D]."""
    vectors_ND: NDArray[np.floating[Any]] = np.load(file, mmap_mode="r", allow_pickle=False)
    if vectors_ND.ndim != 2 or vectors_ND.dtype not in (np.float32, np.float16):
        raise ShapeError(f"{file}: {vectors_ND.dtype} of shape {vectors_ND.shape}; float32 or float16 [N, D] was expected")
    return vectors_ND


def vector_facts(vectors_ND: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """What `index.json` says of the vectors."""
    return {"count": int(vectors_ND.shape[0]), "dim": int(vectors_ND.shape[1])}


def filled_options(name: str, given: dict[str, Any], known: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The options of an index type, defaults filled in. known: option -> (default, smallest value).

    Raises RecipeError for an unknown option, or for one that is not a whole number of that size.
    """
    for key, value in given.items():
        if key not in known:
            listed = f"known: {', '.join(known)}" if known else "it has none"
            raise RecipeError(f"index.options.{key}: unknown option of a {name} index{nearest(key, known)} ({listed})")
        smallest = known[key][1]
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise RecipeError(f"index.options.{key}: found {value!r}; a whole number of {smallest} or more was expected")
    return {key: default for key, (default, _) in known.items()} | given
