"""What mined negatives are like: how hard, how many count, which may be relevant after all, and which come again and again.

The positive of a query is here the one that scores best; a run's scores are compared within that run only. Everything is counted block by
block, so that memory does not grow with the number of groups; texts are read for a seeded sample of the queries.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.evaluation.report.examples import clean, cut
from simlm.evaluation.report.results import ReportStore
from simlm.rankings import Groups, Ints, Run

FORMAT = 1
HARDNESS_EDGES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
"""Between them, and below and above them, lie the shares of the positive's score that negatives are counted by."""
RANK_BANDS = ((1, 1), (2, 3), (4, 10), (11, 50), (51, None))
TEMPERATURES = (0.01, 0.02, 0.05, 0.1)
GROUP_SIZES = (16, 24, 64)
"""The paper's: retrievers 1 and 2, the distilled one, the re-ranker."""
NEAR = 0.8
"""Share of the words of two texts that both have, from which they count as nearly the same."""
SAMPLE_QUERIES = 1000
SAMPLE_NEGATIVES = 50
"""Whose texts are compared: queries, and of each its first negatives."""
_BLOCK = 4096
_CACHED_TEXTS = 2048
_FREQUENT = 10
_SHOWN_CHARACTERS = 400

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class MinedRun:
    """A run that negatives are from. share: of the mix, None where it is alone; cosine: whether its scores are cosines."""

    name: str
    run: Run
    share: float | None
    cosine: bool


def measure_negatives(
    groups: Groups,
    runs: Sequence[MinedRun],
    store: ReportStore,
    *,
    name: str,
    digests: Callable[[Ints], NDArray[np.uint64]],
    facts: Mapping[str, Any],
    seed: int,
    teacher: Run | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    group_sizes: Sequence[int] = (),
    num_examples: int = 20,
) -> dict[str, Any]:
    """The content of negatives.json.

    runs: in the order of `groups.negative_sources`. digests: passage rows -> digests of their texts. facts: what the mining counted.
    teacher: raw logits by which suspects are told; without it the runs' own scores. group_sizes: of the trainings that read the groups
    (none = not known: lists are held against GROUP_SIZES).
    """
    qrels = store.qrels("train")
    best = _best_positives(groups, len(runs))
    return {
        "format": FORMAT,
        "name": name,
        "num_groups": len(groups),
        "num_negatives": len(groups.negative_rows),
        "num_passages": len(store.passages),
        "facts": dict(facts),
        "lists": _lists(groups, group_sizes, facts),
        "runs": [_run(groups, index, mined, best[index], qrels, temperatures) for index, mined in enumerate(runs)],
        "suspects": _suspects(groups, store, teacher, num_examples),
        "near_duplicates": _near_duplicates(groups, store, seed, num_examples),
        "repeated": _repeated(groups, store, digests),
    }


def effective_numbers(scores: Floats, owners: Ints, num_queries: int, temperature: float) -> Floats:
    """float64 [queries that have any]: exp of the entropy of softmax(scores / temperature) over each query's negatives.

    It is n where n negatives weigh the same, and 1 where one of them takes all of the gradient. owners: query of each score.
    """
    scaled = scores / temperature
    top = np.full(num_queries, -np.inf)
    np.maximum.at(top, owners, scaled)
    scaled = scaled - top[owners]
    weights = np.exp(scaled)
    total = np.bincount(owners, weights, minlength=num_queries)
    mean = np.bincount(owners, weights * scaled, minlength=num_queries)
    present = total > 0
    # Entropy of w / W with w = exp(x): log W - mean of x by the weights.
    numbers: Floats = np.exp(np.log(total[present]) - mean[present] / total[present])
    return numbers


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Words that both have over words that either has, 0..1; 0 where both have none."""
    either = len(one | other)
    return len(one & other) / either if either else 0.0


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


# --- lists and scores


@dataclass(frozen=True)
class _Block:
    """Negatives of consecutive queries. owners: position of each one's query, from `first` on; own: those of one run."""

    first: int
    num_queries: int
    start: int
    stop: int
    owners: Ints


def _blocks(groups: Groups) -> Iterator[_Block]:
    for first in range(0, len(groups), _BLOCK):
        last = min(first + _BLOCK, len(groups))
        offsets = np.asarray(groups.negative_offsets[first : last + 1])
        owners = np.repeat(np.arange(last - first), np.diff(offsets))
        yield _Block(first, last - first, int(offsets[0]), int(offsets[-1]), owners)


def _of_run(groups: Groups, block: _Block, source: int) -> Bools:
    if groups.negative_sources is None:
        return np.ones(block.stop - block.start, dtype=bool)
    own: Bools = np.asarray(groups.negative_sources[block.start : block.stop]) == source
    return own


def _best_positives(groups: Groups, num_runs: int) -> tuple[Floats, ...]:
    """For each run float64 [queries]: score of the best positive, NaN where the run has none."""
    of_runs = [groups.positive_scores] if groups.source_positive_scores is None else list(groups.source_positive_scores)
    assert len(of_runs) == num_runs
    starts = np.asarray(groups.positive_offsets[:-1])
    found = []
    for scores in of_runs:
        finite = np.where(np.isfinite(scores), scores, np.nan).astype(np.float64)
        found.append(np.fmax.reduceat(finite, starts))
    return tuple(found)


def _lists(groups: Groups, group_sizes: Sequence[int], facts: Mapping[str, Any]) -> dict[str, Any]:
    lengths = np.diff(groups.negative_offsets)
    return {
        "lengths": {f"{percent}%": int(np.percentile(lengths, percent, method="nearest")) for percent in (0, 10, 50, 90, 100)},
        "mean": round(float(lengths.mean()), 2),
        "short": {str(size): int((lengths < size - 1).sum()) for size in group_sizes or GROUP_SIZES},
        "trained": bool(group_sizes),
        "num_without_negatives": facts.get("num_without_negatives"),
        "num_without_positive": facts.get("num_without_positive"),
    }


def _run(
    groups: Groups,
    source: int,
    mined: MinedRun,
    best: Floats,
    qrels: Mapping[int, Mapping[int, int]],
    temperatures: Sequence[float],
) -> dict[str, Any]:
    counts = np.zeros(len(HARDNESS_EDGES) + 1, dtype=np.int64)
    num_negatives = 0
    effective: dict[float, list[Floats]] = {temperature: [] for temperature in temperatures}
    for block in _blocks(groups):
        own = _of_run(groups, block, source)
        owners, scores = block.owners[own], np.asarray(groups.negative_scores[block.start : block.stop], dtype=np.float64)[own]
        shares = hardness(scores, best[block.first + owners])
        counts += np.bincount(np.searchsorted(HARDNESS_EDGES, shares[np.isfinite(shares)], side="right"), minlength=len(counts))
        num_negatives += len(scores)
        if mined.cosine:
            for temperature, numbers in effective.items():
                numbers.append(effective_numbers(scores, owners, block.num_queries, temperature))
    ranks = positive_ranks(mined.run, qrels)
    return {
        "name": mined.name,
        "share": mined.share,
        "cosine": mined.cosine,
        "num_negatives": num_negatives,
        "hardness": {
            "edges": list(HARDNESS_EDGES),
            "counts": counts.tolist(),
            "num_without_positive_score": num_negatives - int(counts.sum()),
        },
        "positive_ranks": _banded(ranks),
        "effective": [_effective(temperature, np.concatenate(numbers)) for temperature, numbers in effective.items()]
        if mined.cosine
        else [],
    }


def hardness(scores: Any, positives: Any) -> Floats:
    """Scores as shares of their positives', 1 = the same; NaN where there is no positive's score or it is 0.

    For scores below 0 the difference is set against the positive's size, as `below_positive` has it: -2.1 is 0.95 of -2.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares: Floats = np.where(positives == 0, np.nan, 1 + (scores - positives) / np.abs(positives))
    return shares


def positive_ranks(run: Run, qrels: Mapping[int, Mapping[int, int]]) -> Ints:
    """int64 [queries with a relevant passage]: rank of the first relevant passage in the run, from 1; 0 where it has none."""
    places = {int(query): place for place, query in enumerate(run.query_rows)}
    ranks = []
    for query, grades in qrels.items():
        positives = [row for row, grade in grades.items() if grade > 0]
        if positives:
            rows = run.ranked(places[query])[0] if query in places else np.empty(0, np.int64)
            found = np.flatnonzero(np.isin(rows, positives))
            ranks.append(int(found[0]) + 1 if len(found) else 0)
    return np.array(ranks, dtype=np.int64)


def _banded(ranks: Ints) -> list[dict[str, Any]]:
    bands = [
        {
            "from": low,
            "to": high,
            "queries": int(((ranks >= low) & (ranks <= (high if high is not None else ranks.max(initial=low)))).sum()),
        }
        for low, high in RANK_BANDS
    ]
    return [*bands, {"from": None, "to": None, "queries": int((ranks == 0).sum())}]


def _effective(temperature: float, numbers: Floats) -> dict[str, Any]:
    """Over the queries that have negatives of the run."""
    if len(numbers) == 0:
        return {"temperature": temperature, "mean": None, "median": None}
    return {"temperature": temperature, "mean": round(float(numbers.mean()), 3), "median": round(float(np.median(numbers)), 3)}


# --- what may be relevant after all


def _suspects(groups: Groups, store: ReportStore, teacher: Run | None, num_examples: int) -> dict[str, Any]:
    """Negatives that score above the best positive of their query: by the teacher, or by the run that they are from."""
    judged = _by_run(groups) if teacher is None else _by_teacher(groups, teacher)
    num_queries = num_compared = num_negatives = 0
    top: list[tuple[float, int, int, float, float, int]] = []
    for position, scores, positive_scores, positive_rows in judged:
        known = np.isfinite(scores) & np.isfinite(positive_scores)
        num_compared += int(known.sum())
        gaps = np.where(known, scores - positive_scores, -np.inf)
        num_above = int((gaps > 0).sum())
        if num_above == 0:
            continue
        num_queries += 1
        num_negatives += num_above
        place = int(np.argmax(gaps))
        score, positive_score = float(scores[place]), float(positive_scores[place])
        weight = score - positive_score if teacher is not None else float(hardness(scores[place], positive_scores[place]))
        found = (weight, -position, place, score, positive_score, int(positive_rows[place]))
        if len(top) < num_examples:
            heapq.heappush(top, found)
        elif num_examples:
            heapq.heappushpop(top, found)
    return {
        "by": "run" if teacher is None else "teacher",
        "num_queries": num_queries,
        "num_negatives": num_negatives,
        "num_compared": num_compared,
        "examples": [
            _example(groups, store, -negative_position, place, positive)
            | {"score": round(score, 4), "positive_score": round(positive_score, 4)}
            for _, negative_position, place, score, positive_score, positive in sorted(top, reverse=True)
        ],
    }


def _by_run(groups: Groups) -> Iterator[tuple[int, Floats, Floats, Ints]]:
    """Position of a query; for each negative its score, the best positive's in the same run, and that positive."""
    for position in range(len(groups)):
        scores = np.asarray(groups.negatives(position)[1], dtype=np.float64)
        rows = np.asarray(groups.positives(position)[0])
        positive_scores, positive_rows = np.full(len(scores), np.nan), np.full(len(scores), -1)
        for places, of_run in groups.by_source(position):
            if np.isfinite(of_run).any():
                best = int(np.nanargmax(of_run))
                positive_scores[places], positive_rows[places] = of_run[best], rows[best]
        yield position, scores, positive_scores, positive_rows


def _by_teacher(groups: Groups, teacher: Run) -> Iterator[tuple[int, Floats, Floats, Ints]]:
    """The same with a teacher's scores, for the queries that it has scored."""
    place_of = {int(query): place for place, query in enumerate(teacher.query_rows)}
    for position, query in enumerate(np.asarray(groups.query_rows).tolist()):
        if query in place_of:
            rows, scores = teacher.ranked(place_of[query])
            # A run has the best first.
            positives = np.flatnonzero(np.isin(rows, groups.positives(position)[0]))[:1]
            taught = _looked_up(np.asarray(groups.negatives(position)[0]), rows, scores)
            score, row = (float(scores[positives[0]]), int(rows[positives[0]])) if len(positives) else (np.nan, -1)
            yield position, taught, np.full(len(taught), score), np.full(len(taught), row)


def _looked_up(wanted: Ints, rows: Ints, scores: NDArray[np.float32]) -> Floats:
    if len(rows) == 0:
        return np.full(len(wanted), np.nan)
    order = np.argsort(rows)
    places = order[np.minimum(np.searchsorted(rows, wanted, sorter=order), len(rows) - 1)]
    return np.where(rows[places] == wanted, scores[places], np.nan).astype(np.float64)


def _near_duplicates(groups: Groups, store: ReportStore, seed: int, num_examples: int) -> dict[str, Any]:
    """Negatives with nearly the words of a positive, among the first of each of a sample of queries."""
    chosen = np.random.default_rng(seed).permutation(len(groups))[:SAMPLE_QUERIES]

    @functools.lru_cache(_CACHED_TEXTS)
    def words_of(row: int) -> frozenset[str]:
        return words(store.passages.text(row))

    found: list[tuple[float, int, int, int]] = []
    queries: set[int] = set()
    num_compared = 0
    for position in np.sort(chosen).tolist():
        rows = np.asarray(groups.negatives(position)[0][:SAMPLE_NEGATIVES]).tolist()
        num_compared += len(rows)
        for positive in np.asarray(groups.positives(position)[0]).tolist():
            for place, row in enumerate(rows):
                shared = overlap(words_of(positive), words_of(row))
                if shared >= NEAR:
                    found.append((shared, -position, -place, positive))
                    queries.add(position)
    distinct = {(position, place): (shared, positive) for shared, position, place, positive in sorted(found)}
    top = sorted(((shared, position, place, positive) for (position, place), (shared, positive) in distinct.items()), reverse=True)
    return {
        "threshold": NEAR,
        "num_examined_queries": len(chosen),
        "num_compared": num_compared,
        "num_queries": len(queries),
        "num_negatives": len(distinct),
        "examples": [
            _example(groups, store, -position, -place, positive) | {"overlap": round(shared, 4)}
            for shared, position, place, positive in top[:num_examples]
        ],
    }


def _example(groups: Groups, store: ReportStore, position: int, place: int, positive: int) -> dict[str, Any]:
    """Ids and texts of a query, a positive (its row) and a negative (its place in the list)."""
    query = int(groups.query_rows[position])
    queries = store.queries("train")
    return {
        "query_id": str(queries.ids[query]),
        "query": cut(clean(queries.text(query)), _SHOWN_CHARACTERS),
        "positive": _passage(store, positive),
        "negative": _passage(store, int(groups.negatives(position)[0][place])),
        "place": place + 1,
    }


def _passage(store: ReportStore, row: int) -> dict[str, str]:
    table = store.passages
    return {
        "passage_id": str(table.ids[row]),
        "title": clean(table.title(row)),
        "text": cut(clean(table.text(row)), _SHOWN_CHARACTERS),
    }


# --- what comes again


def _repeated(groups: Groups, store: ReportStore, digests: Callable[[Ints], NDArray[np.uint64]]) -> dict[str, Any]:
    """Copies within a query's list, and passages that are negatives of many queries."""
    uses = np.zeros(len(store.passages), dtype=np.int64)
    num_copies = num_queries = 0
    for block in _blocks(groups):
        rows = np.asarray(groups.negative_rows[block.start : block.stop])
        uses += np.bincount(rows, minlength=len(uses))
        texts = digests(rows)
        order = np.lexsort((texts, block.owners))
        same = (np.diff(block.owners[order]) == 0) & (np.diff(texts[order]) == 0)
        num_copies += int(same.sum())
        num_queries += len(np.unique(block.owners[order][1:][same]))
    used = np.sort(uses[uses > 0])[::-1]
    frequent = np.argsort(-uses, kind="stable")[:_FREQUENT]
    return {
        "num_copies_within": num_copies,
        "num_queries_with_copies": num_queries,
        "num_distinct": len(used),
        "mean_uses": round(float(used.mean()), 2),
        "share_of_most_used_percent": round(float(used[: max(1, len(used) // 100)].sum() / used.sum()), 4),
        "most_frequent": [
            {"passage_id": str(store.passages.ids[int(row)]), "num_queries": int(uses[row])} for row in frequent if uses[row]
        ],
    }


__all__ = ["MinedRun", "effective_numbers", "hardness", "measure_negatives", "overlap", "positive_ranks", "words"]
