"""Exports of vectors: a faiss file that faiss alone can open, and Parquet that everything else reads.

Parquet is streamed block by block, as is the table of ids; a flat faiss file is put together in memory, as large as the vectors in fp32.
Passages that were added to the run are there, deleted ones are not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simlm.embedding_files import EmbeddingWriter
from simlm.errors import ArtifactError
from simlm.export.finished_run import FinishedRun
from simlm.index import INFO
from simlm.progress import Progress
from simlm.rankings import Ints

BLOCK_PASSAGES = 8192
"""Read and written at once."""
PART_PASSAGES = 1_000_000
"""Of one Parquet file."""


def write_parquet(run: FinishedRun, folder: Path, progress: Progress) -> dict[str, Any]:
    """part-NNNNN.parquet: passage_id (string), vector (list of D floats), in the order of the corpus.

    Facts: retriever, passages, dim, dtype.
    """
    vectors = _Vectors.of(run)
    count = len(vectors.rows)
    for part, first in enumerate(range(0, max(count, 1), PART_PASSAGES)):
        with EmbeddingWriter(folder / f"part-{part:05d}.parquet", vectors.dim, vectors.dtype) as writer:
            for rows in progress.track(_blocks(vectors.rows[first : first + PART_PASSAGES]), f"part {part}", unit="block"):
                writer.write([run.store.passages.ids[row] for row in rows.tolist()], vectors.take(rows))
    return {"retriever": run.chosen.name, "passages": count, "dim": vectors.dim, "dtype": str(vectors.dtype)}


def write_faiss(run: FinishedRun, folder: Path, progress: Progress) -> dict[str, Any]:
    """index.faiss, and passage_ids.parquet (row, passage_id), since faiss knows passages by number only.

    The index that searches open, where faiss made it and nothing was added or deleted since; else a flat one of the vectors. Facts:
    retriever, index_type, passages, dim, cut: how many of a query's first numbers to take, brought to unit length (all where it is dim).
    """
    import faiss

    vectors = _Vectors.of(run)
    info = json.loads(run.index.file(INFO).read_text(encoding="utf-8"))
    made = run.index.file("index.faiss")
    if made.is_file() and not run.additions:
        shutil.copyfile(made, folder / "index.faiss")
        kind, cut = info["type"], int(info.get("cut", info["dim"]))
    else:
        kind, cut = "flat", vectors.dim
        index = faiss.IndexFlatIP(cut)
        for rows in progress.track(_blocks(vectors.rows), "faiss", unit="block"):
            index.add(np.ascontiguousarray(vectors.take(rows), dtype=np.float32))
        faiss.write_index(index, str(folder / "index.faiss"))
    opened = faiss.read_index(str(folder / "index.faiss"), faiss.IO_FLAG_MMAP)
    if opened.ntotal != len(vectors.rows):
        raise ArtifactError(
            f"{run.index.path}: {opened.ntotal:,} vectors in the faiss file for {len(vectors.rows):,} passages; build it again"
        )
    _write_ids(run, vectors.rows, folder / "passage_ids.parquet")
    return {"retriever": run.chosen.name, "index_type": kind, "passages": len(vectors.rows), "dim": vectors.dim, "cut": cut}


@dataclass(frozen=True)
class _Vectors:
    """The vectors of a run's passages. parts: of the corpus and of what was added; rows: int64, those that are not deleted."""

    parts: list[NDArray[np.floating[Any]]]
    rows: Ints

    @classmethod
    def of(cls, run: FinishedRun) -> _Vectors:
        alive = run.additions.alive(len(run.store.passages))
        return cls(run.vectors(), np.arange(len(run.store.passages)) if alive is None else np.flatnonzero(alive))

    @property
    def dim(self) -> int:
        return int(self.parts[0].shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    def take(self, rows: Ints) -> NDArray[np.floating[Any]]:
        """[len(rows), D], the vectors of increasing rows."""
        found, start = [], 0
        for part in self.parts:
            own = rows[(rows >= start) & (rows < start + len(part))] - start
            found.append(part[own])
            start += len(part)
        return np.concatenate(found)


def _blocks(rows: Ints) -> list[Ints]:
    return [rows[start : start + BLOCK_PASSAGES] for start in range(0, len(rows), BLOCK_PASSAGES)]


def _write_ids(run: FinishedRun, rows: Ints, file: Path) -> None:
    """Number in the faiss file -> id."""
    schema = pa.schema([("row", pa.int64()), ("passage_id", pa.string())])
    place = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for block in _blocks(rows):
            ids = [run.store.passages.ids[row] for row in block.tolist()]
            writer.write_table(pa.table({"row": np.arange(place, place + len(ids), dtype=np.int64), "passage_id": ids}, schema=schema))
            place += len(ids)
