"""Texts -> tokens with word starts, for any fast tokenizer, and the special tokens that its family puts around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Characters a token looked at: first try, second try. English has about 4.5; a text that needs more than 256 is cut there.
FIRST_LOOK, SECOND_LOOK = 16, 256

# Scripts written without spaces: there each token is a word of its own, or a whole sentence would be one word to mask.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U000323af"
)
_SPACELESS_CHARACTER = re.compile(f"[{_SPACELESS}]")


@dataclass(frozen=True)
class Template:
    """Where a tokenizer family puts its special tokens around one sequence, and around two.

    BERT: single ([101], [102]); pair ([101], [102], [102]), second_type 1. RoBERTa: pair ([0], [2, 2], [2]), no token types.
    pad: the padding token's id. has_types: whether the model takes token_type_ids.
    """

    single_prefix: list[int]
    single_suffix: list[int]
    pair_prefix: list[int]
    pair_middle: list[int]
    pair_suffix: list[int]
    second_type: int
    suffix_type: int
    pad: int
    has_types: bool

    @property
    def num_single(self) -> int:
        return len(self.single_prefix) + len(self.single_suffix)

    @property
    def num_pair(self) -> int:
        return len(self.pair_prefix) + len(self.pair_middle) + len(self.pair_suffix)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Template:
        """Read off the tokenizer by encoding a probe; ModelError if it has neither a post-processor nor [CLS] and [SEP]."""
        backend = plain_tokenizer(tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        has_types = "token_type_ids" in tokenizer.model_input_names
        single, pair = backend.encode("the"), backend.encode("the", "the")
        before, _, after = _around(single.ids, single.sequence_ids, sequences=(0,))
        if not before and not after:
            cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
            if cls_id is None or sep_id is None:
                raise ModelError(
                    f"the tokenizer {tokenizer.name_or_path!r} adds no special tokens and names no [CLS] and [SEP]; "
                    "a passage vector needs a first token: take the tokenizer of an encoder (BERT, RoBERTa ...)"
                )
            return cls([cls_id], [sep_id], [cls_id], [sep_id], [sep_id], 1, 1, pad, has_types)
        prefix, middle, suffix = _around(pair.ids, pair.sequence_ids, sequences=(0, 1))
        types = {number: kind for number, kind in zip(pair.sequence_ids, pair.type_ids, strict=True) if number is not None}
        return cls(before, after, prefix, middle, suffix, types[1], pair.type_ids[-1], pad, has_types)


def _around(ids: list[int], sequence_ids: list[int | None], *, sequences: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Special tokens before the first of `sequences`, between the two, and after the last."""
    first = sequence_ids.index(sequences[0])
    last = len(ids) - 1 - sequence_ids[::-1].index(sequences[-1])
    middle = [token for token, number in zip(ids[first:last], sequence_ids[first:last], strict=True) if number is None]
    return ids[:first], middle, ids[last + 1 :]


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The backend without truncation or padding; the text of a special token ("[MASK]") in a passage is ordinary text to it."""
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', tokenizer)!r} is not a fast one (no tokenizer.json); "
            "word boundaries are not known without it: convert it, or choose another model"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


@dataclass(frozen=True)
class Tokens:
    """Tokens of one text without special tokens; `cut`: it had more than were kept."""

    ids: list[int]
    starts: Bools
    cut: bool


class TextEncoder:
    """Texts -> tokens with word starts, for any fast tokenizer; the work on one text is bounded by `kept` tokens.

    words: "pre-tokenizer" where the tokenizer splits text into words, "spaces" where it does not (then words are what spaces separate).
    space_sensitive: the first word of a text gets other tokens than the same word after a space (byte-level BPE).
    """

    def __init__(self, backend: Tokenizer, *, kept: int) -> None:
        self.backend = backend
        self.kept = kept
        probe = backend.encode("the one of the", add_special_tokens=False)
        self.words: Literal["pre-tokenizer", "spaces"] = "pre-tokenizer" if len(set(probe.word_ids)) > 1 else "spaces"
        alone = backend.encode("the", add_special_tokens=False).ids
        self.space_sensitive = backend.encode(" the", add_special_tokens=False).ids != alone

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text, at most `kept`; a text longer than SECOND_LOOK characters a token is looked at no further."""
        first, second = FIRST_LOOK * self.kept, SECOND_LOOK * self.kept
        encodings = self.backend.encode_batch([text[:first] for text in texts], add_special_tokens=False)
        results: list[Tokens] = []
        for text, encoding in zip(texts, encodings, strict=True):
            shown = text[:first]
            if len(text) > first and not self._enough(encoding):
                shown = text[:second]
                encoding = self.backend.encode(shown, add_special_tokens=False)  # noqa: PLW2901
            starts = self._word_starts(encoding, shown)
            cut = len(encoding.ids) > self.kept or len(shown) < len(text)
            results.append(Tokens(encoding.ids[: self.kept], starts[: self.kept], cut))
        return results

    def _enough(self, encoding: Encoding) -> bool:
        """Whether the kept tokens cannot depend on text after the cut: a whole word more than is kept."""
        words = encoding.word_ids
        return len(words) > self.kept and (self.words == "spaces" or words[self.kept] != words[-1])

    def _word_starts(self, encoding: Encoding, text: str) -> Bools:
        starts = np.ones(len(encoding.ids), dtype=bool)
        if len(starts) < 2:
            return starts
        spaceless = not text.isascii() and _SPACELESS_CHARACTER.search(text) is not None
        if self.words == "pre-tokenizer":
            words = np.array(encoding.word_ids)
            starts[1:] = words[1:] != words[:-1]
        if self.words == "spaces" or spaceless:
            offsets = encoding.offsets
            for position in range(1, len(offsets)):
                begin, end_before = offsets[position][0], offsets[position - 1][1]
                if self.words == "spaces":
                    # A token that is nothing but the space belongs to the word after it.
                    parted = begin >= end_before > 0 and (text[begin : begin + 1].isspace() or text[begin - 1].isspace())
                    starts[position] = parted and not text[offsets[position - 1][0] : end_before].isspace()
                if spaceless and begin >= end_before and begin < len(text):
                    here = _SPACELESS_CHARACTER.match(text[begin]) is not None
                    starts[position] |= here or _SPACELESS_CHARACTER.match(text[offsets[position - 1][0]]) is not None
        return starts


def truncate_pair(first: Ints, second: Ints, room: int | Ints) -> tuple[Ints, Ints]:
    """Tokens kept of two sequences so that together they fit `room`, as `tokenizers` cuts with "longest_first".

    The shorter one stays whole while it fits half of the room; else both get half (the longer the odd one; on a tie the second).
    """
    room = np.maximum(np.asarray(room, dtype=np.int64), 0)
    shorter, longer = np.minimum(first, second), np.maximum(first, second)
    halves = shorter > room - shorter
    kept_shorter = np.where((shorter + longer > room) & halves, room // 2, shorter)
    kept_longer = np.where(shorter + longer > room, np.where(halves, room // 2 + room % 2, room - shorter), longer)
    swapped = first > second
    return np.where(swapped, kept_longer, kept_shorter), np.where(swapped, kept_shorter, kept_longer)
