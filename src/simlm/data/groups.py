"""Training groups: which queries a step has, and which passages go with each.

Everything is a function of (seed, step): a query's epoch and its place in the order, the positive (they take turns by epoch) and the
negatives (a walk through the query's mined list in an order shuffled by (seed, query), going on where the last epoch stopped, so
that none comes again before all have been seen; or drawn anew each epoch, those that score like the positive most often, see
`Ambiguous`). Workers, processes and resuming change nothing.
Shapes: Q queries of a step, G group size, P = Q*G passages of a step, N passages of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simlm.data.duplicates import Duplicates
from simlm.data.false_negatives import TeacherMargin
from simlm.errors import DataError, RecipeError
from simlm.progress import Progress
from simlm.rankings import Floats, Groups, Ints
from simlm.recipe import RetrieverSettings

Bools = NDArray[np.bool_]
_ORDER, _WALK, _RANDOM, _FIRST_POSITIVE, _AMBIGUOUS = range(5)
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


@dataclass(frozen=True)
class Ambiguous:
    """Negatives drawn with probability p ~ exp(-a (z - b)^2), without replacement within a group (SimANS, arXiv 2210.11773, eq. 5).

    z = (s - s_pos) / d in standard deviations: s the stored score of the negative, s_pos that of the group's positive in the same run,
    d the standard deviation of the query's negatives from that run; the paper's s - s_pos is not divided, so its `a` depends on the
    scale of the scores. b > 0 prefers negatives above the positive, b < 0 those below it. a = 0: all alike.
    """

    a: float
    b: float

    @classmethod
    def of(cls, settings: RetrieverSettings) -> Ambiguous | None:
        """As a retriever's settings have it; None = the walk."""
        return cls(settings.ambiguous_a, settings.ambiguous_b) if settings.negatives == "ambiguous" else None

    def log_weights(self, groups: Groups, position: int, positive: int) -> NDArray[np.float64]:
        """float64 [negatives of the query at `position`], log p up to a constant; positive: place of the positive among the query's.

        A positive that a run does not have scores at most what the run's last candidate does, and is taken to score that.
        """
        scores = np.asarray(groups.negatives(position)[1], dtype=np.float64)
        weights = np.empty(len(scores))
        for places, positive_scores in groups.by_source(position):
            if len(places):
                own = scores[places]
                known = float(positive_scores[positive])
                differences = own - (known if np.isfinite(known) else own.min())
                spread = float(own.std())
                z = differences / spread if spread > 0 else np.zeros(len(own))
                weights[places] = -self.a * (z - self.b) ** 2
        return weights


class TrainingGroups:
    """Groups of fixed size, dealt out in steps of `queries_per_step` queries; the last step of an epoch goes on into the next.

    groups: mined candidates. judged: query row -> {passage row: grade}, to know more positives than the groups name.
    fill_with_random: give queries without any candidate random passages of the corpus, else refuse them.
    sampling: how negatives are drawn; none = the walk.
    duplicates: tells texts that are relevant under another id; none = ids only. margin: tells what a teacher takes for relevant.
    Raises DataError if there is no query, a query has no positive, the corpus has no passage to set against a query, or a negative has no
    score to be drawn by; RecipeError if queries_per_step is no multiple of num_ranks.
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
        sampling: Ambiguous | None = None,
        duplicates: Duplicates | None = None,
        margin: TeacherMargin | None = None,
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
        if sampling is not None:
            _check_scored(groups)
        self.seed = seed
        self._sampling = sampling
        self._judged = judged or {}
        self._duplicates = duplicates
        self._margin = margin
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
            **({} if self._duplicates is None else self._duplicates.facts()),
            **({} if self._margin is None else {"num_queries_without_teacher_margin": self._margin.num_without}),
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
        negative_rows, negative_scores = self._negatives(position, epoch, positive)
        return np.concatenate([rows[positive : positive + 1], negative_rows]), np.concatenate(
            [scores[positive : positive + 1], negative_scores]
        )

    def relevant(self, position: int) -> Ints:
        """int64, sorted: every passage known to be relevant to a query, by its group or by a judgement with grade > 0.

        Queries with the same text share theirs.
        """
        positives, _ = self.groups.positives(position)
        query_row = int(self.groups.query_rows[position])
        judged = np.array([row for row, grade in self._judged.get(query_row, {}).items() if grade > 0], dtype=np.int64)
        if self._duplicates is not None:
            judged = np.concatenate([judged, self._duplicates.positives_of_twins(query_row)])
        return np.union1d(positives, judged).astype(np.int64)

    def excluded(self, step: StepGroups) -> tuple[Bools, Bools]:
        """bool [Q, P]: passages of the step that are taken for relevant to a query and are not its own positive: no negatives of it;
        bool [Q, Q]: pairs of queries one of which takes the other's positive for relevant (True on the diagonal).

        Relevant are those of `relevant`, passages with the text of one of them, and what the teacher scores above the margin.
        """
        num_queries, group_size = step.passage_rows.shape
        passages_P = step.passage_rows.reshape(-1)
        relevant_QP = self._relevant_among(step.positions, passages_P)
        if self._margin is not None:
            positives_Q = step.passage_rows[:, 0]
            relevant_QP |= np.stack(
                [
                    self._margin.above(int(position), int(positive), passages_P)
                    for position, positive in zip(step.positions, positives_Q, strict=True)
                ]
            )
        own_columns = np.arange(num_queries) * group_size
        relevant_QQ = relevant_QP[:, own_columns]
        excluded_QP = relevant_QP.copy()
        excluded_QP[np.arange(num_queries), own_columns] = False
        return excluded_QP, relevant_QQ | relevant_QQ.T

    def _relevant_among(self, positions: Ints, passages_P: Ints) -> Bools:
        relevant = [self.relevant(int(position)) for position in positions]
        if self._duplicates is None:
            return np.stack([np.isin(passages_P, rows) for rows in relevant])
        digests_P = self._duplicates.digests(passages_P)
        return np.stack([np.isin(digests_P, self._duplicates.digests(rows)) for rows in relevant])

    def _negatives(self, position: int, epoch: int, positive: int) -> tuple[Ints, Floats]:
        wanted = self.group_size - 1
        rows, scores = self.groups.negatives(position)
        if len(rows) == 0:
            return self._random_negatives(position, epoch, wanted), np.full(wanted, np.nan, dtype=np.float32)
        if self._sampling is None:
            order = self._rng(_WALK, position).permutation(len(rows))
            places = order[(epoch * wanted + np.arange(wanted)) % len(rows)]
        else:
            # The largest of log weight + Gumbel noise are a draw without replacement by the weights (Vieira 2014).
            noise = self._rng(_AMBIGUOUS, position, epoch).gumbel(size=len(rows))
            keys = self._sampling.log_weights(self.groups, position, positive) + noise
            places = np.argsort(-keys, kind="stable")[np.arange(wanted) % len(rows)]
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


def _check_scored(groups: Groups, block: int = 1 << 20) -> None:
    """DataError if a negative has no score; reads the scores block by block, as there may be more than fit in memory."""
    scores = groups.negative_scores
    for start in range(0, len(scores), block):
        bare = np.flatnonzero(~np.isfinite(scores[start : start + block]))
        if len(bare):
            position = int(np.searchsorted(groups.negative_offsets, start + int(bare[0]), side="right")) - 1
            raise DataError(
                f'negatives = "ambiguous" draws by stored scores, and a negative of query row {groups.query_rows[position]} has none; '
                'mine again, or set negatives = "walk"'
            )


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
