"""A weak autoregressive decoder writes the clean text from the [CLS] vector.

Source: SEED-Encoder, arXiv 2102.09206, section 4: token t is predicted from [CLS] and the `SPAN` tokens before it, beside the
encoder's masked LM; SimLM's ablation "AutoEncoder" (arXiv 2207.02578, table 6).
Differs: the decoder starts from the encoder's last layers and has `decoder_layers` of them (paper: 3, at random). The attention of every
layer is restricted, so with L layers a prediction rests on the SPAN + (L - 1)(SPAN - 1) tokens before it, as in the paper's decoder;
sliding windows of an architecture give way to this mask. Special tokens are read and never predicted.
Shapes: B sequences, T tokens, N scored positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simlm.models.backbone import encoder_of, with_mask
from simlm.objectives import EncoderPass, Objective, Parts, Term, Tokens, at
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import PretrainSettings

SPAN = 2
"""Tokens before the predicted one that a layer attends to (the span of arXiv 2102.09206)."""


class AutoEncoder(Objective):
    """Encoder: masked LM; decoder: the whole text, each token from the few before it and [CLS]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> AutoEncoder:
        return cls(Decoder(parts.masked_lm, settings.decoder_layers))

    def terms(self, seen: EncoderPass) -> list[Term]:
        embedded_BTH = seen.decoder_embeddings(seen.original_BT)
        # Padding stands behind all tokens, so no token looks at it and one mask serves all sequences.
        allowed_1TT = weak_causal_mask(embedded_BTH.shape[1], embedded_BTH.device)[None]
        inputs = with_mask(encoder_of(seen.masked_lm), seen.inputs, allowed_1TT, embedded_BTH.dtype)
        hidden_BTH = self.decoder(seen.cls_BH, embedded_BTH, inputs)
        # What stands at one position predicts the next; position 0 is special, so no sequence reaches into the one before.
        return [Tokens("decoder", at(hidden_BTH, seen.scored_N - 1), seen.labels_N, seen.batch["step_tokens"])]


def weak_causal_mask(num_tokens: int, device: torch.device) -> Tensor:
    """allowed_TT bool: position t attends to 0 and to the `SPAN` positions that end with itself."""
    places = torch.arange(num_tokens, device=device)
    back_TT = places[:, None] - places[None]
    return ((back_TT >= 0) & (back_TT < SPAN)) | (places[None] == 0)
