"""encode: passages of the store -> vectors of unit length, by a trained retriever or by the starting model as it is.

Tokens come from the store, so nothing is tokenised again. Passages go through in shards of consecutive rows, dealt out to the processes;
within a shard they are sorted by length. A shard's vectors are written to their place in `vectors.npy` and synced before the shard counts
as done, so a kill loses at most one shard a process, and memory does not grow with the corpus. What a shard holds does not depend on the
number of processes, so neither do the vectors.

With `cache`, vectors that the same model has made before are taken from the run's embedding cache, and only the rest goes through it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import open_artifact, write_json
from simlm.data.batches import collate, length_batches, sequence_lengths
from simlm.data.embedding_cache import EmbeddingCache, passage_keys
from simlm.data.prompts import Prompt
from simlm.data.store import Store, Table
from simlm.recipe import EncodeSettings
from simlm.runtime import Ranks
from simlm.stages import Context

if TYPE_CHECKING:
    from simlm.models.biencoder import BiEncoder
    from simlm.models.inference import Batches
    from simlm.models.retriever import Retriever

VECTORS = "vectors.npy"
INFO = "embeddings.json"
DONE = "passages_done"
SEGMENT = "cache_segment"


def run(settings: EncodeSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, model (without it the model of the settings as it is).

    Writes vectors.npy [N, D] and embeddings.json. Facts: num_passages, dim, precision, storage, bytes_total, num_cached (taken from the
    cache), cache_bytes (of disk, besides the vectors of this artifact), and, of what this try encoded, passages_per_second and
    tokens_per_second (of all processes, loading the model left out) and padding (share of the computed positions that are padding).
    """
    from simlm.models.retriever import load_retriever
    from simlm.models.vocabulary import check_vocabulary

    store = Store.open(inputs["store"])
    model = settings.model
    if "model" in inputs:
        model = model.model_copy(update={"start": str(open_artifact(inputs["model"], "model").path), "revision": None})
    retriever = load_retriever(model, precision=settings.precision, batch_tokens=settings.batch_tokens, digest=settings.cache)
    check_vocabulary(model.start, store.tokenizer(), revision=model.revision)
    passages = _Passages.of(store, retriever)
    ranks = Ranks(context.rank, context.num_ranks)
    dtype = np.dtype(np.float16 if settings.storage == "fp16" else np.float32)
    vectors = _Vectors(context, count=len(store.passages), dim=retriever.dim, dtype=dtype, shard_passages=settings.shard_passages)
    pending = ranks.from_first(vectors.begin)
    cache = _open_cache(settings, context, ranks, passages, retriever, vectors) if settings.cache else None
    counted = _encode(vectors, cache, retriever, passages, pending, context)
    total = _Count.sum(ranks.gather(counted))
    if context.rank > 0:
        return
    info = {"dim": retriever.dim, "count": vectors.count, "normalised": True, "precision": retriever.precision, "storage": settings.storage}
    write_json(context.work / INFO, info)
    if cache is not None:
        _finish_cache(cache, vectors, context)
    context.record(
        num_passages=vectors.count,
        num_cached=vectors.num_cached(),
        dim=retriever.dim,
        precision=retriever.precision,
        storage=settings.storage,
        bytes_total=vectors.file.stat().st_size,
        **total.rates(),
    )


def _encode(
    vectors: _Vectors, cache: EmbeddingCache | None, retriever: Retriever, passages: _Passages, pending: list[int], context: Context
) -> _Count:
    """Encode this process's share of the shards that are not done yet; what went through the model."""
    counted = _Count()
    own = pending[context.rank :: context.num_ranks]
    started = time.perf_counter()
    for start in context.progress.track(own, "encode", total=len(own), unit="shard"):
        stop = min(start + vectors.shard_passages, vectors.count)
        vectors_ND = np.empty((stop - start, retriever.dim), dtype=np.float32)
        found = np.zeros(stop - start, dtype=bool)
        keys = None
        if cache is not None:
            keys = passage_keys(passages.table, start, stop)
            found = cache.find(keys, vectors_ND)
        rows = start + np.flatnonzero(~found)
        if len(rows):
            made_MD = np.empty((len(rows), retriever.dim), dtype=np.float32)
            batches = counted.counting(passages.batches(rows, retriever.batch_tokens))
            retriever.inference.run(batches, made_MD, name=lambda place, rows=rows: f"passage {passages.table.ids[int(rows[place])]!r}")  # type: ignore[misc]
            vectors_ND[~found] = made_MD
        vectors.write(start, vectors_ND)
        if cache is not None and keys is not None:
            cache.add(start, keys)
        vectors.mark_done(start, num_cached=int(found.sum()))
    counted.seconds = time.perf_counter() - started
    return counted


@dataclass(frozen=True)
class _Passages:
    """Passages of the store as the model reads them."""

    table: Table
    max_tokens: int
    prompt: Prompt | None

    @classmethod
    def of(cls, store: Store, retriever: Retriever) -> _Passages:
        max_tokens = min(retriever.max_passage_tokens, store.passages.max_tokens)
        prompt = Prompt.of(store.tokenizer(), retriever.passage_prompt, max_tokens, key="passage_prompt")
        return cls(store.passages, max_tokens, prompt)

    def batches(self, rows: NDArray[np.int64], batch_tokens: int) -> Batches:
        lengths = sequence_lengths(self.table, rows, max_tokens=self.max_tokens, prompt=self.prompt)
        for positions in length_batches(lengths, batch_tokens):
            yield positions, collate(self.table, rows[positions], max_tokens=self.max_tokens, prompt=self.prompt).tensors()


@dataclass
class _Count:
    """What went through the model; seconds: of the slowest process."""

    passages: int = 0
    tokens: int = 0
    places: int = 0
    seconds: float = 0.0

    def counting(self, batches: Batches) -> Iterator[Any]:
        for positions, tensors in batches:
            self.passages += len(positions)
            self.tokens += int(tensors["attention_mask"].sum())
            self.places += tensors["input_ids"].numel()
            yield positions, tensors

    @classmethod
    def sum(cls, counts: list[_Count]) -> _Count:
        return cls(
            sum(count.passages for count in counts),
            sum(count.tokens for count in counts),
            sum(count.places for count in counts),
            max(count.seconds for count in counts),
        )

    def rates(self) -> dict[str, Any]:
        if not self.passages:
            return {}
        return {
            "passages_per_second": round(self.passages / self.seconds, 1),
            "tokens_per_second": round(self.tokens / self.seconds),
            "padding": round(1 - self.tokens / self.places, 4),
        }


class _Vectors:
    """vectors.npy under construction: as long as it is going to be from the start; a shard counts once `resume/` names it."""

    def __init__(self, context: Context, *, count: int, dim: int, dtype: np.dtype[Any], shard_passages: int) -> None:
        self.count = count
        self.dim = dim
        self.dtype = dtype.newbyteorder("<")
        self.file = context.work / VECTORS
        self.shard_passages = shard_passages
        self._done = context.resume / DONE

    def begin(self) -> list[int]:
        """Make the file if it is not there; first rows of the shards that are not done. For one process, before any other writes."""
        self._done.mkdir(exist_ok=True)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count, self.dim)}
        if not self.file.exists():
            temporary = self.file.with_name(f".{VECTORS}.tmp")
            with open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + self.count * self._row_bytes)
            os.replace(temporary, self.file)
        os.truncate(self.file, self._header_bytes() + self.count * self._row_bytes)
        return [start for start in range(0, self.count, self.shard_passages) if not (self._done / str(start)).exists()]

    def write(self, start: int, vectors_ND: NDArray[np.float32]) -> None:
        """Put vectors in their place, rows `start` and following, and on the disk."""
        with open(self.file, "r+b") as file:
            file.seek(self._header_bytes() + start * self._row_bytes)
            file.write(np.ascontiguousarray(vectors_ND, dtype=self.dtype).data)
            file.flush()
            os.fsync(file.fileno())

    def mark_done(self, start: int, *, num_cached: int) -> None:
        """Let the shard that begins at row `start` count."""
        write_json(self._done / str(start), num_cached)

    def num_cached(self) -> int:
        """Vectors that came from the cache, in all tries."""
        return sum(int(marker.read_text(encoding="utf-8")) for marker in self._done.iterdir() if marker.name.isdecimal())

    @property
    def _row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    def _header_bytes(self) -> int:
        with open(self.file, "rb") as opened:
            np.lib.format.read_magic(opened)
            np.lib.format.read_array_header_1_0(opened)
            return opened.tell()


def _open_cache(
    settings: EncodeSettings, context: Context, ranks: Ranks, passages: _Passages, retriever: Retriever, vectors: _Vectors
) -> EmbeddingCache:
    """The cache of this step for this very model and these settings, begun."""

    def segment() -> str:
        note = context.resume / SEGMENT
        if not note.exists():
            write_json(note, {"segment": EmbeddingCache.new_segment(context.embedding_cache, about)})
        return str(json.loads(note.read_text(encoding="utf-8"))["segment"])

    model = cast("BiEncoder", retriever.inference.model)
    about = ranks.from_first(
        lambda: {
            "format": 1,
            "weights": retriever.digest,
            "attention": model.encoder.config._attn_implementation,
            "pooling": model.pooling,
            "prompt": retriever.passage_prompt,
            "max_tokens": passages.max_tokens,
            "template": asdict(passages.table.template),
            "precision": retriever.precision,
            "device": retriever.inference.device.type,
            "storage": settings.storage,
        }
    )
    cache = EmbeddingCache(context.embedding_cache, about, segment=ranks.from_first(segment), dim=vectors.dim, dtype=vectors.dtype)
    ranks.from_first(lambda: cache.begin(vectors.file))
    return cache


def _finish_cache(cache: EmbeddingCache, vectors: _Vectors, context: Context) -> None:
    num_bytes = cache.finish(vectors.file)
    context.record(cache_bytes=num_bytes)
    if num_bytes > vectors.file.stat().st_size // 2:
        context.progress.say(
            f"encode: the embedding cache takes {num_bytes / 2**20:,.0f} MiB besides these vectors, those of an earlier model or corpus; "
            f"delete {cache.folder.parent} to free them, or set encode.cache = false"
        )
