"""rerank: cross-encoder scores (raw logits) for the top of a run, or for training groups (the teacher scores of distillation).

Pairs are put together from the store's tokens. Queries go through in shards of about `shard_pairs` pairs, sorted by length within a shard;
a finished shard survives a kill, and memory does not grow with the number of pairs scored.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.artifacts import Manifest, open_artifact, read_manifest
from simlm.data.batches import collate_pairs, length_batches, pair_lengths
from simlm.data.store import Store
from simlm.errors import ArtifactError
from simlm.rankings import Floats, Groups, Ints, Run, offsets_of
from simlm.recipe import RerankSettings
from simlm.stages import Context
from simlm.types import Split

if TYPE_CHECKING:
    from simlm.models.inference import Batches
    from simlm.models.reranker import Reranker

TIMED_QUERIES, TIMED_SECONDS = 20, 20.0
"""One at a time, for milliseconds_per_query; no further query is begun after that many seconds."""


def run(settings: RerankSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, model, and either run (writes `settings.splits`) or groups (writes split train).

    Of a group the positives and the first `depth` negatives are scored. Facts: num_queries, num_pairs, depth, precision,
    pairs_per_second (of this try) and, of a run, milliseconds_per_query (first stage and re-ranking together, one query at a time) and
    bytes_per_passage (of the first stage's index).
    """
    from simlm.models.reranker import load_reranker
    from simlm.models.vocabulary import check_vocabulary

    store = Store.open(inputs["store"])
    candidates, first_stage = _candidates(settings, inputs)
    model = open_artifact(inputs["model"], "model").path
    tokens = _max_pair_tokens(settings, model)
    reranker = load_reranker(model, precision=settings.precision, max_pair_tokens=tokens, batch_tokens=settings.batch_tokens)
    check_vocabulary(model, store.tokenizer())
    scorer = _Scorer(store, reranker, settings)
    runs = [scorer.rerank(lists, context) for lists in candidates]
    for reranked in runs:
        reranked.save(context.work)
    context.record(
        num_queries=sum(len(reranked) for reranked in runs),
        num_pairs=sum(len(reranked.passage_rows) for reranked in runs),
        depth=settings.depth,
        max_pair_tokens=reranker.max_pair_tokens,
        precision=reranker.precision,
        pairs_per_second=scorer.pairs_per_second(),
    )
    if "groups" not in inputs:
        own = _milliseconds_per_query(store, reranker, runs)
        earlier = first_stage.facts.get("milliseconds_per_query")
        context.record(
            milliseconds_per_query=round(own + earlier, 3) if own is not None and earlier is not None else own,
            reranking_milliseconds_per_query=own,
            bytes_per_passage=first_stage.facts.get("bytes_per_passage"),
        )


def _max_pair_tokens(settings: RerankSettings, model: Path) -> int:
    """Those of the settings, but not more than the model was trained with."""
    from simlm.models.model_folder import read_model_folder

    own = read_model_folder(str(model)).max_pair_tokens
    return settings.max_pair_tokens if own is None else min(settings.max_pair_tokens, own)


# --- which pairs


@dataclass(frozen=True)
class _Lists:
    """Passages to score for the queries of a split: those at `position` come from `rows_of(position)`."""

    split: Split
    query_rows: Ints
    source: Run | Groups
    depth: int

    def rows_of(self, position: int) -> Ints:
        if isinstance(self.source, Run):
            return self.source.ranked(position)[0][: self.depth]
        positives, negatives = self.source.positives(position)[0], self.source.negatives(position)[0]
        return np.concatenate([positives, negatives[: self.depth]])

    def counts(self) -> Ints:
        """int64 [Q], passages of each query."""
        if isinstance(self.source, Run):
            return np.minimum(np.diff(self.source.offsets), self.depth)
        negatives = np.minimum(np.diff(self.source.negative_offsets), self.depth)
        counts: Ints = np.diff(self.source.positive_offsets) + negatives
        return counts

    def shards(self, num_pairs: int) -> list[tuple[int, int]]:
        """Positions begin..end of consecutive queries with `num_pairs` pairs or the query that goes beyond."""
        total = np.cumsum(self.counts())
        bounds, end = [], 0
        while end < len(total):
            begin, before = end, int(total[end - 1]) if end else 0
            end = min(int(np.searchsorted(total, before + num_pairs)) + 1, len(total))
            bounds.append((begin, end))
        return bounds


def _candidates(settings: RerankSettings, inputs: dict[str, Path]) -> tuple[list[_Lists], Manifest]:
    role = "groups" if "groups" in inputs else "run"
    source = open_artifact(inputs[role], "groups" if role == "groups" else "run")
    made_from = source.manifest.inputs.get("store")
    if made_from is not None and made_from != read_manifest(inputs["store"], "store").fingerprint:
        raise ArtifactError(
            f"{inputs[role]}: made from another version of the corpus than {inputs['store']}, so passage rows do not fit; "
            "run the step that makes it again"
        )
    if role == "groups":
        groups = Groups.load(source.path, "train")
        return [_Lists("train", groups.query_rows, groups, settings.depth)], source.manifest
    runs = [Run.load(source.path, split) for split in dict.fromkeys(settings.splits)]
    return [_Lists(ranked.split, ranked.query_rows, ranked, settings.depth) for ranked in runs], source.manifest


# --- their scores


class _Scorer:
    """Scores lists of candidates shard by shard, and counts."""

    def __init__(self, store: Store, reranker: Reranker, settings: RerankSettings) -> None:
        self.store = store
        self.reranker = reranker
        self.settings = settings
        self.num_pairs = 0
        self.seconds = 0.0

    def rerank(self, lists: _Lists, context: Context) -> Run:
        """The lists ranked by the re-ranker; shards that an earlier try finished are read from `resume/`."""
        bounds = lists.shards(self.settings.shard_pairs)
        files = []
        for begin, end in context.progress.track(bounds, f"rerank {lists.split}", total=len(bounds), unit="shard"):
            file = context.resume / f"{lists.split}-{begin}.npz"
            if not file.exists():
                _save_shard(file, self._score(lists, begin, end))
            files.append(file)
        return _joined(lists.split, files)

    def pairs_per_second(self) -> float | None:
        """Of what was scored in this try; None if nothing was."""
        return round(self.num_pairs / self.seconds, 1) if self.num_pairs else None

    def _score(self, lists: _Lists, begin: int, end: int) -> Run:
        started = time.perf_counter()
        passages = [lists.rows_of(position) for position in range(begin, end)]
        query_rows = np.asarray(lists.query_rows[begin:end])
        offsets = offsets_of([len(rows) for rows in passages])
        pair_queries = np.repeat(query_rows, np.diff(offsets))
        pair_passages = np.concatenate(passages)
        logits = np.empty(len(pair_queries), dtype=np.float32)
        if len(logits):
            queries, corpus = self.store.queries(lists.split), self.store.passages

            def name(pair: int) -> str:
                return f"query {queries.ids[int(pair_queries[pair])]!r} with passage {corpus.ids[int(pair_passages[pair])]!r}"

            self.reranker.inference.run(self._batches(lists.split, pair_queries, pair_passages), logits, name=name)
        self.num_pairs += len(logits)
        self.seconds += time.perf_counter() - started
        return _ranked(lists.split, query_rows, offsets, pair_passages, logits)

    def _batches(self, split: Split, query_rows: Ints, passage_rows: Ints) -> Batches:
        tokens = self.reranker.max_pair_tokens
        lengths = pair_lengths(self.store, split, query_rows, passage_rows, max_tokens=tokens)
        for positions in length_batches(lengths, self.settings.batch_tokens):
            batch = collate_pairs(self.store, split, query_rows[positions], passage_rows[positions], max_tokens=tokens)
            yield positions, batch.tensors()


def _ranked(split: Split, query_rows: Ints, offsets: Ints, passage_rows: Ints, scores: Floats) -> Run:
    """Each query's slice sorted: best first, of equal scores the smaller passage row."""
    owner = np.repeat(np.arange(len(query_rows)), np.diff(offsets))
    order = np.lexsort((passage_rows, -scores, owner))
    return Run(split, query_rows, offsets, passage_rows[order], scores[order])


def _save_shard(file: Path, shard: Run) -> None:
    temporary = file.with_suffix(".tmp")
    arrays = {"query_rows": shard.query_rows, "counts": np.diff(shard.offsets), "passage_rows": shard.passage_rows, "scores": shard.scores}
    with open(temporary, "wb") as output:
        np.savez(output, **arrays)  # type: ignore[arg-type, unused-ignore]
        output.flush()
        os.fsync(output.fileno())
    temporary.replace(file)


def _joined(split: Split, files: Sequence[Path]) -> Run:
    """One run of the shards, in order."""
    parts: dict[str, list[Any]] = {"query_rows": [np.empty(0, np.int64)], "counts": [np.empty(0, np.int64)]}
    parts |= {"passage_rows": [np.empty(0, np.int64)], "scores": [np.empty(0, np.float32)]}
    for file in files:
        with np.load(file, allow_pickle=False) as shard:
            for name, arrays in parts.items():
                arrays.append(shard[name])
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Run(split, whole["query_rows"], offsets_of(whole["counts"]), whole["passage_rows"], whole["scores"])


# --- how long one query takes


def _milliseconds_per_query(store: Store, reranker: Reranker, runs: list[Run]) -> float | None:
    """Median wall time of re-ranking one query's passages from their texts; None without queries.

    The first query is asked twice: what is loaded or compiled on first use is not counted.
    """
    questions = _questions(store, runs)
    first = next(questions, None)
    if first is None:
        return None
    reranker.score(*first)
    seconds: list[float] = []
    for query, passages in _questions(store, runs):
        started = time.perf_counter()
        reranker.score(query, passages)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == TIMED_QUERIES or sum(seconds) > TIMED_SECONDS:
            break
    return round(float(np.median(seconds)) * 1000, 3)


def _questions(store: Store, runs: list[Run]) -> Iterator[tuple[str, list[str | tuple[str, str]]]]:
    """Text of each query and (title, text) of its passages."""
    table = store.passages
    for ranked in runs:
        for query_row, rows, _ in ranked:
            yield store.queries(ranked.split).text(query_row), [(table.title(int(row)), table.text(int(row))) for row in rows]
