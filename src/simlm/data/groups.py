"""Training groups: which queries a step has, and which passages go with each.

Everything is a function of (seed, step): a query's epoch and its place in the order, the positive (they take turns by epoch) and the
negatives (a walk through the query's mined list in an order shuffled by (seed, query), going on where the last epoch stopped, so
that none comes again before all have been seen). Workers, processes and resuming change nothing.
Shapes: Q queries of a step, G group size, P = Q*G passages of a step, N passages of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simlm.errors import DataError, RecipeError
from simlm.progress import Progress
from simlm.rankings import Floats, Groups, Ints, Run, offsets_of

Bools = NDArray[np.bool_]
_ORDER, _WALK, _RANDOM, _FIRST_POSITIVE = range(4)
"""What a stream of random numbers is for, so that no two uses share one."""


@dataclass(frozen=True)
class StepGroups:
    """The groups of one step, of all processes.

    positions: int64 [Q], place of each query in the Groups; epochs: int64 [Q], how often it has been seen before.
    query_rows: int64 [Q], rows of the store's training queries; passage_rows: int64 [Q, G], positive first.
    scores: float32 [Q, G], what the Groups say of each passage, NaN where nothing.
    """

    positions: Ints
    epochs: Ints
    query_rows: Ints
    passage_rows: Ints
    scores: Floats


class TrainingGroups:
    """Groups of fixed size, dealt out in steps of `queries_per_step` queries; the last step of an epoch goes on into the next.

    groups: mined candidates. judged: query row -> {passage row: grade}, to know more positives than the groups name.
    fill_with_random: give queries without any candidate random passages of the corpus, else refuse them.
    Raises DataError if there is no query, a query has no positive, or the corpus has no passage to set against a query; RecipeError if
    queries_per_step is no multiple of num_ranks.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        num_passages: int,
        group_size: int,
        queries_per_step: int,
        seed: int,
        num_ranks: int = 1,
        judged: Mapping[int, Mapping[int, int]] | None = None,
        fill_with_random: bool = True,
    ) -> None:
        if len(groups) == 0:
            raise DataError("there are no training groups: no training query has a positive passage; training needs labelled queries")
        num_positives = np.diff(groups.positive_offsets)
        if num_positives.min() == 0:
            bare = np.flatnonzero(num_positives == 0)
            raise DataError(
                f"{len(bare):,} training groups have no positive, the first is of query row {groups.query_rows[bare[0]]}; mine again"
            )
        self.groups = groups
        self.num_passages = num_passages
        self.group_size = group_size
        share_of_rank(queries_per_step, 0, num_ranks)
        self.queries_per_step = min(queries_per_step, len(groups) // num_ranks * num_ranks)
        """As asked for, or as many as there are queries (and processes can share)."""
        if self.queries_per_step == 0:
            raise DataError(
                f"{len(groups):,} training queries cannot be shared by {num_ranks} processes; use fewer processes or more queries"
            )
        self.seed = seed
        self._judged = judged or {}
        num_negatives = np.diff(groups.negative_offsets)
        self.num_short = int(np.count_nonzero((num_negatives < group_size - 1) & (num_negatives > 0)))
        """Queries whose list is shorter than a group needs: it is gone through more than once within a group."""
        self.num_bare = int(np.count_nonzero(num_negatives == 0)) if group_size > 1 else 0
        """Queries without any mined negative: they get random passages of the corpus."""
        if self.num_bare and not fill_with_random:
            raise DataError(f"{self.num_bare:,} training queries have no negative passage with a teacher's score; mine and re-rank again")
        if self.num_bare:
            for position in np.flatnonzero(num_negatives == 0):
                if len(self.relevant(int(position))) >= num_passages:
                    raise DataError(
                        f"the corpus of {num_passages:,} passages has none that is not relevant to training query row "
                        f"{groups.query_rows[position]}, so there is nothing to tell its positive from; add passages or set group_size = 1"
                    )

    def __len__(self) -> int:
        return len(self.groups)

    def facts(self) -> dict[str, int]:
        """For the manifest."""
        return {
            "num_groups": len(self),
            "queries_per_step": self.queries_per_step,
            "num_queries_with_repeated_negatives": self.num_short,
            "num_queries_with_random_negatives": self.num_bare,
        }

    def say_what_differs(self, progress: Progress, queries_per_step: int, description: str) -> None:
        """Tell the user where the data do not allow what the recipe asks for."""
        if self.queries_per_step < queries_per_step:
            progress.say(
                f"{description}: {len(self):,} training queries, so a step has {self.queries_per_step} of them, not {queries_per_step}"
            )
        if self.num_short:
            progress.say(
                f"{description}: {self.num_short:,} queries have fewer than {self.group_size - 1} mined negatives; "
                "some come more than once in their group"
            )
        if self.num_bare:
            progress.say(f"{description}: {self.num_bare:,} queries have no mined negative; they get random passages of the corpus")

    def step(self, step: int) -> StepGroups:
        """The groups of a step (0, 1, ...)."""
        numbers = step * self.queries_per_step + np.arange(self.queries_per_step, dtype=np.int64)
        epochs, places = np.divmod(numbers, len(self))
        positions = np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)], dtype=np.int64)
        chosen = [self.choose(int(position), int(epoch)) for position, epoch in zip(positions, epochs, strict=True)]
        return StepGroups(
            positions,
            epochs,
            np.asarray(self.groups.query_rows)[positions],
            np.stack([rows for rows, _ in chosen]),
            np.stack([scores for _, scores in chosen]),
        )

    def choose(self, position: int, epoch: int) -> tuple[Ints, Floats]:
        """int64 [G], float32 [G]: passage rows of the query at `position` in an epoch, positive first, and their scores in the Groups."""
        rows, scores = self.groups.positives(position)
        positive = (int(self._rng(_FIRST_POSITIVE, position).integers(len(rows))) + epoch) % len(rows)
        negative_rows, negative_scores = self._negatives(position, epoch)
        return np.concatenate([rows[positive : positive + 1], negative_rows]), np.concatenate(
            [scores[positive : positive + 1], negative_scores]
        )

    def relevant(self, position: int) -> Ints:
        """int64, sorted: every passage known to be relevant to a query, by its group or by a judgement with grade > 0."""
        positives, _ = self.groups.positives(position)
        judged = self._judged.get(int(self.groups.query_rows[position]), {})
        return np.union1d(positives, np.array([row for row, grade in judged.items() if grade > 0], dtype=np.int64)).astype(np.int64)

    def excluded(self, step: StepGroups) -> tuple[Bools, Bools]:
        """bool [Q, P]: passages of the step that are relevant to a query and not its own positive, which are no negatives of it;
        bool [Q, Q]: pairs of queries one of which has the other's positive among its relevant passages (True on the diagonal)."""
        num_queries, group_size = step.passage_rows.shape
        passages_P = step.passage_rows.reshape(-1)
        relevant_QP = np.stack([np.isin(passages_P, self.relevant(int(position))) for position in step.positions])
        own_columns = np.arange(num_queries) * group_size
        relevant_QQ = relevant_QP[:, own_columns]
        excluded_QP = relevant_QP.copy()
        excluded_QP[np.arange(num_queries), own_columns] = False
        return excluded_QP, relevant_QQ | relevant_QQ.T

    def _negatives(self, position: int, epoch: int) -> tuple[Ints, Floats]:
        wanted = self.group_size - 1
        rows, scores = self.groups.negatives(position)
        if len(rows) == 0:
            return self._random_negatives(position, epoch, wanted), np.full(wanted, np.nan, dtype=np.float32)
        order = self._rng(_WALK, position).permutation(len(rows))
        places = order[(epoch * wanted + np.arange(wanted)) % len(rows)]
        return rows[places], scores[places]

    def _random_negatives(self, position: int, epoch: int, wanted: int) -> Ints:
        relevant = set(self.relevant(position).tolist())
        rng = self._rng(_RANDOM, position, epoch)
        found: list[int] = []
        while len(found) < min(wanted, self.num_passages - len(relevant)):
            row = int(rng.integers(self.num_passages))
            if row not in relevant and row not in found:
                found.append(row)
        return np.resize(np.array(found, dtype=np.int64), wanted)

    def _rng(self, purpose: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([purpose, self.seed, *numbers])

    def _order(self, epoch: int) -> Ints:
        return _permutation(self.seed, epoch, len(self))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Ints:
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(count)


def share_of_rank(num_queries: int, rank: int, num_ranks: int) -> slice:
    """The queries of a step that a process works on; RecipeError if they cannot be shared out evenly."""
    if num_queries % num_ranks:
        raise RecipeError(
            f"queries_per_step = {num_queries} cannot be shared evenly by {num_ranks} processes; choose a multiple of {num_ranks}"
        )
    share = num_queries // num_ranks
    return slice(rank * share, (rank + 1) * share)


@dataclass(frozen=True)
class TeacherGroups:
    """Groups whose scores are the teacher's, cut to what it has scored.

    depth: negatives a query at most. num_constant: queries whose passages all have the same score, which teach nothing.
    """

    groups: Groups
    depth: int
    num_constant: int


def teacher_groups(groups: Groups, teacher: Run, *, query_id: Callable[[int], str], passage_id: Callable[[int], str]) -> TeacherGroups:
    """Groups with a teacher's scores for every positive and for the first negatives of every query.

    teacher: raw logits for pairs of the groups. How deep it goes is told from the query where it goes deepest; every other query must be
    scored as deep, or to the end of its list.
    query_id, passage_id: names of rows, for messages.
    Raises DataError listing the first pairs that are missing, the first scores that are not finite, or if no query's scores differ.
    """
    places = {int(query): position for position, query in enumerate(teacher.query_rows)}
    found: list[tuple[Floats, Floats]] = []
    for position in range(len(groups)):
        place = places.get(int(groups.query_rows[position]))
        rows, scores = teacher.ranked(place) if place is not None else (np.empty(0, np.int64), np.empty(0, np.float32))
        order = np.argsort(rows, kind="stable")
        rows, scores = np.asarray(rows)[order], np.asarray(scores)[order]
        found.append(
            (_scores_of(groups.positives(position)[0], rows, scores), _scores_of(groups.negatives(position)[0], rows, scores)),
        )
    depth = max((int(np.flatnonzero(~np.isnan(negatives))[-1]) + 1 for _, negatives in found if not np.isnan(negatives).all()), default=0)
    found = [(positives, negatives[:depth]) for positives, negatives in found]
    _check_teacher(groups, found, teacher, depth=depth, query_id=query_id, passage_id=passage_id)
    num_constant = sum(len(both) > 1 and float(np.ptp(both)) == 0.0 for both in (np.concatenate(pair) for pair in found))
    if len(groups) and num_constant == len(groups):
        raise DataError(
            "the teacher gives all passages of a query the same score, for every query; it has not learned anything: train it again"
        )
    negatives = [np.asarray(groups.negatives(position)[0][:depth]) for position in range(len(groups))]
    return TeacherGroups(
        Groups(
            groups.split,
            groups.query_rows,
            groups.positive_offsets,
            groups.positive_rows,
            np.concatenate([scores for scores, _ in found]).astype(np.float32),
            offsets_of([len(rows) for rows in negatives]),
            np.concatenate(negatives),
            np.concatenate([scores for _, scores in found]).astype(np.float32),
        ),
        depth,
        num_constant,
    )


def _scores_of(wanted: Ints, rows: Ints, scores: Floats) -> Floats:
    """Scores of the wanted passages, NaN where there is none; `rows` is sorted. A score that is itself not finite becomes infinite."""
    if len(rows) == 0:
        return np.full(len(wanted), np.nan, dtype=np.float32)
    places = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    finite = np.where(np.isfinite(scores[places]), scores[places], np.inf)
    return np.where(rows[places] == wanted, finite, np.nan).astype(np.float32)


def _check_teacher(
    groups: Groups,
    found: list[tuple[Floats, Floats]],
    teacher: Run,
    *,
    depth: int,
    query_id: Callable[[int], str],
    passage_id: Callable[[int], str],
) -> None:
    bad: dict[str, list[str]] = {"missing": [], "infinite": []}
    for position, pair in enumerate(found):
        rows = np.concatenate([groups.positives(position)[0], groups.negatives(position)[0][:depth]])
        scores = np.concatenate(pair)
        for kind, where in (("missing", np.isnan(scores)), ("infinite", np.isinf(scores))):
            name = query_id(int(groups.query_rows[position])) if where.any() else ""
            bad[kind] += [f"({name}, {passage_id(int(row))})" for row in rows[where]]
    if bad["missing"]:
        raise DataError(
            f"the teacher run ({len(teacher):,} queries) has no score for {len(bad['missing']):,} pairs of query and passage "
            f"of the groups: {_first(bad['missing'])}; run the rerank step again over these groups"
        )
    if bad["infinite"]:
        raise DataError(
            f"{len(bad['infinite']):,} teacher scores are not finite numbers: {_first(bad['infinite'])}; train the re-ranker again, "
            "with a lower learning rate or bf16 = false"
        )


def _first(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (" ..." if len(names) > shown else "")
