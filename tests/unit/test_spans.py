"""Passages cut into two sequences: by hand, for every tokenizer family, and as a property over many lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.data.batches import TokenBatch, collate
from simlm.data.tokens import Template
from simlm.objectives.masking import Draws
from simlm.objectives.spans import MIN_CROP_TOKENS, NUM_SEQUENCES, cut, sequence_tokens
from simlm.objectives.steps import Feeding, token_counts
from simlm.objectives.views import PretrainViews
from tests.conftest import build_store, tiny_passages

if TYPE_CHECKING:
    from pathlib import Path

    from simlm.data.store import Store

KINDS = ("neighbours", "crops", "sentence_and_rest")
BERT = Template([2], [3], [2], [3], [3], 1, 1, 0, True)
ROBERTA = Template([0], [2], [0], [2, 2], [2], 0, 0, 1, False)


@dataclass(frozen=True)
class Fixed(Draws):
    """Draws whose numbers are given: [B, 4]."""

    numbers: Any = None

    def uniforms(self, stream: int, count: int) -> Any:
        return np.asarray(self.numbers, dtype=np.float64)[:, :count]


def fixed(*numbers: list[float]) -> Fixed:
    return Fixed(1, 0, np.arange(len(numbers)), numbers=numbers)


def batch_of(*passages: list[int], template: Template = BERT, starts: list[list[int]] | None = None) -> TokenBatch:
    """[CLS] passage [SEP], every token a word unless `starts` lists the word starts' places."""
    width = max(len(passage) for passage in passages) + 2
    ids = np.full((len(passages), width), template.pad, dtype=np.int64)
    special = np.ones_like(ids, dtype=bool)
    words = np.zeros_like(special)
    mask = np.zeros_like(ids)
    for row, passage in enumerate(passages):
        ids[row, : len(passage) + 2] = [*template.single_prefix, *passage, *template.single_suffix]
        special[row, 1 : len(passage) + 1] = False
        words[row, 1 : len(passage) + 1] = True if starts is None else [place in starts[row] for place in range(len(passage))]
        mask[row, : len(passage) + 2] = 1
    return TokenBatch(ids, mask, np.zeros_like(ids) if template.has_types else None, words, special)


def content(batch: TokenBatch) -> list[list[int]]:
    return [row[~special].tolist() for row, special in zip(batch.input_ids, batch.special, strict=True)]


# By hand


def test_neighbours_by_hand() -> None:
    """Eight tokens are cut before token 2 at the earliest and 6 at the latest; starts inside a word become word starts."""
    passage = list(range(10, 18))
    batch = batch_of(passage, passage, [30], [], starts=[[0, 1, 4, 7], [0, 4], [0], []])
    found, draws = cut(batch, fixed([0.0] * 4, [0.999] * 4, [0.5] * 4, [0.5] * 4), "neighbours", BERT)
    assert content(found) == [[10, 11], [10, 11, 12, 13, 14, 15], [30], [], [12, 13, 14, 15, 16, 17], [16, 17], [30], []]
    assert found.input_ids[0].tolist() == [2, 10, 11, 3, 0, 0, 0, 0]
    assert found.input_ids[3].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert found.attention_mask.sum(1).tolist() == [4, 8, 3, 2, 8, 4, 3, 2]
    assert found.token_type_ids is not None and not found.token_type_ids.any()
    assert found.word_starts[0].nonzero()[0].tolist() == [1, 2]
    assert found.word_starts[4].nonzero()[0].tolist() == [1, 3, 6]  # 12 is inside a word, 14 and 17 begin one
    assert found.word_starts[5].nonzero()[0].tolist() == [1]
    assert not found.word_starts[3].any()
    assert draws.rows.tolist() == [0, 1, 2, 3, 2**40, 2**40 + 1, 2**40 + 2, 2**40 + 3]


def test_crops_by_hand() -> None:
    """40 tokens: 8 (5% are 2, which is under the minimum) to 20, from anywhere; 10 tokens: always 8; 3 tokens: all of them."""
    batch = batch_of(list(range(100, 140)), list(range(10, 20)), [7, 8, 9], template=ROBERTA)
    found, _ = cut(batch, fixed([0.0, 0.999, 0.0, 0.999], [0.7, 0.2, 0.0, 0.5], [0.5] * 4), "crops", ROBERTA)
    assert content(found) == [
        list(range(100, 108)),
        list(range(10, 18)),
        [7, 8, 9],
        list(range(120, 140)),
        list(range(11, 19)),
        [7, 8, 9],
    ]
    assert found.token_type_ids is None
    assert found.input_ids[2].tolist()[:6] == [0, 7, 8, 9, 2, 1]


def test_sentence_and_rest_by_hand() -> None:
    """Ten tokens have a sentence of two; the second number decides whether it stays; what follows the hole begins a word."""
    passage = list(range(10, 20))
    batch = batch_of(passage, passage, passage, [30], [40, 41], starts=[[0], [0], [0], [0], [0]])
    numbers = fixed([0.4, 0.1, 0, 0], [0.4, 0.09, 0, 0], [0.999, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.0, 0.5, 0, 0])
    found, _ = cut(batch, numbers, "sentence_and_rest", BERT)
    assert content(found)[:5] == [[13, 14], [13, 14], [18, 19], [30], [40]]
    assert content(found)[5:] == [[10, 11, 12, 15, 16, 17, 18, 19], passage, list(range(10, 18)), [30], [41]]
    assert found.word_starts[5].nonzero()[0].tolist() == [1, 4]
    assert found.word_starts[6].nonzero()[0].tolist() == [1]
    assert found.word_starts[9].nonzero()[0].tolist() == [1]


def test_passages_stay_as_they_are() -> None:
    batch, draws = batch_of([5, 6]), fixed([0.0] * 4)
    assert cut(batch, draws, "passages", BERT) == (batch, draws)
    assert sequence_tokens(np.array([2]), draws, "passages").tolist() == [2]


# Properties over many lengths


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_cut_over_many_rows_and_epochs(kind: Any) -> None:
    tokens = np.tile(np.arange(150), 40)
    draws = Draws(3, np.repeat(np.arange(40), 150), np.arange(len(tokens)) % 977)
    found = sequence_tokens(tokens, draws, kind)
    for begin in range(0, len(tokens), 750):
        part = slice(begin, begin + 750)
        passages = [list(range(1000, 1000 + count)) for count in tokens[part]]
        sequences, _ = cut(batch_of(*passages), Draws(3, draws.epoch[part], draws.rows[part]), kind, BERT)  # type: ignore[index]
        expected = np.concatenate([found[: len(tokens)][part], found[len(tokens) :][part]])
        assert ((~sequences.special).sum(1) == expected).all()
    first, second = found[: len(tokens)], found[len(tokens) :]
    assert (np.minimum(first, second)[tokens > 0] > 0).all() and (first[tokens == 0] + second[tokens == 0] == 0).all()
    if kind == "neighbours":
        assert (first + second)[tokens > 1].tolist() == tokens[tokens > 1].tolist()
        assert (first >= tokens / 4)[tokens > 1].all() and (first <= np.maximum(3 * tokens / 4, 1)).all()
        assert set(first[tokens == 100]) <= set(range(25, 76)) and len(set(first[tokens == 100])) > 20
    elif kind == "crops":
        assert (found >= np.minimum(np.tile(tokens, 2), MIN_CROP_TOKENS)).all()
        long = tokens >= 16
        assert (np.maximum(first, second)[long] <= tokens[long] / 2).all()
        assert (first[tokens == 100] != second[tokens == 100]).any()
    else:
        assert first[tokens == 100].tolist() == [20] * 40
        assert set(second[tokens == 100]) <= {80, 100}
        stayed = (second == tokens)[tokens > 1].mean()
        assert 0.08 < stayed < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_a_passage_alone_is_cut_as_it_is_among_others(kind: Any) -> None:
    passages = [list(range(100, 100 + count)) for count in (30, 7, 61, 1, 12)]
    rows, epochs = np.array([4, 9, 2, 7, 5]), np.array([0, 1, 1, 0, 2])
    together, draws = cut(batch_of(*passages), Draws(8, epochs, rows), kind, BERT)
    uniforms = draws.uniforms(0, 20)
    for place, passage in enumerate(passages):
        alone, own = cut(batch_of(passage), Draws(8, epochs[[place]], rows[[place]]), kind, BERT)
        assert content(alone) == [content(together)[place], content(together)[place + 5]]
        assert (own.uniforms(0, 20) == uniforms[[place, place + 5]]).all()
    assert len({row.tobytes() for row in uniforms}) == 10  # the two parts of a passage have masks of their own
    single, shared = cut(batch_of(*passages), Draws(8, 3, rows), kind, BERT)
    assert shared.epoch == 3 and len(shared.rows) == 10
    other, _ = cut(batch_of(*passages), Draws(8, 4, rows), kind, BERT)
    assert content(single) != content(other)


# Stores of all families


@pytest.fixture(scope="module", params=["tiny_wordpiece", "tiny_bpe", "tiny_unigram"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    tokenizer = request.getfixturevalue(request.param)
    passages = [*tiny_passages()[:12], {"_id": "short", "title": "", "text": "the"}, {"_id": "bare", "title": "Orla", "text": ""}]
    return build_store(path_of(tmp_path_factory), tokenizer, passages, [], {})


def path_of(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("spans") / "store"


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(store: Store, kind: Any) -> None:
    """Content is that of the passage, special tokens are the family's, word starts are the store's or a span's edge."""
    table, template = store.passages, store.passages.template
    rows = np.arange(len(table), dtype=np.int64)
    batch = collate(table, rows)
    draws = Draws(5, 0, rows)
    found, _ = cut(batch, draws, kind, template)
    size = len(rows)
    assert len(found.input_ids) == NUM_SEQUENCES[kind] * size
    assert (token_counts(table, rows) == (~batch.special).sum(1)).all()
    assert ((~found.special).sum(1) == sequence_tokens(token_counts(table, rows), draws, kind)).all()
    assert (found.token_type_ids is None) == (batch.token_type_ids is None)
    assert not (found.word_starts & found.special).any()
    # The longest has no padding.
    assert found.attention_mask[:, -1].any()
    for row, tokens in enumerate(content(found)):
        length = len(tokens) + template.num_single
        expected = [*template.single_prefix, *tokens, *template.single_suffix]
        assert found.input_ids[row, :length].tolist() == expected
        assert (found.input_ids[row, length:] == template.pad).all()
        assert found.attention_mask[row].tolist() == [1] * length + [0] * (len(found.input_ids[row]) - length)
        passage = row % size
        whole = content(batch)[passage]
        starts = batch.word_starts[passage][~batch.special[passage]]
        own = found.word_starts[row][~found.special[row]]
        places = [place for place in range(len(whole) - len(tokens) + 1) if whole[place : place + len(tokens)] == tokens]
        if places:
            assert any((own[1:] == starts[place + 1 : place + len(tokens)]).all() for place in places)
            assert not tokens or own[0]
        else:
            assert (kind, row >= size) == ("sentence_and_rest", True)
            gone = len(whole) - len(tokens)
            holes = [place for place in range(len(tokens) + 1) if whole[:place] + whole[place + gone :] == tokens]
            expected_starts = [[*starts[:hole].tolist(), *([True] if tokens[hole:] else []), *starts[hole + gone + 1 :]] for hole in holes]
            assert own.tolist() in [[True, *found_starts[1:]] for found_starts in expected_starts]
    if kind == "neighbours":
        both = content(found)
        assert [first + second for first, second in zip(both[:12], both[size : size + 12], strict=True)] == content(batch)[:12]


@pytest.mark.parametrize("kind", KINDS)
def test_step_counts_are_those_of_the_micro_batches(store: Store, kind: Any) -> None:
    """Budgets known beforehand are the masks' sizes where every word is one token; tokens always are."""
    views = PretrainViews(0.3, 0.5, cut_into=kind)
    feeding = Feeding(store.passages, views, 90, store.passages.template.has_types, 4)
    rows = np.arange(len(store.passages), dtype=np.int64)
    epochs = rows % 3
    micro_batches = feeding.micro_batches(rows, epochs)
    assert len(micro_batches) > 3
    for micro_batch in micro_batches:
        assert micro_batch["step_passages"] == len(rows) and micro_batch["step_sequences"] == 2 * len(rows)
    assert sum(len(micro_batch["scored"]) for micro_batch in micro_batches) == micro_batches[0]["step_tokens"]
    masked = sum(len(micro_batch["encoder_positions"]) for micro_batch in micro_batches)
    assert 0.7 * micro_batches[0]["step_encoder_masked"] <= masked <= micro_batches[0]["step_encoder_masked"]
    # Token by token nothing is left over.
    word_views = PretrainViews(0.3, cut_into=kind)
    counts = word_views.step_counts(token_counts(store.passages, rows), Draws(4, epochs, rows))
    batch, draws = word_views.sequences(collate(store.passages, rows), Draws(4, epochs, rows), store.passages.template)
    every = TokenBatch(batch.input_ids, batch.attention_mask, batch.token_type_ids, ~batch.special, batch.special)
    assert len(word_views(every, draws)["encoder_positions"]) == counts["step_encoder_masked"]
