"""Masks of words, tokens, spans and rare words: budgets, rates, nesting, every tokenizer family, and what decides them."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, get_args, get_type_hints

import numpy as np
import pytest

from simlm.data.batches import TokenBatch, collate
from simlm.objectives import masking
from simlm.objectives.masking import Draws, Masking, idf_weights, mask_budget, whole_word_mask
from tests.conftest import build_store, tiny_passages

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

KINDS = get_args(get_type_hints(Masking)["kind"])
WHOLE_WORD_KINDS = [kind for kind in KINDS if kind != "token"]


def masking_of(kind: str, num_entries: int = 1000) -> Masking:
    """With weights that differ from token to token."""
    weights = np.linspace(0.1, 10, num_entries, dtype=np.float32) if kind == "idf" else None
    return Masking(kind, weights)


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


@pytest.mark.parametrize("kind", KINDS)
def test_decided_by_seed_epoch_and_passage_only(kind: str) -> None:
    lengths = [[1, 2, 1, 3, 1, 1, 2, 4] * 3, [2, 1, 1] * 6, [1] * 30]
    rows = np.array([900, 3, 41])

    def masks(chosen: list[int], seed: int = 1, epoch: int = 0, width: int | None = None) -> list[list[int]]:
        batch = batch_of(*(lengths[row] for row in chosen), width=width)
        batch.input_ids[:] = np.arange(batch.input_ids.shape[1]) * 7 + rows[chosen][:, None] % 5
        source = Draws(seed, epoch, rows[chosen])
        count = batch.input_ids.shape[1]
        mask = masking_of(kind).nested(batch, 0.3, 0.5, source.uniforms(0, count), source.uniforms(1, count))[1]
        return [np.flatnonzero(row).tolist() for row in mask]

    together = masks([0, 1, 2])
    assert together == [masks([row])[0] for row in range(3)] == [masks([row], width=99)[0] for row in range(3)]
    assert masks([2, 0]) == [together[2], together[0]]
    assert masks([0, 1, 2], seed=2) != together
    assert masks([0, 1, 2], epoch=1) != together


def test_draws_of_one_epoch_a_passage() -> None:
    rows = np.array([900, 3, 41])
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


@pytest.mark.parametrize("kind", KINDS)
def test_rates_and_nesting(kind: str) -> None:
    rng = np.random.default_rng(0)
    batch = batch_of(*(rng.choice([1, 1, 1, 2, 3], size=rng.integers(30, 100)).tolist() for _ in range(400)))
    batch.input_ids[:] = rng.integers(1000, size=batch.input_ids.shape)
    source = Draws(5, 0, np.arange(400))
    width = batch.input_ids.shape[1]
    maskable = (~batch.special).sum(1)
    for encoder_rate, decoder_rate in ((0.3, 0.5), (0.15, 0.3), (0.4, 0.6), (0.3, 0.3), (0.3, 1.0)):
        encoder, decoder = masking_of(kind).nested(batch, encoder_rate, decoder_rate, source.uniforms(0, width), source.uniforms(1, width))
        assert not (encoder & ~decoder).any()
        assert not (decoder & batch.special).any()
        assert (encoder.sum(1) <= mask_budget(maskable, encoder_rate)).all()
        assert encoder.sum() / maskable.sum() == pytest.approx(encoder_rate, abs=0.005)
        assert decoder.sum() / maskable.sum() == pytest.approx(decoder_rate, abs=0.01)


def test_nested_masks_are_those_of_whole_words() -> None:
    batch = batch_of([2, 1, 3, 1, 1] * 4, [1] * 9)
    first, second = (Draws(5, 0, np.arange(2)).uniforms(stream, 34) for stream in (0, 1))
    ours, theirs = Masking().nested(batch, 0.3, 0.5, first, second), Masking().nested(batch, 0.3, 0.5, first, second)
    assert (ours[0] == theirs[0]).all() and (ours[1] == theirs[1]).all()
    assert (ours[0] == whole_word_mask(batch, 0.3, first)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_short_and_empty_passages(kind: str) -> None:
    ours = masking_of(kind)
    # Budgets: none, 1 of 1 token, 1 of 2 tokens though 0.15 of them is less than half a token.
    batch = batch_of([], [1], [1, 1])
    uniforms = Draws(3, 0, np.arange(3)).uniforms(0, 4)
    assert ours.mask(batch, 0.15, uniforms).sum(1).tolist() == [0, 1, 1]
    encoder, decoder = ours.nested(batch, 0.15, 1.0, uniforms, uniforms)
    assert encoder.sum(1).tolist() == [0, 1, 1] and (decoder == ~batch.special).all()
    assert not ours.mask(batch_of([], []), 0.5, np.zeros((2, 2))).any()
    # A single word longer than the budget: single tokens of it can be masked, the word cannot.
    assert ours.mask(batch_of([9]), 0.3, Draws(3, 0, np.arange(1)).uniforms(0, 11)).sum() == (3 if kind == "token" else 0)


def test_single_tokens_are_those_of_the_smallest_numbers() -> None:
    # 6 tokens, budget 3; the special tokens have the smallest numbers of all.
    batch = batch_of([4, 2])
    assert Masking("token").mask(batch, 0.5, np.array([[0.0, 0.3, 0.9, 0.2, 0.8, 0.7, 0.1, 0.0]])).tolist() == [
        [False, True, False, True, False, False, True, False]
    ]


SPAN_OF = {1: 0.1, 2: 0.3, 3: 0.5, 10: 0.99}
"""Lower bits (as a fraction) that give a span of so many words: the shares of lengths 1, 2, 3 are 0.224, 0.179, 0.143, of 10 0.030."""


def span_draws(spans: dict[int, int], width: int) -> np.ndarray:
    """Numbers that begin spans at these words, in this order, of so many words; then at the others, one word each."""
    order = [*spans, *(word for word in range(width) if word not in spans)]
    values = np.zeros((1, width))
    for place, word in enumerate(order):
        values[0, word] = (place + SPAN_OF[spans.get(word, 1)]) / 2**24
    return values


def test_spans_run_into_each_other_until_the_budget_is_used() -> None:
    # Budget 5 of 10: words 6 7 8; at 5 a span of two, of which 6 is masked already; none at 7, it is masked; of the ten from 1 on only one.
    mask = Masking("span").mask(batch_of([1] * 10), 0.5, span_draws({6: 3, 5: 2, 7: 3, 1: 10}, 12))
    assert np.flatnonzero(mask[0]).tolist() == [2, 6, 7, 8, 9]


def test_spans_end_before_a_word_that_does_not_fit() -> None:
    # Budget 2 of 8: a span of ten at word 0 ends before word 1 (5 tokens); one at word 1 does not begin; word 3 fits.
    mask = Masking("span").mask(batch_of([1, 5, 1, 1]), 0.25, span_draws({0: 10, 1: 1, 3: 1}, 10))
    assert np.flatnonzero(mask[0]).tolist() == [1, 8]


def test_spans_end_where_the_title_does() -> None:
    batch = batch_of([1] * 6)
    batch.special[0, 3], batch.word_starts[0, 3] = True, False
    # Title: words 0 1 (tokens 1 2); text: words 2 3 4 (tokens 4 5 6); budget 3 of 5.
    mask = Masking("span").mask(batch, 0.6, span_draws({1: 10, 3: 10}, 8))
    assert np.flatnonzero(mask[0]).tolist() == [2, 5, 6]


def test_span_lengths_are_those_of_the_paper() -> None:
    lengths = masking._span_lengths(Draws(7, 0, np.arange(1000)).uniforms(0, 100))
    assert lengths.min() == 1 and lengths.max() == 10
    # Geometric with p = 0.2 given at most 10: mean 3.797 (the paper says 3.8), share of length 1 0.2 / (1 - 0.8^10) = 0.2241.
    assert float(lengths.mean()) == pytest.approx(3.797, abs=0.03)
    assert float((lengths == 1).mean()) == pytest.approx(0.2241, abs=0.005)
    assert float((lengths == 2).mean() / (lengths == 1).mean()) == pytest.approx(0.8, abs=0.03)


def test_rare_words_weigh_as_their_rarest_token() -> None:
    # Words of token ids (0 3), (2), (1) that weigh 8, 4, 1. Keys -log(1 - u) / weight: 0.087, 0.128, 0.010; with the mean weight of a
    # word's tokens the first would have 0.154 and come last.
    batch = batch_of([2, 1, 1])
    batch.input_ids[0, 1:5] = [0, 3, 2, 1]
    ours = Masking("idf", np.array([1, 1, 4, 8], dtype=np.float32))
    uniforms = np.array([[0.5, 0.4, 0.01, 0.0, 0.0, 0.0]])
    assert np.flatnonzero(ours.mask(batch, 0.25, uniforms)[0]).tolist() == [4]
    assert np.flatnonzero(ours.mask(batch, 0.75, uniforms)[0]).tolist() == [1, 2, 4]


def test_equal_weights_are_plain_whole_words() -> None:
    batch = batch_of([2, 1, 3, 1, 1] * 5, [1, 4] * 6)
    uniforms = Draws(5, 0, np.arange(2)).uniforms(0, 42)
    ours = Masking("idf", np.full(5, 2.5, dtype=np.float32))
    assert (ours.mask(batch, 0.4, uniforms) == whole_word_mask(batch, 0.4, uniforms)).all()


def test_words_are_drawn_in_proportion_to_their_weight() -> None:
    size = 20_000
    batch = batch_of(*([[1, 1, 1]] * size))
    batch.input_ids[:, 1:4] = [0, 1, 2]
    ours = Masking("idf", np.array([5, 3, 2], dtype=np.float32))
    uniforms = Draws(1, 0, np.arange(size)).uniforms(0, 5)
    assert ours.mask(batch, 1 / 3, uniforms).mean(0)[1:4] == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    # Two of three without replacement; word 0 is left out by drawing 1 then 2 (0.3 x 2/7) or 2 then 1 (0.2 x 3/8), and so on.
    expected = [1 - 0.3 * 2 / 7 - 0.2 * 3 / 8, 1 - 0.5 * 2 / 5 - 0.2 * 5 / 8, 1 - 0.5 * 3 / 5 - 0.3 * 5 / 7]
    assert ours.mask(batch, 2 / 3, uniforms).mean(0)[1:4] == pytest.approx(expected, abs=0.015)


def test_pickles() -> None:
    ours = pickle.loads(pickle.dumps(masking_of("idf")))
    assert ours.kind == "idf" and (ours.weights_V == masking_of("idf").weights_V).all()


def test_idf_of_every_passage(tiny_store: Store) -> None:
    tokenizer = tiny_store.tokenizer()
    weights = idf_weights(tiny_store.passages, len(tokenizer) + 3)
    kept = [np.concatenate(tiny_store.passages.tokens_of(row)).tolist() for row in range(60)]
    full_stop, never = tokenizer.convert_tokens_to_ids("."), len(tokenizer) + 2
    frequency = sum(full_stop in tokens for tokens in kept)
    assert 30 < frequency < 60 and sum(tokens.count(full_stop) for tokens in kept) > frequency
    assert weights[full_stop] == pytest.approx(np.log(1 + (60 - frequency + 0.5) / (frequency + 0.5)))
    assert weights[never] == pytest.approx(np.log(1 + 60.5 / 0.5))
    assert weights.dtype == np.float32 and weights.shape == (never + 1,) and (weights > 0).all()


def test_idf_of_a_sample(tiny_wordpiece: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 passages in 4 pieces of 64, of which 5 passages each are counted: rows 0-4, 64-68, 128-132, 192-196.
    passages = [{"_id": str(row), "title": "", "text": "garden" if row % 64 < 2 else "kitchen"} for row in range(256)]
    store = build_store(tmp_path / "store", tiny_wordpiece, passages, [], {})
    monkeypatch.setattr(masking, "_MAX_COUNTED_PASSAGES", 20)
    weights = idf_weights(store.passages, len(tiny_wordpiece))
    (garden,), (kitchen,) = (np.unique(store.passages.tokens_of(row)[1])[:1] for row in (0, 2))
    assert garden != kitchen
    assert weights[garden] == pytest.approx(np.log(1 + 12.5 / 8.5))
    assert weights[kitchen] == pytest.approx(np.log(1 + 8.5 / 12.5))


@pytest.mark.parametrize("fixture", ["tiny_wordpiece", "tiny_bpe", "tiny_unigram"])
def test_whole_words_in_every_tokenizer_family(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(fixture)
    passages = tiny_passages()
    store = build_store(tmp_path / "store", tokenizer, passages, [], {})
    batch = collate(store.passages, np.arange(len(passages)))
    uniforms = Draws(1, 0, np.arange(len(passages))).uniforms(0, batch.input_ids.shape[1])
    weights = idf_weights(store.passages, len(tokenizer))
    masks = {kind: Masking(kind, weights).mask(batch, 0.4, uniforms) for kind in KINDS}
    for kind, mask in masks.items():
        assert not (mask & batch.special).any()
        assert mask.sum() / (~batch.special).sum() == pytest.approx(0.4, abs=0.02), kind
    num_long = dict.fromkeys(KINDS, 0)
    split = 0
    for row, passage in enumerate(passages):
        # The tokenizer's own account of its words, from the text itself.
        pair = [passage["title"], passage["text"]] if passage["title"] else [passage["text"]]
        encoding = tokenizer(*pair, truncation=True, max_length=64)
        assert batch.input_ids[row, : len(encoding["input_ids"])].tolist() == encoding["input_ids"]
        words: dict[tuple[int | None, int], list[int]] = {}
        for position, (word, sequence) in enumerate(zip(encoding.word_ids(), encoding.sequence_ids(), strict=True)):
            if word is not None:
                words.setdefault((sequence, word), []).append(position)
            assert word is not None or batch.special[row, position]
        for positions in words.values():
            for kind in WHOLE_WORD_KINDS:
                assert len(set(masks[kind][row, positions].tolist())) == 1, kind
                num_long[kind] += len(positions) > 1 and bool(masks[kind][row, positions[0]])
            split += len(set(masks["token"][row, positions].tolist())) == 2
    assert all(num_long[kind] > 20 for kind in WHOLE_WORD_KINDS)
    assert split > 20
    rarity = {kind: float(weights[batch.input_ids[mask]].mean()) for kind, mask in masks.items()}
    assert rarity["idf"] > 1.1 * rarity["whole_word"]
    # Neighbours masked together: more in spans than where each word is drawn by itself.
    together = {kind: float((mask[:, 1:] & mask[:, :-1]).sum() / mask.sum()) for kind, mask in masks.items()}
    assert together["span"] > together["whole_word"] + 0.1
