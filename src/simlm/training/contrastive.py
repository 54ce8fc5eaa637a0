"""Training a bi-encoder: the steps that a store and groups make, and the loss of a step. Used by train_retriever and distill.

Shapes: Q queries of this process, A queries of all processes, G group size, P = A*G passages of all processes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simlm.data.batches import collate, length_batches
from simlm.data.groups import TrainingGroups, share_of_rank
from simlm.data.store import Store, Table
from simlm.losses.contrastive import group_scores, info_nce, info_nce_all_pairs, query_to_passages
from simlm.losses.distillation import distillation_kl, teacher_entropy
from simlm.rankings import Ints
from simlm.recipe import DistillSettings, RetrieverSettings
from simlm.training.cached_step import Piece, encode_pieces, gather_ranks, inverse_order, piece_tokens
from simlm.training.dev import DEV_MEASURE, retriever_dev
from simlm.training.trainer import MicroBatch, TrainingContext, TrainingResult, mixed_precision, num_training_steps, train


def train_biencoder(
    model: nn.Module, store: Store, groups: TrainingGroups, settings: RetrieverSettings, context: TrainingContext, *, description: str
) -> TrainingResult:
    """Train a bi-encoder (token tensors -> embeddings of unit length) in place; its dev measure is RR@10 over a pool of passages."""
    groups.say_what_differs(context.progress, settings.queries_per_step, description)
    _, bf16 = mixed_precision(settings.training)
    dev = retriever_dev(
        store,
        model,
        settings.dev,
        seed=context.seed,
        batch_tokens=settings.micro_batch_tokens,
        bf16=bf16,
        max_query_tokens=settings.max_query_tokens,
        max_passage_tokens=settings.max_passage_tokens,
    )
    num_steps = num_training_steps(settings.training, len(groups), groups.queries_per_step)
    return train(
        ContrastiveTask(model, settings, rank=context.rank, num_ranks=context.num_ranks),
        ContrastiveBatches(store, groups, settings, num_steps),
        settings=settings.training,
        context=context,
        dev=dev,
        main_dev_measure=DEV_MEASURE if dev else None,
        description=description,
    )


@dataclass(frozen=True)
class ContrastiveBatches:
    """Whole steps of groups, tokens sorted by length into pieces; one micro-batch a step, which the task encodes in bounded memory."""

    store: Store
    groups: TrainingGroups
    settings: RetrieverSettings
    num_steps: int

    def load(self, step: int, rank: int, num_ranks: int) -> list[MicroBatch]:
        """This process's queries and passages of a step, and what is no negative among the passages of all."""
        settings = self.settings
        whole = self.groups.step(step)
        own = share_of_rank(len(whole.positions), rank, num_ranks)
        passage_rows = whole.passage_rows[own].reshape(-1)
        query_rows = whole.query_rows[own]
        passages, passage_places = self._pieces(self.store.passages, passage_rows, settings.max_passage_tokens)
        queries, query_places = self._pieces(self.store.queries("train"), query_rows, settings.max_query_tokens)
        # Queries come last in the pieces and first in the result.
        order = torch.cat([query_places + len(passage_rows), passage_places])
        excluded_AP, excluded_AA = self.groups.excluded(whole)
        batch: MicroBatch = {
            "pieces": [*passages, *queries],
            "order": order,
            "num_queries": len(query_rows),
            "excluded_QP": torch.from_numpy(excluded_AP[own]),
        }
        if settings.contrast == "all_pairs":
            batch["excluded_QA"] = torch.from_numpy(excluded_AA[own])
        if isinstance(settings, DistillSettings):
            batch["teacher_scores_QG"] = torch.from_numpy(np.ascontiguousarray(whole.scores[own], dtype=np.float32))
        return [batch]

    def _pieces(self, table: Table, rows: Ints, max_tokens: int | None) -> tuple[list[Piece], Tensor]:
        lengths = np.asarray(table.lengths[rows])
        if max_tokens is not None:
            lengths = np.minimum(lengths, max_tokens)
        positions = length_batches(lengths, piece_tokens(self.settings.micro_batch_tokens))
        return [collate(table, rows[part], max_tokens=max_tokens).tensors() for part in positions], inverse_order(positions)


class ContrastiveTask(nn.Module):
    """Loss of a bi-encoder on one step: InfoNCE, for a DistillSettings KL(teacher, student) + contrastive_weight x InfoNCE.

    model: token tensors -> embeddings of unit length. Each process computes the part of its own queries; the parts sum to the step's
    loss. Other measures: contrastive (InfoNCE), accuracy (share of queries with the positive on top of all passages of the step),
    and for distillation kl and teacher_entropy (nats).
    """

    def __init__(self, model: nn.Module, settings: RetrieverSettings, *, rank: int = 0, num_ranks: int = 1) -> None:
        super().__init__()
        self.model = model
        self._settings = settings
        self._rank = rank
        self._num_ranks = num_ranks

    def forward(
        self,
        *,
        pieces: list[Piece],
        order: Tensor,
        num_queries: int,
        excluded_QP: Tensor,
        excluded_QA: Tensor | None = None,
        teacher_scores_QG: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See the class; the arguments are what ContrastiveBatches.load gives."""
        settings = self._settings
        embeddings = encode_pieces(self.model, pieces, order, max_kept_tokens=settings.micro_batch_tokens)
        queries_QD, own_passages = embeddings[:num_queries], embeddings[num_queries:]
        group_size = len(own_passages) // num_queries
        passages_PD = gather_ranks(own_passages, self._num_ranks)
        rows_Q = torch.arange(self._rank * num_queries, (self._rank + 1) * num_queries, device=order.device)
        positives_Q = rows_Q * group_size
        if settings.contrast == "all_pairs":
            queries_AD = gather_ranks(queries_QD, self._num_ranks)
            contrastive = info_nce_all_pairs(
                queries_AD,
                passages_PD,
                torch.arange(len(queries_AD), device=order.device) * group_size,
                temperature=settings.temperature,
                rows_Q=rows_Q,
                excluded_QP=excluded_QP,
                excluded_QA=excluded_QA,
            )
        else:
            contrastive = info_nce(queries_QD, passages_PD, positives_Q, temperature=settings.temperature, excluded_QP=excluded_QP)
        outputs = {"loss": contrastive, "accuracy": _accuracy(queries_QD, passages_PD, positives_Q, excluded_QP)}
        if isinstance(settings, DistillSettings):
            assert teacher_scores_QG is not None
            kl = distillation_kl(
                group_scores(queries_QD, own_passages.view(num_queries, group_size, -1)),
                teacher_scores_QG,
                student_temperature=settings.student_temperature,
                teacher_temperature=settings.teacher_temperature,
            )
            entropy = teacher_entropy(teacher_scores_QG, teacher_temperature=settings.teacher_temperature)
            outputs |= {"loss": kl + settings.contrastive_weight * contrastive, "kl": kl.detach(), "teacher_entropy": entropy}
        # All processes have as many queries, so the step's mean is the mean of theirs.
        outputs["contrastive"] = contrastive.detach()
        return {name: value / self._num_ranks for name, value in outputs.items()}


@torch.no_grad()
def _accuracy(queries_QD: Tensor, passages_PD: Tensor, positives_Q: Tensor, excluded_QP: Tensor) -> Tensor:
    scores_QP = query_to_passages(queries_QD, passages_PD, temperature=1.0, excluded_QP=excluded_QP)
    return (scores_QP.argmax(dim=1) == positives_Q).float().mean()
