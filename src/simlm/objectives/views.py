"""The loader's half of pre-training: sequences, masks, the random numbers of samples, and what a step's losses are divided by.

Shapes: B sequences, T tokens, S passages of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simlm.data.batches import TokenBatch
from simlm.data.tokens import Template
from simlm.objectives import ExtraViews, Sequences
from simlm.objectives.masking import Draws, Masking, mask_budget
from simlm.objectives.spans import NUM_SEQUENCES, cut, sequence_tokens

# Streams of `Draws`; fixed numbers, so that one does not change when another is added. Objectives of their own start at 16.
ENCODER_MASK, DECODER_MASK, ENCODER_SAMPLE, DECODER_SAMPLE = range(4)


@dataclass(frozen=True)
class PretrainViews:
    """Masked positions of the encoder's side, of the decoder's where one reads, and one random number for each sample.

    sampled: whether a generator fills the masked positions. extra: what the objectives add.
    """

    encoder_rate: float
    decoder_rate: float | None = None
    sampled: bool = False
    masking: Masking = field(default_factory=Masking)
    cut_into: Sequences = "passages"
    extra: tuple[ExtraViews, ...] = ()

    def sequences(self, batch: TokenBatch, draws: Draws, template: Template) -> tuple[TokenBatch, Draws]:
        return cut(batch, draws, self.cut_into, template)

    def lengths(
        self, lengths_S: NDArray[np.integer[Any]], tokens_S: NDArray[np.int64], draws_S: Draws, template: Template
    ) -> tuple[NDArray[np.integer[Any]], int]:
        """(tokens of each passage's longest sequence, special ones included; sequences a passage)."""
        number = NUM_SEQUENCES[self.cut_into]
        if number == 1:
            return lengths_S, 1
        return sequence_tokens(tokens_S, draws_S, self.cut_into).reshape(number, -1).max(0) + template.num_single, number

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        width = batch.input_ids.shape[1]
        first_BT = draws.uniforms(ENCODER_MASK, width)
        entries: dict[str, Tensor] = {}
        if self.decoder_rate is None:
            masks = {"encoder": self.masking.mask(batch, self.encoder_rate, first_BT)}
        else:
            second_BT = draws.uniforms(DECODER_MASK, width)
            encoder_BT, decoder_BT = self.masking.nested(batch, self.encoder_rate, self.decoder_rate, first_BT, second_BT)
            masks = {"encoder": encoder_BT, "decoder": decoder_BT}
        for side, stream in (("encoder", ENCODER_SAMPLE), ("decoder", DECODER_SAMPLE)):
            if side not in masks:
                continue
            entries[f"{side}_positions"] = torch.from_numpy(np.flatnonzero(masks[side]))
            if self.sampled:
                entries[f"{side}_uniforms"] = torch.from_numpy(draws.uniforms(stream, width)[masks[side]].astype(np.float32))
        for views in self.extra:
            entries |= views(batch, draws)
        return entries

    def step_counts(self, tokens_S: NDArray[np.int64], draws_S: Draws) -> dict[str, float]:
        """step_tokens: all that are not special; step_sequences; step_encoder_masked and step_decoder_masked: the masks' budgets.

        Budgets are known without drawing the masks; a word too long for the rest of one leaves a little of it unused.
        """
        tokens = sequence_tokens(tokens_S, draws_S, self.cut_into)
        counts = {"step_tokens": float(tokens.sum()), "step_sequences": float(len(tokens_S) * NUM_SEQUENCES[self.cut_into])}
        counts["step_encoder_masked"] = float(mask_budget(tokens, self.encoder_rate).sum())
        if self.decoder_rate is not None:
            counts["step_decoder_masked"] = float(mask_budget(tokens, self.decoder_rate).sum())
        return {name: max(1.0, count) for name, count in counts.items()}
