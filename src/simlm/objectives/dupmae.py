"""DupMAE: RetroMAE, and a bag of words from the ordinary tokens beside it.

Source: "RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models", arXiv 2211.08769, section 3: the
states of all ordinary tokens go through a projection to the vocabulary, the highest logit of each entry over the passage is kept, and
softmax over those predicts the distinct tokens of the passage. Weight 0.1: method.md section 3.
Differs: the projection is the language-model head; the mean over a passage's distinct tokens, then over the passages of the step, as in
`bow`; special tokens are left out on both sides. The paper's vectors of ordinary tokens, joined to [CLS] for retrieval, are not made.
Shapes: B sequences, C of a chunk, T tokens, N = B * T positions, H width of the output embeddings, V vocabulary, P pairs (sequence, token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simlm.data.batches import TokenBatch
from simlm.losses.language_model import default_chunk_rows, logits_fp32
from simlm.objectives import EncoderPass, ExtraViews, Parts, Summed, Term, number
from simlm.objectives.bow import BagViews
from simlm.objectives.masking import Draws
from simlm.objectives.retromae import RetroMAE, VisibleViews
from simlm.recipe import PretrainSettings


@dataclass(frozen=True)
class DupViews:
    """What RetroMAE's decoder sees, and the distinct tokens."""

    rate: float

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        return VisibleViews(self.rate)(batch, draws) | BagViews()(batch, draws)


class DupMAE(RetroMAE):
    """RetroMAE's two losses and, from the encoder's ordinary states, the words of the passage with weight `ordinary_weight`."""

    ordinary_weight = 0.1

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> DupMAE:
        objective = super().build(settings, parts)
        assert isinstance(objective, cls)
        objective.ordinary_weight = settings.ordinary_weight
        return objective

    def extra_views(self) -> ExtraViews:
        return DupViews(self.hidden_rate)

    def terms(self, seen: EncoderPass) -> list[Term]:
        features_NH, weight, bias = seen.head(seen.hidden_BTH)
        scored_BT = (
            torch.zeros_like(seen.original_BT, dtype=torch.bool).flatten().index_fill(0, seen.scored_N, True).view_as(seen.original_BT)
        )
        total = max_pooled_bag_loss(features_NH, weight, bias, scored_BT, seen.head_ids(seen.batch["bag_tokens"]), seen.batch["bag_rows"])
        count = number(len(scored_BT), total)
        bag = Summed("ordinary", total, count, seen.batch["step_sequences"], weight=self.ordinary_weight)
        return [*super().terms(seen), bag]


def max_pooled_bag_loss(
    features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scored_BT: Tensor, tokens_P: Tensor, rows_P: Tensor
) -> Tensor:
    """Sum (fp32 scalar, nats) over sequences of the mean over their bag's tokens v of -log softmax(m)_v.

    m_v is the highest logit of v at a scored position of the sequence.
    scored_BT: bool. tokens_P, rows_P: int64, token tokens_P[i] is in the bag of sequence rows_P[i]. A sequence without any counts 0.
    At no time are there logits of more than a chunk of sequences; the gradients are made on the way, so the graph runs backward once.
    """
    wanted = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (features_NH, weight_VH, bias_V))
    loss: Tensor = _MaxPooledBagLoss.apply(  # type: ignore[no-untyped-call]
        features_NH, weight_VH, bias_V, scored_BT, tokens_P, rows_P, wanted
    )
    return loss


class _MaxPooledBagLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        scored_BT: Tensor,
        tokens_P: Tensor,
        rows_P: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        device = features_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype
        num_rows, width = scored_BT.shape
        # Positions that do not count repeat one that does: the maximum stays the same, and nothing has to be written into the logits.
        places_BT = torch.arange(scored_BT.numel(), device=scored_BT.device).view_as(scored_BT)
        first_B1 = places_BT.gather(1, scored_BT.int().argmax(1, keepdim=True))
        source_BT = torch.where(scored_BT, places_BT, first_B1)
        # A bincount would have to wait for the device.
        sizes_B = torch.zeros(num_rows, device=rows_P.device).index_add_(0, rows_P, torch.ones_like(rows_P, dtype=torch.float32))
        shares_P = 1.0 / sizes_B[rows_P]

        wants_features, wants_weight, wants_bias = wanted
        grad_features = torch.zeros_like(features_NH, dtype=torch.float32) if wants_features else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if wants_bias else None
        loss = torch.zeros((), device=scored_BT.device)
        chunk = max(1, default_chunk_rows(weight_VH) // width)
        with torch.autocast(device, enabled=False):
            features, weight = features_NH.to(dtype), weight_VH.to(dtype)
            for start in range(0, num_rows, chunk):
                source_CT = source_BT[start : start + chunk]
                logits = logits_fp32(features[source_CT.flatten()], weight, bias_V)
                pooled_CV, best_CV = logits.view(*source_CT.shape, -1).max(1)
                del logits
                # Pairs of other chunks get the share 0 in any row: picking them out would have to wait for the device.
                inside_P = (rows_P >= start) & (rows_P < start + len(source_CT))
                pairs = ((rows_P - start).clamp(0, len(source_CT) - 1), tokens_P)
                bags_CV = torch.zeros_like(pooled_CV).index_put(pairs, shares_P * inside_P, accumulate=True)
                has_C1 = bags_CV.sum(1, keepdim=True) > 0
                loss = loss + (has_C1[:, 0] * pooled_CV.logsumexp(1)).sum() - (bags_CV * pooled_CV).sum()
                if not any(wanted):
                    continue
                grad_CV = torch.softmax(pooled_CV, 1) * has_C1 - bags_CV
                # One position an entry has a gradient, so these sums are 1 / T of the plain matrix products.
                best_CV = source_CT.gather(1, best_CV)
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0)
                if grad_weight is not None:
                    grad_weight += F.embedding_bag(
                        best_CV.T.contiguous(), features_NH.float(), mode="sum", per_sample_weights=grad_CV.T.contiguous()
                    )
                if grad_features is not None:
                    places = slice(start * width, start * width + source_CT.numel())
                    grad_features[places] = _best_positions_sums(grad_CV, best_CV - places.start, weight_VH, source_CT.numel())
        gradients = zip((grad_features, grad_weight, grad_bias), (features_NH, weight_VH, bias_V), strict=True)
        ctx.gradients = [None if gradient is None or owner is None else gradient.to(owner.dtype) for gradient, owner in gradients]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("max_pooled_bag_loss: its gradients are made once and used once; call it again for a second backward")
        return *(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients), None, None, None, None


def _best_positions_sums(grad_CV: Tensor, best_CV: Tensor, weight_VH: Tensor, num_places: int) -> Tensor:
    """[places, H]: at each place the sum of grad x weight over the entries whose highest logit stands there."""
    by_place, order = torch.sort(best_CV.flatten())
    starts = torch.searchsorted(by_place, torch.arange(num_places, device=order.device))
    return F.embedding_bag(order % weight_VH.shape[0], weight_VH.float(), starts, mode="sum", per_sample_weights=grad_CV.flatten()[order])
