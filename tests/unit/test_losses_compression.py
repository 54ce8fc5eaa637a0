"""Embeddings cut and rounded, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from simlm.errors import ShapeError
from simlm.losses.compression import binary_rounded, cut, int8_rounded

ROWS = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])


def test_cut_rows_have_unit_length_again() -> None:
    torch.testing.assert_close(cut(ROWS, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert cut(ROWS, 3) is ROWS


def test_what_is_cut_to_nothing_is_zero_and_has_a_finite_gradient() -> None:
    rows = torch.tensor([[0.0, 1.0]], requires_grad=True)
    kept = cut(rows, 1)
    kept.sum().backward()  # type: ignore[no-untyped-call]
    assert kept.tolist() == [[0.0]] and rows.grad is not None and torch.isfinite(rows.grad).all()


def test_too_large_a_size_is_refused() -> None:
    with pytest.raises(ShapeError, match="of 3 dimensions cannot be cut to 4"):
        cut(ROWS, 4)


def test_int8_has_one_range_for_all_rows() -> None:
    # The greatest number is 1 = 127 steps: 0.6 is 76.2 steps and 0.8 is 101.6, so the first row is (76, 0, 102) steps.
    length = math.hypot(76, 102)
    expected = torch.tensor([[76 / length, 0.0, 102 / length], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(int8_rounded(ROWS), expected)
    # Alone its range is 0.8: 0.6 is 95.25 steps.
    length = math.hypot(95, 127)
    torch.testing.assert_close(int8_rounded(ROWS[:1]), torch.tensor([[95 / length, 0.0, 127 / length]]))


def test_binary_keeps_signs() -> None:
    third = 1 / math.sqrt(3)
    torch.testing.assert_close(binary_rounded(torch.tensor([[0.6, -0.8, 0.0]])), torch.tensor([[third, -third, third]]))


@pytest.mark.parametrize("rounded", [int8_rounded, binary_rounded])
def test_the_gradient_passes_as_if_nothing_had_been_rounded(rounded: object) -> None:
    assert callable(rounded)
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(4, 5, generator=generator), dim=1).requires_grad_()
    weights = torch.randn(4, 5, generator=generator)
    values = rounded(rows)
    (values * weights).sum().backward()
    assert not torch.allclose(values, rows, atol=1e-4)
    # Of a vector of length l, scaled to length 1, in direction u: (w - (w.u) u) / l.
    step = rows.detach().abs().max() / 127
    before = (rows.detach() / step).round() * step if rounded is int8_rounded else torch.sign(rows.detach()) / math.sqrt(5)
    unit = F.normalize(before, dim=1)
    expected = (weights - (weights * unit).sum(1, keepdim=True) * unit) / before.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("rounded", [int8_rounded, binary_rounded])
def test_rows_of_zeros_and_float64(rounded: object) -> None:
    assert callable(rounded)
    values = rounded(torch.zeros(2, 4, dtype=torch.float64))
    assert values.dtype == torch.float64 and torch.isfinite(values).all()
