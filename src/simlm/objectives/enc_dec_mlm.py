"""Masked language modelling on both sides of the bottleneck: replaced LM with [MASK] in place of the generator's samples.

Source: SimLM, arXiv 2207.02578, section 3.1 and table 6 ("Enc-Dec MLM"): the loss is taken at the masked positions of each side.
Differs: a side's sum is divided by its masks' budget over the whole step (what a word too long for the rest leaves unused included).
"""

from __future__ import annotations

import torch

from simlm.objectives import EncoderPass, Objective, Parts, Term, Tokens, at
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import PretrainSettings


class EncDecMLM(Objective):
    """Encoder and decoder recover what was masked; neither needs a generator."""

    decodes = True

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> EncDecMLM:
        return cls(Decoder(parts.masked_lm, settings.decoder_layers))

    def terms(self, seen: EncoderPass) -> list[Term]:
        hidden_BTH = self.decoder(seen.cls_BH, seen.decoder_embeddings(seen.decoder_masked_BT), seen.inputs)
        positions_M = seen.decoder_positions_M
        labels_M = at(seen.original_BT, positions_M)
        masked = {"masked": torch.ones_like(labels_M, dtype=torch.bool)}
        return [Tokens("decoder", at(hidden_BTH, positions_M), labels_M, seen.batch["step_decoder_masked"], masked)]
