"""What pre-training starts from: checks that come before long work, and a good first output bias."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from simlm.data.store import Store
from simlm.errors import ModelError
from simlm.models.backbone import max_positions

_MAX_COUNTED_TOKENS = 20_000_000
"""Tokens that frequencies are taken from; more change none of them noticeably."""

_BLOCK_TOKENS = 16_000_000


def check_length(model: PreTrainedModel, store: Store, name: str) -> None:
    """ModelError if the store's passages are longer than the model has positions for."""
    limit, longest = max_positions(model), int(store.passages.max_tokens)
    if limit is not None and longest > limit:
        raise ModelError(
            f"{name} has positions for {limit} tokens, passages are up to {longest} long; set prepare.max_passage_tokens to {limit}"
        )


def log_frequencies(store: Store, num_entries: int) -> Tensor:
    """Log of each token's share of the corpus, [num_entries]; one that does not occur counts as half an occurrence.

    A head that starts from these predicts the unigram distribution at once. With Adam each bias moves by about the learning rate a
    step, so learning them would take thousands of steps of a loss that is dominated by them.
    """
    tokens = store.passages.tokens
    # Equally spaced pieces: corpora are often sorted by subject.
    num_pieces = max(1, min(64, len(tokens) // 4096))
    size = min(len(tokens) // num_pieces, _MAX_COUNTED_TOKENS // num_pieces)
    counts = np.full(num_entries, 0.5)
    for piece in range(num_pieces):
        begin = piece * len(tokens) // num_pieces
        counts += np.bincount(tokens[begin : begin + size], minlength=num_entries)
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def corpus_ids(store: Store, num_entries: int) -> Tensor:
    """Ascending int64 ids of the tokens that occur in the corpus, special ones included: no label is ever outside. Reads all of it once."""
    seen = np.zeros(num_entries, dtype=bool)
    tokens = store.passages.tokens
    for begin in range(0, len(tokens), _BLOCK_TOKENS):
        seen[np.unique(tokens[begin : begin + _BLOCK_TOKENS])] = True
    seen[[token for token in store.tokenizer().all_special_ids if token < num_entries]] = True
    return torch.from_numpy(np.flatnonzero(seen))
