"""Passages cut into two sequences each, for objectives that compare or connect parts of one passage.

Sources: coCondenser (arXiv 2108.05540) and CoT-MAE (arXiv 2208.07670): two spans of one document; Contriever (arXiv 2112.09118):
two independent crops; the Inverse Cloze Task (arXiv 1906.00300): a sentence and its surroundings.
Differs: spans are cut from one passage of the corpus, title tokens included and the special tokens between title and text dropped, as the
store knows no longer documents; a "sentence" of the cloze task is a run of a fifth of the tokens.
Cuts lie between tokens, so that the lengths of all sequences of a step follow from token counts and draws alone, without reading a token.
A piece of a word at the edge of a span counts as a word: whole-word masks take it whole.
Shapes: B passages; 2B sequences, first those of all first parts, then those of all second parts; T tokens; S passages of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simlm.data.batches import TokenBatch
from simlm.data.tokens import Template
from simlm.objectives import Sequences
from simlm.objectives.masking import Draws, Uniforms

Ints = NDArray[np.int64]

NUM_SEQUENCES: dict[str, int] = {"passages": 1, "neighbours": 2, "crops": 2, "sentence_and_rest": 2}

MIN_CROP_TOKENS = 8
"""Ours: 5% of a passage are a few tokens, which tell nothing; Contriever crops documents of 256."""

STAYS_RATE = 0.1
"""Share of passages in which the sentence stays, so that matching words is of use too (arXiv 1906.00300, section 4)."""

_SPAN_STREAM, _NUM_DRAWS = 8, 4
"""Of `Draws`; see simlm.objectives.views for the others."""

_SECOND_ROWS = 2**40
"""Added to the row of a passage for the draws of its second part; no corpus has as many rows."""


@dataclass(frozen=True)
class _Spans:
    """`length` tokens of each passage from token `begin` on; those from number `gap_at` on are taken `gap` tokens later. All int64."""

    begin: Ints
    length: Ints
    gap_at: Ints
    gap: Ints


def sequence_tokens(tokens_S: Ints, draws_S: Draws, kind: Sequences) -> Ints:
    """Tokens (special ones not counted) of the sequences that passages of tokens_S tokens are cut into; [S] or [2S]."""
    return tokens_S if kind == "passages" else _spans(tokens_S, draws_S, kind).length


def cut(batch: TokenBatch, draws: Draws, kind: Sequences, template: Template) -> tuple[TokenBatch, Draws]:
    """The sequences of a batch, padded to their longest, and random numbers of their own for each.

    passages: as they are. neighbours: what is before and what is after a point drawn in the middle half. crops: two runs drawn apart from
    each other, of 5% to 50% of the tokens each (but MIN_CROP_TOKENS at least). sentence_and_rest: a run of a fifth of the tokens, and the
    passage without it (with it at STAYS_RATE).
    Both parts of a passage of one token are that token; an empty passage gives two empty sequences.
    """
    if kind == "passages":
        return batch, draws
    epoch = draws.epoch if np.ndim(draws.epoch) == 0 else np.tile(draws.epoch, 2)
    rows_B = draws.rows.astype(np.int64)
    spans = _spans((~batch.special).sum(1), draws, kind)
    return _assemble(batch, spans, template), Draws(draws.seed, epoch, np.concatenate([rows_B, rows_B + _SECOND_ROWS]))


def _spans(tokens_S: Ints, draws_S: Draws, kind: Sequences) -> _Spans:
    """[2S], first and second parts."""
    draws = draws_S.uniforms(_SPAN_STREAM, _NUM_DRAWS)
    if kind == "neighbours":
        return _neighbours(tokens_S, draws)
    return _crops(tokens_S, draws) if kind == "crops" else _sentences(tokens_S, draws)


def _neighbours(tokens_S: Ints, draws: Uniforms) -> _Spans:
    first_cut_S = -(-tokens_S // 4)
    cut_S = _integers(draws[:, 0], first_cut_S, np.maximum(first_cut_S, 3 * tokens_S // 4))
    second_S = np.where(tokens_S > 1, cut_S, 0)
    return _runs([np.zeros_like(cut_S), second_S], [cut_S, tokens_S - second_S])


def _crops(tokens_S: Ints, draws: Uniforms) -> _Spans:
    shortest_S = np.minimum(np.maximum(-(-tokens_S // 20), MIN_CROP_TOKENS), tokens_S)
    longest_S = np.maximum(shortest_S, tokens_S // 2)
    lengths = [_integers(draws[:, part], shortest_S, longest_S) for part in (0, 1)]
    begins = [_integers(draws[:, 2 + part], np.zeros_like(tokens_S), tokens_S - lengths[part]) for part in (0, 1)]
    return _runs(begins, lengths)


def _sentences(tokens_S: Ints, draws: Uniforms) -> _Spans:
    size_S = np.minimum(np.maximum((2 * tokens_S + 5) // 10, 1), tokens_S)
    begin_S = _integers(draws[:, 0], np.zeros_like(tokens_S), tokens_S - size_S)
    removed_S = np.where((draws[:, 1] >= STAYS_RATE) & (tokens_S > 1), size_S, 0)
    nothing_S = np.zeros_like(tokens_S)
    return _Spans(
        begin=np.concatenate([begin_S, nothing_S]),
        length=np.concatenate([size_S, tokens_S - removed_S]),
        gap_at=np.concatenate([nothing_S, begin_S]),
        gap=np.concatenate([nothing_S, removed_S]),
    )


def _integers(draws_S: NDArray[np.float64], lowest_S: Ints, highest_S: Ints) -> Ints:
    """One of lowest..highest, both included."""
    integers: Ints = lowest_S + (draws_S * (highest_S - lowest_S + 1)).astype(np.int64)
    return integers


def _runs(begins: list[Ints], lengths: list[Ints]) -> _Spans:
    begin = np.concatenate(begins)
    return _Spans(begin, np.concatenate(lengths), np.zeros_like(begin), np.zeros_like(begin))


def _assemble(batch: TokenBatch, spans: _Spans, template: Template) -> TokenBatch:
    """[CLS] span [SEP] for each of the spans, N = 2B of them."""
    content_BT = ~batch.special
    tokens_B = content_BT.sum(1)
    origin_N = np.tile(np.cumsum(tokens_B) - tokens_B, 2) + spans.begin
    num_before = len(template.single_prefix)
    lengths_N = spans.length + template.num_single
    shape = (len(origin_N), int(lengths_N.max()))
    places_T = np.arange(shape[1], dtype=np.int64) - num_before  # within the span
    inside_NT = (places_T >= 0) & (places_T < spans.length[:, None])
    gap_at_N1, gap_N1 = spans.gap_at[:, None], spans.gap[:, None]
    sources = (origin_N[:, None] + places_T + np.where(places_T >= gap_at_N1, gap_N1, 0))[inside_NT]

    ids = np.full(shape, template.pad, dtype=np.int64)
    ids[:, :num_before] = template.single_prefix
    ids[inside_NT] = batch.input_ids[content_BT][sources]
    for offset, token in enumerate(template.single_suffix):
        ids[np.arange(shape[0]), num_before + spans.length + offset] = token
    starts = np.zeros(shape, dtype=bool)
    starts[inside_NT] = batch.word_starts[content_BT][sources]
    starts |= inside_NT & ((places_T == 0) | ((places_T == gap_at_N1) & (gap_N1 > 0)))
    return TokenBatch(
        input_ids=ids,
        attention_mask=(np.arange(shape[1]) < lengths_N[:, None]).astype(np.int64),
        token_type_ids=np.zeros(shape, dtype=np.int64) if template.has_types else None,
        word_starts=starts,
        special=~inside_NT,
    )
