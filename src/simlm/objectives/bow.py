"""Bag-of-words prediction from the [CLS] vector, without a decoder.

Source: "Drop your Decoder: Pre-training with Bag-of-Word Prediction for Dense Passage Retrieval", arXiv 2401.11248, section 4: the
language-model head on the [CLS] state predicts every distinct token of the passage, beside masked LM on the encoder's states.
Differs: the mean over a passage's distinct tokens, then over the passages of the step; special tokens are left out.
Shapes: B passages, H hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simlm.data.batches import TokenBatch
from simlm.losses.language_model import bag_of_words_cross_entropy
from simlm.objectives import EncoderPass, ExtraViews, Objective, Summed, Term, number
from simlm.objectives.masking import Draws


class BagViews:
    """The distinct tokens of each sequence: bag_tokens and bag_rows, int64, one entry a (sequence, token) pair."""

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        rows, columns = np.nonzero(~batch.special)
        size = int(batch.input_ids.max()) + 1
        pairs = np.unique(rows * size + batch.input_ids[rows, columns])
        return {"bag_tokens": torch.from_numpy(pairs % size), "bag_rows": torch.from_numpy(pairs // size)}


class BagOfWords(Objective):
    """Encoder: masked LM; [CLS]: the words of the passage. As an addition to another objective, the second part alone."""

    def extra_views(self) -> ExtraViews:
        return BagViews()

    def terms(self, seen: EncoderPass) -> list[Term]:
        features_BH, weight, bias = seen.head(seen.cls_BH)
        loss_B = bag_of_words_cross_entropy(
            features_BH, weight, bias, seen.head_ids(seen.batch["bag_tokens"]), seen.batch["bag_rows"], len(features_BH)
        )
        return [Summed("bow", loss_B.sum(), number(len(loss_B), loss_B), seen.batch["step_sequences"])]
