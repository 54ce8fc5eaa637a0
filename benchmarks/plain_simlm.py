"""SimLM's pre-training step written down plainly, as its public reference code computes it: what `pretrain.py` measures against.

Source: SimLM, arXiv 2207.02578, and its reference code (method.md section 1): a batch of random passages padded to its longest; two
passes of the generator, each with logits over the whole vocabulary at every position and its masked-LM loss; a categorical sample at
every position, of which the masked ones are kept; the encoder called as transformers' masked LM with labels; the decoder's
cross-entropy over all logits at once; `.item()` in every step. Same masks, models and weights as ours.
Shapes: B passages, T tokens of the longest, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers.masking_utils import create_bidirectional_mask

from simlm.data.batches import collate
from simlm.data.store import Table
from simlm.objectives.masking import Draws

Views = Callable[[Any, Draws], dict[str, Tensor]]

IGNORED = -100
"""Label of positions without a loss, as transformers has it."""


class PlainSimLM(nn.Module):
    """Encoder with head, decoder layers, frozen generator; `forward` gives the loss of one batch."""

    def __init__(self, masked_lm: Any, generator: Any, *, mask_token_id: int, decoder_layers: int = 2) -> None:
        """masked_lm, generator: BertForMaskedLM."""
        super().__init__()
        self.encoder = masked_lm
        self.decoder = copy.deepcopy(masked_lm.bert.encoder.layer[-decoder_layers:])
        self.generator = generator.eval().requires_grad_(False)
        self.mask_token_id = mask_token_id

    def train(self, mode: bool = True) -> PlainSimLM:
        super().train(mode)
        self.generator.eval()
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor, encoder_mask: Tensor, decoder_mask: Tensor
    ) -> Tensor:
        """L_enc + L_dec in nats; all arguments [B, T]. labels: IGNORED at special tokens and padding. Masks: True where masked."""
        fixed = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        encoder_ids = self._replace(input_ids, labels, encoder_mask, fixed)
        decoder_ids = self._replace(input_ids, labels, decoder_mask, fixed)
        replaced = ((encoder_ids != input_ids) & (labels != IGNORED)).sum().item()
        self.replace_ratio = replaced / attention_mask.sum().item()

        outputs = self.encoder(input_ids=encoder_ids, labels=labels, output_hidden_states=True, **fixed)
        embedded_BTH = self.encoder.bert.embeddings(input_ids=decoder_ids, token_type_ids=token_type_ids)
        hidden_BTH = torch.cat([outputs.hidden_states[-1][:, :1], embedded_BTH[:, 1:]], dim=1)
        mask = create_bidirectional_mask(config=self.encoder.config, inputs_embeds=hidden_BTH, attention_mask=attention_mask)
        for layer in self.decoder:
            hidden_BTH = layer(hidden_BTH, mask)
        logits_BTV = self.encoder.cls(hidden_BTH)
        decoder_loss = nn.functional.cross_entropy(logits_BTV.view(-1, logits_BTV.shape[-1]), labels.view(-1), ignore_index=IGNORED)
        loss: Tensor = outputs.loss + decoder_loss
        return loss

    @torch.no_grad()
    def _replace(self, input_ids: Tensor, labels: Tensor, masked: Tensor, fixed: dict[str, Tensor]) -> Tensor:
        masked_labels = torch.where(masked, labels, IGNORED)
        masked_ids = torch.where(masked, self.mask_token_id, input_ids)
        outputs = self.generator(input_ids=masked_ids, labels=masked_labels, **fixed)
        categorical: Any = Categorical(logits=outputs.logits)
        sampled = categorical.sample()
        return torch.where(masked, sampled, input_ids)


class PlainSteps:
    """Batches of passages in the order they come, padded to their longest; masks of `views`, the same as ours."""

    def __init__(self, table: Table, views: Views, *, seed: int) -> None:
        self.table, self.views, self.seed = table, views, seed

    def batches(self, rows_S: NDArray[np.int64], epochs_S: NDArray[np.int64], size: int) -> list[dict[str, Tensor]]:
        """The passages of a step, `size` at a time."""
        starts = range(0, len(rows_S), size)
        return [self._batch(rows_S[start : start + size], epochs_S[start : start + size]) for start in starts]

    def _batch(self, rows_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = collate(self.table, rows_B)
        views = self.views(batch, Draws(self.seed, epochs_B, rows_B))
        assert batch.token_type_ids is not None
        masks = {}
        for side in ("encoder", "decoder"):
            masks[f"{side}_mask"] = torch.zeros(batch.input_ids.size, dtype=torch.bool).index_fill(0, views[f"{side}_positions"], True)
        return {
            "input_ids": torch.from_numpy(batch.input_ids),
            "attention_mask": torch.from_numpy(batch.attention_mask),
            "token_type_ids": torch.from_numpy(batch.token_type_ids),
            "labels": torch.from_numpy(np.where(batch.special, IGNORED, batch.input_ids)),
            **{name: mask.view(batch.input_ids.shape) for name, mask in masks.items()},
        }
