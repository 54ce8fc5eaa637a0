"""Masks of words, tokens, spans or rare words, decided by (seed, epoch, passage) alone: not by the batch, the worker or the device.

Sources: SimLM, arXiv 2207.02578, section 3.1, and its reference code for what is not in the paper (method.md section 1); spans:
SpanBERT, arXiv 1907.10529, section 3.1; sampling that prefers rare tokens: WSBERT, arXiv 2302.14225.
Differs: the budget counts maskable tokens only, so that a rate of 0.3 masks 30% of what can be masked whatever the length. Spans end
where the title does. Rarity is BM25's idf and counts for whole words, where WSBERT draws tokens by a power of their frequency.
Shapes: B passages, T tokens, W words of the passage with the most, L words of the longest span, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.data.batches import TokenBatch
from simlm.data.store import Table

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Uniforms = NDArray[np.float64]

DEV_EPOCH = 2**32 - 1
"""The epoch of held-out passages: their masks are the same whenever they are measured."""

_MAX_SPAN_WORDS = 10
_SPAN_STOPS = 0.2
"""SpanBERT, section 3.1: span lengths are geometric with p = 0.2 and at most 10 words; drawn again where longer, hence a mean of 3.8."""

_MAX_COUNTED_PASSAGES = 100_000
"""Passages that document frequencies are taken from; more change no weight noticeably."""

_GOLDEN = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)


@dataclass(frozen=True)
class Draws:
    """Random numbers of the passages `rows` [B] in `epoch`, one for all or one for each.

    Number j of a passage's stream is SplitMix64's j-th output (Steele, Lea and Flood 2014) from a start that hashes seed, epoch, row
    and stream, so it can be computed for all passages at once and does not depend on how many there are.
    """

    seed: int
    epoch: int | NDArray[np.int64]
    rows: NDArray[np.integer[Any]]

    def uniforms(self, stream: int, count: int) -> Uniforms:
        """[B, count] numbers in [0, 1), 53 bits each."""
        state_B = np.full(len(self.rows), self.seed % 2**64, dtype=np.uint64)
        for part in (self.epoch, self.rows, stream):
            state_B = _mix(state_B + _GOLDEN) ^ np.asarray(part).astype(np.uint64)
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return (_mix(_mix(state_B)[:, None] + steps) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Masking:
    """What is masked together: whole words, single tokens, spans of whole words, or whole words drawn by rarity. Pickles.

    weights_V: what a token's rarity weighs, above 0; kind "idf" needs it (`idf_weights`), the others do not look at it.
    """

    kind: Literal["whole_word", "token", "span", "idf"] = "whole_word"
    weights_V: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        assert self.kind != "idf" or self.weights_V is not None, "masks by rarity need the tokens' weights"

    def mask(self, batch: TokenBatch, rate: float, draws_BT: Uniforms) -> Bools:
        """True at the masked tokens; [B, T]. Never a special token, never more than the budget (`mask_budget`).

        draws_BT: uniform numbers in [0, 1), one for each word of the passage, or for each token where kind is "token".
        """
        if self.kind == "token":
            return token_mask(batch, rate, draws_BT)
        if self.kind == "span":
            return span_mask(batch, rate, draws_BT)
        if self.kind == "idf":
            assert self.weights_V is not None
            return rare_word_mask(batch, rate, draws_BT, self.weights_V)
        return whole_word_mask(batch, rate, draws_BT)

    def nested(
        self, batch: TokenBatch, encoder_rate: float, decoder_rate: float, first_draws_BT: Uniforms, second_draws_BT: Uniforms
    ) -> tuple[Bools, Bools]:
        """(encoder mask, decoder mask), the second a superset of the first.

        The decoder's is the union of the encoder's with a second mask over all words at rate (d - e) / (1 - e): what both draw
        independently covers e + (1 - e) (d - e) / (1 - e) = d of the tokens in expectation. Words drawn by rarity are not
        independent, both masks prefer the same ones: there the decoder's mask goes on from the encoder's up to its own budget.
        """
        encoder_BT = self.mask(batch, encoder_rate, first_draws_BT)
        if decoder_rate <= encoder_rate:
            return encoder_BT, encoder_BT.copy()
        if self.kind == "idf":
            assert self.weights_V is not None
            return encoder_BT, rare_word_mask(batch, decoder_rate, second_draws_BT, self.weights_V, taken_BT=encoder_BT)
        second_rate = (decoder_rate - encoder_rate) / (1.0 - encoder_rate)
        return encoder_BT, encoder_BT | self.mask(batch, second_rate, second_draws_BT)


def mask_budget(maskable_B: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Tokens to mask of so many: max(1, round(rate x tokens)), and none where there are none."""
    budget_B: NDArray[np.int64] = np.minimum(np.maximum(np.rint(rate * maskable_B), 1), maskable_B).astype(np.int64)
    return budget_B


def whole_word_mask(batch: TokenBatch, rate: float, draws_BT: Uniforms) -> Bools:
    """True at the masked tokens; [B, T].

    The budget of a passage is max(1, round(rate x maskable tokens)). Its words are taken in random order; a word longer than what is
    left of the budget is skipped. Special tokens are never masked; a passage without any other token has no mask.
    draws_BT: uniform numbers; the first as many as there are words decide a passage's order.
    """
    words = _Words.of(batch)
    if words.count == 0:
        return np.zeros_like(batch.special)
    return words.tokens_of(words.taken_in_order(draws_BT[:, : words.count], rate))


def token_mask(batch: TokenBatch, rate: float, draws_BT: Uniforms) -> Bools:
    """True at the masked tokens; [B, T]: those of the smallest numbers, exactly the budget, without regard to words."""
    maskable_BT = ~batch.special
    order_BT = np.argsort(np.where(maskable_BT, draws_BT, 2.0), axis=1, kind="stable")
    masked_BT = np.zeros_like(maskable_BT)
    first_BT = np.arange(maskable_BT.shape[1]) < mask_budget(maskable_BT.sum(1), rate)[:, None]
    np.put_along_axis(masked_BT, order_BT, first_BT, axis=1)
    return masked_BT


def span_mask(batch: TokenBatch, rate: float, draws_BT: Uniforms) -> Bools:
    """True at the masked tokens; [B, T]: spans of whole words, until the budget is used.

    A span begins at a random word that is not masked yet and is as long as `_span_lengths` says, less where the title or the text ends
    or where its next word is more than what is left of the budget. It may run into words that are masked already; they cost nothing.
    draws_BT: one number a word decides both when a span may begin there and, by its lower bits, the span's length.
    """
    words = _Words.of(batch)
    if words.count == 0:
        return np.zeros_like(batch.special)
    size, draws_BW = len(words.lengths_BW), draws_BT[:, : words.count]
    reach_BW = np.minimum(_span_lengths(draws_BW), words.ends() - np.arange(words.count))
    order_BW = np.argsort(np.where(words.lengths_BW > 0, draws_BW, 2.0), axis=1, kind="stable")
    # With columns of zeros behind the last word, so that a span's places are always there; `costs` is a view of the same numbers.
    width = words.count + _MAX_SPAN_WORDS
    costs_BW = np.zeros((size, width), dtype=np.int64)
    costs_BW[:, : words.count] = words.lengths_BW
    costs, within_L = costs_BW.reshape(-1), np.arange(_MAX_SPAN_WORDS)
    begins_WB = np.ascontiguousarray((order_BW + np.arange(size)[:, None] * width).T)
    reach_WB = np.ascontiguousarray(np.take_along_axis(reach_BW, order_BW, axis=1).T)
    left_B = mask_budget(words.lengths_BW.sum(1), rate)
    for begins_B, reach_B in zip(begins_WB, reach_WB, strict=True):
        # N rows where a span begins now. A word costs nothing once it is masked, and no passage has a word without tokens.
        rows_N = np.flatnonzero((costs[begins_B] > 0) & (left_B > 0))
        if len(rows_N) == 0:
            if not left_B.any():
                break
            continue
        places_NL = begins_B[rows_N, None] + within_L
        used_NL = np.cumsum(costs[places_NL], axis=1)
        taken_NL = (within_L < reach_B[rows_N, None]) & (used_NL <= left_B[rows_N, None])
        left_B[rows_N] -= (used_NL * taken_NL).max(1)
        costs[places_NL[taken_NL]] = 0
    return words.tokens_of((words.lengths_BW > 0) & (costs_BW[:, : words.count] == 0))


def rare_word_mask(
    batch: TokenBatch, rate: float, draws_BT: Uniforms, weights_V: NDArray[np.float32], *, taken_BT: Bools | None = None
) -> Bools:
    """True at the masked tokens; [B, T]: words as in `whole_word_mask`, but each next one drawn in proportion to its rarity.

    A word weighs as much as its rarest token: it occurs in no more passages than that one does (ours; WSBERT draws tokens).
    taken_BT: masked already; these words count towards the budget and are masked here too.
    """
    words = _Words.of(batch)
    if words.count == 0:
        return np.zeros_like(batch.special)
    # The smallest of exponential numbers with rates w is number i with probability w_i / sum(w), and so on among the rest: a draw
    # without replacement from one uniform number a word. u is in [0, 1), and so is 1 - u in (0, 1].
    keys_BW = -np.log1p(-draws_BT[:, : words.count]) / words.largest(weights_V[batch.input_ids])
    if taken_BT is not None:
        keys_BW = np.where(words.with_any(taken_BT), -1.0, keys_BW)
    return words.tokens_of(words.taken_in_order(keys_BW, rate))


def idf_weights(table: Table, num_entries: int) -> NDArray[np.float32]:
    """How rare each token is: log(1 + (N - df + 0.5) / (df + 0.5)) for df of N passages, above 0 for every token; [num_entries].

    BM25's idf in the form that is never negative (Lucene's). N: at most 100,000 passages, in equally spaced pieces of the table, as
    corpora are often sorted by subject. A passage's kept tokens count, title included.
    """
    num_rows = len(table)
    num_pieces = max(1, min(64, num_rows // 64))
    size = min(num_rows // num_pieces, _MAX_COUNTED_PASSAGES // num_pieces)
    passages_V = np.zeros(num_entries)
    for piece in range(num_pieces):
        begin = piece * num_rows // num_pieces
        offsets = np.asarray(table.token_offsets[begin : begin + size + 1])
        tokens = table.tokens[offsets[0] : offsets[-1]].astype(np.int64)
        pairs = np.unique(np.repeat(np.arange(size), np.diff(offsets)) * num_entries + tokens)
        passages_V += np.bincount(pairs % num_entries, minlength=num_entries)
    return np.log1p((num_pieces * size - passages_V + 0.5) / (passages_V + 0.5)).astype(np.float32)


def _span_lengths(draws_BW: Uniforms) -> Ints:
    """Words of a span, 1 to 10, from the 29 bits of each number that follow its first 24, which decide the order of the spans."""
    stops = _SPAN_STOPS * (1.0 - _SPAN_STOPS) ** np.arange(_MAX_SPAN_WORDS)
    below = np.cumsum(stops / stops.sum())[:-1]
    lengths_BW: Ints = 1 + np.searchsorted(below, draws_BW * 2.0**24 % 1.0, side="right")
    return lengths_BW


@dataclass(frozen=True)
class _Words:
    """The words of a batch. count: W; of_BT: the word that each token belongs to, counted within its passage, -1 before the first.

    lengths_BW: tokens of each word; 0 where a passage has fewer words.
    """

    count: int
    of_BT: Ints
    lengths_BW: Ints
    starts_BT: Bools
    special_BT: Bools

    @classmethod
    def of(cls, batch: TokenBatch) -> _Words:
        # What follows a special token begins a word even where the store cut the beginning of the word away.
        starts_BT = (batch.word_starts | _after_special(batch.special)) & ~batch.special
        of_BT: Ints = np.cumsum(starts_BT, axis=1, dtype=np.int64) - 1
        size, count = len(of_BT), int(of_BT.max(initial=-1)) + 1
        flat_BT = np.arange(size)[:, None] * count + of_BT
        lengths_BW = np.bincount(flat_BT[~batch.special], minlength=size * count).reshape(size, count)
        return cls(count, of_BT, lengths_BW, starts_BT, batch.special)

    def taken_in_order(self, keys_BW: Uniforms, rate: float) -> Bools:
        """[B, W]: the words of the smallest keys, as long as the budget lasts; one longer than what is left of it is skipped."""
        order_BW = np.argsort(np.where(self.lengths_BW > 0, keys_BW, np.inf), axis=1, kind="stable")
        lengths_WB = np.ascontiguousarray(np.take_along_axis(self.lengths_BW, order_BW, axis=1).T)
        left_B = mask_budget(self.lengths_BW.sum(1), rate)
        taken_WB = np.zeros(lengths_WB.shape, dtype=bool)
        for position, lengths_B in enumerate(lengths_WB):
            fits_B = (lengths_B <= left_B) & (lengths_B > 0)
            taken_WB[position] = fits_B
            left_B -= lengths_B * fits_B
            if not left_B.any():
                break
        chosen_BW = np.zeros(self.lengths_BW.shape, dtype=bool)
        np.put_along_axis(chosen_BW, order_BW, taken_WB.T, axis=1)
        return chosen_BW

    def tokens_of(self, chosen_BW: Bools) -> Bools:
        """[B, T]: True at the tokens of the chosen words."""
        return chosen_BW[np.arange(len(chosen_BW))[:, None], np.maximum(self.of_BT, 0)] & ~self.special_BT

    def largest(self, values_BT: NDArray[np.float32]) -> NDArray[np.float64]:
        """[B, W]: the largest of the values at a word's tokens; 1 where a passage has fewer words."""
        values = np.where(self.special_BT, -np.inf, values_BT).reshape(-1)
        largest_BW = np.ones(self.lengths_BW.shape)
        # What lies between the start of a word and that of the next one is the word, then special tokens or padding.
        largest_BW[self.lengths_BW > 0] = np.maximum.reduceat(values, np.flatnonzero(self.starts_BT))
        return largest_BW

    def with_any(self, marked_BT: Bools) -> Bools:
        """[B, W]: the words any of whose tokens is marked."""
        found_BW = np.zeros(self.lengths_BW.shape, dtype=bool)
        rows, places = np.nonzero(marked_BT & ~self.special_BT)
        found_BW[rows, self.of_BT[rows, places]] = True
        return found_BW

    def ends(self) -> Ints:
        """[B, W]: for each word the number of the first one that is no longer in the same title or text."""
        bounds_BW = np.repeat((self.lengths_BW > 0).sum(1)[:, None], self.count + 1, axis=1)
        rows, places = np.nonzero(_after_special(self.special_BT) & ~self.special_BT)
        firsts = self.of_BT[rows, places]
        bounds_BW[rows, firsts] = firsts
        return np.minimum.accumulate(bounds_BW[:, :0:-1], axis=1)[:, ::-1]


def _after_special(special_BT: Bools) -> Bools:
    after_BT = np.ones_like(special_BT)
    after_BT[:, 1:] = special_BT[:, :-1]
    return after_BT
