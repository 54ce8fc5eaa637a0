"""Replaced language modelling with a representation bottleneck: SimLM's objective.

Source: SimLM, arXiv 2207.02578, section 3.1: L_pt = L_enc + L_dec, each the mean cross-entropy of the original token at every position,
replaced or not. Special tokens are left out (method.md section 1).
Differs: the means run over all tokens of the step, not over the batch of a device, so the loss does not depend on how a step is cut.
Shapes: B passages, T tokens, N scored positions (all that are not special), H hidden.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from simlm.objectives import EncoderPass, Objective, Parts, Reads, Term, Tokens, at
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import PretrainSettings


class ReplacedLM(Objective):
    """Both sides read samples of the generator and recover the text."""

    reads: ClassVar[Reads] = "replaced"
    decodes = True

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> ReplacedLM:
        return cls(Decoder(parts.masked_lm, settings.decoder_layers))

    def encoder_terms(self, seen: EncoderPass) -> list[Term]:
        return [_everywhere("encoder", seen, seen.hidden_BTH, seen.encoder_BT)]

    def terms(self, seen: EncoderPass) -> list[Term]:
        hidden_BTH = self.decoder(seen.cls_BH, seen.decoder_embeddings(seen.replaced_BT), seen.inputs)
        return [_everywhere("decoder", seen, hidden_BTH, seen.replaced_BT)]


def _everywhere(name: str, seen: EncoderPass, hidden_BTH: Tensor, read_BT: Tensor) -> Tokens:
    """The original token at every position that is not special; accuracy is told where another token had been put in its place."""
    replaced_N = at(read_BT, seen.scored_N) != seen.labels_N
    return Tokens(name, at(hidden_BTH, seen.scored_N), seen.labels_N, seen.batch["step_tokens"], {"replaced": replaced_N})
