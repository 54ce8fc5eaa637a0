"""InfoNCE against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from simlm.errors import ShapeError
from simlm.losses.contrastive import group_scores, info_nce, info_nce_all_pairs, similarity

EYE = torch.eye(2)


def test_info_nce_of_two_orthogonal_pairs() -> None:
    # Scores 1/0.5 = 2 for the positive and 0 for the other: -log(e^2 / (e^2 + 1)).
    loss = info_nce(EYE, EYE, torch.tensor([0, 1]), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)


def test_info_nce_takes_the_mean_and_counts_hard_negatives() -> None:
    # Query 0 sees scores (1, 0, 0, 1), query 1 sees (0, 1, 1, 0), at temperature 1; positives are columns 0 and 2.
    passages = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    loss = info_nce(EYE, passages, torch.tensor([0, 2]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(2 * math.e + 2) - 1, rel=1e-6)


def test_excluded_passages_are_no_negatives() -> None:
    # The duplicate of query 0's positive in column 3 is left out: (e, 1, 1) for query 0.
    passages = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    excluded = torch.tensor([[False, False, False, True], [False, False, False, False]])
    loss = info_nce(EYE, passages, torch.tensor([0, 2]), temperature=1.0, excluded_QP=excluded)
    expected = (math.log(math.e + 2) - 1 + math.log(2 * math.e + 2) - 1) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_one_query_and_one_passage_have_no_loss() -> None:
    assert info_nce(EYE[:1], EYE[:1], torch.tensor([0]), temperature=0.02).item() == 0.0


def test_all_pairs_of_two_orthogonal_pairs() -> None:
    # Row 0 at temperature 1: q0 with p0, p1: e, 1; p0 with q1: 1; q0 with q1: 1; p0 with p1: 1. Row 1 is the same.
    loss = info_nce_all_pairs(EYE, EYE, torch.tensor([0, 1]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 4) - 1, rel=1e-6)


def test_all_pairs_leave_out_queries_with_the_same_positive() -> None:
    # Queries 0 and 1 have equal positives. Row 0 keeps its own positive alone: the loss is 0.
    passages = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = info_nce_all_pairs(
        EYE,
        passages,
        torch.tensor([0, 1]),
        temperature=1.0,
        excluded_QP=torch.tensor([[False, True], [True, False]]),
        excluded_QA=torch.ones(2, 2, dtype=torch.bool),
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-7)


def test_all_pairs_over_some_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=1)
    passages = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    positives = torch.arange(4) * 3
    parts = [info_nce_all_pairs(queries, passages, positives, temperature=0.1, rows_Q=torch.tensor([row])) for row in range(4)]
    assert torch.stack(parts).mean().item() == pytest.approx(
        info_nce_all_pairs(queries, passages, positives, temperature=0.1).item(), rel=1e-6
    )


def test_scores_stay_in_float32_under_autocast() -> None:
    left = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, grouped = similarity(left, left, temperature=0.02), group_scores(left, left[:, None, :])
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, left @ left.T / 0.02)
    torch.testing.assert_close(grouped, torch.ones(3, 1))


def test_a_temperature_that_is_trained_gets_its_gradient() -> None:
    # One positive with score 1 and one negative with score 0: loss = log(1 + exp(-1 / t)), d loss / d t = sigmoid(-1 / t) / t^2.
    temperature = torch.tensor([0.5], requires_grad=True)
    loss = info_nce(EYE, EYE, torch.tensor([0, 1]), temperature=temperature)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert temperature.grad is not None and temperature.grad.item() == pytest.approx(4 / (1 + math.exp(2)), rel=1e-5)


def test_float64_stays() -> None:
    assert similarity(EYE.double(), EYE.double(), temperature=0.5).dtype == torch.float64
    assert group_scores(EYE.bfloat16(), EYE.bfloat16()[:, None]).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="2 and of 3 dimensions"):
        info_nce(EYE, torch.zeros(2, 3), torch.tensor([0, 1]), temperature=1.0)
    with pytest.raises(ShapeError, match=r"columns 0\.\.2, there are 2"):
        info_nce(EYE, EYE, torch.tensor([0, 2]), temperature=1.0)
    with pytest.raises(ShapeError, match="excluded_QP"):
        info_nce(EYE, EYE, torch.tensor([0, 1]), temperature=1.0, excluded_QP=torch.zeros(2, 3, dtype=torch.bool))
