"""Padded batches from the token store, and the grouping of rows by length that keeps padding small.

Everything is whole-array numpy: no Python loop over rows. Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simlm.data.prompts import Prompt
from simlm.data.store import Store, Table
from simlm.data.tokens import Template, truncate_pair
from simlm.errors import ShapeError
from simlm.types import Split

if TYPE_CHECKING:
    import torch

Ints = NDArray[np.int64]
Rows = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right to the longest of the batch; all arrays [B, T].

    input_ids, attention_mask, token_type_ids: int64 (`token_type_ids` is None where the model family has none).
    word_starts: True at the first token of each word, never at a special token. special: True at special tokens and padding.
    """

    input_ids: Ints
    attention_mask: Ints
    token_type_ids: Ints | None
    word_starts: NDArray[np.bool_]
    special: NDArray[np.bool_]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's keyword arguments."""
        import torch

        arrays = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "token_type_ids": self.token_type_ids}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def collate(table: Table, rows: Rows, *, max_tokens: int | None = None, prompt: Prompt | None = None) -> TokenBatch:
    """`[CLS] title [SEP] text [SEP]`, or `[CLS] text [SEP]` where there is no title, cut to `max_tokens`.

    max_tokens: at most and by default the store's own maximum for this table. prompt: stands before the title, or the text where there
    is none, and is cut with it.
    """
    rows_B = _checked(table, rows)
    title, text = _passage_pieces(table, rows_B)
    paired = title.length > 0
    # Without a title the text is the only sequence and takes the first one's place.
    firsts = [title, text.where(~paired)]
    if prompt is not None:
        firsts = _prompted(prompt, table, rows_B, title, text)
    first_B, second_B = _kept(table, firsts, text.where(paired), paired, max_tokens)
    return _assemble(table.template, _cut_in_order(firsts, first_B), [text.cut(second_B)], paired)


def sequence_lengths(table: Table, rows: Rows, *, max_tokens: int | None = None, prompt: Prompt | None = None) -> Ints:
    """Tokens of each sequence as `collate` makes it, special tokens included; int64 [B]."""
    rows_B = np.asarray(rows, dtype=np.int64)
    if prompt is None:
        lengths_B = table.lengths[rows_B].astype(np.int64)
        return lengths_B if max_tokens is None else np.minimum(lengths_B, max_tokens)
    if len(rows_B) == 0:
        return rows_B
    rows_B = _checked(table, rows_B)
    title, text = _passage_pieces(table, rows_B)
    paired = title.length > 0
    firsts = _prompted(prompt, table, rows_B, title, text)
    first_B, second_B = _kept(table, firsts, text.where(paired), paired, max_tokens)
    special_B = np.where(paired, table.template.num_pair, table.template.num_single)
    lengths: Ints = first_B + second_B + special_B
    return lengths


def collate_pairs(store: Store, split: Split, query_rows: Rows, passage_rows: Rows, *, max_tokens: int) -> TokenBatch:
    """`[CLS] query [SEP] title text [SEP]` for a cross-encoder, each query with the passage at the same position.

    Cut as `truncation=True` cuts: the passage, unless the query takes more than half of the room.
    """
    template = store.passages.template
    query, passage, kept_query, kept_passage = _pair_pieces(store, split, query_rows, passage_rows, max_tokens)
    pieces = _cut_in_order(passage, kept_passage)
    return _assemble(template, [query.cut(kept_query)], pieces, np.ones(len(kept_query), dtype=bool))


def pair_lengths(store: Store, split: Split, query_rows: Rows, passage_rows: Rows, *, max_tokens: int) -> Ints:
    """Tokens of each pair as `collate_pairs` makes it, special tokens included; int64 [B]."""
    _, _, kept_query, kept_passage = _pair_pieces(store, split, query_rows, passage_rows, max_tokens)
    lengths: Ints = kept_query + kept_passage + store.passages.template.num_pair
    return lengths


def length_batches(lengths: NDArray[np.integer[Any]] | Sequence[int], max_padded_tokens: int) -> list[Ints]:
    """Positions 0..n-1 in batches of near-equal length, longest first.

    A batch's rows times its longest length is at most `max_padded_tokens`, but one row is always taken. Equal lengths keep their order.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths_N, kind="stable")
    batches: list[Ints] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths_N[order[start]]), 1)
        count = max(max_padded_tokens // longest, 1)
        batches.append(order[start : start + count])
        start += count
    return batches


# --- pieces: slices of token arrays, one a row


@dataclass(frozen=True)
class _Piece:
    """For each row of a batch, `length[b]` tokens from `start[b]` on of `tokens`; `bits`: word starts are packed, 8 to a byte."""

    tokens: NDArray[np.integer[Any]]
    starts_of_words: NDArray[np.uint8]
    bits: bool
    start: Ints
    length: Ints

    def cut(self, length: Ints) -> _Piece:
        return _Piece(self.tokens, self.starts_of_words, self.bits, self.start, length)

    def where(self, chosen: NDArray[np.bool_]) -> _Piece:
        return self.cut(np.where(chosen, self.length, 0))


def _checked(table: Table, rows: Rows) -> Ints:
    rows_B = np.asarray(rows, dtype=np.int64)
    if rows_B.ndim != 1 or len(rows_B) == 0:
        raise ShapeError(f"a batch needs a flat list of one row or more, got shape {rows_B.shape}")
    if rows_B.min() < 0 or rows_B.max() >= len(table):
        raise ShapeError(f"rows {rows_B.min()}..{rows_B.max()} given, the table has rows 0..{len(table) - 1}")
    return rows_B


def _passage_pieces(table: Table, rows_B: Ints) -> tuple[_Piece, _Piece]:
    start, stop = table.token_offsets[rows_B], table.token_offsets[rows_B + 1]
    titles = table.title_tokens[rows_B].astype(np.int64)
    title = _Piece(table.tokens, table.word_start_bits, True, start, titles)
    return title, _Piece(table.tokens, table.word_start_bits, True, start + titles, stop - start - titles)


def _prompted(prompt: Prompt, table: Table, rows_B: Ints, title: _Piece, text: _Piece) -> list[_Piece]:
    """The first sequence of each row behind the prompt: tokens of the prompt (and of a first word that it changes), and the rest."""
    paired = title.length > 0
    start = np.where(paired, title.start, text.start)
    length = np.where(paired, title.length, text.length)
    heads = [(list(prompt.ids if size else prompt.ids_alone), 0) for size in length.tolist()]
    if prompt.backend is not None:
        heads = prompt.heads([table.title(row) if pair else table.text(row) for row, pair in zip(rows_B.tolist(), paired, strict=True)])
    head_B = np.array([len(ids) for ids, _ in heads], dtype=np.int64)
    skip_B = np.minimum(np.array([skip for _, skip in heads], dtype=np.int64), length)
    tokens = np.array([token for ids, _ in heads for token in ids], dtype=np.int64)
    head = _Piece(tokens, np.zeros(len(tokens), dtype=np.uint8), False, np.cumsum(head_B) - head_B, head_B)
    return [head, _Piece(table.tokens, table.word_start_bits, True, start + skip_B, length - skip_B)]


def _kept(table: Table, firsts: list[_Piece], second: _Piece, paired: NDArray[np.bool_], max_tokens: int | None) -> tuple[Ints, Ints]:
    """Tokens kept of the first and of the second sequence of each row, cut to `max_tokens` and the table's own maximum."""
    limit = table.max_tokens if max_tokens is None else min(max_tokens, table.max_tokens)
    template = table.template
    first_B: Ints = np.sum([piece.length for piece in firsts], axis=0)
    pair_first, pair_second = truncate_pair(first_B, second.length, limit - template.num_pair)
    single = np.minimum(first_B, max(limit - template.num_single, 0))
    return np.where(paired, pair_first, single), np.where(paired, pair_second, 0)


def _cut_in_order(pieces: list[_Piece], length_B: Ints) -> list[_Piece]:
    """The pieces of a sequence cut to its first `length_B` tokens."""
    cut = []
    for piece in pieces:
        kept = np.minimum(piece.length, length_B)
        length_B = length_B - kept
        cut.append(piece.cut(kept))
    return cut


def _pair_pieces(
    store: Store, split: Split, query_rows: Rows, passage_rows: Rows, max_tokens: int
) -> tuple[_Piece, list[_Piece], Ints, Ints]:
    """Query, pieces of the passage in order, and how many tokens of query and of passage are kept."""
    queries, passages = store.queries(split), store.passages
    queries_B, passages_B = _checked(queries, query_rows), _checked(passages, passage_rows)
    if len(queries_B) != len(passages_B):
        raise ShapeError(f"{len(queries_B)} queries for {len(passages_B)} passages; one query a passage is needed")
    _, query = _passage_pieces(queries, queries_B)
    title, text = _passage_pieces(passages, passages_B)
    pieces = [title, text]
    if passages.heads is not None:
        heads = passages.heads
        begin, end = heads.offsets[passages_B], heads.offsets[passages_B + 1]
        skip = np.minimum(heads.skip[passages_B], text.length)
        rest = _Piece(text.tokens, text.starts_of_words, True, text.start + skip, text.length - skip)
        pieces = [title, _Piece(heads.tokens, heads.starts, False, begin, end - begin), rest]
    total = np.sum([piece.length for piece in pieces], axis=0)
    kept_query, kept_passage = truncate_pair(query.length, total, max_tokens - passages.template.num_pair)
    return query, pieces, kept_query, kept_passage


def _assemble(template: Template, first: list[_Piece], second: list[_Piece], paired: NDArray[np.bool_]) -> TokenBatch:
    """Put special tokens around the pieces of the first and of the second sequence (`paired`: rows that have a second one)."""
    size = len(paired)
    first_B = np.sum([piece.length for piece in first], axis=0)
    second_B = np.sum([piece.length for piece in second], axis=0)
    special_B = np.where(paired, template.num_pair, template.num_single)
    lengths_B = first_B + second_B + special_B
    width = int(lengths_B.max())
    ids = np.full(size * width, template.pad, dtype=np.int64)
    starts = np.zeros(size * width, dtype=bool)
    special = np.ones(size * width, dtype=bool)
    row_start = np.arange(size, dtype=np.int64) * width
    prefix_B = np.where(paired, len(template.pair_prefix), len(template.single_prefix))
    place_B = row_start + prefix_B
    for pieces, gap in ((first, len(template.pair_middle)), (second, 0)):
        for piece in pieces:
            source, target = _ranges(piece.start, piece.length), _ranges(place_B, piece.length)
            ids[target] = piece.tokens[source]
            found = piece.starts_of_words[source >> 3] >> (source & 7).astype(np.uint8) & 1 if piece.bits else piece.starts_of_words[source]
            starts[target] = found
            special[target] = False
            place_B = place_B + piece.length
        place_B = place_B + np.where(paired, gap, 0)
    singles, pairs = row_start[~paired], row_start[paired]
    middles = pairs + len(template.pair_prefix) + first_B[paired]
    for tokens, places in (
        (template.single_prefix, singles),
        (template.single_suffix, singles + len(template.single_prefix) + first_B[~paired]),
        (template.pair_prefix, pairs),
        (template.pair_middle, middles),
        (template.pair_suffix, middles + len(template.pair_middle) + second_B[paired]),
    ):
        for offset, token in enumerate(tokens):
            ids[places + offset] = token
    columns = np.arange(width, dtype=np.int64)
    mask = (columns < lengths_B[:, None]).astype(np.int64)
    types = None
    if template.has_types:
        second_begins = prefix_B + first_B + len(template.pair_middle)
        suffix_begins = second_begins + second_B
        types = np.where(columns >= second_begins[:, None], template.second_type, 0)
        types = np.where(columns >= suffix_begins[:, None], template.suffix_type, types)
        types = (types * mask * paired[:, None]).astype(np.int64)
    shape = (size, width)
    return TokenBatch(ids.reshape(shape), mask, types, starts.reshape(shape), special.reshape(shape))


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then the same for the next row."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    positions: Ints = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
    return positions
