"""Indexes: passage vectors or terms, searched for the best `depth` of each query.

A new index type is one class and one row of the table: `cls(folder, info)` opens the files
that the classmethod `build(vectors_or_texts, folder, ...)` wrote; `info` is what that returned, kept in `index.json`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from simlm.artifacts import open_artifact
from simlm.errors import ArtifactError, RecipeError, nearest
from simlm.index.results import Results
from simlm.index.vectors import filled_options

INFO = "index.json"

INDEXES: dict[str, str] = {
    "flat": "simlm.index.flat:FlatIndex",
    "hnsw": "simlm.index.faiss_index:HNSWIndex",
    "ivf": "simlm.index.faiss_index:IVFIndex",
    "pq": "simlm.index.faiss_index:PQIndex",
    "bm25": "simlm.index.bm25:BM25Index",
}


class Index(Protocol):
    """An opened index.

    takes: "vectors" = float32 [Q, D] of unit length, "text" = a list of strings. info: the contents of `index.json`.
    OPTIONS: option of the recipe -> (default, smallest value).
    """

    takes: ClassVar[Literal["vectors", "text"]]
    OPTIONS: ClassVar[dict[str, tuple[int, int]]]
    folder: Path
    info: dict[str, Any]

    def __len__(self) -> int:
        """Number of passages."""
        ...

    def search(self, queries: Any, /, depth: int) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 where there are no more."""
        ...


def index_class(name: str) -> Any:
    """The class behind a name of the table; RecipeError for an unknown name."""
    if name not in INDEXES:
        raise RecipeError(f"unknown index type {name!r}{nearest(name, INDEXES)} (known: {', '.join(INDEXES)})")
    module, _, attribute = INDEXES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise RecipeError unless the options are ones that this type of index has; for checking a recipe before any work."""
    filled_options(name, options, index_class(name).OPTIONS)


def open_index(path: Path | str) -> Index:
    """Open an index artifact, memory-mapped; ArtifactError if it is not whole."""
    artifact = open_artifact(path, "index")
    try:
        info: dict[str, Any] = json.loads(artifact.file(INFO).read_text(encoding="utf-8"))
        name = info["type"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ArtifactError(f"{artifact.path / INFO}: not readable ({error!r}); run the build_index step again") from None
    index: Index = index_class(name)(artifact.path, info)
    return index


def load_index(path: Path | str) -> Index:
    """Open a finished index for searching: `scores, rows = load_index(path).search(queries, depth)`.

    queries: strings for BM25, float32 [Q, D] of unit length for the others.
    """
    return open_index(path)


__all__ = ["INDEXES", "Index", "Results", "check_options", "index_class", "load_index", "open_index"]
