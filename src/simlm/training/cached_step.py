"""Encoding a whole step in bounded memory, and gathering what all processes encoded, both without changing loss or gradient.

A contrastive step needs the embeddings of all its rows at once. Rows are encoded in pieces of near-equal length; of the pieces that do not
fit into the budget only the embeddings are kept, and their activations are computed again on the way back (torch.utils.checkpoint, with
the same dropout). This is gradient caching (arXiv 2101.06983) as autograd does it, so it holds for any loss.
Shapes: N rows, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Piece = dict[str, Tensor]
"""The model's keyword arguments for some rows, padded to the longest of them."""

PIECES_A_BUDGET = 4
"""Pieces are a quarter of the budget: less padding, and the last ones that fit need not be computed twice."""


def encode_pieces(encode: Callable[..., Tensor], pieces: Sequence[Piece], order_N: Tensor, *, max_kept_tokens: int) -> Tensor:
    """[N, ...]: what `encode` gives for all rows, in the order of the rows before they were sorted into pieces.

    order_N: int64, place of each row among the rows of all pieces end to end.
    max_kept_tokens: padded tokens whose activations may be kept for the backward pass, and at least one piece is.
    """
    grad = torch.is_grad_enabled()
    kept = _kept_pieces([int(piece["input_ids"].numel()) for piece in pieces], max_kept_tokens)
    outputs: list[Tensor] = []
    for position, piece in enumerate(pieces):
        if grad and position < len(pieces) - kept:
            outputs.append(checkpoint(_call, encode, piece, use_reentrant=False, preserve_rng_state=True))
        else:
            outputs.append(encode(**piece))
    return torch.cat(outputs).index_select(0, order_N)


def _call(encode: Callable[..., Tensor], piece: Piece) -> Tensor:
    return encode(**piece)


def _kept_pieces(sizes: Sequence[int], max_kept_tokens: int) -> int:
    """How many of the last pieces (the first ones of the backward pass) keep their activations."""
    kept, total = 0, 0
    for size in reversed(sizes):
        total += size
        if kept and total > max_kept_tokens:
            break
        kept += 1
    return kept


def piece_tokens(micro_batch_tokens: int) -> int:
    """Padded tokens of one piece, for a budget."""
    return max(1, micro_batch_tokens // PIECES_A_BUDGET)


def inverse_order(positions: Sequence[NDArray[np.integer[Any]]]) -> Tensor:
    """int64 [N]: where each row 0..N-1 ends up when the rows are taken as `positions` lists them."""
    taken = np.concatenate(positions)
    order = np.empty(len(taken), dtype=np.int64)
    order[taken] = np.arange(len(taken))
    return torch.from_numpy(order)


def gather_ranks(local: Tensor, num_ranks: int) -> Tensor:
    """The rows of all processes end to end, by rank; every process must bring as many. Gradient flows back to all of them.

    If each process computes its part of a sum from the gathered rows, each row gets the gradient of the whole sum.
    """
    if num_ranks == 1:
        return local
    gathered: Tensor = _GatherRanks.apply(local)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRanks(torch.autograd.Function):
    """all_gather forward; backward sums what every process wants of each row and keeps this process's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        rank = torch.distributed.get_rank()
        return total[rank * ctx.rows : (rank + 1) * ctx.rows]
