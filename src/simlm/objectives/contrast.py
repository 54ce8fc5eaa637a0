"""Contrast between the vectors of a whole step: each sequence's partner is the other part of its passage, all others are negatives.

Sources: coCondenser (arXiv 2108.05540, section 3.2) and Contriever (arXiv 2112.09118, section 3). Gradient caching: arXiv 2101.06983.
Differs: cosines divided by a temperature where coCondenser takes plain inner products, as the retriever later compares cosines.
The vectors of a step are made once without gradient; what the loss wants of each is then handed to its micro-batch, whose second pass
(with the same dropout) carries it back. So memory is that of a micro-batch, and the loss is that of the whole step on any number of
processes.
Shapes: B sequences of a micro-batch = 2b, first those of all first parts; S passages of the step; H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simlm.models.biencoder import pool
from simlm.models.model_folder import Pooling

MicroBatch = dict[str, Any]

DEV_BLOCK = 256
"""Passages that a dev measure contrasts with each other, so that it does not depend on the micro-batches. Ours."""


@dataclass(frozen=True)
class Contrast:
    """InfoNCE in both directions over the 2S sequences of a step. temperature: divides cosines. pooling: of the vectors."""

    temperature: float
    pooling: Pooling = "cls"

    def vectors(self, hidden_BTH: Tensor, attention_mask: Tensor | None) -> Tensor:
        """float32 [B, H], unit length."""
        return F.normalize(pool(hidden_BTH, attention_mask, self.pooling).float(), dim=-1)

    def losses(self, first_SH: Tensor, second_SH: Tensor) -> Tensor:
        """[2S] in nats: of the first parts, then of the second parts. 0 for a passage alone: its partner is all there is to choose."""
        # At temperature 0.05 scores reach 20, where bf16 resolves only 0.1: stay in fp32.
        with torch.autocast(first_SH.device.type, enabled=False):
            vectors = torch.cat([first_SH, second_SH]).float()
            scores = vectors @ vectors.T / self.temperature
        scores.fill_diagonal_(float("-inf"))
        size = len(first_SH)
        partners = torch.arange(2 * size, device=scores.device).roll(size)
        return F.cross_entropy(scores, partners, reduction="none")

    def prepare(
        self, micro_batches: list[MicroBatch], encode: Callable[[MicroBatch], Tensor], *, rank: int, num_ranks: int
    ) -> list[MicroBatch]:
        """The micro-batches with contrast_gradient [B, H] and contrast_share (its part of the mean loss) added.

        encode: micro-batch -> `vectors`, run with the seed `dropout_seed` of each, as the second pass will be.
        """
        found: list[Tensor] = []
        for micro_batch in micro_batches:
            if "dropout_seed" in micro_batch:
                torch.manual_seed(micro_batch["dropout_seed"])
            found.append(encode(micro_batch).detach())
        halves = [vectors.chunk(2) for vectors in found]
        own = torch.stack([torch.cat([half[part] for half in halves]) for part in (0, 1)], dim=1)  # [own passages, 2, H]
        num_passages = round(micro_batches[0]["step_passages"])
        before, everything = _gathered(own, num_passages, rank, num_ranks)
        assert len(everything) == num_passages
        with torch.enable_grad():
            leaf = everything.clone().requires_grad_(True)
            losses = self.losses(leaf[:, 0], leaf[:, 1])
            (gradient,) = torch.autograd.grad(losses.mean(), leaf)
        losses_S2 = losses.detach().view(2, num_passages).T
        mine = slice(before, before + len(own))
        sizes = [len(half[0]) for half in halves]
        pieces = zip(micro_batches, torch.split(gradient[mine], sizes), torch.split(losses_S2[mine], sizes), strict=True)
        return [
            micro_batch | {"contrast_gradient": torch.cat([grad[:, 0], grad[:, 1]]), "contrast_share": loss.sum() / (2 * num_passages)}
            for micro_batch, grad, loss in pieces
        ]

    def share(self, hidden_BTH: Tensor, attention_mask: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """This micro-batch's part of the mean loss, with the gradient that the whole step's loss has."""
        carried = (self.vectors(hidden_BTH, attention_mask) * micro_batch["contrast_gradient"]).sum()
        share: Tensor = carried - carried.detach() + micro_batch["contrast_share"]
        return share

    def measure(self, first_PH: Tensor, second_PH: Tensor) -> float:
        """Mean loss in nats within blocks of `DEV_BLOCK` passages, in their order; a shorter last block counts only if it is the first."""
        num_blocks = max(1, len(first_PH) // DEV_BLOCK)
        pairs = list(zip(torch.split(first_PH, DEV_BLOCK), torch.split(second_PH, DEV_BLOCK), strict=True))[:num_blocks]
        return float(torch.stack([self.losses(first, second).mean() for first, second in pairs]).mean())


def _gathered(own: Tensor, num_passages: int, rank: int, num_ranks: int) -> tuple[int, Tensor]:
    """(place of this process's first passage, the rows of all processes by rank).

    Passages are dealt out like cards, so the processes' numbers of them differ by one at most.
    """
    if num_ranks == 1:
        return 0, own
    counts = [len(range(other, num_passages, num_ranks)) for other in range(num_ranks)]
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    torch.distributed.all_gather(parts, padded)
    return sum(counts[:rank]), torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
