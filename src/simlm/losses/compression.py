"""Embeddings as an index may store them, so that a loss can be taken of what will be searched.

Sources: Matryoshka representations, arXiv 2205.13147 (nested sizes, equal weights); straight-through gradients, arXiv 1308.3432.
Shapes: N rows, D embedding dim, S size that is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simlm.errors import ShapeError

LEVELS = 127
"""Steps of int8 on each side of 0 (symmetric: -128 is not used)."""


def cut(rows_ND: Tensor, size: int) -> Tensor:
    """[N, S]: the first `size` numbers of each row, at unit length again; rows of that size as they are.

    Raises ShapeError if the rows have fewer.
    """
    if size > rows_ND.shape[1]:
        raise ShapeError(f"embeddings of {rows_ND.shape[1]} dimensions cannot be cut to {size}; name a smaller size")
    return rows_ND if size == rows_ND.shape[1] else F.normalize(rows_ND[:, :size], dim=1)


def int8_rounded(rows_ND: Tensor) -> Tensor:
    """[N, D]: each number as int8 gives it back, at unit length again; the gradient passes as if nothing had been rounded.

    One symmetric range for all rows: their greatest absolute number is 127 steps. Rows of zeros stay.
    """
    exact_ND = rows_ND.detach()
    step = exact_ND.abs().amax().clamp_min(torch.finfo(rows_ND.dtype).tiny) / LEVELS
    return F.normalize((exact_ND / step).round() * step + (rows_ND - exact_ND), dim=1)


def binary_rounded(rows_ND: Tensor) -> Tensor:
    """[N, D]: +1 or -1 by each number's sign (0 counts as +), divided by sqrt(D); the gradient passes as if nothing had been rounded."""
    exact_ND = rows_ND.detach()
    signs_ND = torch.where(exact_ND >= 0, 1.0, -1.0).to(rows_ND.dtype) / rows_ND.shape[1] ** 0.5
    return F.normalize(signs_ND + (rows_ND - exact_ND), dim=1)
