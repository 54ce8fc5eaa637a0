"""No pre-training: the starting weights as they are, for comparing with."""

from __future__ import annotations

from typing import ClassVar

from simlm.objectives import EncoderPass, Objective, Reads, Term


class Untrained(Objective):
    """The pretrain stage saves what it starts from and trains nothing."""

    reads: ClassVar[Reads] = "clean"
    uses_head = False
    bottleneck = False

    def encoder_terms(self, seen: EncoderPass) -> list[Term]:
        return []
