"""Losses over one query's own list of passages, for the re-ranker.

Source: SimLM, arXiv 2207.02578, section 3.2 (listwise softmax cross-entropy) and its public code (R-Drop, arXiv 2106.14448).
Shapes: Q queries, G passages of a query's list.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simlm.errors import ShapeError


def listwise_cross_entropy(logits_QG: Tensor, positives_Q: Tensor | None = None) -> Tensor:
    """Mean negative log-probability (nats) of the positive in a softmax over its list.

    positives_Q: int64, the positive's place in each list; none = the first.
    """
    positives_Q = torch.zeros(len(logits_QG), dtype=torch.int64, device=logits_QG.device) if positives_Q is None else positives_Q
    return F.cross_entropy(logits_QG.float(), positives_Q)


def symmetric_kl(first_QG: Tensor, second_QG: Tensor) -> Tensor:
    """Mean over the lists of (KL(first, second) + KL(second, first)) / 2 in nats, of softmax distributions; both get gradient.

    R-Drop's term: two dropout passes of the same list should agree. Raises ShapeError if the shapes differ.
    """
    if first_QG.shape != second_QG.shape:
        raise ShapeError(f"the two passes gave {tuple(first_QG.shape)} and {tuple(second_QG.shape)} scores")
    first_log_QG = F.log_softmax(first_QG.float(), dim=-1)
    second_log_QG = F.log_softmax(second_QG.float(), dim=-1)
    # KL(p, q) + KL(q, p) = sum (p - q) (log p - log q)
    return 0.5 * ((first_log_QG.exp() - second_log_QG.exp()) * (first_log_QG - second_log_QG)).sum(dim=-1).mean()


def hardest(logits_QG: Tensor, num_kept: int) -> Tensor:
    """int64 [Q, num_kept]: places of the positive (place 0, always first) and of the highest-scoring other passages of each list.

    Ties: any order. Raises ShapeError if the lists are shorter than num_kept.
    """
    if logits_QG.shape[1] < num_kept:
        raise ShapeError(f"cannot keep {num_kept} of lists of {logits_QG.shape[1]}")
    with_positive_QG = logits_QG.float().clone()
    with_positive_QG[:, 0] = torch.inf
    return with_positive_QG.topk(num_kept, dim=1).indices
