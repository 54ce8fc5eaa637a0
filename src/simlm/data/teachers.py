"""Training groups with the scores of one or several teachers in place of the miner's.

Everything goes through the groups block by block, and what is new can be written into files, so that lists of thousands of passages
for every query take no more memory than short ones.
Shapes: T teachers, N passages of all lists end to end, L lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.errors import DataError, ShapeError
from simlm.rankings import Floats, Groups, Ints, Run, offsets_of

BLOCK_PAIRS = 1 << 18
"""Pairs that are looked up at once, and at least one query's."""

Names = Callable[[int], str]
Bools = NDArray[np.bool_]


def combine_teachers(scores_TN: Floats, offsets: Ints, weights: Sequence[float] | None = None) -> Floats:
    """float32 [N]: what several teachers say together of each passage.

    Within each list every teacher's scores are standardised, averaged, and scaled back by the mean of the teachers' standard deviations
    (and moved to the mean of their means), so that a temperature keeps its meaning; one teacher alone keeps its scores. A teacher that
    gives a whole list one score says nothing of it and is left out there; if all do, the list stays constant.
    scores_TN: raw logits; list l owns the columns offsets[l] to offsets[l + 1] - 1.
    weights: of each teacher in all of these means, above 0; only their ratio counts. None = all alike.
    Raises ShapeError if the offsets or weights do not fit or a list is empty, DataError if a score is not finite.
    """
    weights_T1 = np.ones((len(scores_TN), 1)) if weights is None else np.asarray(weights, dtype=np.float64)[:, None]
    if len(weights_T1) != len(scores_TN) or not (weights_T1 > 0).all():
        raise ShapeError(f"weights {weights_T1.ravel().tolist()} for {len(scores_TN)} teachers; one above 0 for each is needed")
    counts_L = np.diff(offsets)
    if scores_TN.ndim != 2 or len(scores_TN) == 0 or offsets[0] != 0 or offsets[-1] != scores_TN.shape[1] or (counts_L < 1).any():
        raise ShapeError(f"scores of shape {scores_TN.shape} for lists of {counts_L[:5].tolist()}... passages; each list needs one or more")
    if not np.isfinite(scores_TN).all():
        raise DataError("a teacher score is not a finite number; score the pairs again, or train the teacher again")
    scores_TN = scores_TN.astype(np.float64)
    starts_L = offsets[:-1]
    means_TL = np.add.reduceat(scores_TN, starts_L, axis=1) / counts_L
    centred_TN = scores_TN - np.repeat(means_TL, counts_L, axis=1)
    # Of equal float32 scores the mean in float64 is exact, so that their deviation is exactly 0.
    deviations_TL = np.sqrt(np.add.reduceat(centred_TN**2, starts_L, axis=1) / counts_L)
    speaks_TL = deviations_TL > 0
    voices_L = np.where(speaks_TL.any(axis=0), (weights_T1 * speaks_TL).sum(axis=0), 1.0)
    standard_TN = centred_TN / np.repeat(np.where(speaks_TL, deviations_TL, 1.0), counts_L, axis=1)
    scale_L = (weights_T1 * deviations_TL).sum(axis=0) / voices_L
    heard_TL = weights_T1 * (speaks_TL | ~speaks_TL.any(axis=0))
    mean_L = (means_TL * heard_TL).sum(axis=0) / heard_TL.sum(axis=0)
    average_N = (weights_T1 * standard_TN).sum(axis=0) / np.repeat(voices_L, counts_L)
    combined_N: Floats = (average_N * np.repeat(scale_L, counts_L) + np.repeat(mean_L, counts_L)).astype(np.float32)
    return combined_N


@dataclass(frozen=True)
class Mixture:
    """How several teachers become one: weights of `combine_teachers`, and what the combined scores are multiplied by."""

    weights: tuple[float, ...]
    sharpness: float = 1.0

    def of(self, scores_TN: Floats, offsets: Ints) -> Floats:
        """float32 [N]; see `combine_teachers`."""
        combined_N: Floats = combine_teachers(scores_TN, offsets, self.weights) * np.float32(self.sharpness)
        return combined_N


@dataclass(frozen=True)
class TeacherGroups:
    """Groups whose scores are the teachers', cut to what all of them have scored.

    depth: negatives a query at most. num_constant: queries whose passages all have the same score, which teach nothing.
    num_bare: queries left out because none of their passages is a negative.
    """

    groups: Groups
    depth: int
    num_constant: int
    num_bare: int


def teacher_groups(
    groups: Groups,
    teachers: Sequence[Run],
    *,
    query_id: Names,
    passage_id: Names,
    folder: Path | None = None,
    mixture: Mixture | None = None,
) -> TeacherGroups:
    """Groups with the teachers' scores for every positive and for the first negatives of every query, several combined.

    teachers: raw logits for pairs of the groups. How deep one goes is told from the query where it goes deepest; every other query must be
    scored as deep, or to the end of its list. Of several the shallowest counts.
    query_id, passage_id: names of rows, for messages. folder: where what is new is kept, memory-mapped; none = in memory.
    mixture: how several are combined; none = all alike.
    Raises DataError if a group has no positive, listing the first pairs that are missing and the first scores that are not finite, if a
    teacher scores no query's passages differently, or if no query has a negative left.
    """
    without = np.flatnonzero(np.diff(groups.positive_offsets) == 0)
    if len(without):
        name = query_id(int(groups.query_rows[without[0]]))
        raise DataError(f"{len(without):,} groups have no positive passage, the first is of query {name!r}; mine again")
    lookups = [_Lookup(teacher) for teacher in teachers]
    depth = min(_depth(groups, lookup) for lookup in lookups)
    told = [f"teacher {number}" if len(teachers) > 1 else "the teacher" for number in range(1, len(teachers) + 1)]
    checks = [_Check(name, len(teacher), query_id, passage_id) for name, teacher in zip(told, teachers, strict=True)]
    counts = np.minimum(np.diff(groups.negative_offsets), depth)
    kept = np.flatnonzero(counts > 0)
    whole = len(kept) == len(groups) and bool((counts == np.diff(groups.negative_offsets)).all())
    negative_offsets = offsets_of(counts[kept])
    positive_counts = np.diff(groups.positive_offsets)[kept]
    positive_offsets = offsets_of(positive_counts)
    positive_rows = _new_array(folder, "positive_rows", np.int64, int(positive_offsets[-1]))
    positive_scores = _new_array(folder, "positive_scores", np.float32, int(positive_offsets[-1]))
    negative_scores = _new_array(folder, "negative_scores", np.float32, int(negative_offsets[-1]))
    # Lists that keep their length need no copy.
    negative_rows = groups.negative_rows if whole else _new_array(folder, "negative_rows", np.int64, int(negative_offsets[-1]))
    num_constant, positive_end, negative_end = 0, 0, 0
    for block in _blocks(groups, depth):
        scores = [lookup.scores(block) for lookup in lookups]
        if not all(check.sees(block, each_N) for check, each_N in zip(checks, scores, strict=True)):
            continue
        scores_N = _combined(block, scores, mixture)
        num_constant += int((block.varied(scores_N) == 0)[block.num_negatives > 0].sum())
        chosen_N = np.repeat(block.num_negatives > 0, block.counts)
        positives_N, negatives_N = chosen_N & ~block.is_negative_N, chosen_N & block.is_negative_N
        begin, positive_end = positive_end, positive_end + int(positives_N.sum())
        positive_rows[begin:positive_end] = block.rows_N[positives_N]
        positive_scores[begin:positive_end] = scores_N[positives_N]
        begin, negative_end = negative_end, negative_end + int(negatives_N.sum())
        negative_scores[begin:negative_end] = scores_N[negatives_N]
        if not whole:
            negative_rows[begin:negative_end] = block.rows_N[negatives_N]
    for check in checks:
        check.refuse_if_bad()
    if len(groups) and len(kept) == 0:
        raise DataError(
            f"none of the {len(groups):,} training queries has a negative passage with a teacher's score; loosen the filters in [mining], "
            "or let the teacher score deeper"
        )
    return TeacherGroups(
        Groups(
            groups.split,
            np.asarray(groups.query_rows)[kept],
            positive_offsets=positive_offsets,
            positive_rows=positive_rows,
            positive_scores=positive_scores,
            negative_offsets=negative_offsets,
            negative_rows=negative_rows,
            negative_scores=negative_scores,
        ),
        depth=depth,
        num_constant=num_constant,
        num_bare=len(groups) - len(kept),
    )


def of_scored_queries(groups: Groups, teacher: Run) -> Groups:
    """The groups of those queries that a teacher has scored, where it was to score a sample of them."""
    return groups.take(np.flatnonzero(np.isin(groups.query_rows, teacher.query_rows)))


# --- lists that several have scored


@dataclass(frozen=True)
class ScoredLists:
    """Candidates of some queries, end to end, and what each of several says of them.

    offsets: int64 [L + 1]; is_positive_N: bool; scores_TN: float32, finite.
    """

    offsets: Ints
    is_positive_N: Bools
    scores_TN: Floats

    def __len__(self) -> int:
        return len(self.offsets) - 1


def scored_groups(groups: Groups, scorers: Mapping[str, Run], *, query_id: Names, passage_id: Names) -> ScoredLists:
    """The positives and first negatives of every query, as deep as all have scored, in memory: for a sample of the groups.

    scorers: name for messages -> raw scores of pairs of the groups. Raises DataError for a score that is missing or not finite.
    """
    lookups = [_Lookup(scorer) for scorer in scorers.values()]
    depth = min(_depth(groups, lookup) for lookup in lookups)
    checks = [_Check(name, len(scorer), query_id, passage_id) for name, scorer in scorers.items()]
    return _scored(list(_blocks(groups, depth)), lookups, checks, [block.places_N < 0 for block in _blocks(groups, depth)])


def scored_candidates(
    candidates: Run, relevant: Mapping[int, Sequence[int]], scorers: Mapping[str, Run], *, query_id: Names, passage_id: Names
) -> ScoredLists:
    """All candidates of a run, as several have scored them. relevant: query row -> passage rows. Raises DataError as `scored_groups`."""
    rows_N, counts_L = np.asarray(candidates.passage_rows), np.diff(candidates.offsets)
    block = _Block(np.asarray(candidates.query_rows), counts_L, counts_L, rows_N, np.zeros(len(rows_N), dtype=np.int64))
    known = [np.isin(rows, list(relevant.get(query, ()))) for query, rows, _ in candidates]
    checks = [_Check(name, len(scorer), query_id, passage_id) for name, scorer in scorers.items()]
    return _scored([block], [_Lookup(scorer) for scorer in scorers.values()], checks, known)


def _scored(blocks: list[_Block], lookups: list[_Lookup], checks: list[_Check], is_positive: list[Bools]) -> ScoredLists:
    parts = [np.zeros((len(lookups), 0), dtype=np.float32)]
    for block in blocks:
        scores = [lookup.scores(block) for lookup in lookups]
        for check, scores_N in zip(checks, scores, strict=True):
            check.sees(block, scores_N)
        parts.append(np.stack(scores))
    for check in checks:
        check.refuse_if_incomplete()
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(block.counts for block in blocks)])
    positive_N = np.concatenate([np.zeros(0, dtype=bool), *is_positive])
    return ScoredLists(offsets_of(counts), positive_N, np.concatenate(parts, axis=1))


# --- blocks of groups


@dataclass(frozen=True)
class _Block:
    """Some groups, each as one list: its positives, then its first negatives.

    query_rows, counts, num_negatives: int64 [L]; rows_N: passages; places_N: place among the negatives, -1 for a positive.
    """

    query_rows: Ints
    counts: Ints
    num_negatives: Ints
    rows_N: Ints
    places_N: Ints

    @property
    def is_negative_N(self) -> Bools:
        return self.places_N >= 0

    def varied(self, scores_N: Floats) -> Floats:
        """float32 [L]: highest less lowest score of each list."""
        starts_L = offsets_of(self.counts)[:-1]
        spread_L: Floats = np.maximum.reduceat(scores_N, starts_L) - np.minimum.reduceat(scores_N, starts_L)
        return spread_L


def _blocks(groups: Groups, depth: int | None = None) -> Iterator[_Block]:
    """All groups in order, with their first `depth` negatives (all of them where there is none)."""
    num_negatives = np.diff(groups.negative_offsets)
    if depth is not None:
        num_negatives = np.minimum(num_negatives, depth)
    num_positives = np.diff(groups.positive_offsets)
    total = np.cumsum(num_positives + num_negatives)
    end = 0
    while end < len(groups):
        begin, before = end, int(total[end - 1]) if end else 0
        end = max(int(np.searchsorted(total, before + BLOCK_PAIRS, "right")), begin + 1)
        positives_L, negatives_L = num_positives[begin:end], num_negatives[begin:end]
        counts_L = positives_L + negatives_L
        # Places -p .. -1 of a list are its positives, 0 .. n - 1 its negatives.
        places_N = np.arange(counts_L.sum()) - np.repeat(offsets_of(counts_L)[:-1] + positives_L, counts_L)
        owners_N = np.repeat(np.arange(begin, end), counts_L)
        negative_N = places_N >= 0
        rows_N = np.empty(len(places_N), dtype=np.int64)
        rows_N[negative_N] = groups.negative_rows[(np.asarray(groups.negative_offsets)[owners_N] + places_N)[negative_N]]
        rows_N[~negative_N] = groups.positive_rows[(np.asarray(groups.positive_offsets)[owners_N + 1] + places_N)[~negative_N]]
        yield _Block(np.asarray(groups.query_rows[begin:end]), counts_L, negatives_L, rows_N, np.where(negative_N, places_N, -1))


class _Lookup:
    """Scores of one teacher's run by query and passage."""

    def __init__(self, teacher: Run) -> None:
        self.teacher = teacher
        self._order = np.argsort(teacher.query_rows, kind="stable")
        self._sorted = np.asarray(teacher.query_rows)[self._order]

    def scores(self, block: _Block) -> Floats:
        """float32 [N]: NaN where the teacher has no score, infinite where it has one that is not finite."""
        found_N = np.full(len(block.rows_N), np.nan, dtype=np.float32)
        if len(self._sorted) == 0:
            return found_N
        places_L = np.minimum(np.searchsorted(self._sorted, block.query_rows), len(self._sorted) - 1)
        runs_L = self._order[places_L]
        known_L = self._sorted[places_L] == block.query_rows
        offsets = np.asarray(self.teacher.offsets)
        lengths_L = np.where(known_L, offsets[runs_L + 1] - offsets[runs_L], 0)
        starts = offsets_of(lengths_L)
        source = np.arange(starts[-1]) + np.repeat(offsets[runs_L] - starts[:-1], lengths_L)
        keys = _keys(np.repeat(np.arange(len(lengths_L)), lengths_L), np.asarray(self.teacher.passage_rows[source]))
        if len(keys) == 0:
            return found_N
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        wanted_N = _keys(np.repeat(np.arange(len(block.counts)), block.counts), block.rows_N)
        places_N = np.minimum(np.searchsorted(keys, wanted_N), len(keys) - 1)
        hits_N = keys[places_N] == wanted_N
        scores = np.asarray(self.teacher.scores[source])[order[places_N[hits_N]]]
        found_N[hits_N] = np.where(np.isfinite(scores), scores, np.inf)
        return found_N


def _keys(owners: Ints, rows: Ints) -> Ints:
    keys: Ints = owners.astype(np.int64) << 32 | rows
    return keys


def _depth(groups: Groups, lookup: _Lookup) -> int:
    """How many negatives a query the teacher has scored, told from the query where it goes deepest."""
    return max((int(block.places_N[~np.isnan(lookup.scores(block))].max(initial=-1)) + 1 for block in _blocks(groups)), default=0)


class _Check:
    """Sees a teacher's scores block by block, and says in the end what is wrong with them."""

    def __init__(self, told: str, num_queries: int, query_id: Names, passage_id: Names) -> None:
        self._told, self._num_queries, self._query_id, self._passage_id = told, num_queries, query_id, passage_id
        self._first: dict[str, list[str]] = {"missing": [], "infinite": []}
        self._num_bad = dict.fromkeys(self._first, 0)
        self._num_lists = self._num_constant = 0

    def sees(self, block: _Block, scores_N: Floats) -> bool:
        """Whether all that was seen so far are numbers."""
        for kind, bad_N in (("missing", np.isnan(scores_N)), ("infinite", np.isinf(scores_N))):
            self._num_bad[kind] += int(bad_N.sum())
            for place in np.flatnonzero(bad_N)[: _SHOWN - len(self._first[kind])]:
                owner = int(np.searchsorted(np.cumsum(block.counts), place, "right"))
                names = self._query_id(int(block.query_rows[owner])), self._passage_id(int(block.rows_N[place]))
                self._first[kind].append(f"({names[0]}, {names[1]})")
        if any(self._num_bad.values()):
            return False
        several_L = block.counts > 1
        self._num_lists += int(several_L.sum())
        self._num_constant += int((block.varied(scores_N)[several_L] == 0).sum())
        return True

    def refuse_if_bad(self) -> None:
        """DataError for scores that are not there or not finite, and for a teacher that says nothing at all."""
        self.refuse_if_incomplete()
        if self._num_lists and self._num_constant == self._num_lists:
            raise DataError(
                f"{self._told} gives all passages of a query the same score, for every query; it has not learned anything: train it again"
            )

    def refuse_if_incomplete(self) -> None:
        """DataError for scores that are not there or not finite."""
        missing, infinite = self._num_bad["missing"], self._num_bad["infinite"]
        if missing:
            raise DataError(
                f"{self._told}'s run ({self._num_queries:,} queries) has no score for {missing:,} pairs of query and passage "
                f"of the groups: {_listed(self._first['missing'], missing)}; run the rerank step again over these groups"
            )
        if infinite:
            raise DataError(
                f"{infinite:,} scores of {self._told} are not finite numbers: {_listed(self._first['infinite'], infinite)}; "
                "train the re-ranker again, with a lower learning rate or bf16 = false"
            )


_SHOWN = 5


def _listed(names: list[str], number: int) -> str:
    return ", ".join(names) + (" ..." if number > len(names) else "")


def _combined(block: _Block, scores: list[Floats], mixture: Mixture | None) -> Floats:
    if mixture is not None:
        return mixture.of(np.stack(scores), offsets_of(block.counts))
    return scores[0] if len(scores) == 1 else combine_teachers(np.stack(scores), offsets_of(block.counts))


def _new_array(folder: Path | None, name: str, dtype: type[np.generic], length: int) -> NDArray[Any]:
    """An array to be filled: in memory, or mapped onto a file of the folder."""
    if folder is None or length == 0:
        return np.empty(length, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(length,))
