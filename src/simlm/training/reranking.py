"""Training a cross-encoder on lists: the steps that a store and groups make, and the loss of a micro-batch of whole lists.

Shapes: Q queries of a micro-batch, G group size, K passages of a list that are trained on, R = Q*G pairs, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simlm.data.batches import collate_pairs, length_batches, pair_lengths
from simlm.data.groups import TrainingGroups, share_of_rank
from simlm.data.store import Store
from simlm.losses.listwise import hardest, listwise_cross_entropy, symmetric_kl
from simlm.rankings import Run
from simlm.recipe import RerankerSettings
from simlm.training.cached_step import Piece, encode_pieces, inverse_order, piece_tokens
from simlm.training.dev import DEV_MEASURE, reranker_dev
from simlm.training.trainer import MicroBatch, TrainingContext, TrainingResult, mixed_precision, num_training_steps, train


def train_crossencoder(
    model: nn.Module,
    store: Store,
    groups: TrainingGroups,
    settings: RerankerSettings,
    context: TrainingContext,
    *,
    dev_run: Run | None,
) -> TrainingResult:
    """Train a cross-encoder (token tensors of pairs -> logits) in place; its dev measure is RR@10 of the re-ranked `dev_run`."""
    groups.say_what_differs(context.progress, settings.queries_per_step, "train re-ranker")
    _, bf16 = mixed_precision(settings.training)
    dev = None
    if dev_run is not None:
        dev = reranker_dev(
            store,
            model,
            dev_run,
            settings.dev,
            depth=settings.dev_depth,
            max_pair_tokens=settings.max_pair_tokens,
            seed=context.seed,
            batch_tokens=settings.micro_batch_tokens,
            bf16=bf16,
        )
    num_steps = num_training_steps(settings.training, len(groups), groups.queries_per_step)
    return train(
        ListwiseTask(model, settings),
        ListBatches(store, groups, settings, num_steps),
        settings=settings.training,
        context=context,
        dev=dev,
        main_dev_measure=DEV_MEASURE if dev else None,
        description="train re-ranker",
    )


def num_trained(settings: RerankerSettings) -> int:
    """How many passages of each list are trained on."""
    return min(settings.train_hardest or settings.group_size, settings.group_size)


@dataclass(frozen=True)
class ListBatches:
    """Steps of whole lists, in micro-batches whose trained pairs fit into `micro_batch_tokens` (one list at least)."""

    store: Store
    groups: TrainingGroups
    settings: RerankerSettings
    num_steps: int

    def load(self, step: int, rank: int, num_ranks: int) -> list[MicroBatch]:
        """This process's lists of a step."""
        settings = self.settings
        whole = self.groups.step(step)
        own = share_of_rank(len(whole.positions), rank, num_ranks)
        passage_rows = whole.passage_rows[own]
        query_rows = np.repeat(whole.query_rows[own], settings.group_size).reshape(passage_rows.shape)
        lengths = pair_lengths(
            self.store, "train", query_rows.reshape(-1), passage_rows.reshape(-1), max_tokens=settings.max_pair_tokens
        ).reshape(passage_rows.shape)
        passes = 2 if settings.rdrop_weight else 1
        # A list costs what its longest pair costs; lists of near-equal length go together.
        trained_tokens = lengths.max(axis=1) * num_trained(settings) * passes
        micro_batches: list[MicroBatch] = []
        for lists in length_batches(trained_tokens, settings.micro_batch_tokens):
            rows = lengths[lists].reshape(-1)
            batch = collate_pairs(
                self.store,
                "train",
                query_rows[lists].reshape(-1),
                passage_rows[lists].reshape(-1),
                max_tokens=settings.max_pair_tokens,
            )
            micro_batches.append({"pairs": batch.tensors(), "lengths": rows.tolist(), "num_queries": len(whole.positions)})
        return micro_batches


class ListwiseTask(nn.Module):
    """Listwise softmax cross-entropy of a cross-encoder, with the reference code's forward factor and R-Drop.

    model: token tensors -> one logit a row. The whole list is scored in eval mode without gradient, the positive and the hardest
    negatives are trained on. With R-Drop two dropout passes are made: the mean of their losses plus `rdrop_weight` x symmetric KL.
    Losses of all micro-batches of a step sum to the mean over its queries. Other measures: listwise, rdrop, accuracy (share of
    queries with the positive on top of what is trained on).
    """

    def __init__(self, model: nn.Module, settings: RerankerSettings) -> None:
        super().__init__()
        self.model = model
        self._settings = settings

    def forward(self, pairs: Piece, lengths: list[int], num_queries: int) -> dict[str, Tensor]:
        """pairs: [R, T] tensors, lists end to end, positive first; lengths: tokens of each; num_queries: of the whole step."""
        settings = self._settings
        device = pairs["input_ids"].device
        lists = len(lengths) // settings.group_size
        rows = torch.arange(len(lengths), device=device)
        kept = num_trained(settings)
        if kept < settings.group_size:
            rows = self._hardest_rows(pairs, lengths, kept)
        passes = 2 if settings.rdrop_weight else 1
        # Which pairs are trained on decides the shapes of what follows, so the host has to know.
        chosen = rows.tolist() * passes
        logits = self._score(pairs, lengths, chosen).view(passes, lists, kept)
        weight = lists / num_queries
        listwise = sum((listwise_cross_entropy(one) for one in logits), torch.zeros((), device=device)) / passes
        outputs = {"loss": listwise, "listwise": listwise.detach()}
        if passes == 2:
            agreement = symmetric_kl(logits[0], logits[1])
            outputs |= {"loss": listwise + settings.rdrop_weight * agreement, "rdrop": agreement.detach()}
        outputs["accuracy"] = (logits[0].detach().argmax(dim=1) == 0).float().mean()
        return {name: value * weight for name, value in outputs.items()}

    @torch.no_grad()
    def _hardest_rows(self, pairs: Piece, lengths: list[int], kept: int) -> Tensor:
        group_size = self._settings.group_size
        training = self.model.training
        self.model.eval()
        logits_QG = self._score(pairs, lengths, list(range(len(lengths)))).view(-1, group_size)
        self.model.train(training)
        first_Q1 = torch.arange(len(logits_QG), device=logits_QG.device)[:, None] * group_size
        return (hardest(logits_QG, kept) + first_Q1).view(-1)

    def _score(self, pairs: Piece, lengths: list[int], rows: list[int]) -> Tensor:
        """Logits of some rows of the micro-batch, computed in pieces of near-equal length."""
        budget = self._settings.micro_batch_tokens
        row_lengths = np.array([lengths[row] for row in rows])
        positions = length_batches(row_lengths, piece_tokens(budget))
        device = pairs["input_ids"].device
        pieces = []
        for part in positions:
            longest = int(row_lengths[part].max())
            index = torch.tensor([rows[position] for position in part], device=device)
            pieces.append({name: tensor[:, :longest].index_select(0, index) for name, tensor in pairs.items()})
        return encode_pieces(self.model, pieces, inverse_order(positions).to(device), max_kept_tokens=budget)
