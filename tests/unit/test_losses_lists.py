"""Distillation, listwise and R-Drop losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from simlm.errors import ShapeError
from simlm.losses.distillation import distillation_kl, listwise_likelihood, margin_mse, teacher_entropy
from simlm.losses.listwise import hardest, listwise_cross_entropy, symmetric_kl

HALVES = torch.tensor([[0.0, 0.0]])
QUARTERS = torch.tensor([[math.log(3.0), 0.0]])  # softmax: 3/4, 1/4


def test_kl_of_a_quarter_and_a_half() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2).
    kl = distillation_kl(HALVES, QUARTERS, student_temperature=0.02, teacher_temperature=1.0)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_kl_has_separate_temperatures_and_no_factor_of_their_square() -> None:
    # Student 0.02 * log 3 at temperature 0.02 is (3/4, 1/4); teacher 2 * log 3 at temperature 2 too: nothing to learn.
    same = distillation_kl(0.02 * QUARTERS, 2 * QUARTERS, student_temperature=0.02, teacher_temperature=2.0)
    assert same.item() == pytest.approx(0.0, abs=1e-7)
    # Teacher (1/2, 1/2), student (3/4, 1/4): log 2 pieces, the full value at temperature 0.02.
    kl = distillation_kl(0.02 * QUARTERS, HALVES, student_temperature=0.02, teacher_temperature=1.0)
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)


def test_kl_is_a_mean_over_queries_and_leaves_the_teacher_alone() -> None:
    student = torch.zeros(2, 2, requires_grad=True)
    teacher = torch.cat([QUARTERS, HALVES]).requires_grad_()
    kl = distillation_kl(student, teacher, student_temperature=1.0, teacher_temperature=1.0)
    kl.backward()  # type: ignore[no-untyped-call]
    assert kl.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)
    assert teacher.grad is None
    # d KL / d student = softmax(student) - teacher, halved by the mean.
    torch.testing.assert_close(student.grad, torch.tensor([[-0.125, 0.125], [0.0, 0.0]]))


def test_teacher_entropy() -> None:
    assert teacher_entropy(torch.zeros(3, 4), teacher_temperature=1.0).item() == pytest.approx(math.log(4), rel=1e-6)
    assert teacher_entropy(torch.tensor([[200.0, 0.0]]), teacher_temperature=1.0).item() == pytest.approx(0.0, abs=1e-7)


def test_listwise_cross_entropy() -> None:
    assert listwise_cross_entropy(QUARTERS).item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert listwise_cross_entropy(QUARTERS, torch.tensor([1])).item() == pytest.approx(-math.log(0.25), rel=1e-6)
    assert listwise_cross_entropy(torch.zeros(5, 1)).item() == 0.0


def test_symmetric_kl_of_a_quarter_and_a_half() -> None:
    # ((3/4 - 1/2) log(3/2) + (1/4 - 1/2) log(1/2)) / 2 = log(3) / 8.
    first, second = QUARTERS.clone().requires_grad_(), HALVES.clone().requires_grad_()
    value = symmetric_kl(first, second)
    assert value.item() == pytest.approx(math.log(3) / 8, rel=1e-6)
    assert symmetric_kl(second, first).item() == pytest.approx(value.item(), rel=1e-6)
    value.backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None and second.grad is not None and first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0


def test_hardest_keeps_the_positive_and_the_best_scored() -> None:
    logits = torch.tensor([[-9.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.5, -1.0]])
    chosen = hardest(logits, 3)
    assert chosen[:, 0].tolist() == [0, 0]
    assert [sorted(row) for row in chosen.tolist()] == [[0, 1, 3], [0, 1, 2]]
    assert logits[0, 0] == -9.0  # not mutated


def test_margin_mse_of_one_pair() -> None:
    # Student (0.5, 0.1) at 0.5 has margin 0.8, teacher (3, 1) at 2 has margin 1.
    loss = margin_mse(torch.tensor([[0.5, 0.1]]), torch.tensor([[3.0, 1.0]]), student_temperature=0.5, teacher_temperature=2.0)
    assert loss.item() == pytest.approx(0.04, rel=1e-5)


def test_margin_mse_is_a_mean_over_negatives_and_queries() -> None:
    # Margins of the student 1, 2 and 0, 0; of the teacher 1, 1 and 1, 3: squares 0, 1, 1, 9.
    student = torch.tensor([[1.0, 0.0, -1.0], [2.0, 2.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 1.0], [0.0, -1.0, -3.0]], requires_grad=True)
    loss = margin_mse(student, teacher, student_temperature=1.0, teacher_temperature=1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(11 / 4, rel=1e-6)
    assert teacher.grad is None
    # d / d student of row 1: 2 (s0 - s1 - 1) / 4 for negative 1, and so on; the positive gets minus the sum.
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, 0.0, -0.5], [-2.0, 0.5, 1.5]]))


def test_margin_mse_of_a_constant_teacher_asks_for_equal_scores() -> None:
    student = torch.tensor([[0.3, 0.1]], requires_grad=True)
    margin_mse(student, HALVES, student_temperature=1.0, teacher_temperature=1.0).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(student.grad, torch.tensor([[0.4, -0.4]]))


WEIGHTS = torch.log(torch.tensor([[3.0, 2.0, 1.0]]))  # drawn with 3/6, 2/6, 1/6


@pytest.mark.parametrize(
    ("teacher", "likelihood"),
    [
        ([3.0, 2.0, 1.0], 3 / 6 * 2 / 3),
        ([-1.0, 0.0, 100.0], 1 / 6 * 2 / 5),
        ([2.0, 2.0, 1.0], 3 / 6 * 2 / 6),  # two in no order, each drawn from all three
        ([1.0, 2.0, 1.0], 2 / 6 * 3 / 4 * 1 / 4),
        ([5.0, 5.0, 5.0], 3 / 6 * 2 / 6 * 1 / 6),
    ],
)
def test_listwise_likelihood_of_three(teacher: list[float], likelihood: float) -> None:
    for temperature in (1.0, 0.02):
        loss = listwise_likelihood(temperature * WEIGHTS, torch.tensor([teacher]), student_temperature=temperature)
        assert loss.item() == pytest.approx(-math.log(likelihood), rel=1e-5)


def test_listwise_likelihood_of_two_is_logistic() -> None:
    student = torch.tensor([[0.2, 0.5], [0.2, 0.5]], requires_grad=True)
    teacher = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    loss = listwise_likelihood(student, teacher, student_temperature=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx((math.log(1 + math.exp(3)) + math.log(1 + math.exp(-3))) / 2, rel=1e-6)
    assert teacher.grad is None
    right, wrong = 1 / (1 + math.exp(3)) * 5, 1 / (1 + math.exp(-3)) * 5
    torch.testing.assert_close(student.grad, torch.tensor([[-wrong, wrong], [right, -right]]))


def test_a_constant_teacher_leaves_equal_scores_alone() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    loss = listwise_likelihood(student, torch.full((1, 3), 7.0), student_temperature=0.02)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(3 * math.log(3), rel=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros(1, 3), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="cannot keep 3 of lists of 2"):
        hardest(HALVES, 3)
    with pytest.raises(ShapeError, match="teacher scores"):
        distillation_kl(HALVES, torch.zeros(1, 3), student_temperature=1.0, teacher_temperature=1.0)
    with pytest.raises(ShapeError, match="two passes"):
        symmetric_kl(HALVES, torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="teacher scores"):
        margin_mse(HALVES, torch.zeros(1, 3), student_temperature=1.0, teacher_temperature=1.0)
    with pytest.raises(ShapeError, match="teacher scores"):
        listwise_likelihood(HALVES, torch.zeros(1, 3), student_temperature=1.0)
    with pytest.raises(ShapeError, match="needs a negative"):
        margin_mse(HALVES[:, :1], HALVES[:, :1], student_temperature=1.0, teacher_temperature=1.0)
