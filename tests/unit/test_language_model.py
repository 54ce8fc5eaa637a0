"""Chunked cross-entropy against the plain one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

from simlm.errors import ShapeError
from simlm.losses.language_model import (
    bag_of_words_cross_entropy,
    chunked_cross_entropy,
    cross_entropy_and_rows,
    default_chunk_rows,
    padded_columns,
    padded_probabilities,
    token_losses,
)

torch.set_num_threads(1)


def _tensors(num_rows: int = 23, width: int = 8, num_entries: int = 37, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = (torch.randn(num_rows, width, generator=generator) * scale).requires_grad_()
    weight = torch.randn(num_entries, width, generator=generator).requires_grad_()
    bias = torch.randn(num_entries, generator=generator).requires_grad_()
    return features, weight, bias, torch.randint(0, num_entries, (num_rows,), generator=generator)


def test_value_worked_out_by_hand() -> None:
    # Logits (0, ln 3): probabilities 1/4 and 3/4.
    features, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3.0)]])
    loss = chunked_cross_entropy(features, weight, None, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(4.0) + math.log(4.0 / 3.0), rel=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100, None])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_plain_cross_entropy(chunk_rows: int | None, scale: float) -> None:
    features, weight, bias, labels = _tensors(scale=scale)
    loss = chunked_cross_entropy(features, weight, bias, labels, chunk_rows)
    (loss / 7).backward()
    found = [features.grad, weight.grad, bias.grad]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, weight, bias)]
    plain = cross_entropy(leaves[0] @ leaves[1].T + leaves[2], labels, reduction="sum")
    (plain / 7).backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for gradient, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)


def test_without_bias_and_with_frozen_parts() -> None:
    features, weight, _, labels = _tensors()
    weight.requires_grad_(False)
    loss = chunked_cross_entropy(features, weight, None, labels, 6)
    loss.backward()
    leaf = features.detach().clone().requires_grad_()
    cross_entropy(leaf @ weight.T, labels, reduction="sum").backward()
    torch.testing.assert_close(features.grad, leaf.grad, rtol=1e-5, atol=1e-6)
    assert weight.grad is None
    with torch.no_grad():
        assert not chunked_cross_entropy(features, weight, None, labels).requires_grad


def test_tied_weight_gets_both_gradients() -> None:
    _, weight, bias, labels = _tensors()
    tied = embedding(labels, weight)
    chunked_cross_entropy(tied, weight, bias, labels, 4).backward()
    leaf = weight.detach().clone().requires_grad_()
    cross_entropy(embedding(labels, leaf) @ leaf.T + bias, labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, leaf.grad, rtol=1e-4, atol=1e-5)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    features, weight, bias, labels = _tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss = chunked_cross_entropy(features, weight, bias, labels, 5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    exact = cross_entropy(features.detach() @ weight.detach().T + bias.detach(), labels, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    leaf = weight.detach().clone().requires_grad_()
    cross_entropy(features.detach() @ leaf.T + bias.detach(), labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, leaf.grad, rtol=5e-2, atol=5e-2)


def test_no_rows_at_all() -> None:
    features, weight, bias, labels = _tensors()
    loss = chunked_cross_entropy(features[:0], weight, bias, labels[:0])
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None and weight.grad.abs().max() == 0


def test_second_backward_is_refused() -> None:
    features, weight, bias, labels = _tensors()
    loss = chunked_cross_entropy(features, weight, bias, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used once"):
        loss.backward()


def test_rows_come_without_gradient() -> None:
    features, weight, bias, labels = _tensors()
    total, rows = cross_entropy_and_rows(features, weight, bias, labels, 7)
    assert not rows.requires_grad
    torch.testing.assert_close(rows.sum(), total.detach())
    torch.testing.assert_close(rows, token_losses(features, weight, bias, labels)[0])


@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_row_weights(chunk_rows: int) -> None:
    features, weight, bias, labels = _tensors()
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(5)) * 3 - 1
    weights[2] = 0.0
    total, rows = cross_entropy_and_rows(features, weight, bias, labels, chunk_rows, row_weights_N=weights)
    (total / 7).backward()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, weight, bias)]
    plain = cross_entropy(leaves[0] @ leaves[1].T + leaves[2], labels, reduction="none")
    ((plain * weights).sum() / 7).backward()
    torch.testing.assert_close(rows, plain.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, (plain * weights).sum(), rtol=1e-5, atol=1e-5)
    for tensor, leaf in zip((features, weight, bias), leaves, strict=True):
        torch.testing.assert_close(tensor.grad, leaf.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="one weight a row"):
        cross_entropy_and_rows(features, weight, bias, labels, row_weights_N=weights[:3])


def test_bag_of_words_by_hand() -> None:
    # Row 0 has logits (0, ln 3): probabilities 1/4, 3/4; row 1 has (0, 0). Bags {0, 1} and {1}; row 2's is empty.
    features, weight = torch.tensor([[1.0], [0.0], [5.0]]).requires_grad_(), torch.tensor([[0.0], [math.log(3.0)]])
    loss = bag_of_words_cross_entropy(features, weight, None, torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), 3)
    assert loss.tolist() == pytest.approx([(math.log(4.0) + math.log(4.0 / 3.0)) / 2, math.log(2.0), 0.0], rel=1e-6)
    loss.sum().backward()
    # d/dx of log(1 + e^(x ln 3)) - x ln 3 / 2 at 1, of the same without the half at 0.
    assert features.grad is not None
    assert features.grad.flatten().tolist() == pytest.approx([math.log(3.0) * (0.75 - 0.5), math.log(3.0) * (0.5 - 1.0), 0.0], rel=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 4, 23, None])
def test_bag_of_words_equals_soft_labels(chunk_rows: int | None) -> None:
    features, weight, bias, _ = _tensors()
    in_bag = torch.rand(23, 37, generator=torch.Generator().manual_seed(1)) < 0.2
    in_bag[:, 5] = True
    rows, tokens = in_bag.nonzero(as_tuple=True)
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    upstream = torch.linspace(-1.0, 2.0, 23)
    loss = bag_of_words_cross_entropy(features, weight, bias, tokens[mixed], rows[mixed], 23, chunk_rows)
    (loss * upstream).sum().backward()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, weight, bias)]
    soft = in_bag.float() / in_bag.sum(1, keepdim=True)
    plain = cross_entropy(leaves[0] @ leaves[1].T + leaves[2], soft, reduction="none")
    (plain * upstream).sum().backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for tensor, leaf in zip((features, weight, bias), leaves, strict=True):
        torch.testing.assert_close(tensor.grad, leaf.grad, rtol=1e-4, atol=1e-5)


def test_bag_of_words_shapes() -> None:
    features, weight, bias, _ = _tensors()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert bag_of_words_cross_entropy(features[:0], weight, bias, nothing, nothing, 0).shape == (0,)
    with pytest.raises(ShapeError, match="do not fit"):
        bag_of_words_cross_entropy(features, weight, bias, nothing, nothing, 5)
    with pytest.raises(ShapeError, match="flat lists"):
        bag_of_words_cross_entropy(features, weight, bias, nothing, torch.zeros(1, dtype=torch.int64), 23)


def test_padded_probabilities() -> None:
    features, weight, bias, _ = _tensors()
    found = padded_probabilities(features, weight, bias, temperature=0.5)
    logits = (features @ weight.T + bias).detach()
    assert found.shape == (23, 128) and found.is_contiguous() and not found.requires_grad
    torch.testing.assert_close(found[:, :37], torch.softmax(logits / 0.5, 1), rtol=1e-5, atol=1e-6)
    assert not found[:, 37:].any()
    assert [padded_columns(number) for number in (1, 128, 129, 30_522)] == [128, 128, 256, 30_592]


def test_vocabulary_that_fills_its_columns() -> None:
    features, weight, bias, labels = _tensors(num_entries=256)
    chunked_cross_entropy(features, weight, bias, labels, 9).backward()
    leaf = weight.detach().clone().requires_grad_()
    cross_entropy(features.detach() @ leaf.T + bias.detach(), labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, leaf.grad, rtol=1e-4, atol=1e-5)


def test_hopeless_label_has_its_exact_loss() -> None:
    # Its probability, e^-500, is 0 in fp32; the loss is not infinite for that.
    features, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0]])
    assert chunked_cross_entropy(features, weight, None, torch.tensor([0])).item() == 500.0
    assert token_losses(features, weight, None, torch.tensor([0]))[0].item() == 500.0


def test_token_losses() -> None:
    features, weight, bias, labels = _tensors()
    losses, correct = token_losses(features, weight, bias, labels, 4)
    logits = (features @ weight.T + bias).detach()
    torch.testing.assert_close(losses, cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    assert correct.tolist() == (logits.argmax(1) == labels).tolist()
    assert token_losses(features[:0], weight, bias, labels[:0])[0].shape == (0,)


def test_shapes_that_do_not_fit() -> None:
    features, weight, bias, labels = _tensors()
    with pytest.raises(ShapeError, match="do not fit"):
        chunked_cross_entropy(features, weight[:, :4], bias, labels)
    with pytest.raises(ShapeError, match="do not fit"):
        chunked_cross_entropy(features, weight, bias, labels[:3])


def test_default_chunk_is_bounded() -> None:
    rows = default_chunk_rows(torch.empty(30_522, 4))
    assert rows * 30_522 * 4 <= 64 * 2**20
    assert default_chunk_rows(torch.empty(10_000_000, 1, device="meta")) >= 16
