"""Cross-entropy over a whole vocabulary that never holds all the logits.

With N positions and a vocabulary of V, the logits of the plain computation and their gradient are the largest tensors of a
pre-training step (16,384 x 30,522 floats = 2 GB each). Here the rows go through in chunks, and since the loss is a sum its gradients
are computed in the same pass: a chunk's logits are made once, turned into their gradient in place, and overwritten by the next chunk's.
Shapes: N positions, H width of the output embeddings, V vocabulary, C rows of a chunk, W columns of a chunk's memory (V filled up).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from simlm.errors import ShapeError

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of one chunk's fp32 logits. On a CPU larger ones gain nothing (measured: 512 rows of 30,522 multiply as fast as 2,048)."""

COLUMNS = 128
"""Rows of logits lie a multiple of so many columns apart, for aligned memory. Measured (AVX2, MKL, 512 rows, H = 384): the product into
rows of 30,522 columns makes 52 GFLOP/s, into rows of 30,592 it makes 79; tensor cores want multiples of 8 columns all the same."""


def chunked_cross_entropy(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Sum (fp32 scalar) of the cross-entropies, in nats, of labels_N under softmax(features_NH @ weight_VH.T + bias_V).

    Equals F.cross_entropy(logits, labels, reduction="sum") to float tolerance, gradients of features, weight and bias included.
    Under autocast the matrix products run in its type, the softmax in fp32; the weight's gradient is accumulated in fp32.
    labels_N: int64 in 0..V-1. chunk_rows: rows at a time; None = as many as CHUNK_BYTES hold.
    The gradients are made on the way forward, so the graph can be run backward once. Raises ShapeError if the shapes do not fit.
    """
    return cross_entropy_and_rows(features_NH, weight_VH, bias_V, labels_N, chunk_rows)[0]


def cross_entropy_and_rows(
    features_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    chunk_rows: int | None = None,
    *,
    row_weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum over rows of row_weights_N x loss_N with gradient, the unweighted loss_N without): parts of a sum made in one pass.

    row_weights_N: any real numbers, constants; None = 1 for every row, which is what `chunked_cross_entropy` returns.
    Other arguments, and errors, as there.
    """
    _check_shapes(features_NH, weight_VH, bias_V, labels_N)
    if row_weights_N is not None and row_weights_N.shape != labels_N.shape:
        raise ShapeError(
            f"chunked cross-entropy: {tuple(row_weights_N.shape)} row weights for {tuple(labels_N.shape)} labels; expected one weight a row"
        )
    rows = chunk_rows or default_chunk_rows(weight_VH)
    wanted = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (features_NH, weight_VH, bias_V))
    loss, loss_N = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        features_NH, weight_VH, bias_V, labels_N, row_weights_N, rows, wanted
    )
    return loss, loss_N


def bag_of_words_cross_entropy(
    features_BH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    tokens: Tensor,
    rows: Tensor,
    num_rows: int,
    chunk_rows: int | None = None,
) -> Tensor:
    """loss_B (fp32, nats, with gradient): of each row, the mean over its bag's tokens v of -log softmax(logits_B)_v.

    Source: "Drop your Decoder", arXiv 2401.11248, section 4. A row without any token has loss 0 and no gradient.
    tokens, rows: int64 [pairs]; token tokens[i] is in the bag of row rows[i], each pair at most once. num_rows: B.
    chunk_rows: rows whose logits exist at a time (they are made again on the way back); None = as many as CHUNK_BYTES hold.
    Raises ShapeError if the shapes do not fit.
    """
    _check_shapes(features_BH, weight_VH, bias_V, rows.new_empty(num_rows))
    if tokens.ndim != 1 or tokens.shape != rows.shape:
        raise ShapeError(f"bag of words: {tuple(tokens.shape)} tokens and {tuple(rows.shape)} rows; flat lists of one length are needed")
    if num_rows == 0:
        return features_BH.sum(1).float()
    chunk = chunk_rows or default_chunk_rows(weight_VH)
    if num_rows <= chunk:
        return _bag_losses(features_BH, weight_VH, bias_V, tokens, rows)
    order = torch.argsort(rows, stable=True)
    tokens, rows = tokens[order], rows[order]
    starts = torch.arange(0, num_rows, chunk, device=rows.device)
    pairs = torch.diff(torch.searchsorted(rows, starts), append=torch.tensor([len(rows)], device=rows.device)).tolist()
    losses = [
        checkpoint(
            _bag_losses, features_CH, weight_VH, bias_V, tokens_C, rows_C - number * chunk, use_reentrant=False, preserve_rng_state=False
        )
        for number, (features_CH, tokens_C, rows_C) in enumerate(
            zip(torch.split(features_BH, chunk), torch.split(tokens, pairs), torch.split(rows, pairs), strict=True)
        )
    ]
    return torch.cat(losses)


def _bag_losses(features_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, tokens: Tensor, rows: Tensor) -> Tensor:
    logits_CV = logits_fp32(features_CH, weight_VH, bias_V)
    # -log softmax_v = log-sum-exp - logit_v, and the mean of the second over a bag is all that the bag is needed for.
    # A bincount would have to wait for the device.
    counts_C = logits_CV.new_zeros(len(logits_CV)).index_add(0, rows, torch.ones_like(rows, dtype=logits_CV.dtype))
    sums_C = logits_CV.new_zeros(len(logits_CV)).index_add(0, rows, logits_CV[rows, tokens])
    return torch.where(counts_C > 0, logits_CV.logsumexp(1) - sums_C / counts_C.clamp_min(1), 0.0)


@torch.no_grad()
def token_losses(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """(loss_N in nats, correct_N bool: the label has the highest logit), without gradients; arguments as above."""
    _check_shapes(features_NH, weight_VH, bias_V, labels_N)
    rows = chunk_rows or default_chunk_rows(weight_VH)
    losses, correct = [], []
    for features_CH, labels_C in zip(torch.split(features_NH, rows), torch.split(labels_N, rows), strict=True):
        logits_CW = padded_logits(features_CH, weight_VH, bias_V)
        label_logits_C = logits_CW.gather(1, labels_C[:, None])[:, 0]
        best_C = logits_CW.amax(1)
        losses.append(_log_sums_softmax_(logits_CW) - label_logits_C)
        correct.append(label_logits_C == best_C)
    if not losses:
        return features_NH.new_zeros(0, dtype=torch.float32), labels_N.new_zeros(0, dtype=torch.bool)
    return torch.cat(losses), torch.cat(correct)


@torch.no_grad()
def padded_probabilities(features_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, temperature: float = 1.0) -> Tensor:
    """probabilities_CW, contiguous fp32: softmax of the logits / temperature in the first V columns, 0 in the others.

    W is V filled up to a multiple of COLUMNS. Products in autocast's type where that is on.
    """
    logits_CW = padded_logits(features_CH, weight_VH, bias_V)
    if temperature != 1.0:
        logits_CW.div_(temperature)
    return torch.softmax(logits_CW, 1, out=logits_CW)


def padded_logits(features_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """logits_CW, contiguous fp32 without gradient: -inf in columns V to W. The product runs in autocast's type where that is on."""
    dtype = _product_dtype(weight_VH)
    memory = _ChunkMemory(len(features_CH), len(weight_VH), dtype, weight_VH.device)
    with torch.autocast(weight_VH.device.type, enabled=False):
        return memory.logits(features_CH.to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.float())


def logits_fp32(features_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """logits_CV in fp32, with gradient; the product itself runs in autocast's type where that is on."""
    logits_CV = features_CH @ weight_VH.T
    if bias_V is None:
        return logits_CV.float()
    return logits_CV.add_(bias_V) if logits_CV.dtype == bias_V.dtype == torch.float32 else logits_CV + bias_V.float()


def default_chunk_rows(weight_VH: Tensor) -> int:
    """Rows whose fp32 logits fit CHUNK_BYTES."""
    size = CHUNK_BYTES.get(weight_VH.device.type, CHUNK_BYTES["cuda"])
    return max(16, size // (4 * weight_VH.shape[0]))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        row_weights_N: Tensor | None,
        chunk_rows: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        dtype = _product_dtype(weight_VH)
        with torch.autocast(weight_VH.device.type, enabled=False):
            loss_N, gradients = _loss_and_gradients(
                features_NH, weight_VH, bias_V, labels_N, row_weights_N, chunk_rows=chunk_rows, wanted=wanted, dtype=dtype
            )
        ctx.gradients = gradients
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum() if row_weights_N is None else torch.dot(loss_N, row_weights_N.float()), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("chunked_cross_entropy: its gradients are made once and used once; call it again for a second backward")
        return *(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients), None, None, None, None


def _loss_and_gradients(
    features_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    row_weights_N: Tensor | None,
    *,
    chunk_rows: int,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor | None]]:
    num_rows = len(features_NH)
    features, weight = features_NH.to(dtype), weight_VH.to(dtype)
    bias = None if bias_V is None else bias_V.float()
    # A row's weight scales all its gradients: it goes to the small factors of the products, never to the logits.
    weights_N = torch.ones(num_rows, device=features.device) if row_weights_N is None else row_weights_N.float()
    weighted = features if row_weights_N is None else (features_NH * weights_N[:, None]).to(dtype)
    grad_features = torch.empty_like(features_NH) if wanted[0] else None
    grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if wanted[1] else None
    grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None
    loss_N = torch.empty(num_rows, dtype=torch.float32, device=features.device)

    # Chunks of one size: a short last one would multiply slowly.
    chunk_rows = -(-num_rows // max(1, -(-num_rows // chunk_rows)))
    memory = _ChunkMemory(chunk_rows, len(weight_VH), dtype, features.device)
    for start in range(0, num_rows, chunk_rows or 1):
        rows = slice(start, min(start + chunk_rows, num_rows))
        labels_C1 = labels_N[rows, None]
        logits_CW = memory.logits(features[rows], weight, bias)
        label_logits_C = logits_CW.gather(1, labels_C1)[:, 0]
        torch.sub(_log_sums_softmax_(logits_CW), label_logits_C, out=loss_N[rows])
        if not any(wanted):
            continue
        # What were logits are probabilities by now, and become the gradient.
        grad_CV = logits_CW.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=torch.float32))[:, : len(weight_VH)]
        if grad_bias is not None:
            grad_bias.addmv_(grad_CV.T, weights_N[rows])
        grad_CV = memory.in_product_type(grad_CV)
        if grad_features is not None:
            grad_features[rows] = grad_CV @ weight
        if grad_weight is not None:
            _add_product(grad_weight, grad_CV.T, weighted[rows])

    if grad_features is not None and row_weights_N is not None:
        grad_features.mul_(weights_N[:, None])
    gradients: list[Tensor | None] = [grad_features]
    gradients.append(None if grad_weight is None else grad_weight.to(weight_VH.dtype))
    gradients.append(None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype))
    return loss_N, gradients


class _ChunkMemory:
    """The memory of one chunk's logits, used for all: fresh tensors of this size cost a CPU more in page faults than the arithmetic."""

    def __init__(self, num_rows: int, num_entries: int, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of the products."""
        self._num_entries = num_entries
        self._fp32 = torch.empty(num_rows, padded_columns(num_entries), dtype=torch.float32, device=device)
        self._low = None if dtype == torch.float32 else torch.empty_like(self._fp32, dtype=dtype)

    def logits(self, features_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        """logits_CW in fp32, valid until the next call; features and weight in the products' type, bias in fp32."""
        logits_CW = self._fp32[: len(features_CH)]
        logits_CV = logits_CW[:, : self._num_entries]
        logits_CW[:, self._num_entries :] = -torch.inf
        if self._low is not None:
            low_CV = torch.mm(features_CH, weight_VH.T, out=self._low[: len(features_CH), : self._num_entries])
            logits_CV.copy_(low_CV) if bias_V is None else torch.add(low_CV, bias_V, out=logits_CV)
        elif bias_V is None:
            torch.mm(features_CH, weight_VH.T, out=logits_CV)
        else:
            torch.addmm(bias_V, features_CH, weight_VH.T, out=logits_CV)
        return logits_CW

    def in_product_type(self, grad_CV: Tensor) -> Tensor:
        """grad_CV in the products' type; overwrites what the product left there."""
        return grad_CV if self._low is None else self._low[: len(grad_CV), : self._num_entries].copy_(grad_CV)


def padded_columns(num_entries: int) -> int:
    """W: num_entries filled up to a multiple of COLUMNS."""
    return -(-num_entries // COLUMNS) * COLUMNS


def _log_sums_softmax_(logits_CW: Tensor) -> Tensor:
    """log sum exp of each row, [C]; the logits become their softmax in place.

    The highest logit less the log of its probability, which is never below 1/V: exact, and two quick passes over memory.
    """
    best_C = logits_CW.amax(1)
    torch.softmax(logits_CW, 1, out=logits_CW)
    return best_C - logits_CW.amax(1).log()


def _product_dtype(weight_VH: Tensor) -> torch.dtype:
    device = weight_VH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left @ right."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _check_shapes(features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> None:
    fits = features_NH.ndim == weight_VH.ndim == 2 and features_NH.shape[1] == weight_VH.shape[1]
    if not fits or labels_N.shape != features_NH.shape[:1] or (bias_V is not None and bias_V.shape != weight_VH.shape[:1]):
        shapes = {
            "features": tuple(features_NH.shape),
            "weight": tuple(weight_VH.shape),
            "bias": None if bias_V is None else tuple(bias_V.shape),
            "labels": tuple(labels_N.shape),
        }
        raise ShapeError(f"chunked cross-entropy: {shapes} do not fit; expected [N, H], [V, H], [V] and [N]")
