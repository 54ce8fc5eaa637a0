"""Condenser: a head that sees early token states, and of the late layers only the [CLS] vector.

Source: "Condenser: a Pre-training Architecture for Dense Retrieval", arXiv 2104.08253, section 3.2: masked LM of the head, two layers on
[CLS] of the last layer and token states of half-way up, plus the encoder's own masked LM at the same positions.
Differs: the head starts from the encoder's last layers, as SimLM's decoder does, where the paper's starts at random; whole words are
masked, at `encoder_mask_rate`; a sum is divided by the masks' budget over the step. Early states of a pre-norm architecture (ModernBERT)
go into the head as they are, without the final norm that [CLS] has passed.
Shapes: B sequences, T tokens, M masked positions, H hidden.
"""

from __future__ import annotations

import torch

from simlm.errors import ModelError
from simlm.models.backbone import encoder_of, layers_of
from simlm.objectives import EncoderPass, Objective, Parts, Term, Tokens, at
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import PretrainSettings


class Condenser(Objective):
    """The head must find in [CLS] what the early states do not tell; `decoder_layers` are its layers."""

    def __init__(self, decoder: Decoder, early_layer: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.early_layer = early_layer

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> Condenser:
        """ModelError if no layer is left between the early states and the last."""
        return cls(Decoder(parts.masked_lm, settings.decoder_layers), skip_layer(settings, parts))

    def terms(self, seen: EncoderPass) -> list[Term]:
        assert seen.early_BTH is not None
        hidden_BTH = self.decoder(seen.cls_BH, seen.early_BTH, seen.inputs)
        positions_M = seen.encoder_positions_M
        labels_M = at(seen.original_BT, positions_M)
        masked = {"masked": torch.ones_like(labels_M, dtype=torch.bool)}
        return [Tokens("decoder", at(hidden_BTH, positions_M), labels_M, seen.batch["step_encoder_masked"], masked)]


def skip_layer(settings: PretrainSettings, parts: Parts) -> int:
    """Number of layers after which the head takes token states: `pretrain.skip_layer`, by default half of the encoder's.

    Raises ModelError unless there is a layer before and a layer behind.
    """
    num_layers = len(layers_of(encoder_of(parts.masked_lm)))
    early = num_layers // 2 if settings.skip_layer is None else settings.skip_layer
    if not 1 <= early < num_layers:
        raise ModelError(
            f"pretrain.skip_layer: the head would take the states behind layer {early} of an encoder with {num_layers}; "
            f"a number from 1 to {num_layers - 1} was expected"
            if num_layers > 1
            else "pretrain.objective: a condenser's head takes states between two layers, and the encoder has only one; take a deeper model"
        )
    return early
