"""Paired tests worked out by hand, and their extremes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from simlm.errors import ShapeError
from simlm.evaluation.significance import holm, p_value, randomization_test, t_test, wins_ties_losses

ZEROS = np.zeros


def test_few_queries_are_enumerated() -> None:
    # Differences 1, 2, 3: of the 8 sign patterns only +++ and --- reach |6|.
    assert randomization_test(np.array([1.0, 2.0, 3.0]), ZEROS(3)) == 2 / 8
    # Differences 1, 2, -3 sum to 0, which every pattern reaches.
    assert randomization_test(np.array([1.0, 2.0, -3.0]), ZEROS(3)) == 1.0
    # 1, 1, 1, -1 sum to 2: patterns with |sum| >= 2 are all but the 6 with two of each sign.
    assert randomization_test(np.array([1.0, 1.0, 1.0, -1.0]), ZEROS(4)) == 10 / 16
    # Queries that do not differ do not matter.
    assert randomization_test(np.array([1.0, 2.0, 0.0, 3.0, 0.0]), ZEROS(5)) == 2 / 8


def test_enumeration_agrees_with_a_loop() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        differences = rng.normal(size=7).round(2)
        sums = [abs(float(np.dot(signs, differences))) for signs in itertools.product((-1, 1), repeat=7)]
        expected = sum(value >= abs(differences.sum()) - 1e-9 for value in sums) / len(sums)
        assert randomization_test(differences, ZEROS(7)) == pytest.approx(expected)


def test_sampled_p_value_has_the_plus_one_and_is_seeded() -> None:
    ones = np.ones(40)
    assert randomization_test(ones, ZEROS(40), num_samples=999) == 1 / 1000  # never 0
    values, against = np.random.default_rng(0).random((2, 200))
    first = randomization_test(values, against, seed=1)
    assert first == randomization_test(values, against, seed=1)
    assert first != randomization_test(values, against, seed=2)
    assert first == pytest.approx(randomization_test(against, values, seed=1))


def test_sampled_and_t_test_agree_on_many_queries() -> None:
    rng = np.random.default_rng(5)
    against = rng.random(300)
    values = against + rng.normal(0.02, 0.2, 300)
    expected = stats.ttest_rel(values, against).pvalue
    assert t_test(values, against) == pytest.approx(expected)
    assert p_value(values, against, method="t-test") == pytest.approx(expected)
    assert p_value(values, against, num_samples=10_000) == pytest.approx(expected, abs=0.02)


def test_false_alarms_are_as_rare_as_they_claim() -> None:
    rng = np.random.default_rng(11)
    p_values = [randomization_test(*rng.random((2, 50)), num_samples=500, seed=trial) or 0.0 for trial in range(400)]
    assert 0.02 < np.mean(np.array(p_values) <= 0.05) < 0.09


def test_extremes() -> None:
    same = np.array([0.5, 0.25])
    assert randomization_test(same, same) == 1.0
    assert t_test(same, same) == 1.0
    assert randomization_test(ZEROS(0), ZEROS(0)) is None
    assert t_test(ZEROS(0), ZEROS(0)) is None
    assert t_test(np.ones(1), ZEROS(1)) is None  # one query has no variance
    assert randomization_test(np.ones(1), ZEROS(1)) == 1.0  # both swaps are as large
    assert t_test(np.ones(4), ZEROS(4)) == 0.0
    with pytest.raises(ShapeError, match="same queries"):
        p_value(np.ones(2), np.ones(3))


def test_holm() -> None:
    # Sorted .01 .02 .04 .04: times 4 3 2 1 = .04 .06 .08 .04, made monotone .04 .06 .08 .08.
    corrected = holm({"a": 0.04, "b": 0.01, "none": None, "c": 0.02, "d": 0.04})
    assert corrected == {
        "a": pytest.approx(0.08),
        "b": pytest.approx(0.04),
        "none": None,
        "c": pytest.approx(0.06),
        "d": pytest.approx(0.08),
    }
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_wins_ties_losses() -> None:
    assert wins_ties_losses(np.array([1.0, 0.5, 0.0, 0.0]), np.array([0.5, 0.5, 0.1, 0.0])) == (1, 2, 1)
