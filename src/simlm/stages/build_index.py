"""Build an index over the corpus: BM25 from the store's texts, the others from passage vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simlm.artifacts import open_artifact, write_json
from simlm.data.store import Store, Table, passages_fingerprint
from simlm.errors import ArtifactError
from simlm.index import INFO, build_vectors, check_options, index_class
from simlm.recipe import IndexSettings
from simlm.stages import Context

VECTORS = "vectors.npy"


def run(settings: IndexSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, embeddings (not for BM25). Facts: bytes_total, bytes_per_passage, num_passages, index_type, and the index's own."""
    store = Store.open(inputs["store"])
    count = len(store.passages)
    check_options(settings.type, settings.options)
    if settings.type == "bm25":
        info = index_class("bm25").build(
            PassageTexts(store.passages), context.work, k1=settings.k1, b=settings.b, language=settings.language
        )
    else:
        vectors = open_artifact(inputs["embeddings"], "embeddings").file(VECTORS)
        embedded = len(np.load(vectors, mmap_mode="r", allow_pickle=False))
        if embedded != count:
            raise ArtifactError(f"{vectors}: {embedded:,} vectors for a corpus of {count:,} passages; run the encode step again")
        info = build_vectors(settings.type, vectors, context.work, options=settings.options, seed=context.seed)
    write_json(context.work / INFO, info | {"type": settings.type, "store_fingerprint": passages_fingerprint(inputs["store"])})
    bytes_total = sum(file.stat().st_size for file in index_files(context))
    facts: dict[str, Any] = {"index_type": settings.type, "num_passages": count, "bytes_total": bytes_total}
    context.record(**info | facts, bytes_per_passage=round(bytes_total / max(count, 1), 1))


def index_files(context: Context) -> list[Path]:
    """The files of the artifact so far; what is only kept for resuming is not of it."""
    return [file for file in context.work.rglob("*") if file.is_file() and context.resume not in file.parents]


class PassageTexts(Sequence[str]):
    """Title and text of each passage, joined by a space; read from the store when asked for."""

    def __init__(self, passages: Table) -> None:
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        return f"{self._passages.title(row)} {self._passages.text(row)}"
