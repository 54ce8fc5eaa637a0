"""Whole-word masks: budgets, rates, nesting, whole words in every tokenizer family, and what decides them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from simlm.data.batches import TokenBatch, collate
from simlm.objectives.masking import Draws, mask_budget, nested_masks, whole_word_mask
from tests.conftest import build_store, tiny_passages

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast


def batch_of(*word_lengths: list[int], width: int | None = None) -> TokenBatch:
    """One row for each list: [CLS], words of these lengths, [SEP], padding."""
    width = width or max(sum(lengths) for lengths in word_lengths) + 2
    starts = np.zeros((len(word_lengths), width), dtype=bool)
    special = np.ones_like(starts)
    for row, lengths in enumerate(word_lengths):
        special[row, 1 : 1 + sum(lengths)] = False
        starts[row, 1 + np.cumsum([0, *lengths[:-1]]) if lengths else []] = True
    return TokenBatch(np.zeros_like(starts, dtype=np.int64), (~special).astype(np.int64), None, starts, special)


def draws(*order: list[int], width: int) -> np.ndarray:
    """Numbers that put words into the given order."""
    values = np.full((len(order), width), 0.99)
    for row, words in enumerate(order):
        values[row, words] = np.arange(len(words)) / 100
    return values


def test_budget() -> None:
    assert mask_budget(np.array([0, 1, 2, 10, 100]), 0.3).tolist() == [0, 1, 1, 3, 30]


def test_a_word_longer_than_what_is_left_is_skipped() -> None:
    # 10 tokens, budget 3; in order: a word of 2 fits, a word of 4 does not, a word of 1 does, and then the budget is used up.
    batch = batch_of([4, 2, 1, 3])
    mask = whole_word_mask(batch, 0.3, draws([1, 0, 2, 3], width=12))
    assert np.flatnonzero(mask[0]).tolist() == [5, 6, 7]


def test_nothing_fits_or_nothing_is_there() -> None:
    assert not whole_word_mask(batch_of([9]), 0.3, draws([0], width=11)).any()
    assert not whole_word_mask(batch_of([]), 0.3, np.zeros((1, 2))).any()
    assert whole_word_mask(batch_of([1]), 0.3, draws([0], width=3)).tolist() == [[False, True, False]]
    mixed = whole_word_mask(batch_of([], [1, 1]), 0.5, draws([], [1, 0], width=4))
    assert mixed.tolist() == [[False] * 4, [False, False, True, False]]


def test_rate_one_masks_every_token_but_special_ones() -> None:
    batch = batch_of([2, 1, 3], [1])
    assert (whole_word_mask(batch, 1.0, draws([2, 0, 1], [0], width=8)) == ~batch.special).all()


def test_what_follows_a_special_token_begins_a_word() -> None:
    batch = batch_of([3, 2])
    batch.word_starts[0, 1] = False
    mask = whole_word_mask(batch, 0.6, draws([0], width=7))
    assert np.flatnonzero(mask[0]).tolist() == [1, 2, 3]


def test_decided_by_seed_epoch_and_passage_only() -> None:
    lengths = [[1, 2, 1, 3, 1, 1, 2, 4] * 3, [2, 1, 1] * 6, [1] * 30]
    rows = np.array([900, 3, 41])

    def masks(chosen: list[int], seed: int = 1, epoch: int = 0, width: int | None = None) -> list[list[int]]:
        batch = batch_of(*(lengths[row] for row in chosen), width=width)
        source = Draws(seed, epoch, rows[chosen])
        count = batch.input_ids.shape[1]
        mask = nested_masks(batch, 0.3, 0.5, source.uniforms(0, count), source.uniforms(1, count))[1]
        return [np.flatnonzero(row).tolist() for row in mask]

    together = masks([0, 1, 2])
    assert together == [masks([row])[0] for row in range(3)] == [masks([row], width=99)[0] for row in range(3)]
    assert masks([2, 0]) == [together[2], together[0]]
    assert masks([0, 1, 2], seed=2) != together
    assert masks([0, 1, 2], epoch=1) != together
    mixed = Draws(1, np.array([0, 1, 0]), rows).uniforms(0, 5)
    assert (mixed[1] == Draws(1, 1, rows).uniforms(0, 5)[1]).all()


def test_draws_are_uniform_and_independent() -> None:
    source = Draws(123, 4, np.arange(500))
    values = source.uniforms(2, 200)
    assert values.min() >= 0.0 and values.max() < 1.0
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 85.4  # 99.9% point of chi-square with 49 degrees of freedom
    flat = values - 0.5
    for other in (
        source.uniforms(3, 200),
        np.roll(values, 1, axis=0),
        np.roll(values, 1, axis=1),
        Draws(123, 5, np.arange(500)).uniforms(2, 200),
    ):
        assert abs(float((flat * (other - 0.5)).mean() * 12)) < 0.012  # correlation; standard deviation 0.0032


def test_rates_and_nesting() -> None:
    rng = np.random.default_rng(0)
    batch = batch_of(*(rng.choice([1, 1, 1, 2, 3], size=rng.integers(30, 100)).tolist() for _ in range(400)))
    source = Draws(5, 0, np.arange(400))
    width = batch.input_ids.shape[1]
    for encoder_rate, decoder_rate in ((0.3, 0.5), (0.15, 0.3), (0.4, 0.6), (0.3, 0.3), (0.3, 1.0)):
        encoder, decoder = nested_masks(batch, encoder_rate, decoder_rate, source.uniforms(0, width), source.uniforms(1, width))
        assert not (encoder & ~decoder).any()
        assert not (decoder & batch.special).any()
        total = (~batch.special).sum()
        assert encoder.sum() / total == pytest.approx(encoder_rate, abs=0.005)
        assert decoder.sum() / total == pytest.approx(decoder_rate, abs=0.01)


@pytest.mark.parametrize("fixture", ["tiny_wordpiece", "tiny_bpe", "tiny_unigram"])
def test_whole_words_in_every_tokenizer_family(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(fixture)
    passages = tiny_passages()
    store = build_store(tmp_path / "store", tokenizer, passages, [], {})
    batch = collate(store.passages, np.arange(len(passages)))
    source = Draws(1, 0, np.arange(len(passages)))
    mask = whole_word_mask(batch, 0.4, source.uniforms(0, batch.input_ids.shape[1]))
    num_long = 0
    for row, passage in enumerate(passages):
        # The tokenizer's own account of its words, from the text itself.
        pair = [passage["title"], passage["text"]] if passage["title"] else [passage["text"]]
        encoding = tokenizer(*pair, truncation=True, max_length=64)
        assert batch.input_ids[row, : len(encoding["input_ids"])].tolist() == encoding["input_ids"]
        words: dict[tuple[int | None, int], list[bool]] = {}
        for position, (word, sequence) in enumerate(zip(encoding.word_ids(), encoding.sequence_ids(), strict=True)):
            if word is None:
                assert not mask[row, position]
            else:
                words.setdefault((sequence, word), []).append(bool(mask[row, position]))
        assert all(len(set(flags)) == 1 for flags in words.values())
        num_long += sum(len(flags) > 1 and flags[0] for flags in words.values())
    assert num_long > 20
    assert mask.sum() / (~batch.special).sum() == pytest.approx(0.4, abs=0.02)
