"""Teacher against student, and their mixture, with numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simlm.data.teachers import Mixture, ScoredLists, combine_teachers, of_scored_queries, scored_candidates, scored_groups, teacher_groups
from simlm.errors import DataError, ShapeError
from simlm.evaluation.report.verdicts import teaching_verdict
from simlm.rankings import Groups, Run, offsets_of
from simlm.recipe import CheckTeacherSettings
from simlm.stages.check_teacher import decide
from simlm.training.teaching import Comparison, best_mixture, compare, likeliest_sharpness, mixture_of, reciprocal_ranks


def lists_of(*lists: tuple[list[int], list[list[float]]]) -> ScoredLists:
    """Each list: places of the positives, and what each scorer says of its candidates."""
    positives = [np.isin(np.arange(len(scores[0])), places) for places, scores in lists]
    scores_TN = np.concatenate([np.array(scores, dtype=np.float32) for _, scores in lists], axis=1)
    return ScoredLists(offsets_of([len(scores[0]) for _, scores in lists]), np.concatenate(positives), scores_TN)


# --- ranks


def test_reciprocal_ranks_by_hand() -> None:
    lists = lists_of(
        ([0], [[3.0, 2.0, 1.0]]),  # first
        ([2], [[3.0, 2.0, 1.0]]),  # third
        ([1, 2], [[3.0, 1.0, 2.0]]),  # the better of two positives is second
        ([], [[3.0, 2.0]]),  # none to find
        ([0], [[5.0]]),  # nothing else
    )
    assert reciprocal_ranks(lists, lists.scores_TN[0], None).tolist() == [1.0, 1 / 3, 0.5, 0.0, 1.0]
    assert reciprocal_ranks(lists, lists.scores_TN[0], 2).tolist() == [1.0, 0.0, 0.5, 0.0, 1.0]


def test_equal_scores_count_half_wherever_they_stand() -> None:
    for place in range(3):
        lists = lists_of(([place], [[1.0, 1.0, 1.0]]))
        assert reciprocal_ranks(lists, lists.scores_TN[0], None).tolist() == [0.5]  # between the first and the third place


def test_no_lists_at_all() -> None:
    nothing = ScoredLists(offsets_of([]), np.zeros(0, dtype=bool), np.zeros((2, 0), dtype=np.float32))
    assert len(reciprocal_ranks(nothing, nothing.scores_TN[0], None)) == 0
    assert likeliest_sharpness(nothing, nothing.scores_TN[0]) == 1.0


# --- the comparison

POOR, GOOD = [1.0, 2.0], [2.0, 1.0]


def test_a_comparison_by_hand() -> None:
    """Ten queries: the teacher has the positive first for two of them, the student for all but one of those."""
    lists = lists_of(*[([0], [GOOD if query < 2 else POOR, POOR if query == 0 else GOOD]) for query in range(10)])
    found = compare(lists, cutoff=10, seed=1)
    assert (found.num_queries, found.won, found.lost) == (10, 1, 8)
    assert (found.teacher, found.student) == (pytest.approx(0.6), pytest.approx(0.95))
    assert (found.teacher_accuracy, found.student_accuracy) == (pytest.approx(0.2), pytest.approx(0.9))
    # Nine queries differ, by half each: of 512 swaps those with 8 or 9 on one side, 2 x (9 + 1).
    assert found.p_value == pytest.approx(20 / 512)
    assert found.outcome == "worse"
    assert found.facts()["outcome"] == "worse"


def test_how_sure_each_is_by_hand() -> None:
    """Of two candidates with a margin m of logits the entropy is log(1 + e^-m) + m / (1 + e^m) nats."""
    lists = lists_of(*[([0 if query % 4 else 1], [[1.5, 0.0], [0.0, 0.0]]) for query in range(40)])
    found = compare(lists, cutoff=10, seed=1)
    assert found.teacher_entropy == pytest.approx(math.log1p(math.exp(-1.5)) + 1.5 / (1 + math.exp(1.5)))
    assert found.student_entropy == pytest.approx(math.log(2))
    # Right three times in four: the margin ought to be log 3.
    assert found.teacher_sharpness == pytest.approx(math.log(3) / 1.5, rel=0.05)


def test_a_few_queries_prove_nothing() -> None:
    lists = lists_of(*[([0], [POOR, GOOD])] * 4)
    found = compare(lists, cutoff=10, seed=1)
    assert (found.student - found.teacher, found.p_value, found.outcome) == (0.5, pytest.approx(2 / 16), "level")
    turned = ScoredLists(*[getattr(lists, name) for name in ("offsets", "is_positive_N")], lists.scores_TN[::-1])  # type: ignore[arg-type]
    assert compare(turned, cutoff=10, seed=1).outcome == "level"
    more = lists_of(*[([0], [GOOD, POOR])] * 8)
    assert compare(more, cutoff=10, seed=1).outcome == "better"


def test_several_teachers_are_compared_together() -> None:
    """One teacher has the positive first, one last; what they say together decides."""
    lists = lists_of(([0], [[3.0, 1.0, 0.0], [0.0, 2.0, 0.1], [1.0, 2.0, 3.0]]))
    both = combine_teachers(lists.scores_TN[:2], lists.offsets)
    assert compare(lists, cutoff=None, seed=1).teacher == reciprocal_ranks(lists, both, None).mean()


# --- mixtures


def test_weights_by_hand() -> None:
    # Deviations: (0, 1, 2) sqrt(2/3), (10, 40, 10) sqrt(200). Standardised: sqrt(3/2) (-1, 0, 1) and (-1, 2, -1) / sqrt(2).
    scores = np.array([[0.0, 1.0, 2.0], [10.0, 40.0, 10.0]], dtype=np.float32)
    combined = combine_teachers(scores, np.array([0, 3]), [0.75, 0.25])
    scale, middle, root = 0.75 * math.sqrt(2 / 3) + 0.25 * math.sqrt(200), 0.75 * 1 + 0.25 * 20, math.sqrt(1.5)
    first = [0.75 * value for value in (-root, 0.0, root)]
    second = [0.25 * value / math.sqrt(2) for value in (-1, 2, -1)]
    np.testing.assert_allclose(combined, [middle + scale * (one + other) for one, other in zip(first, second, strict=True)], rtol=1e-6)
    np.testing.assert_allclose(combine_teachers(scores, np.array([0, 3]), [3.0, 1.0]), combined, rtol=1e-6)
    assert combine_teachers(scores, np.array([0, 3]), [1.0, 1.0]).tolist() == combine_teachers(scores, np.array([0, 3])).tolist()


def test_who_says_nothing_of_a_list_leaves_it_to_the_other_whatever_the_weights() -> None:
    scores = np.array([[7.0, 7.0], [1.0, 3.0]], dtype=np.float32)
    np.testing.assert_allclose(combine_teachers(scores, np.array([0, 2]), [0.95, 0.05]), [1.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(combine_teachers(scores[:1], np.array([0, 2]), [0.5]), [7.0, 7.0], rtol=1e-6)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(ShapeError, match="one above 0 for each is needed"):
        combine_teachers(np.ones((2, 3), dtype=np.float32), np.array([0, 3]), weights)


def test_the_best_mixture_beats_both() -> None:
    """Each is right where the other is unsure: only together they are right about all."""
    sure, unsure = [3.0, -3.0, 0.0], [1.0, 1.1, 0.0]
    lists = lists_of(*[([0], [sure, unsure]), ([0], [unsure, sure])] * 5)
    found = best_mixture(lists, cutoff=10)
    assert (found.curve[0.0], found.curve[1.0]) == (pytest.approx(0.75), pytest.approx(0.75))
    assert found.value == 1.0 and 0 < found.teacher_weight < 1
    # Of the weights that do as well the teacher's largest.
    assert found.teacher_weight == max(weight for weight, value in found.curve.items() if value == 1.0)
    assert len(found.curve) == 21


def test_a_teacher_that_is_right_or_wrong_about_everything() -> None:
    right, wrong = [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]
    best = best_mixture(lists_of(*[([0], [right, wrong])] * 3), cutoff=10)
    assert (best.teacher_weight, best.value, best.sharpness) == (1.0, 1.0, 1.0)
    # Level: the teacher's.
    assert best_mixture(lists_of(*[([0], [right, right])] * 3), cutoff=10).teacher_weight == 1.0
    # Below an even share the student's order stands.
    worst = best_mixture(lists_of(*[([0], [wrong, right])] * 3), cutoff=10)
    assert worst.value == 1.0 and worst.teacher_weight < 0.5


def test_teachers_share_the_teachers_weight() -> None:
    assert mixture_of(2, 0.5).weights == (0.25, 0.25, 0.5)
    assert mixture_of(1, 0.3, 2.0) == Mixture((0.3, 0.7), 2.0)


def test_the_likeliest_sharpness_by_hand() -> None:
    """A margin of 1 that is right three times in four: the odds 3 : 1 are those of a margin of log 3 = 1.0986."""
    lists = lists_of(*[([0 if query % 4 else 1], [[1.0, 0.0]]) for query in range(40)])
    found = likeliest_sharpness(lists, lists.scores_TN[0])
    assert found == pytest.approx(math.log(3), rel=0.05)
    # Scores ten times as large are to be divided by ten.
    assert likeliest_sharpness(lists, lists.scores_TN[0] * 10) == pytest.approx(math.log(3) / 10, rel=0.05)


def test_lists_that_say_nothing_of_the_sharpness() -> None:
    useful = [([0 if query % 4 else 1], [[1.0, 0.0]]) for query in range(40)]
    with_others = lists_of(*useful, ([], [[9.0, 0.0]]), ([0], [[5.0]]), ([0, 1], [[0.0, 9.0]]))
    alone = lists_of(*useful)
    assert likeliest_sharpness(with_others, with_others.scores_TN[0]) == likeliest_sharpness(alone, alone.scores_TN[0])
    silent = lists_of(([], [[1.0, 0.0]]), ([0], [[1.0]]))
    assert likeliest_sharpness(silent, silent.scores_TN[0]) == 1.0


def test_the_mixture_is_as_sharp_as_it_is_right() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((200, 8))
    noisy = [truth + rng.standard_normal(truth.shape) for _ in range(2)]
    lists = lists_of(*[([int(truth[query].argmax())], [noisy[0][query].tolist(), noisy[1][query].tolist()]) for query in range(200)])
    found = best_mixture(lists, cutoff=10)
    assert 0.2 < found.teacher_weight < 0.8
    # Two noisy views together know more than one: the mixture may be surer than either at its own likeliest sharpness.
    alone = likeliest_sharpness(lists, lists.scores_TN[0])
    assert found.sharpness > alone > 0
    assert likeliest_sharpness(lists, lists.scores_TN[0] * 0.001) == pytest.approx(64.0)  # as far as is looked


# --- what is done


def settings(**options: object) -> CheckTeacherSettings:
    return CheckTeacherSettings.model_validate(options)


def decided(lists: ScoredLists, **options: object) -> tuple[str, float | None]:
    action, mixed = decide(settings(**options), compare(lists, cutoff=10, seed=1), lists, cutoff=10)
    return action, None if mixed is None else mixed.teacher_weight


RIGHT, WRONG = [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]
SURE, UNSURE = [3.0, -3.0, 0.0], [1.0, 1.1, 0.0]
WORSE = lists_of(*[([0], [WRONG, SURE])] * 10, *[([0], [SURE, UNSURE])] * 2)
"""The teacher is worse, and yet of use."""
HARMFUL = lists_of(*[([0], [[-1.0, 1.0, 0.0, 0.0], [1.0, 0.99, 0.0, 0.0]])] * 10)
"""The student is right by a hair, which the least share of the teacher undoes."""
BETTER = lists_of(*[([0], [RIGHT, WRONG])] * 10)


def test_what_a_worse_teacher_leads_to() -> None:
    action, weight = decided(WORSE)
    assert action == "mix" and weight is not None and 0 < weight < 1
    assert decided(WORSE, if_worse="skip") == ("skip", None)
    assert decided(WORSE, if_worse="go_on") == ("teach", None)


def test_a_teacher_that_adds_nothing_is_not_distilled() -> None:
    assert decided(HARMFUL) == ("skip", 0.0)
    assert decided(HARMFUL, interpolate=True) == ("skip", 0.0)
    found = best_mixture(HARMFUL, cutoff=10)
    assert (found.curve[0.0], found.curve[0.05], found.sharpness) == (1.0, 0.5, 1.0)


def test_a_better_teacher_teaches_alone() -> None:
    for rule in ("mix", "skip", "go_on"):
        assert decided(BETTER, if_worse=rule) == ("teach", None)
    assert decided(BETTER, interpolate=True) == ("teach", 1.0)
    action, weight = decided(WORSE, interpolate=True)
    assert action == "mix" and weight == decided(WORSE)[1]


FACTS = {
    "student_name": "retriever2",
    "measure": "RR@10",
    "measured_on": "dev",
    "teacher": 0.776,
    "student": 0.958,
    "num_queries": 200,
    "p_value": 0.0001,
    "outcome": "worse",
    "action": "teach",
}


@pytest.mark.parametrize(
    ("facts", "tone", "text"),
    [
        (
            {},
            "warn",
            "The teacher is worse than retriever 2, which it is to teach (RR@10 0.776 against 0.958 on 200 dev queries, p < 0.001), "
            "and is distilled all the same.",
        ),
        (
            {"action": "skip"},
            "warn",
            "Not distilled: the distilled retriever is retriever 2 as it was. The teacher is worse than retriever 2, which it is to teach "
            "(RR@10 0.776 against 0.958 on 200 dev queries, p < 0.001).",
        ),
        (
            {"action": "skip", "teacher_weight": 0.0},
            "warn",
            "Not distilled: the distilled retriever is retriever 2 as it was. The teacher is worse than retriever 2, which it is to teach "
            "(RR@10 0.776 against 0.958 on 200 dev queries, p < 0.001). No mixture of the two is better than the student alone.",
        ),
        (
            {"action": "mix", "teacher_weight": 0.3, "mixture": 0.961},
            "warn",
            "The teacher is worse than retriever 2, which it is to teach (RR@10 0.776 against 0.958 on 200 dev queries, p < 0.001). "
            "What is distilled is a mixture chosen on the same queries: 0.30 x teacher + 0.70 x retriever 2, RR@10 0.961.",
        ),
        (
            {"outcome": "better", "teacher": 0.97, "p_value": 0.02, "measured_on": "train", "measure": "RR", "num_queries": 1000},
            "plain",
            "The teacher is better than retriever 2, which it is to teach (RR 0.970 against 0.958 on 1,000 training groups, which both "
            "were trained on, p = 0.020).",
        ),
        (
            {"outcome": "level", "student_name": "retriever2_round3"},
            "plain",
            "The teacher is not measurably different from retriever 2, round 3, which it is to teach (RR@10 0.776 against 0.958 on 200 dev "
            "queries, p < 0.001).",
        ),
    ],
)
def test_what_is_said(facts: dict[str, object], tone: str, text: str) -> None:
    verdict = teaching_verdict(FACTS | facts)
    assert (verdict.tone, verdict.text) == (tone, text)


# --- lists from runs and groups


def groups_of(positives: list[list[int]], negatives: list[list[int]]) -> Groups:
    flat = [np.array([row for rows in table for row in rows], dtype=np.int64) for table in (positives, negatives)]
    return Groups(
        "train",
        np.arange(len(positives), dtype=np.int64) + 10,
        offsets_of([len(rows) for rows in positives]),
        flat[0],
        flat[0].astype(np.float32),
        offsets_of([len(rows) for rows in negatives]),
        flat[1],
        flat[1].astype(np.float32),
    )


def run_of(lists: dict[int, dict[int, float]], split: str = "train") -> Run:
    return Run.from_lists(split, list(lists), [(list(scores), list(scores.values())) for scores in lists.values()])  # type: ignore[arg-type]


NAMES = {"query_id": lambda row: f"q{row}", "passage_id": lambda row: f"p{row}"}
GROUPS = groups_of([[0, 3], [1]], [[5, 6, 7], [8]])
TEACHER = run_of({10: {0: 2.0, 3: 1.0, 5: 4.0, 6: 3.0}, 11: {1: 1.0, 8: 0.0}})
STUDENT = run_of({10: {0: 9.0, 3: 8.0, 5: 7.0, 6: 6.0, 7: 5.0}, 11: {1: 4.0, 8: 3.0}})


def test_groups_as_lists_are_cut_where_the_shallowest_ends() -> None:
    lists = scored_groups(GROUPS, {"the teacher": TEACHER, "the student": STUDENT}, **NAMES)  # type: ignore[arg-type]
    assert lists.offsets.tolist() == [0, 4, 6]
    assert lists.is_positive_N.tolist() == [True, True, False, False, True, False]
    assert lists.scores_TN.tolist() == [[2.0, 1.0, 4.0, 3.0, 1.0, 0.0], [9.0, 8.0, 7.0, 6.0, 4.0, 3.0]]


def test_candidates_as_lists_are_in_the_runs_order() -> None:
    candidates = run_of({4: {7: 3.0, 2: 2.0, 9: 1.0}, 5: {1: 1.0}}, "dev")
    teacher = run_of({5: {1: 0.5}, 4: {9: 3.0, 7: -1.0, 2: 0.0}}, "dev")
    lists = scored_candidates(candidates, {4: [9, 100], 5: []}, {"the teacher": teacher, "the student": candidates}, **NAMES)  # type: ignore[arg-type]
    assert lists.offsets.tolist() == [0, 3, 4]
    assert lists.is_positive_N.tolist() == [False, False, True, False]
    assert lists.scores_TN.tolist() == [[-1.0, 0.0, 3.0, 0.5], [3.0, 2.0, 1.0, 1.0]]
    with pytest.raises(DataError, match=r"the teacher's run \(1 queries\) has no score for 1 pairs .*\(q5, p1\)"):
        scored_candidates(candidates, {}, {"the teacher": run_of({4: {9: 3.0, 7: -1.0, 2: 0.0}}, "dev")}, **NAMES)  # type: ignore[arg-type]


def test_a_mixture_in_place_of_the_miners_scores() -> None:
    mixture = mixture_of(1, 0.25, 2.0)
    found = teacher_groups(GROUPS, [TEACHER, STUDENT], mixture=mixture, **NAMES)  # type: ignore[arg-type]
    lists = scored_groups(GROUPS, {"the teacher": TEACHER, "the student": STUDENT}, **NAMES)  # type: ignore[arg-type]
    expected = combine_teachers(lists.scores_TN, lists.offsets, [0.25, 0.75]) * 2
    own = [np.concatenate([found.groups.positives(query)[1], found.groups.negatives(query)[1]]) for query in range(2)]
    np.testing.assert_allclose(np.concatenate(own), expected, rtol=1e-6)


def test_the_queries_that_a_teacher_was_given() -> None:
    kept = of_scored_queries(GROUPS, run_of({11: {1: 0.0, 8: 1.0}}))
    assert kept.query_rows.tolist() == [11]
    assert (kept.positives(0)[0].tolist(), kept.negatives(0)[0].tolist()) == ([1], [8])
    assert len(of_scored_queries(GROUPS, STUDENT)) == 2


def test_taking_queries_from_runs_and_groups() -> None:
    run = STUDENT.take(np.array([1, 0]), depth=2)
    assert [(query, rows.tolist(), scores.tolist()) for query, rows, scores in run] == [
        (11, [1, 8], [4.0, 3.0]),
        (10, [0, 3], [9.0, 8.0]),
    ]
    assert len(STUDENT.take(np.array([], dtype=np.int64))) == 0
    mined = Groups(
        **{name: getattr(GROUPS, name) for name in GROUPS.__dataclass_fields__}
        | {
            "negative_sources": np.array([0, 1, 0, 1], dtype=np.int8),
            "source_positive_scores": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=np.float32),
        }
    )
    taken = mined.take(np.array([1]))
    assert taken.negative_sources is not None and taken.source_positive_scores is not None
    assert (taken.negative_sources.tolist(), taken.source_positive_scores.tolist()) == ([1], [[3.0], [6.0]])


def test_numbers_of_a_comparison_are_json() -> None:
    facts = Comparison(3, 1 / 3, 0.5, None, 1, 2, 0.0, 1.0, 0.5, 0.6, 1.0, 1.0).facts()
    assert (facts["teacher"], facts["p_value"], facts["outcome"]) == (0.333333, None, "level")
