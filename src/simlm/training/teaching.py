"""Is the teacher better than the retriever that it is to teach, and what mixture of the two is?

Both score the same candidates of the same queries. A mixture is standardised and summed by weight (`combine_teachers`), the weight chosen
by reciprocal rank; its logits are multiplied by the factor under which the relevant passages are likeliest, which is what the listwise
softmax that trains a re-ranker does to the re-ranker's own (temperature scaling, arXiv 1706.04599).
Shapes: L lists of candidates, N candidates of all lists end to end; the last of the T scorers is the student, the others are the teachers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.data.teachers import Mixture, ScoredLists, combine_teachers
from simlm.evaluation.significance import p_value, wins_ties_losses
from simlm.rankings import Floats

Doubles = NDArray[np.float64]
Outcome = Literal["better", "level", "worse"]
SIGNIFICANT = 0.05
WEIGHTS = tuple(step / 20 for step in range(21))
SHARPNESS = tuple(float(factor) for factor in np.geomspace(1 / 64, 64, 97))
"""Factors tried, 9% apart."""


@dataclass(frozen=True)
class Comparison:
    """Teacher against student: means of the reciprocal rank, and of how often the positive is first; p as in the report.

    *_entropy: nats, mean over the lists, at temperature 1. *_sharpness: see `likeliest_sharpness`; 3 says that the logits are a third of
    what they ought to be, so that a temperature of 1/3 would suit.
    """

    num_queries: int
    teacher: float
    student: float
    p_value: float | None
    won: int
    lost: int
    teacher_accuracy: float
    student_accuracy: float
    teacher_entropy: float
    student_entropy: float
    teacher_sharpness: float
    student_sharpness: float

    @property
    def outcome(self) -> Outcome:
        """ "better" or "worse" if the teacher is so with p < SIGNIFICANT."""
        if self.p_value is None or self.p_value >= SIGNIFICANT:
            return "level"
        return "worse" if self.teacher < self.student else "better"

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        numbers = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return numbers | {"outcome": self.outcome}


def compare(lists: ScoredLists, *, cutoff: int | None, seed: int) -> Comparison:
    """The teachers together against the student. cutoff: of the reciprocal rank; none = the whole list."""
    teacher_N, student_N = combine_teachers(lists.scores_TN[:-1], lists.offsets), lists.scores_TN[-1]
    teacher_L, student_L = reciprocal_ranks(lists, teacher_N, cutoff), reciprocal_ranks(lists, student_N, cutoff)
    won, _, lost = wins_ties_losses(teacher_L, student_L)
    return Comparison(
        num_queries=len(lists),
        teacher=_mean(teacher_L),
        student=_mean(student_L),
        p_value=p_value(teacher_L, student_L, seed=seed),
        won=won,
        lost=lost,
        teacher_accuracy=_mean((teacher_L == 1).astype(np.float64)),
        student_accuracy=_mean((student_L == 1).astype(np.float64)),
        teacher_entropy=_entropy(lists, teacher_N),
        student_entropy=_entropy(lists, student_N),
        teacher_sharpness=likeliest_sharpness(lists, teacher_N),
        student_sharpness=likeliest_sharpness(lists, student_N),
    )


def reciprocal_ranks(lists: ScoredLists, scores_N: Floats, cutoff: int | None) -> Doubles:
    """float64 [L]: 1 / rank of the best positive of each list, 0 where there is none or it stands beyond the cut-off.

    A negative with the same score counts half a rank, so that the order of the list decides nothing.
    """
    starts_L, counts_L = lists.offsets[:-1], np.diff(lists.offsets)
    if len(counts_L) == 0:
        return np.empty(0)
    positive_N = lists.is_positive_N
    best_L = np.maximum.reduceat(np.where(positive_N, scores_N, -np.inf), starts_L)
    best_N = np.repeat(best_L, counts_L)
    before_L = np.add.reduceat((~positive_N & (scores_N > best_N)) + 0.5 * (~positive_N & (scores_N == best_N)), starts_L)
    ranks_L = np.where(np.isfinite(best_L), 1.0 + before_L, np.inf)
    if cutoff is not None:
        ranks_L = np.where(ranks_L <= cutoff, ranks_L, np.inf)
    return 1.0 / ranks_L


@dataclass(frozen=True)
class Mixed:
    """The best mixture of teachers and student.

    teacher_weight: share of the teachers together. value: its mean reciprocal rank; curve: that of every weight tried.
    sharpness: factor of the mixture's logits. entropy: nats, mean over the lists, with that factor.
    """

    teacher_weight: float
    value: float
    curve: dict[float, float]
    sharpness: float
    entropy: float

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "teacher_weight": self.teacher_weight,
            "mixture": round(self.value, 6),
            "curve": {f"{weight:.2f}": round(value, 6) for weight, value in self.curve.items()},
            "sharpness": round(self.sharpness, 6),
            "mixture_entropy": round(self.entropy, 6),
        }


def best_mixture(lists: ScoredLists, *, cutoff: int | None) -> Mixed:
    """The weight with the best mean reciprocal rank (0 to 1 in steps of 0.05; of equal values the teachers' largest), and its sharpness."""
    num_teachers = len(lists.scores_TN) - 1
    values = {weight: _mean(reciprocal_ranks(lists, _mixed(lists, mixture_of(num_teachers, weight)), cutoff)) for weight in WEIGHTS}
    best = max(values.values())
    # The same ranks can add up to sums that differ in the last bit.
    weight = max(weight for weight, value in values.items() if value >= best - 1e-12)
    mixed_N = _mixed(lists, mixture_of(num_teachers, weight))
    sharpness = likeliest_sharpness(lists, mixed_N) if 0 < weight < 1 else 1.0
    return Mixed(weight, values[weight], values, sharpness, _entropy(lists, mixed_N * np.float32(sharpness)))


def mixture_of(num_teachers: int, teacher_weight: float, sharpness: float = 1.0) -> Mixture:
    """Teachers that share `teacher_weight` alike, then the student; those of weight 0 get 0."""
    return Mixture((*[teacher_weight / num_teachers] * num_teachers, 1.0 - teacher_weight), sharpness)


def likeliest_sharpness(lists: ScoredLists, scores_N: Floats) -> float:
    """The factor of SHARPNESS under which a softmax over each list gives the positives the highest mean log-probability.

    Lists without a positive, or with nothing else, say nothing; 1 if all are such.
    """
    num_positives_L = np.add.reduceat(lists.is_positive_N.astype(np.int64), lists.offsets[:-1]) if len(lists) else np.empty(0, np.int64)
    useful_L = (num_positives_L > 0) & (num_positives_L < np.diff(lists.offsets))
    if not useful_L.any():
        return 1.0
    likelihoods = [float(_log_likelihood(lists, scores_N * factor)[useful_L].mean()) for factor in SHARPNESS]
    return SHARPNESS[int(np.argmax(likelihoods))]


def _mixed(lists: ScoredLists, mixture: Mixture) -> Floats:
    """float32 [N], without those of weight 0."""
    chosen = [place for place, weight in enumerate(mixture.weights) if weight > 0]
    return Mixture(tuple(mixture.weights[place] for place in chosen)).of(lists.scores_TN[chosen], lists.offsets)


def _log_likelihood(lists: ScoredLists, scores_N: Floats) -> Doubles:
    """float64 [L]: log of the softmax's sum over the positives; -inf where there is none."""
    log_N = _log_softmax(lists, scores_N)
    with np.errstate(divide="ignore"):
        likelihood_L: Doubles = np.log(np.add.reduceat(np.where(lists.is_positive_N, np.exp(log_N), 0.0), lists.offsets[:-1]))
    return likelihood_L


def _entropy(lists: ScoredLists, scores_N: Floats) -> float:
    log_N = _log_softmax(lists, scores_N)
    return _mean(-np.add.reduceat(np.exp(log_N) * log_N, lists.offsets[:-1])) if len(lists) else 0.0


def _log_softmax(lists: ScoredLists, scores_N: Floats) -> Doubles:
    starts_L, counts_L = lists.offsets[:-1], np.diff(lists.offsets)
    if len(counts_L) == 0:
        return np.empty(0)
    centred_N = scores_N.astype(np.float64) - np.repeat(np.maximum.reduceat(scores_N, starts_L), counts_L)
    log_N: Doubles = centred_N - np.repeat(np.log(np.add.reduceat(np.exp(centred_N), starts_L)), counts_L)
    return log_N


def _mean(values: Doubles) -> float:
    return float(values.mean()) if len(values) else 0.0


__all__ = ["Comparison", "Mixed", "best_mixture", "compare", "likeliest_sharpness", "mixture_of", "reciprocal_ranks"]
