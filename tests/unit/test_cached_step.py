"""Encoding in pieces is the same as encoding at once: values, gradients, dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simlm.data.batches import length_batches
from simlm.training.cached_step import encode_pieces, inverse_order, piece_tokens


class Toy(nn.Module):
    """Mean of token embeddings through a layer; counts its forward passes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.dropout = nn.Embedding(50, 8), nn.Linear(8, 6), nn.Dropout(dropout)
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.dropout(self.words(input_ids)) * attention_mask[..., None]
        return torch.nn.functional.normalize(self.layer(hidden.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)), dim=1)


LENGTHS = np.array([3, 9, 1, 4, 9, 2, 7])


def pieces_of(budget: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    positions = length_batches(LENGTHS, budget)
    pieces = []
    for part in positions:
        longest = int(LENGTHS[part].max())
        ids, mask = torch.zeros(len(part), longest, dtype=torch.int64), torch.zeros(len(part), longest, dtype=torch.int64)
        for place, row in enumerate(part):
            length = int(LENGTHS[row])
            ids[place, :length] = torch.arange(length) + 5 * int(row) + 1
            mask[place, :length] = 1
        pieces.append({"input_ids": ids, "attention_mask": mask})
    return pieces, inverse_order(positions)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("budget", "kept"), [(9, 1), (18, 18), (20, 40), (10_000, 10_000)])
def test_pieces_give_the_values_and_gradients_of_the_whole(budget: int, kept: int) -> None:
    whole, piecewise = Toy(), Toy()
    target = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for model, (pieces, order), keep in ((whole, pieces_of(10_000), 10_000), (piecewise, pieces_of(budget), kept)):
        outputs = encode_pieces(model, pieces, order, max_kept_tokens=keep)
        (outputs @ outputs.T - target @ target.T).square().sum().backward()
        results.append(outputs.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    for left, right in zip(gradients(whole), gradients(piecewise), strict=True):
        assert (left - right).norm() <= 1e-6 * left.norm()


def test_rows_come_back_in_their_order() -> None:
    pieces, order = pieces_of(9)
    outputs = encode_pieces(
        lambda input_ids, attention_mask: (input_ids * attention_mask).max(dim=1).values, pieces, order, max_kept_tokens=1
    )
    assert outputs.tolist() == [5 * row + int(length) for row, length in enumerate(LENGTHS)]


def test_only_what_fits_is_kept_the_rest_is_computed_twice() -> None:
    pieces, order = pieces_of(9)
    sizes = [int(piece["input_ids"].numel()) for piece in pieces]
    model = Toy()
    encode_pieces(model, pieces, order, max_kept_tokens=sizes[-1] + sizes[-2]).sum().backward()
    assert model.calls == 2 * len(pieces) - 2
    alone = Toy()
    with torch.no_grad():
        encode_pieces(alone, pieces, order, max_kept_tokens=1)
    assert alone.calls == len(pieces)


def test_dropout_is_the_same_the_second_time() -> None:
    pieces, order = pieces_of(9)
    kept, cached = Toy(0.5), Toy(0.5)
    for model, keep in ((kept, 10_000), (cached, 1)):
        torch.manual_seed(3)
        encode_pieces(model, pieces, order, max_kept_tokens=keep).square().sum(dim=0).prod().backward()
    for left, right in zip(gradients(kept), gradients(cached), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_pieces_are_a_quarter_of_the_budget() -> None:
    assert (piece_tokens(16384), piece_tokens(3)) == (4096, 1)
