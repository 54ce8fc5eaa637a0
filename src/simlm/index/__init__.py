"""Indexes: passage vectors or terms, searched for the best `depth` of each query.

A new index type is one class and one row of the table: `cls(folder, info)` opens the files
that the classmethod `build(vectors_or_texts, folder, ...)` wrote; `info` is what that returned, kept in `index.json`.
Scoring candidates again (`rescore`) is not the classes' business: `build_vectors` and `open_index` add it to those that list the option.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import Artifact, file_digest, open_artifact
from simlm.errors import ArtifactError, RecipeError, nearest
from simlm.index import rescoring
from simlm.index.results import Results
from simlm.index.stored import SCALES, VECTORS, store_vectors
from simlm.index.vectors import Option, SourceVectors, filled_options

INFO = "index.json"

INDEXES: dict[str, str] = {
    "flat": "simlm.index.flat:FlatIndex",
    "hnsw": "simlm.index.faiss_index:HNSWIndex",
    "ivf": "simlm.index.faiss_index:IVFIndex",
    "pq": "simlm.index.faiss_index:PQIndex",
    "rabitq": "simlm.index.faiss_index:RaBitQIndex",
    "milvus": "simlm.index.milvus:MilvusIndex",
    "bm25": "simlm.index.bm25:BM25Index",
}


class Index(Protocol):
    """An opened index.

    takes: "vectors" = float32 [Q, D] of unit length, "text" = a list of strings. info: the contents of `index.json`.
    OPTIONS: option of the recipe -> its default and what it may be.
    """

    takes: ClassVar[Literal["vectors", "text"]]
    OPTIONS: ClassVar[dict[str, Option]]
    folder: Path
    info: dict[str, Any]

    def __len__(self) -> int:
        """Number of passages."""
        ...

    def search(self, queries: Any, /, depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 where there are no more.

        allowed: bool [N], the passages that may be results; none = all.
        """
        ...


def index_class(name: str) -> Any:
    """The class behind a name of the table; RecipeError for an unknown name."""
    if name not in INDEXES:
        raise RecipeError(f"unknown index type {name!r}{nearest(name, INDEXES)} (known: {', '.join(INDEXES)})")
    module, _, attribute = INDEXES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise RecipeError unless the options are ones that this type of index has; for checking a recipe before any work."""
    kind = index_class(name)
    filled_options(name, options, kind.OPTIONS)
    if hasattr(kind, "check_options"):
        # What depends on several options at once.
        kind.check_options(options)


def build_vectors(name: str, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Write an index of vectors (float32 or float16 [N, D], a .npy file) into `folder`; what `index.json` has to say about it.

    Among that is resident_bytes: the files that a search goes through. Vectors that candidates are scored with again stay on disk and are
    not counted.
    """
    kind = index_class(name)
    chosen = filled_options(name, options, kind.OPTIONS)
    info: dict[str, Any] = kind.build(vectors, folder, options=options, seed=seed)
    info.setdefault("resident_bytes", sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name != INFO))
    if chosen.get("rescore"):
        # The whole vectors, whatever the index itself was cut to.
        store_vectors(SourceVectors(vectors), folder / rescoring.FOLDER, chosen["rescore_dtype"])
        info |= {"rescore": chosen["rescore"], "rescore_dtype": chosen["rescore_dtype"]}
    return info


def open_index(path: Path | str, *, verify: Literal["full", "parsed"] = "full") -> Index:
    """Open an index artifact, memory-mapped; ArtifactError if it is not whole.

    verify: "full" compares the digest of every file, each once a process; "parsed" only of those that a library takes apart, and of
    vectors the sizes: it does not read what may be many gigabytes, and a changed number gives a wrong score, no worse.
    """
    artifact = open_artifact(path, "index", verify="full" if verify == "full" else "sizes")
    if verify == "parsed":
        _check_parsed(artifact)
    try:
        info: dict[str, Any] = json.loads(artifact.file(INFO).read_text(encoding="utf-8"))
        kind = index_class(info["type"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact.path / INFO}: not readable ({error!r}); run the build_index step again") from None
    index: Any = kind(artifact.path, info)
    opened: Index = rescoring.RescoredIndex(index, artifact.path, info) if info.get("rescore") else index
    return opened


def load_index(path: Path | str) -> Index:
    """Open a finished index for searching: `scores, rows = load_index(path).search(queries, depth)`.

    queries: strings for BM25, float32 [Q, D] of unit length for the others.
    """
    return open_index(path)


def _check_parsed(artifact: Artifact) -> None:
    for name, recorded in artifact.manifest.files.items():
        file = artifact.path / name
        if file.name not in (VECTORS, SCALES) and file_digest(file) != recorded["sha256"]:
            raise ArtifactError(f"{file}: its SHA-256 is not the one in the manifest; delete {artifact.path} and run its step again")


__all__ = ["INDEXES", "Index", "Results", "build_vectors", "check_options", "index_class", "load_index", "open_index"]
