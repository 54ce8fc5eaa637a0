"""Losses that teach a retriever the scores of a re-ranker.

Source: SimLM, arXiv 2207.02578, eq. 5 and its public code: KL over the query's own group, teacher logits at temperature 1.
Differs from common libraries: no factor of temperature squared, which at the student's 0.02 would all but remove the term.
Shapes: Q queries, G passages of a query's group.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from simlm.errors import ShapeError


def distillation_kl(
    student_scores_QG: Tensor, teacher_scores_QG: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over the queries of KL(teacher, student) in nats, each a softmax over the group's scores divided by its temperature.

    student_scores_QG: cosines. teacher_scores_QG: raw logits, never squashed by a sigmoid; no gradient goes to them.
    student_temperature, teacher_temperature: paper 0.02 and 1.
    Raises ShapeError if the shapes differ.
    """
    if student_scores_QG.shape != teacher_scores_QG.shape:
        raise ShapeError(f"student scores are {tuple(student_scores_QG.shape)}, teacher scores {tuple(teacher_scores_QG.shape)}")
    student_log_QG = F.log_softmax(student_scores_QG.float() / student_temperature, dim=-1)
    teacher_log_QG = F.log_softmax(teacher_scores_QG.detach().float() / teacher_temperature, dim=-1)
    return F.kl_div(student_log_QG, teacher_log_QG, reduction="batchmean", log_target=True)


def teacher_entropy(teacher_scores_QG: Tensor, *, teacher_temperature: float) -> Tensor:
    """Mean entropy (nats) of the teacher's distributions: 0 = it always picks one passage, log G = it knows nothing."""
    log_QG = F.log_softmax(teacher_scores_QG.float() / teacher_temperature, dim=-1)
    return -(log_QG.exp() * log_QG).sum(dim=-1).mean()
