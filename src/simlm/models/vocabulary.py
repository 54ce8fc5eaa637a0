"""Whether a model's tokens are those of a store."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from simlm.errors import ModelError
from simlm.models.backbone import load_tokenizer


def check_vocabulary(ref: str | Path, tokenizer: PreTrainedTokenizerFast, *, revision: str | None = None) -> None:
    """ModelError if the model at `ref` numbers its tokens otherwise than `tokenizer`, the store's: its vectors would be noise."""
    theirs, ours = load_tokenizer(str(ref), revision).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        differing = sum(theirs.get(token) != number for token, number in ours.items())
        raise ModelError(
            f"{ref}: its vocabulary ({len(theirs):,} tokens) is not the store's ({len(ours):,}; {differing:,} of them differ); "
            "set prepare.tokenizer to this model, or take a model with the store's vocabulary"
        )
