"""Losses that pull a query towards its positive passage.

Source: SimLM, arXiv 2207.02578, eq. 3 (our `temperature` is the paper's tau); `info_nce_all_pairs` is the loss of its public code.
Differs: the mean runs over the queries of all devices, so the loss does not change with their number; passages known to be
relevant to a query are left out of its negatives. A temperature is a number or a tensor of one number, which then gets gradient.
Shapes: Q queries (this device's), A queries of all devices, P passages of all devices (A groups), G group size, D embedding dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simlm.errors import ShapeError


def info_nce(
    queries_QD: Tensor, passages_PD: Tensor, positives_Q: Tensor, *, temperature: float | Tensor, excluded_QP: Tensor | None = None
) -> Tensor:
    """Mean negative log-probability (nats) of each query's positive among all P passages.

    queries_QD, passages_PD: float, same device, unit length.
    positives_Q: int64, column of the positive in 0..P-1.
    temperature: divides the scores; paper 0.02.
    excluded_QP: bool, True where a passage must not count as a negative (relevant to the query); never at the positive itself.
    Raises ShapeError if D or the mask's shape differs or (on the CPU, where looking is free) a column is out of range.
    """
    scores_QP = query_to_passages(queries_QD, passages_PD, temperature=temperature, excluded_QP=excluded_QP)
    _check_positives(positives_Q, scores_QP)
    return F.cross_entropy(scores_QP, positives_Q)


def info_nce_all_pairs(
    queries_AD: Tensor,
    passages_PD: Tensor,
    positives_A: Tensor,
    *,
    temperature: float | Tensor,
    rows_Q: Tensor | None = None,
    excluded_QP: Tensor | None = None,
    excluded_QA: Tensor | None = None,
) -> Tensor:
    """Mean negative log-probability (nats) of each query's positive, in one softmax with three more directions of contrast.

    Row i holds q_i against all passages, p+_i against all other queries, q_i against all other queries, and p+_i against all other
    positives (method.md section 2; `full_contrastive_scores_and_labels` of the reference code).
    positives_A: int64, column of each query's positive in 0..P-1.
    rows_Q: int64, the rows i to take the mean over (this device's queries); none = all A.
    excluded_QP: as in `info_nce`, for the rows taken. excluded_QA: bool, True where queries i and j share a relevant passage, so that
    neither q_j nor p+_j is a negative of row i.
    Raises ShapeError as `info_nce` does.
    """
    rows_Q = torch.arange(len(queries_AD), device=queries_AD.device) if rows_Q is None else rows_Q
    queries_QD = queries_AD[rows_Q]
    scores_QP = query_to_passages(queries_QD, passages_PD, temperature=temperature, excluded_QP=excluded_QP)
    _check_positives(positives_A, scores_QP)
    positives_AD = passages_PD[positives_A]
    own_QA = rows_Q[:, None] == torch.arange(len(queries_AD), device=queries_AD.device)[None, :]
    left_out_QA = own_QA if excluded_QA is None else own_QA | excluded_QA
    pairs = [
        similarity(positives_AD[rows_Q], queries_AD, temperature=temperature).masked_fill(left_out_QA, -torch.inf),
        similarity(queries_QD, queries_AD, temperature=temperature).masked_fill(left_out_QA, -torch.inf),
        similarity(positives_AD[rows_Q], positives_AD, temperature=temperature).masked_fill(left_out_QA, -torch.inf),
    ]
    return F.cross_entropy(torch.cat([scores_QP, *pairs], dim=1), positives_A[rows_Q])


def query_to_passages(queries_QD: Tensor, passages_PD: Tensor, *, temperature: float | Tensor, excluded_QP: Tensor | None = None) -> Tensor:
    """[Q, P], float32 or wider: dot products divided by the temperature, -inf where excluded."""
    scores_QP = similarity(queries_QD, passages_PD, temperature=temperature)
    if excluded_QP is None:
        return scores_QP
    if excluded_QP.shape != scores_QP.shape:
        raise ShapeError(
            f"excluded_QP has shape {tuple(excluded_QP.shape)}, the scores {tuple(scores_QP.shape)}; one entry a score is needed"
        )
    return scores_QP.masked_fill(excluded_QP, -torch.inf)


def group_scores(queries_QD: Tensor, passages_QGD: Tensor) -> Tensor:
    """[Q, G], float32 or wider: dot products of each query with the passages of its own group."""
    with torch.autocast(queries_QD.device.type, enabled=False):
        return torch.einsum("qd,qgd->qg", at_least_fp32(queries_QD), at_least_fp32(passages_QGD))


def similarity(left_ND: Tensor, right_MD: Tensor, *, temperature: float | Tensor) -> Tensor:
    """[N, M], float32 or wider: dot products divided by the temperature, also inside autocast."""
    if left_ND.shape[-1] != right_MD.shape[-1]:
        raise ShapeError(f"embeddings of {left_ND.shape[-1]} and of {right_MD.shape[-1]} dimensions cannot be compared")
    # At temperature 0.02 scores reach 50, where bf16 resolves only 0.25: stay in fp32.
    with torch.autocast(left_ND.device.type, enabled=False):
        return at_least_fp32(left_ND) @ at_least_fp32(right_MD).T / temperature


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def _check_positives(positives: Tensor, scores_QP: Tensor) -> None:
    if positives.device.type == "cpu" and len(positives) and not 0 <= int(positives.min()) <= int(positives.max()) < scores_QP.shape[1]:
        raise ShapeError(f"positives are columns {int(positives.min())}..{int(positives.max())}, there are {scores_QP.shape[1]} passages")
