"""Search the queries of some splits in an index: one run a split.

Queries go through in shards, dealt out to the processes; a finished shard survives a kill, and what it holds does not depend on the
number of processes. Dense queries are encoded from the store's tokens, with the model that encoded the passages.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.artifacts import open_artifact, read_manifest
from simlm.data.store import Store, Table, passages_fingerprint
from simlm.errors import ArtifactError
from simlm.index import Index, Results, open_index
from simlm.index.flat import FlatIndex
from simlm.rankings import Floats, Ints, Run, offsets_of
from simlm.recipe import SearchSettings
from simlm.runtime import Ranks
from simlm.stages import Context
from simlm.types import Split

if TYPE_CHECKING:
    from simlm.data.prompts import Prompt
    from simlm.models.inference import Batches
    from simlm.models.retriever import Retriever

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
    shards = [
        _Shard(split, np.arange(start, min(start + size, len(table)), dtype=np.int64), context.resume / f"{split}-{start}.npz")
        for size in [max(SHARD_QUERIES, settings.batch_queries)]
        for split, table in tables.items()
        for start in range(0, len(table), size)
    ]
    _search_shards(searcher, tables, shards, context)
    if context.rank > 0:
        return
    for split in tables:
        _joined(split, [shard.file for shard in shards if shard.split == split]).save(context.work)
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
    if index.info["store_fingerprint"] != passages_fingerprint(inputs["store"]):
        raise ArtifactError(
            f"{inputs['index']}: built for another version of the corpus than {inputs['store']}, so passage rows do not fit; "
            "run the build_index step again"
        )
    return index


@dataclass(frozen=True)
class _Shard:
    """Queries of one split, and where what was found for them is kept until all are done."""

    split: Split
    rows: Ints
    file: Path


def _search_shards(searcher: _Searcher, tables: dict[Split, Table], shards: list[_Shard], context: Context) -> None:
    """Search what is not done yet: this process its share, then wait for the others."""
    ranks = Ranks(context.rank, context.num_ranks)
    pending = ranks.from_first(lambda: [place for place, shard in enumerate(shards) if not shard.file.exists()])
    own = pending[context.rank :: context.num_ranks]
    for place in context.progress.track(own, "search", total=len(own), unit="shard"):
        shard = shards[place]
        results = searcher.search(tables[shard.split], shard.rows)
        _save_shard(shard.file, Run.from_matrix(shard.split, shard.rows, *_swapped(results)))
    ranks.barrier()


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
    retriever: Retriever
    prompt: Prompt | None
    options: dict[str, Any]
    """Of the index's `search`."""

    def search(self, table: Table, rows: Ints) -> Results:
        return self.index.search(self.encode_rows(table, rows), self.depth, **self.options)

    def encode_rows(self, table: Table, rows: Ints) -> Floats:
        """float32 [Q, D], in the order of `rows`."""
        vectors_QD = np.empty((len(rows), self.retriever.dim), dtype=np.float32)
        self.retriever.inference.run(self._batches(table, rows), vectors_QD, name=lambda place: f"query {table.ids[int(rows[place])]!r}")
        return vectors_QD

    def _batches(self, table: Table, rows: Ints) -> Batches:
        from simlm.data.batches import collate, length_batches, sequence_lengths

        max_tokens = self.retriever.max_query_tokens
        lengths = sequence_lengths(table, rows, max_tokens=max_tokens, prompt=self.prompt)
        for positions in length_batches(lengths, self.retriever.batch_tokens):
            yield positions, collate(table, rows[positions], max_tokens=max_tokens, prompt=self.prompt).tensors()

    def ask(self, text: str) -> Results:
        return self.index.search(self.retriever.encode_queries([text]), self.depth, **self.options)


_Searcher = _TextSearcher | _DenseSearcher


def _dense_searcher(settings: SearchSettings, inputs: dict[str, Path], index: Index, store: Store, depth: int) -> _DenseSearcher:
    from simlm.data.prompts import Prompt
    from simlm.models.model_folder import read_model_folder
    from simlm.models.retriever import load_retriever

    model = settings.model
    max_tokens = int(store.info["max_query_tokens"])
    if "model" in inputs:
        model = model.model_copy(update={"start": str(open_artifact(inputs["model"], "model").path), "revision": None})
        # As long as the model was trained with, and as long as it cuts them itself: what is measured is what is shipped.
        max_tokens = min(max_tokens, read_model_folder(model.start).max_query_tokens or max_tokens)
    retriever = load_retriever(
        model, precision=settings.precision, max_query_tokens=max_tokens, batch_tokens=settings.batch_queries * max_tokens
    )
    if retriever.dim != index.info["dim"]:
        raise ArtifactError(
            f"{inputs['index']}: vectors of dimension {index.info['dim']}, the model makes {retriever.dim}; "
            "give the model that encoded the passages"
        )
    prompt = Prompt.of(store.tokenizer(), retriever.query_prompt, max_tokens, key="query_prompt")
    opened: object = index
    options: dict[str, Any] = {"memory_bytes": settings.memory_budget * 2**20} if isinstance(opened, FlatIndex) else {}
    return _DenseSearcher(index, depth, retriever, prompt, options)
