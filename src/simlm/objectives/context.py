"""Context decoding: a span's masked tokens are recovered from the [CLS] vector of its neighbour.

Source: CoT-MAE, arXiv 2208.07670, section 3: masked LM on the encoder's side of each span; the decoder reads the other span, masked at a
higher rate, with the encoder's [CLS] state of the first in place of its own. Each span is the other's context. The paper masks 0.30 and
0.45 and takes two decoder layers; ours are the recipe's rates and depth.
Differs: the spans are the two sides of a cut in one passage, as the store knows no longer documents (the paper also draws overlapping and
distant ones); the decoder starts from the encoder's last layers, as SimLM's does, where the paper's code starts at random; the decoder's
mask is a superset of the encoder's, where the paper draws both independently.
Shapes: B spans, first all first parts, then all second parts.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from simlm.objectives import EncoderPass, Objective, Parts, Sequences, Term, Tokens, at
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import PretrainSettings


class ContextDecoding(Objective):
    """Encoder: masked LM. Decoder: masked LM of each span behind the vector of its neighbour."""

    sequences: ClassVar[Sequences] = "neighbours"
    decodes = True

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> ContextDecoding:
        return cls(Decoder(parts.masked_lm, settings.decoder_layers))

    def terms(self, seen: EncoderPass) -> list[Term]:
        neighbours_BH = torch.cat(seen.cls_BH.chunk(2)[::-1])
        hidden_BTH = self.decoder(neighbours_BH, seen.decoder_embeddings(seen.decoder_masked_BT), seen.inputs)
        positions_M = seen.decoder_positions_M
        labels_M = at(seen.original_BT, positions_M)
        masked = {"masked": torch.ones_like(labels_M, dtype=torch.bool)}
        return [Tokens("decoder", at(hidden_BTH, positions_M), labels_M, seen.batch["step_decoder_masked"], masked)]
