"""Whether a model's tokens are those of a store."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from simlm.artifacts import json_digest
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


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides the tokens and token types of a text or pair; equal digest = equal inputs for a model."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {name: parts.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "model")}
    return json_digest([deciding, tokenizer.get_vocab(), "token_type_ids" in tokenizer.model_input_names])
