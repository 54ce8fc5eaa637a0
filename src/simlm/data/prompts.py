"""Prompts ("query: ") in front of token sequences: the store stays without them, they are put in when a batch is made.

The tokens are those of `prompt + text` as one string. For WordPiece these are the prompt's tokens and then the text's. To a byte-level BPE
the first word after a space is another one than the first word of a text, and a unigram model sees how many spaces stand before it: there
the first word of each row is tokenised again, behind the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simlm.data.tokens import Template, TextEncoder, plain_tokenizer
from simlm.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prompt:
    """What stands before a text.

    ids: its tokens before a word; ids_alone: before an empty text, which differ where a trailing space is a token.
    backend: the tokenizer, where the first word of a text has to be tokenised again; None where it never changes.
    """

    text: str
    ids: tuple[int, ...]
    ids_alone: tuple[int, ...]
    backend: Tokenizer | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int, *, key: str) -> Prompt | None:
        """The prompt in the tokens of a tokenizer; None for an empty one.

        max_tokens: of a whole sequence, special tokens included. key: what the error calls the prompt.
        Raises RecipeError if the prompt leaves no room for a token of the text.
        """
        if not text:
            return None
        backend = plain_tokenizer(tokenizer)
        alone = backend.encode(text, add_special_tokens=False).ids
        ids = backend.encode(text.rstrip(), add_special_tokens=False).ids if text[-1].isspace() else alone
        num_special = Template.of(tokenizer).num_pair
        if len(alone) + num_special >= max_tokens:
            raise RecipeError(
                f"{key} {text!r} takes {len(alone)} tokens and special tokens up to {num_special}, but a sequence has {max_tokens}: "
                "no room is left for the text. Shorten the prompt, or allow more tokens"
            )
        joins = text[-1].isspace() and not TextEncoder(backend, kept=1).space_sensitive
        for probe in ("the", "  the"):  # a unigram model keeps spaces, and how many stand together matters
            own = backend.encode(probe, add_special_tokens=False).ids
            joins = joins and backend.encode(text + probe, add_special_tokens=False).ids == [*ids, *own]
        return cls(text, tuple(ids), tuple(alone), None if joins else backend)

    def heads(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """For each text: the tokens of the prompt with the text's first word, and how many of the text's own tokens they stand for.

        Only where there is a `backend`.
        """
        assert self.backend is not None
        words = [_first_word(text) for text in texts]
        joined = self.backend.encode_batch([self.text + word for word in words], add_special_tokens=False)
        alone = self.backend.encode_batch(words, add_special_tokens=False)
        return [(whole.ids, len(word.ids)) for whole, word in zip(joined, alone, strict=True)]


def _first_word(text: str) -> str:
    """The text up to the first space behind a character that is none."""
    begin = len(text) - len(text.lstrip())
    for place in range(begin, len(text)):
        if text[place].isspace():
            return text[:place]
    return text
