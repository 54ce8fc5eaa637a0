"""Plain masked language modelling: what the generator is trained with.

Source: BERT (arXiv 1810.04805) with whole-word masks. Differs: every masked token becomes [MASK] (no 80/10/10), which is what the
generator is shown when it is sampled from (method.md section 1).
Shapes: B passages, T tokens, M masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from simlm.data.batches import TokenBatch
from simlm.losses.language_model import chunked_cross_entropy, token_losses
from simlm.models.backbone import embed, encoder_of, layer_inputs, lm_features, run_encoder
from simlm.objectives.masking import Draws, mask_budget, whole_word_mask


@dataclass(frozen=True)
class MaskedViews:
    """One whole-word mask a passage."""

    rate: float

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        mask_BT = whole_word_mask(batch, self.rate, draws.uniforms(0, batch.input_ids.shape[1]))
        return {"positions": torch.from_numpy(np.flatnonzero(mask_BT))}

    def step_counts(self, tokens_S: NDArray[np.int64]) -> dict[str, float]:
        """step_masked: the masks' budget, known without drawing them; a word too long for the rest leaves a little of it unused."""
        return {"step_masked": max(1.0, float(mask_budget(tokens_S, self.rate).sum()))}


class MaskedLM(nn.Module):
    """Cross-entropy at the masked positions, hidden states of all others being dropped before the head."""

    def __init__(self, masked_lm: PreTrainedModel, mask_token_id: int, views: MaskedViews) -> None:
        super().__init__()
        self.masked_lm = masked_lm
        self.mask_token_id = mask_token_id
        self._views = views

    def views(self) -> MaskedViews:
        return self._views

    def forward(
        self,
        *,
        input_ids: Tensor,
        scored: Tensor,
        positions: Tensor,
        step_masked: float,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        step_passages: float = 0,
    ) -> dict[str, Tensor]:
        """This micro-batch's share of the step's loss."""
        hidden_MH = self._hidden(input_ids, attention_mask, token_type_ids, positions)
        labels_M = input_ids.flatten().index_select(0, positions)
        return {"loss": chunked_cross_entropy(*lm_features(self.masked_lm, hidden_MH), labels_M) / step_masked}

    def measure(
        self,
        *,
        input_ids: Tensor,
        scored: Tensor,
        positions: Tensor,
        step_masked: float = 0,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        step_passages: float = 0,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss and accuracy at the masked positions, as (sum, count)."""
        hidden_MH = self._hidden(input_ids, attention_mask, token_type_ids, positions)
        loss_M, correct_M = token_losses(*lm_features(self.masked_lm, hidden_MH), input_ids.flatten().index_select(0, positions))
        count = torch.tensor(float(len(loss_M)), device=input_ids.device)
        return {"loss": (loss_M.sum(), count), "accuracy_at_masked": (correct_M.sum().float(), count)}

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, positions_M: Tensor) -> Tensor:
        encoder = encoder_of(self.masked_lm)
        masked_BT = input_ids.flatten().index_fill(0, positions_M, self.mask_token_id).view_as(input_ids)
        hidden_BTH = embed(encoder, masked_BT, token_type_ids)
        hidden_BTH = run_encoder(encoder, hidden_BTH, layer_inputs(encoder, hidden_BTH, attention_mask))
        return hidden_BTH.flatten(0, 1).index_select(0, positions_M)
