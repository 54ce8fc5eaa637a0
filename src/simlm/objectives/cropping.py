"""Independent cropping: two random crops of one passage find each other among those of the whole step.

Source: Contriever, arXiv 2112.09118, section 3.1: crops of 5% to 50% of a document of 256 tokens, a contrast of their vectors at
temperature 0.05.
Differs: negatives are the step's own crops, both sides of them, not a queue of a momentum encoder (MoCo); cosines where the paper takes
inner products; the retriever's pooling ([CLS] by default) where the paper takes the mean; a crop has 8 tokens at least, as passages are
short; no tokens are deleted from the crops.
"""

from __future__ import annotations

from typing import ClassVar

from simlm.objectives import EncoderPass, Objective, Reads, Sequences, Term


class Cropping(Objective):
    """`simlm.objectives.contrast.Contrast` alone: the encoder reads clean text, and no token is predicted."""

    reads: ClassVar[Reads] = "clean"
    sequences: ClassVar[Sequences] = "crops"
    uses_head = False
    contrasts = True

    def encoder_terms(self, seen: EncoderPass) -> list[Term]:
        return []
