"""The Inverse Cloze Task: a sentence finds the passage that it was taken out of.

Source: arXiv 1906.00300, section 4: the sentence is the question, what surrounds it the evidence, the other evidence of the batch the
negatives; in 10% of the passages the sentence stays where it is.
Differs: a "sentence" is a run of a fifth of the passage's tokens, as the store keeps no sentence ends; one encoder for both sides, as the
retriever has; cosines divided by `contrast_temperature` where the paper takes inner products of projections; each side has to find the
other, and all other sequences of the step are negatives, those of its own side too.
"""

from __future__ import annotations

from typing import ClassVar

from simlm.objectives import EncoderPass, Objective, Reads, Sequences, Term


class InverseCloze(Objective):
    """`simlm.objectives.contrast.Contrast` alone: the encoder reads clean text, and no token is predicted."""

    reads: ClassVar[Reads] = "clean"
    sequences: ClassVar[Sequences] = "sentence_and_rest"
    uses_head = False
    contrasts = True

    def encoder_terms(self, seen: EncoderPass) -> list[Term]:
        return []
