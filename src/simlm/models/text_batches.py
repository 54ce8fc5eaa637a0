"""Texts -> padded batches of near-equal length, at a bounded cost a text.

Tokens are those of the token store: pairs are cut as transformers' `truncation=True` cuts them (the longer of the two first), and the
name of a special token inside a text ("[SEP]") is ordinary text.
Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from simlm.errors import DataError

Text = str | tuple[str, str]
Ints = NDArray[np.int64]

FIRST_LOOK, SECOND_LOOK = 16, 256
"""Characters a token that are tokenised at first, and at most, as in the store: English has about 4.5."""


@dataclass(frozen=True)
class Sequences:
    """Token ids and token types of each text, special tokens included."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    pad: int

    def lengths(self) -> Ints:
        return np.fromiter(map(len, self.input_ids), dtype=np.int64, count=len(self.input_ids))

    def tensors(self, rows: Ints) -> dict[str, Tensor]:
        """int64 [B, T] model inputs of some rows, padded on the right; no attention mask where nothing is padded."""
        chosen = [self.input_ids[row] for row in rows]
        lengths = np.array([len(ids) for ids in chosen])
        mask = np.arange(lengths.max()) < lengths[:, None]
        arrays = {"input_ids": _padded(chosen, mask, self.pad)}
        if self.token_type_ids is not None:
            arrays["token_type_ids"] = _padded([self.token_type_ids[row] for row in rows], mask, 0)
        if not mask.all():
            arrays["attention_mask"] = mask.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TextTokenizer:
    """A tokenizer with its own truncation, apart from the state of the one it was made from. Threads may share it: they take turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._one_at_a_time = threading.Lock()
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._has_types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, texts: Sequence[Text], max_tokens: int) -> Sequences:
        """Tokens of texts and of pairs, at most `max_tokens` each; DataError if a text is not valid Unicode.

        Characters beyond SECOND_LOOK a token are never looked at, so a huge text costs no more than a long one.
        """
        with self._one_at_a_time:
            return self._encoded(texts, max_tokens)

    def _encoded(self, texts: Sequence[Text], max_tokens: int) -> Sequences:
        self._backend.enable_truncation(max_tokens)
        first = [_shortened(text, FIRST_LOOK * max_tokens) for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(first)
            for position, (text, shown) in enumerate(zip(texts, first, strict=True)):
                if shown is not text and not _is_full(encodings[position], _cut_parts(text, shown), max_tokens):
                    (encodings[position],) = self._backend.encode_batch_fast([_shortened(text, SECOND_LOOK * max_tokens)])
        except (TypeError, UnicodeEncodeError) as error:
            broken = _first_broken(texts)
            if broken is None:
                raise
            raise DataError(f"{broken} is not valid Unicode ({error}); decode it as UTF-8 with errors='replace'") from None
        types = [encoding.type_ids for encoding in encodings] if self._has_types else None
        return Sequences([encoding.ids for encoding in encodings], types, self._pad)

    def leaves_room(self, prompt: str, max_tokens: int) -> bool:
        """Whether a pair of `max_tokens` has room for at least one token behind a prompt."""
        with self._one_at_a_time:
            self._backend.no_truncation()
            return len(self._backend.encode(prompt, "").ids) < max_tokens


def _shortened(text: Text, limit: int) -> Text:
    """The text itself, or its first `limit` characters up to the last space among them (parts of a pair likewise)."""
    if isinstance(text, tuple):
        first, second = _cut(text[0], limit), _cut(text[1], limit)
        return text if first is text[0] and second is text[1] else (first, second)
    return _cut(text, limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # Cut before a space no token changes; where there is none the last token may, which _is_full leaves room for.
    space = text.rfind(" ", limit // 2, limit)
    return text[: space if space > 0 else limit]


def _cut_parts(text: Text, shown: Text) -> list[int]:
    """Which parts of a text were shortened: 0 is the text or the first of a pair, 1 the second."""
    if isinstance(text, str):
        return [0]
    return [number for number in (0, 1) if shown[number] is not text[number]]


def _is_full(encoding: Encoding, cut_parts: list[int], max_tokens: int) -> bool:
    """Whether a shortened text had more tokens than were kept, so that the rest of it cannot matter.

    In a pair each part that was cut must fill half of the room: then `longest_first` gives it what it would give the whole.
    """
    if not encoding.overflowing:
        return False
    if encoding.n_sequences == 1:
        return True
    numbers = encoding.sequence_ids
    half = (max_tokens - numbers.count(None)) // 2
    return all(numbers.count(part) >= half for part in cut_parts)


def batches(lengths: Ints, batch_tokens: int) -> Iterator[Ints]:
    """Positions 0..n-1 grouped by near-equal length, longest first; rows times the longest is at most `batch_tokens` (or one row)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(batch_tokens // max(int(lengths[order[start]]), 1), 1)
        yield order[start : start + count]
        start += count


def checked_texts(texts: Any, name: str) -> list[str]:
    """The texts as a list of strings; DataError naming the first that is not one, or if a single string was given."""
    if isinstance(texts, str):
        raise DataError(f"{name}: one string was given, a list of strings was expected; write [text]")
    found = list(texts)
    for position, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(
                f"{name}[{position}]: {type(text).__name__} was given, a string was expected; leave out or convert missing texts"
            )
    return found


def _padded(rows: list[list[int]], mask: NDArray[np.bool_], pad: int) -> Ints:
    padded = np.full(mask.shape, pad, dtype=np.int64)
    padded[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return padded


def _first_broken(texts: Sequence[Text]) -> str | None:
    for position, text in enumerate(texts):
        for part in text if isinstance(text, tuple) else (text,):
            try:
                part.encode()
            except UnicodeEncodeError:
                return f"text {position} ({part[:40].encode('ascii', 'backslashreplace').decode()!r})"
    return None
