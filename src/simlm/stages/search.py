"""Search the queries of some splits in an index: one run a split.

Queries go through in shards; a finished shard survives a kill. Dense queries are encoded from the store's tokens, with the model that
encoded the passages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.artifacts import open_artifact, read_manifest
from simlm.data.store import Store, Table
from simlm.errors import ArtifactError, DataError
from simlm.index import Index, Results, open_index
from simlm.rankings import Floats, Ints, Run, offsets_of
from simlm.recipe import SearchSettings
from simlm.stages import Context
from simlm.types import Split

if TYPE_CHECKING:
    import torch

SHARD_QUERIES = 4096
"""Searched between two points that survive a kill (or `batch_queries`, if that is more): the index is read once a shard."""
TIMED_QUERIES = 100
"""One at a time, for milliseconds_per_query."""


def run(settings: SearchSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, index, model (dense; without it the model of the settings as it is).

    Facts: milliseconds_per_query (median, one query at a time from text to result), bytes_per_passage, num_queries, num_passages, depth,
    index_type.
    """
    store = Store.open(inputs["store"])
    index = _open_matching_index(inputs)
    tables = {split: store.queries(split) for split in dict.fromkeys(settings.splits)}
    depth = min(settings.depth, len(index))
    searcher = _dense_searcher(settings, inputs, index, store, depth) if index.takes == "vectors" else _TextSearcher(index, depth)
    for split, table in tables.items():
        _search_split(searcher, split, table, settings, context).save(context.work)
    index_facts = read_manifest(inputs["index"], "index").facts
    context.record(
        milliseconds_per_query=_milliseconds_per_query(searcher, list(tables.values())),
        bytes_per_passage=index_facts.get("bytes_per_passage"),
        num_queries=sum(len(table) for table in tables.values()),
        num_passages=len(index),
        depth=settings.depth,
        index_type=index.info["type"],
    )


def _open_matching_index(inputs: dict[str, Path]) -> Index:
    index = open_index(inputs["index"])
    store_fingerprint = read_manifest(inputs["store"], "store").fingerprint
    if index.info["store_fingerprint"] != store_fingerprint:
        raise ArtifactError(
            f"{inputs['index']}: built for another version of the corpus than {inputs['store']}, so passage rows do not fit; "
            "run the build_index step again"
        )
    return index


def _search_split(searcher: _Searcher, split: Split, table: Table, settings: SearchSettings, context: Context) -> Run:
    shard = max(SHARD_QUERIES, settings.batch_queries)
    files = []
    starts = range(0, len(table), shard)
    for start in context.progress.track(starts, f"search {split}", total=len(starts), unit="shard"):
        file = context.resume / f"{split}-{start}.npz"
        if not file.exists():
            rows = np.arange(start, min(start + shard, len(table)), dtype=np.int64)
            _save_shard(file, Run.from_matrix(split, rows, *_swapped(searcher.search(table, rows))))
        files.append(file)
    return _joined(split, files)


def _swapped(results: Results) -> tuple[Ints, Floats]:
    scores_QK, rows_QK = results
    return rows_QK, scores_QK


def _save_shard(file: Path, run_of_shard: Run) -> None:
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as output:
        np.savez(
            output,
            query_rows=run_of_shard.query_rows,
            counts=np.diff(run_of_shard.offsets),
            passage_rows=run_of_shard.passage_rows,
            scores=run_of_shard.scores,
        )
        output.flush()
        os.fsync(output.fileno())
    temporary.replace(file)


def _joined(split: Split, files: list[Path]) -> Run:
    """One run of the shards, in order."""
    parts: dict[str, list[Any]] = {"query_rows": [np.empty(0, np.int64)], "counts": [np.empty(0, np.int64)]}
    parts |= {"passage_rows": [np.empty(0, np.int64)], "scores": [np.empty(0, np.float32)]}
    for file in files:
        with np.load(file, allow_pickle=False) as shard:
            for name, arrays in parts.items():
                arrays.append(shard[name])
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Run(split, whole["query_rows"], offsets_of(whole["counts"]), whole["passage_rows"], whole["scores"])


def _milliseconds_per_query(searcher: _Searcher, tables: list[Table]) -> float | None:
    """Median wall time of one query from its text to its results; None without queries.

    The first query is asked twice: what is loaded or compiled on first use is not counted.
    """
    texts = [text for table in tables for text in (table.text(row) for row in range(min(len(table), TIMED_QUERIES)))][:TIMED_QUERIES]
    if not texts:
        return None
    searcher.ask(texts[0])
    seconds = []
    for text in texts:
        started = time.perf_counter()
        searcher.ask(text)
        seconds.append(time.perf_counter() - started)
    return round(float(np.median(seconds)) * 1000, 3)


@dataclass(frozen=True)
class _TextSearcher:
    index: Index
    depth: int

    def search(self, table: Table, rows: Ints) -> Results:
        return self.index.search([table.text(int(row)) for row in rows], self.depth)

    def ask(self, text: str) -> Results:
        return self.index.search([text], self.depth)


@dataclass(frozen=True)
class _DenseSearcher:
    index: Index
    depth: int
    encode: Callable[[dict[str, torch.Tensor]], Floats]
    batch_tokens: int
    tokenizer: Any
    max_tokens: int

    def search(self, table: Table, rows: Ints) -> Results:
        return self.index.search(self.encode_rows(table, rows), self.depth)

    def encode_rows(self, table: Table, rows: Ints) -> Floats:
        """float32 [Q, D], in the order of `rows`."""
        from simlm.data.batches import collate, length_batches

        vectors_QD = np.empty((len(rows), int(self.index.info["dim"])), dtype=np.float32)
        for part in length_batches(np.asarray(table.lengths[rows]), self.batch_tokens):
            vectors_QD[part] = self.encode(collate(table, rows[part]).tensors())
        return vectors_QD

    def ask(self, text: str) -> Results:
        tokens = self.tokenizer([text], truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return self.index.search(self.encode(dict(tokens)), self.depth)


_Searcher = _TextSearcher | _DenseSearcher


def _dense_searcher(settings: SearchSettings, inputs: dict[str, Path], index: Index, store: Store, depth: int) -> _DenseSearcher:
    import torch

    from simlm.models.biencoder import BiEncoder
    from simlm.models.model_folder import read_model_folder
    from simlm.training.precision import autocast, resolve_bf16, training_device

    model = BiEncoder.load(open_artifact(inputs["model"], "model").path) if "model" in inputs else BiEncoder.load(settings.model)
    if model.dim != index.info["dim"]:
        raise ArtifactError(
            f"{inputs['index']}: vectors of dimension {index.info['dim']}, the model makes {model.dim}; "
            "give the model that encoded the passages"
        )
    device = training_device()
    model.eval().to(device)
    bf16 = resolve_bf16("auto" if settings.precision == "auto" else settings.precision == "bf16", device.type)

    @torch.inference_mode()
    def encode(tokens: dict[str, torch.Tensor]) -> Floats:
        with autocast(device.type, bf16):
            vectors_BD: Floats = model(**{name: tensor.to(device) for name, tensor in tokens.items()}).float().cpu().numpy()
        if not np.isfinite(vectors_BD).all():
            raise DataError('the model gives query vectors that are not finite numbers; use precision = "fp32", or train it again')
        return vectors_BD

    max_tokens = int(store.info["max_query_tokens"])
    if "model" in inputs:
        # As long as the model was trained with, and as long as it cuts them itself: what is measured is what is shipped.
        max_tokens = min(max_tokens, read_model_folder(str(inputs["model"])).max_query_tokens or max_tokens)
    return _DenseSearcher(index, depth, encode, settings.batch_queries * max_tokens, store.tokenizer(), max_tokens)
