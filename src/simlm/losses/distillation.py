"""Losses that teach a retriever the scores of a re-ranker.

Sources: SimLM, arXiv 2207.02578, eq. 5 and its public code: KL over the query's own group, teacher logits at temperature 1; Margin-MSE,
arXiv 2010.02666, eq. 3; ListMLE, Xia et al. 2008, "Listwise approach to learning to rank", eq. 7.
Differs from common libraries: no factor of temperature squared, which at the student's 0.02 would all but remove the term; Margin-MSE
has temperatures like the others, so that cosines can have the margins of logits.
Shapes: Q queries, G passages of a query's group, positive first. Student scores are cosines. Teacher scores are raw logits, never squashed
by a sigmoid; no gradient goes to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simlm.errors import ShapeError
from simlm.losses.contrastive import at_least_fp32


def distillation_kl(
    student_scores_QG: Tensor, teacher_scores_QG: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over the queries of KL(teacher, student) in nats, each a softmax over the group's scores divided by its temperature.

    student_temperature, teacher_temperature: paper 0.02 and 1.
    Raises ShapeError if the shapes differ.
    """
    _check_shapes(student_scores_QG, teacher_scores_QG)
    student_log_QG = F.log_softmax(at_least_fp32(student_scores_QG) / student_temperature, dim=-1)
    teacher_log_QG = F.log_softmax(at_least_fp32(teacher_scores_QG.detach()) / teacher_temperature, dim=-1)
    return F.kl_div(student_log_QG, teacher_log_QG.to(student_log_QG.dtype), reduction="batchmean", log_target=True)


def margin_mse(student_scores_QG: Tensor, teacher_scores_QG: Tensor, *, student_temperature: float, teacher_temperature: float) -> Tensor:
    """Mean over all negatives of (student's margin - teacher's margin) squared; a margin is the positive's score less the negative's.

    student_temperature, teacher_temperature: divide the scores, and so the margins; the paper has none (1 and 1, inner products).
    Raises ShapeError if the shapes differ or a group has no negative.
    """
    _check_shapes(student_scores_QG, teacher_scores_QG)
    if student_scores_QG.shape[1] < 2:
        raise ShapeError("a margin needs a negative, the groups have one passage each; set group_size to 2 or more")
    student_QG = at_least_fp32(student_scores_QG) / student_temperature
    teacher_QG = (at_least_fp32(teacher_scores_QG.detach()) / teacher_temperature).to(student_QG.dtype)
    return F.mse_loss(student_QG[:, :1] - student_QG[:, 1:], teacher_QG[:, :1] - teacher_QG[:, 1:])


def listwise_likelihood(student_scores_QG: Tensor, teacher_scores_QG: Tensor, *, student_temperature: float) -> Tensor:
    """Mean over the queries of -log P(teacher's order) in nats, where the student draws passages one by one by softmax (Plackett-Luce).

    Passages with equal teacher scores stand in no order: each is drawn from all that are left when the first of them is (Breslow's way
    with ties), so a constant teacher asks for equal student scores.
    student_temperature: divides the student's scores. Raises ShapeError if the shapes differ.
    """
    _check_shapes(student_scores_QG, teacher_scores_QG)
    # In float64: the gradient of logcumsumexp goes through logarithms of sums, which cost float32 a digit. It is [Q, G] only.
    student_QG = student_scores_QG.double() / student_temperature
    # Worst first: what is left when a passage is drawn are those up to and including it and its ties.
    teacher_QG, order_QG = teacher_scores_QG.detach().sort(dim=1)
    sorted_QG = student_QG.gather(1, order_QG)
    last_QG = torch.searchsorted(teacher_QG, teacher_QG, right=True) - 1
    left_QG = sorted_QG.logcumsumexp(dim=1).gather(1, last_QG)
    return (left_QG - sorted_QG).sum(dim=1).mean().to(at_least_fp32(student_scores_QG).dtype)


def teacher_entropy(teacher_scores_QG: Tensor, *, teacher_temperature: float) -> Tensor:
    """Mean entropy (nats) of the teacher's distributions: 0 = it always picks one passage, log G = it knows nothing."""
    log_QG = F.log_softmax(teacher_scores_QG.float() / teacher_temperature, dim=-1)
    return -(log_QG.exp() * log_QG).sum(dim=-1).mean()


def _check_shapes(student_scores_QG: Tensor, teacher_scores_QG: Tensor) -> None:
    if student_scores_QG.shape != teacher_scores_QG.shape:
        raise ShapeError(f"student scores are {tuple(student_scores_QG.shape)}, teacher scores {tuple(teacher_scores_QG.shape)}")
