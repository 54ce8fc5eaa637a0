"""Replaced language modelling with a representation bottleneck: SimLM's objective.

Source: SimLM, arXiv 2207.02578, section 3.1: L_pt = L_enc + L_dec, each the mean cross-entropy of the original token at every position,
replaced or not. Special tokens are left out (method.md section 1).
Differs: the means run over all tokens of the step, not over the batch of a device, so the loss does not depend on how a step is cut.
Shapes: B passages, T tokens, N scored positions (all that are not special), M masked positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from simlm.data.batches import TokenBatch
from simlm.errors import ModelError
from simlm.losses.language_model import cross_entropy_and_rows, token_losses
from simlm.models.backbone import lm_features
from simlm.objectives import Parts
from simlm.objectives.bottleneck import Bottleneck
from simlm.objectives.generator import Generator
from simlm.objectives.masking import Draws, nested_masks
from simlm.recipe import PretrainSettings

# Streams of `Draws`; fixed numbers, so that one does not change when another is added.
_ENCODER_MASK, _DECODER_MASK, _ENCODER_SAMPLE, _DECODER_SAMPLE = range(4)


@dataclass(frozen=True)
class ReplacedViews:
    """Masked positions of both sides, and one random number each for sampling the replacement."""

    encoder_rate: float
    decoder_rate: float

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        width = batch.input_ids.shape[1]
        encoder_BT, decoder_BT = nested_masks(
            batch, self.encoder_rate, self.decoder_rate, draws.uniforms(_ENCODER_MASK, width), draws.uniforms(_DECODER_MASK, width)
        )
        return {
            "encoder_positions": torch.from_numpy(np.flatnonzero(encoder_BT)),
            "decoder_positions": torch.from_numpy(np.flatnonzero(decoder_BT)),
            "encoder_uniforms": torch.from_numpy(draws.uniforms(_ENCODER_SAMPLE, width)[encoder_BT].astype(np.float32)),
            "decoder_uniforms": torch.from_numpy(draws.uniforms(_DECODER_SAMPLE, width)[decoder_BT].astype(np.float32)),
        }

    def step_counts(self, tokens_S: NDArray[np.int64]) -> dict[str, float]:
        """step_tokens: all that are not special."""
        return {"step_tokens": max(1.0, float(tokens_S.sum()))}


class _Sides(NamedTuple):
    """At the scored positions: tokens that went in [N], last hidden states [N, H], and the original tokens [N]."""

    encoder_ids: Tensor
    decoder_ids: Tensor
    encoder_hidden: Tensor
    decoder_hidden: Tensor
    labels: Tensor


class ReplacedLM(nn.Module):
    """Bottleneck plus frozen generator."""

    def __init__(self, bottleneck: Bottleneck, generator: Generator, views: ReplacedViews) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.generator = generator
        self._views = views

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> ReplacedLM:
        """Decoder from the encoder's last layers, or from `parts.continued` where that has one."""
        if parts.generator is None:
            raise ModelError("replaced language modelling samples from a generator, but none was given; run train_generator first")
        generator = Generator.load(str(parts.generator), parts.tokenizer, temperature=settings.generator_temperature)
        bottleneck = Bottleneck(parts.masked_lm, num_decoder_layers=settings.decoder_layers)
        if parts.continued is not None:
            bottleneck.load_decoder(parts.continued)
        return cls(bottleneck, generator, ReplacedViews(settings.encoder_mask_rate, settings.decoder_mask_rate))

    def views(self) -> ReplacedViews:
        return self._views

    def forward(
        self,
        *,
        input_ids: Tensor,
        scored: Tensor,
        step_tokens: float,
        encoder_positions: Tensor,
        decoder_positions: Tensor,
        encoder_uniforms: Tensor,
        decoder_uniforms: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        step_passages: float = 0,
    ) -> dict[str, Tensor]:
        """This micro-batch's share of the step's loss; see `simlm.objectives.Objective` for the arguments."""
        masked = (encoder_positions, encoder_uniforms, decoder_positions, decoder_uniforms)
        sides = self._sides(input_ids, attention_mask, token_type_ids, scored, masked)
        # One pass over the vocabulary for both sides: the shared head's gradient is made once.
        features, weight, bias = lm_features(self.bottleneck.masked_lm, torch.cat([sides.encoder_hidden, sides.decoder_hidden]))
        total, loss_N = cross_entropy_and_rows(features, weight, bias, torch.cat([sides.labels, sides.labels]))
        num_scored = len(sides.labels)
        return {
            "loss": total / step_tokens,
            "encoder_loss": loss_N[:num_scored].sum() / step_tokens,
            "decoder_loss": loss_N[num_scored:].sum() / step_tokens,
            "encoder_replaced": (sides.encoder_ids != sides.labels).sum() / step_tokens,
            "decoder_replaced": (sides.decoder_ids != sides.labels).sum() / step_tokens,
        }

    def measure(
        self,
        *,
        input_ids: Tensor,
        scored: Tensor,
        encoder_positions: Tensor,
        decoder_positions: Tensor,
        encoder_uniforms: Tensor,
        decoder_uniforms: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        step_tokens: float = 0,
        step_passages: float = 0,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss of each side, share of tokens replaced by another, and accuracy at exactly those positions, as (sum, count)."""
        masked = (encoder_positions, encoder_uniforms, decoder_positions, decoder_uniforms)
        sides = self._sides(input_ids, attention_mask, token_type_ids, scored, masked)
        count = torch.tensor(float(len(sides.labels)), device=input_ids.device)
        measures: dict[str, tuple[Tensor, Tensor]] = {}
        for side, hidden_NH, ids_N in (
            ("encoder", sides.encoder_hidden, sides.encoder_ids),
            ("decoder", sides.decoder_hidden, sides.decoder_ids),
        ):
            features, weight, bias = lm_features(self.bottleneck.masked_lm, hidden_NH)
            loss_N, correct_N = token_losses(features, weight, bias, sides.labels)
            replaced_N = ids_N != sides.labels
            measures[f"{side}_loss"] = loss_N.sum(), count
            measures[f"{side}_replaced"] = replaced_N.sum().float(), count
            measures[f"{side}_accuracy_at_replaced"] = (correct_N & replaced_N).sum().float(), replaced_N.sum().float()
        measures["loss"] = measures["encoder_loss"][0] + measures["decoder_loss"][0], count
        return measures

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Encoder with head, and decoder; the generator is an artifact of its own."""
        self.bottleneck.save(folder, tokenizer, objective="replaced_lm")

    def _sides(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        scored: Tensor,
        masked: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> _Sides:
        encoder_positions, encoder_uniforms, decoder_positions, decoder_uniforms = masked
        # Two passes: a token masked in both views gets two independent samples, each from the context of its own view.
        encoder_ids = self.generator(input_ids, attention_mask, token_type_ids, encoder_positions, encoder_uniforms)
        decoder_ids = self.generator(input_ids, attention_mask, token_type_ids, decoder_positions, decoder_uniforms)
        encoder_BTH, decoder_BTH = self.bottleneck(encoder_ids, decoder_ids, attention_mask, token_type_ids)
        encoder_NH, decoder_NH = (hidden.flatten(0, 1).index_select(0, scored) for hidden in (encoder_BTH, decoder_BTH))
        ids = (tensor.flatten().index_select(0, scored) for tensor in (encoder_ids, decoder_ids, input_ids))
        encoder_ids_N, decoder_ids_N, labels_N = ids
        return _Sides(encoder_ids_N, decoder_ids_N, encoder_NH, decoder_NH, labels_N)
