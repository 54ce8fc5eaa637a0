"""encode: passages of the store -> vectors of unit length, by a trained retriever or by the starting model as it is.

Tokens come from the store, so nothing is tokenised again. Passages go through in shards, in the order of their rows; within a shard they
are sorted by length. A shard's vectors are written to their place in `vectors.npy` and synced before the shard counts as done, so a kill
loses at most one shard, and memory does not grow with the corpus.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import open_artifact, write_json
from simlm.data.batches import collate, length_batches
from simlm.data.store import Store, Table
from simlm.recipe import EncodeSettings, ModelSettings
from simlm.stages import Context

if TYPE_CHECKING:
    from simlm.models.inference import Batches
    from simlm.models.retriever import Retriever

VECTORS = "vectors.npy"
INFO = "embeddings.json"
DONE = "passages_done.json"


def run(settings: EncodeSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, model (without it the model of the settings as it is).

    Writes vectors.npy [N, D] and embeddings.json. Facts: num_passages, dim, precision, storage, bytes_total, passages_per_second and
    tokens_per_second (of this try, loading the model left out), padding (share of the computed positions that are padding).
    """
    from simlm.models.retriever import load_retriever
    from simlm.models.vocabulary import check_vocabulary

    store = Store.open(inputs["store"])
    model = ModelSettings(start=str(open_artifact(inputs["model"], "model").path)) if "model" in inputs else settings.model
    retriever = load_retriever(model, precision=settings.precision, batch_tokens=settings.batch_tokens)
    check_vocabulary(model.start, store.tokenizer(), revision=model.revision)
    dtype = np.float16 if settings.storage == "fp16" else np.float32
    work = _Vectors(context, count=len(store.passages), dim=retriever.dim, dtype=dtype)
    rates = _encode(work, retriever, store.passages, settings, context)
    info = {"dim": retriever.dim, "count": work.count, "normalised": True, "precision": retriever.precision, "storage": settings.storage}
    write_json(context.work / INFO, info)
    context.record(
        num_passages=work.count,
        dim=retriever.dim,
        precision=retriever.precision,
        storage=settings.storage,
        bytes_total=(context.work / VECTORS).stat().st_size,
        **rates,
    )


def _encode(work: _Vectors, retriever: Retriever, passages: Table, settings: EncodeSettings, context: Context) -> dict[str, Any]:
    """Encode what is not done yet; the rates."""
    counted = _Count()
    starts = range(work.done, work.count, settings.shard_passages)
    started = time.perf_counter()
    for start in context.progress.track(starts, "encode", total=len(starts), unit="shard"):
        rows = np.arange(start, min(start + settings.shard_passages, work.count), dtype=np.int64)
        vectors_ND = np.empty((len(rows), retriever.dim), dtype=np.float32)
        batches = counted.counting(_batches(passages, rows, retriever.max_passage_tokens, settings.batch_tokens))
        retriever.inference.run(batches, vectors_ND, name=lambda row, start=start: f"passage {passages.ids[start + row]!r}")  # type: ignore[misc]
        work.append(vectors_ND)
    return counted.rates(time.perf_counter() - started)


def _batches(passages: Table, rows: NDArray[np.int64], max_tokens: int, batch_tokens: int) -> Batches:
    lengths = np.minimum(passages.lengths[rows], max_tokens)
    for positions in length_batches(lengths, batch_tokens):
        yield positions, collate(passages, rows[positions], max_tokens=max_tokens).tensors()


class _Count:
    """What went through the model."""

    def __init__(self) -> None:
        self.passages = self.tokens = self.places = 0

    def counting(self, batches: Batches) -> Iterator[Any]:
        for positions, tensors in batches:
            self.passages += len(positions)
            self.tokens += int(tensors["attention_mask"].sum())
            self.places += tensors["input_ids"].numel()
            yield positions, tensors

    def rates(self, seconds: float) -> dict[str, Any]:
        if not self.passages:
            return {}
        return {
            "passages_per_second": round(self.passages / seconds, 1),
            "tokens_per_second": round(self.tokens / seconds),
            "padding": round(1 - self.tokens / self.places, 4),
        }


class _Vectors:
    """vectors.npy under construction: rows are appended, and count once `resume/` says so."""

    def __init__(self, context: Context, *, count: int, dim: int, dtype: type[np.floating[Any]]) -> None:
        self.count = count
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._file = context.work / VECTORS
        self._marker = context.resume / DONE
        self._row_bytes = dim * self.dtype.itemsize
        self.done = int(json.loads(self._marker.read_text(encoding="utf-8"))) if self._marker.exists() else 0
        if self.done == 0:
            with open(self._file, "wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (count, dim)}
                np.lib.format.write_array_header_1_0(file, header)
        # What an interrupted shard has written comes after what is done.
        self._header_bytes = _header_bytes(self._file)
        os.truncate(self._file, self._header_bytes + self.done * self._row_bytes)

    def append(self, vectors_ND: NDArray[np.float32]) -> None:
        """Write the next rows and let them count."""
        with open(self._file, "ab") as file:
            file.write(np.ascontiguousarray(vectors_ND, dtype=self.dtype).data)
            file.flush()
            os.fsync(file.fileno())
        self.done += len(vectors_ND)
        write_json(self._marker, self.done)


def _header_bytes(file: Path) -> int:
    with open(file, "rb") as opened:
        np.lib.format.read_magic(opened)
        np.lib.format.read_array_header_1_0(opened)
        return opened.tell()
