"""rerank: cross-encoder scores (raw logits) for the top of a run, or for training groups (the teacher scores of distillation).

What the run's pair_scores/ knows of this very model is looked up, and only the rest is scored: another depth or filter costs what is new.
Queries go through in shards of about `shard_pairs` pairs, sorted by length within a shard; a shard's scores are kept before the next one
begins, so a kill loses one shard at most, and memory does not grow with the number of pairs. Pairs are put together from the tokens of
the store, or from its texts where the model has another tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simlm.artifacts import Manifest, open_artifact, read_manifest
from simlm.data.batches import collate_pairs, length_batches, pair_lengths
from simlm.data.store import Store
from simlm.data.teacher_scores import Teacher, TeacherScores
from simlm.errors import ArtifactError, DataError
from simlm.rankings import Floats, Groups, Ints, Run, RunWriter, offsets_of
from simlm.recipe import OutsideRerankSettings, RerankSettings, SampledRerankSettings
from simlm.stages import Context
from simlm.types import Split

if TYPE_CHECKING:
    from simlm.models.inference import Batches
    from simlm.models.reranker import Reranker

TIMED_QUERIES, TIMED_SECONDS = 20, 20.0
"""One at a time, for milliseconds_per_query; no further query is begun after that many seconds."""


def run(settings: RerankSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, model (none with OutsideRerankSettings), and either run (writes `settings.splits`) or groups (writes split train).

    Of a group the positives and the first `depth` negatives are scored; of SampledRerankSettings.num_queries queries, where it is set.
    Facts: num_queries, num_pairs, of which num_known_pairs were not scored again, depth, precision, pairs_per_second (of what was scored in
    this try) and, of a whole run, milliseconds_per_query (first stage and re-ranking together, one query at a time) and bytes_per_passage
    (of the first stage's index).
    Raises DataError before scoring if a group has no positive or no group has a negative, ModelError for a model that has not one label.
    """
    store = Store.open(inputs["store"])
    candidates, first_stage = _candidates(settings, inputs, store, context.seed)
    _check_groups(candidates, store)
    scorer = _open_scorer(store, settings, inputs, context)
    for lists in candidates:
        scorer.rerank(lists, context)
    runs = [Run.load(context.work, lists.split) for lists in candidates]
    context.record(
        num_queries=sum(len(reranked) for reranked in runs),
        num_pairs=scorer.num_known + scorer.num_scored,
        num_known_pairs=scorer.num_known,
        depth=settings.depth,
        max_pair_tokens=scorer.reranker.max_pair_tokens,
        precision=scorer.reranker.precision,
        pairs_per_second=scorer.pairs_per_second(),
        teacher=scorer.scores.teacher.key,
    )
    if scorer.num_known:
        total = scorer.num_known + scorer.num_scored
        context.progress.say(f"rerank: {scorer.num_known:,} of {total:,} pairs had been scored before by this model")
    if "groups" not in inputs and _sampled(settings) is None:
        own = _milliseconds_per_query(store, scorer.reranker, runs)
        earlier = first_stage.facts.get("milliseconds_per_query")
        context.record(
            milliseconds_per_query=round(own + earlier, 3) if own is not None and earlier is not None else own,
            reranking_milliseconds_per_query=own,
            bytes_per_passage=first_stage.facts.get("bytes_per_passage"),
        )


def _open_scorer(store: Store, settings: RerankSettings, inputs: dict[str, Path], context: Context) -> _Scorer:
    """The model on its device, and what it has scored before in this run."""
    from simlm.models.backbone import load_tokenizer
    from simlm.models.reranker import load_reranker
    from simlm.models.vocabulary import check_vocabulary, tokenizer_digest
    from simlm.models.weights import model_digest

    outside = isinstance(settings, OutsideRerankSettings)
    reference = settings.checkpoint if isinstance(settings, OutsideRerankSettings) else str(open_artifact(inputs["model"], "model").path)
    reranker = load_reranker(reference, precision=settings.precision, batch_tokens=settings.batch_tokens)
    # Not more than the model was trained with, or has positions for.
    reranker.max_pair_tokens = min(settings.max_pair_tokens, reranker.max_pair_tokens)
    own_tokens = ""
    if outside:
        digest = tokenizer_digest(load_tokenizer(reference))
        own_tokens = digest if digest != tokenizer_digest(store.tokenizer()) else ""
    else:
        check_vocabulary(reference, store.tokenizer())
    teacher = Teacher(
        reference if outside else inputs["model"].name,
        weights=model_digest(reranker.inference.model),
        tokenizer=own_tokens,
        max_pair_tokens=reranker.max_pair_tokens,
        precision=reranker.precision,
        store=read_manifest(store.path, "store").fingerprint,
    )
    scores = TeacherScores.open(context.pair_scores, teacher)
    for name in scores.dropped:
        context.progress.say(f"rerank: {scores.folder / name} is damaged; its pairs are scored again")
    return _Scorer(store, reranker, settings, scores)


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


def _candidates(settings: RerankSettings, inputs: dict[str, Path], store: Store, seed: int) -> tuple[list[_Lists], Manifest]:
    role = "groups" if "groups" in inputs else "run"
    source = open_artifact(inputs[role], "groups" if role == "groups" else "run")
    made_from = source.manifest.inputs.get("store")
    if made_from is not None and made_from != read_manifest(inputs["store"], "store").fingerprint:
        raise ArtifactError(
            f"{inputs[role]}: made from another version of the corpus than {inputs['store']}, so passage rows do not fit; "
            "run the step that makes it again"
        )
    sample = _sampled(settings)
    if role == "groups":
        groups = Groups.load(source.path, "train")
        if sample is not None and sample < len(groups):
            groups = groups.take(np.sort(np.random.default_rng([seed, 13]).choice(len(groups), sample, replace=False)))
        return [_Lists("train", groups.query_rows, groups, settings.depth)], source.manifest
    runs = [Run.load(source.path, split) for split in dict.fromkeys(settings.splits)]
    if sample is not None:
        from simlm.training.dev import judged_sample

        runs = [run.take(np.flatnonzero(np.isin(run.query_rows, list(judged_sample(store, run.split, sample, seed))))) for run in runs]
    return [_Lists(ranked.split, ranked.query_rows, ranked, settings.depth) for ranked in runs], source.manifest


def _sampled(settings: RerankSettings) -> int | None:
    """How many queries are scored at most; None = all."""
    return settings.num_queries if isinstance(settings, SampledRerankSettings) else None


def _check_groups(candidates: list[_Lists], store: Store) -> None:
    """DataError if a group has no positive, or no group a negative: nothing could be taught with such scores."""
    for lists in candidates:
        if isinstance(lists.source, Run):
            continue
        without = np.flatnonzero(np.diff(lists.source.positive_offsets) == 0)
        if len(without):
            name = store.queries(lists.split).ids[int(lists.query_rows[without[0]])]
            raise DataError(f"{len(without):,} groups have no positive passage, the first is of query {name!r}; mine again")
        if len(lists.query_rows) and not np.diff(lists.source.negative_offsets).any():
            raise DataError(
                f"all negatives of all {len(lists.query_rows):,} groups are filtered away, so there is nothing for a teacher to compare; "
                "loosen the filters in [mining], or mine deeper"
            )


# --- their scores


class _Scorer:
    """Scores lists of candidates shard by shard, as far as they are not known, and counts."""

    def __init__(self, store: Store, reranker: Reranker, settings: RerankSettings, scores: TeacherScores) -> None:
        self.store = store
        self.reranker = reranker
        self.settings = settings
        self.scores = scores
        self.num_known = 0
        self.num_scored = 0
        self.seconds = 0.0

    def rerank(self, lists: _Lists, context: Context) -> None:
        """Write the lists ranked by the re-ranker as a run into `context.work`."""
        bounds = lists.shards(self.settings.shard_pairs)
        with RunWriter(context.work, lists.split, lists.query_rows, lists.counts()) as writer:
            for begin, end in context.progress.track(bounds, f"rerank {lists.split}", total=len(bounds), unit="shard"):
                writer.write(*self._ranked(lists, begin, end))

    def pairs_per_second(self) -> float | None:
        """Of what was scored in this try; None if nothing was."""
        return round(self.num_scored / self.seconds, 1) if self.num_scored else None

    def _ranked(self, lists: _Lists, begin: int, end: int) -> tuple[Ints, Floats]:
        """The lists at `begin` to `end`, end to end, each best first."""
        passages = [lists.rows_of(position) for position in range(begin, end)]
        offsets = offsets_of([len(rows) for rows in passages])
        queries_N = np.repeat(np.asarray(lists.query_rows[begin:end]), np.diff(offsets))
        passages_N = np.concatenate(passages)
        logits_N = self.scores.find(lists.split, queries_N, passages_N)
        unknown = np.flatnonzero(np.isnan(logits_N))
        self.num_known += len(logits_N) - len(unknown)
        if len(unknown):
            logits_N[unknown] = self._score(lists.split, queries_N[unknown], passages_N[unknown])
            self.scores.append(lists.split, queries_N[unknown], passages_N[unknown], logits_N[unknown])
        return _best_first(offsets, passages_N, logits_N)

    def _score(self, split: Split, queries_N: Ints, passages_N: Ints) -> Floats:
        started = time.perf_counter()
        query_ids, passage_ids = self.store.queries(split).ids, self.store.passages.ids

        def name(pair: int) -> str:
            return f"query {query_ids[int(queries_N[pair])]!r} with passage {passage_ids[int(passages_N[pair])]!r}"

        logits_N = np.empty(len(queries_N), dtype=np.float32)
        batches = self._text_batches if self.scores.teacher.tokenizer else self._token_batches
        self.reranker.inference.run(batches(split, queries_N, passages_N), logits_N, name=name)
        self.num_scored += len(logits_N)
        self.seconds += time.perf_counter() - started
        return logits_N

    def _token_batches(self, split: Split, queries_N: Ints, passages_N: Ints) -> Batches:
        tokens = self.reranker.max_pair_tokens
        lengths = pair_lengths(self.store, split, queries_N, passages_N, max_tokens=tokens)
        for positions in length_batches(lengths, self.settings.batch_tokens):
            batch = collate_pairs(self.store, split, queries_N[positions], passages_N[positions], max_tokens=tokens)
            yield positions, batch.tensors()

    def _text_batches(self, split: Split, queries_N: Ints, passages_N: Ints) -> Batches:
        from simlm.models.reranker import one_string

        queries, table = self.store.queries(split), self.store.passages
        texts = one_string([(table.title(int(row)), table.text(int(row))) for row in passages_N])
        return self.reranker.pair_batches([(queries.text(int(row)), text) for row, text in zip(queries_N, texts, strict=True)])


def _best_first(offsets: Ints, passages_N: Ints, logits_N: Floats) -> tuple[Ints, Floats]:
    """Each query's slice sorted: best first, of equal scores the smaller passage row."""
    owners_N = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((passages_N, -logits_N, owners_N))
    return passages_N[order], logits_N[order]


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
