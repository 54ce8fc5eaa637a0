"""Whole-word masks, decided by (seed, epoch, passage) alone: neither the batch, the worker nor the device plays a part.

Source: SimLM, arXiv 2207.02578, section 3.1, and its reference code for what is not in the paper (method.md section 1).
Differs: the budget counts maskable tokens only, so that a rate of 0.3 masks 30% of what can be masked whatever the length.
Shapes: B passages, T tokens, W words of the passage with the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.data.batches import TokenBatch

Bools = NDArray[np.bool_]
Uniforms = NDArray[np.float64]

DEV_EPOCH = 2**32 - 1
"""The epoch of held-out passages: their masks are the same whenever they are measured."""

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


def whole_word_mask(batch: TokenBatch, rate: float, draws_BT: Uniforms) -> Bools:
    """True at the masked tokens; [B, T].

    The budget of a passage is max(1, round(rate x maskable tokens)). Its words are taken in random order; a word longer than what is
    left of the budget is skipped. Special tokens are never masked; a passage without any other token has no mask.
    draws_BT: uniform numbers; the first as many as there are words decide a passage's order.
    """
    maskable_BT = ~batch.special
    words_BT = _words(batch)
    size, num_words = len(words_BT), int(words_BT.max(initial=-1)) + 1
    if num_words == 0:
        return np.zeros_like(maskable_BT)
    rows_B1 = np.arange(size)[:, None]
    flat_BT = rows_B1 * num_words + words_BT
    lengths_BW = np.bincount(flat_BT[maskable_BT], minlength=size * num_words).reshape(size, num_words)
    order_BW = np.argsort(np.where(lengths_BW > 0, draws_BT[:, :num_words], 2.0), axis=1, kind="stable")
    lengths_WB = np.ascontiguousarray(np.take_along_axis(lengths_BW, order_BW, axis=1).T)

    maskable_B = maskable_BT.sum(1)
    left_B = mask_budget(maskable_B, rate)
    taken_WB = np.zeros((num_words, size), dtype=bool)
    for position, lengths_B in enumerate(lengths_WB):
        fits_B = (lengths_B <= left_B) & (lengths_B > 0)
        taken_WB[position] = fits_B
        left_B -= lengths_B * fits_B
        if not left_B.any():
            break
    chosen_BW = np.zeros((size, num_words), dtype=bool)
    np.put_along_axis(chosen_BW, order_BW, taken_WB.T, axis=1)
    return chosen_BW[rows_B1, np.maximum(words_BT, 0)] & maskable_BT


def mask_budget(maskable_B: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Tokens to mask of so many: max(1, round(rate x tokens)), and none where there are none."""
    budget_B: NDArray[np.int64] = np.minimum(np.maximum(np.rint(rate * maskable_B), 1), maskable_B).astype(np.int64)
    return budget_B


def nested_masks(
    batch: TokenBatch, encoder_rate: float, decoder_rate: float, first_draws_BT: Uniforms, second_draws_BT: Uniforms
) -> tuple[Bools, Bools]:
    """(encoder mask, decoder mask), the second a superset of the first.

    The decoder's is the union of the encoder's with a second mask over all words at rate (d - e) / (1 - e): what both draw
    independently covers e + (1 - e) (d - e) / (1 - e) = d of the tokens in expectation.
    """
    encoder_BT = whole_word_mask(batch, encoder_rate, first_draws_BT)
    if decoder_rate <= encoder_rate:
        return encoder_BT, encoder_BT.copy()
    second_rate = (decoder_rate - encoder_rate) / (1.0 - encoder_rate)
    return encoder_BT, encoder_BT | whole_word_mask(batch, second_rate, second_draws_BT)


def _words(batch: TokenBatch) -> NDArray[np.int64]:
    """Number of the word that each token belongs to, counted within its passage; -1 before the first word."""
    after_special = np.ones_like(batch.special)
    after_special[:, 1:] = batch.special[:, :-1]
    # What follows a special token begins a word even where the store cut the beginning of the word away.
    starts_BT = (batch.word_starts | after_special) & ~batch.special
    words_BT: NDArray[np.int64] = np.cumsum(starts_BT, axis=1, dtype=np.int64) - 1
    return words_BT
