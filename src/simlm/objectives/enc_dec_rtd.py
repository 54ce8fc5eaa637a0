"""Replaced-token detection on both sides of the bottleneck: which tokens are samples of the generator?

Source: SimLM, arXiv 2207.02578, table 6 ("Enc-Dec RTD"); the loss and its head are ELECTRA's, arXiv 2003.10555, section 2 (a dense layer,
gelu, one number a token). A sample that equals the original counts as original, as there.
Differs: encoder and decoder share one head, which starts small and from a fixed seed; its weight is 1 and not 50, since no generator's
loss stands beside it (a joint one's is weighted by `generator_weight`). The language-model head is not used and stays as it is.
Shapes: B sequences, T tokens, N scored positions (all that are not special), H hidden.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from simlm.objectives import EncoderPass, Objective, Parts, Reads, Summed, Term, at, number
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import PretrainSettings


class Discriminator(nn.Module):
    """States [N, H] -> logits_N that the token was replaced."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Weights from a fixed seed, normal with the configuration's initializer_range, so a build depends on no global state."""
        super().__init__()
        spread = float(getattr(config, "initializer_range", 0.02))
        source = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            self.dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.output = nn.Linear(config.hidden_size, 1)
        for layer in (self.dense, self.output):
            nn.init.normal_(layer.weight, std=spread, generator=source)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        logits_N1: Tensor = self.output(F.gelu(self.dense(hidden_NH)))
        return logits_N1[:, 0].float()


class EncDecRTD(Objective):
    """Both sides read samples of the generator and tell them from the text."""

    reads: ClassVar[Reads] = "replaced"
    decodes = True
    uses_head = False

    def __init__(self, decoder: Decoder, discriminator: Discriminator) -> None:
        super().__init__()
        self.decoder = decoder
        self.discriminator = discriminator

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> EncDecRTD:
        return cls(Decoder(parts.masked_lm, settings.decoder_layers), Discriminator(parts.masked_lm.config))

    def encoder_terms(self, seen: EncoderPass) -> list[Term]:
        return [self._detection("encoder", seen, seen.hidden_BTH, seen.encoder_BT)]

    def terms(self, seen: EncoderPass) -> list[Term]:
        hidden_BTH = self.decoder(seen.cls_BH, seen.decoder_embeddings(seen.replaced_BT), seen.inputs)
        return [self._detection("decoder", seen, hidden_BTH, seen.replaced_BT)]

    def _detection(self, name: str, seen: EncoderPass, hidden_BTH: Tensor, read_BT: Tensor) -> Summed:
        """Binary cross-entropy at every position that is not special; the measure is the share of replaced tokens that are found."""
        replaced_N = at(read_BT, seen.scored_N) != seen.labels_N
        logits_N = self.discriminator(at(hidden_BTH, seen.scored_N))
        total = F.binary_cross_entropy_with_logits(logits_N, replaced_N.float(), reduction="sum")
        count = number(len(logits_N), logits_N)
        found = ((logits_N > 0) & replaced_N).sum().float(), replaced_N.sum().float()
        return Summed(name, total, count, seen.batch["step_tokens"], {"accuracy_at_replaced": found})
