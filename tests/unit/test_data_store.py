"""The store gives back what went in, and `collate` makes what the tokenizer itself would make."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.data.batches import collate, collate_pairs, length_batches, pair_lengths
from simlm.data.store import Store
from simlm.errors import ArtifactError, DataError, ShapeError
from tests.conftest import build_store, tiny_passages, tiny_qrels, tiny_queries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FAMILIES = ("tiny_wordpiece", "tiny_bpe", "tiny_unigram")


@pytest.fixture(params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_ids_texts_titles_and_answers_come_back(tiny_store: Store) -> None:
    passages = tiny_passages()
    assert len(tiny_store.passages) == 60 == len(tiny_store.passages.ids)
    for row, line in enumerate(passages):
        assert tiny_store.passages.ids[row] == line["_id"]
        assert tiny_store.passages.ids.row(line["_id"]) == row
        assert tiny_store.passages.text(row) == line["text"]
        assert tiny_store.passages.title(row) == line["title"]
    assert list(tiny_store.passages.ids) == [line["_id"] for line in passages]
    assert tiny_store.splits == ["train", "dev", "test"]
    train = tiny_store.queries("train")
    row = train.ids.row("q/silent-drum/made")
    assert train.text(row) == "which material is the silent drum made of"
    assert train.title(row) == ""
    assert tiny_store.answers("train", row) == ("felt and cedar wood",)
    assert tiny_store.answers("test", 0) == ()
    with pytest.raises(KeyError):
        tiny_store.passages.ids.row("nobody")
    assert "nobody" not in tiny_store.passages.ids
    with pytest.raises(IndexError):
        tiny_store.passages.ids[60]


def test_judgements_keep_grade_zero(tiny_store: Store) -> None:
    qrels = tiny_store.qrels("test")
    assert len(qrels) == 12
    query = tiny_store.queries("test").ids.row("q/salt-library/needs")
    ids = tiny_store.passages.ids
    assert qrels[query] == {ids.row("salt-library/needs"): 1, ids.row("salt-library/where"): 0}


def test_lengths_are_those_of_the_assembled_sequences(tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    for row, line in enumerate(tiny_passages()):
        pair = (line["title"], line["text"]) if line["title"] else (line["text"],)
        assert tiny_store.passages.lengths[row] == len(tiny_wordpiece(*pair, truncation=True, max_length=64)["input_ids"])


@pytest.mark.parametrize("max_tokens", [8, 9, 12, 13, 20, 21, 64])
def test_collate_equals_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
    # Long titles, equal lengths, one without title: every branch of the cut.
    passages: list[dict[str, Any]] = [
        *tiny_passages()[:8],
        {"_id": "long", "title": "the granite kettle of Orla " * 9, "text": "river water " * 8},
        {"_id": "huge", "title": "paper lighthouse " * 300, "text": "a silver pencil " * 12},
        {"_id": "even", "title": "the the the the the the the", "text": "the the the the the the the"},
        {"_id": "more", "title": "the the the the the the the the", "text": "the the the the the the the"},
        {"_id": "odd", "title": "x", "text": "'s 12 days, don't?  two  spaces"},
    ]
    store = build_store(tmp_path / "store", tokenizer, passages, [], {})
    rows = np.arange(len(passages))
    batch = collate(store.passages, rows, max_tokens=max_tokens)
    for row, line in enumerate(passages):
        title, text = line["title"].strip(), line["text"].strip()
        store_title = line["title"]
        pair = (store_title, line["text"]) if store_title else (line["text"],)
        wanted = tokenizer(*pair, truncation=True, max_length=max_tokens, return_special_tokens_mask=True)
        length = len(wanted["input_ids"])
        assert batch.input_ids[row, :length].tolist() == wanted["input_ids"], (title, text)
        assert (batch.input_ids[row, length:] == tokenizer.pad_token_id).all()
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        if "token_type_ids" in wanted:
            assert batch.token_type_ids is not None
            assert batch.token_type_ids[row, :length].tolist() == wanted["token_type_ids"]
            assert not batch.token_type_ids[row, length:].any()
        else:
            assert batch.token_type_ids is None
        special = [bool(flag) for flag in wanted["special_tokens_mask"]]
        assert batch.special[row, :length].tolist() == special
        assert batch.special[row, length:].all()
        assert not (batch.word_starts[row] & batch.special[row]).any()
    assert set(batch.tensors()) == ({"input_ids", "attention_mask"} | ({"token_type_ids"} if batch.token_type_ids is not None else set()))


@pytest.mark.parametrize("max_tokens", [16, 17, 30, 64, 200])
def test_pairs_equal_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
    passages: list[dict[str, Any]] = [
        *tiny_passages()[:8],
        {"_id": "long", "title": "Granite Kettle", "text": "river water " * 200},
        {"_id": "odd", "title": "x", "text": "'s 12 days, don't?  two  spaces"},
    ]
    queries: list[dict[str, Any]] = [
        {"_id": "q1", "text": "where is it"},
        {"_id": "q2", "text": "which material is the kettle made of " * 6},
    ]
    qrels = {"test": [("q1", "long", 1), ("q2", "odd", 1)]}
    store = build_store(tmp_path / "store", tokenizer, passages, queries, qrels)
    for query in (0, 1):
        rows = np.arange(len(passages))
        batch = collate_pairs(store, "test", np.full(len(rows), query), rows, max_tokens=max_tokens)
        lengths = pair_lengths(store, "test", np.full(len(rows), query), rows, max_tokens=max_tokens)
        for row, line in enumerate(passages):
            text = f"{line['title']} {line['text']}" if line["title"] else line["text"]
            wanted = tokenizer(queries[query]["text"], text, truncation=True, max_length=max_tokens)["input_ids"]
            assert lengths[row] == len(wanted)
            assert batch.input_ids[row, : len(wanted)].tolist() == wanted


def test_word_starts_join_to_words(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Unbelievable patience isn't mandatory; lighthouses re-fold"
    store = build_store(tmp_path / "store", tokenizer, [{"_id": "a", "text": text}], [], {})
    batch = collate(store.passages, [0])
    words: list[list[int]] = []
    for token, start, special in zip(batch.input_ids[0], batch.word_starts[0], batch.special[0], strict=True):
        if not special:
            if start:
                words.append([])
            words[-1].append(int(token))
    decoded = [tokenizer.decode(word).strip() for word in words]
    assert decoded[:2] in (["unbelievable", "patience"], ["Unbelievable", "patience"])
    assert "lighthouses" in decoded
    assert any(len(word) > 1 for word in words)


def test_without_a_pre_tokenizer_words_are_what_spaces_separate(tmp_path: Path) -> None:
    from tokenizers import normalizers

    from tests.conftest import build_unigram, tiny_texts

    tokenizer = build_unigram(tiny_texts())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    store = build_store(tmp_path / "store", tokenizer, [{"_id": "a", "text": "the paper lighthouse of orla"}], [], {})
    assert store.info["words"] == "spaces"
    batch = collate(store.passages, [0])
    assert int(batch.word_starts.sum()) == 5


def test_each_token_is_a_word_where_words_are_not_separated(tmp_path: Path, tiny_bpe: PreTrainedTokenizerFast) -> None:
    store = build_store(tmp_path / "store", tiny_bpe, [{"_id": "a", "text": "数学 of 数"}], [], {})
    batch = collate(store.passages, [0])
    # Three bytes a character, none merged: the first byte of each character starts a word, and so do " of" and the space before 数.
    starts = batch.word_starts[0][~batch.special[0]]
    assert starts.tolist()[:6] == [True, False, False, True, False, False]


def test_literal_special_tokens_stay_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.mask_token == "<mask>" and tokenizer.convert_ids_to_tokens(5) == "▁":
        pytest.skip("a unigram vocabulary holds the special tokens as pieces, XLM-R's too")
    text = f"the {tokenizer.mask_token} and {tokenizer.sep_token} here"
    store = build_store(tmp_path / "store", tokenizer, [{"_id": "a", "text": text}], [], {})
    ids = collate(store.passages, [0]).input_ids[0].tolist()
    assert tokenizer.mask_token_id not in ids
    assert ids.count(tokenizer.sep_token_id) == 1
    assert store.tokenizer()(text)["input_ids"] == ids


def test_a_passage_of_a_million_characters_is_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    passages = [
        {"_id": "words", "text": "river water " * 90_000},
        {"_id": "one word", "text": "x" * 1_000_000},
        {"_id": "spaces", "text": "a" + " " * 1_000_000 + "b"},
        {"_id": "short", "text": "river"},
    ]
    store = build_store(tmp_path / "store", tokenizer, passages, [], {})
    assert store.info["tables"]["passages"]["cut"] == 3
    assert store.passages.lengths[0] == 64
    assert store.passages.lengths[1] <= 64
    assert store.passages.text(0) == passages[0]["text"]
    wanted = tokenizer("river water " * 100, truncation=True, max_length=64)["input_ids"]
    assert collate(store.passages, [0]).input_ids[0].tolist() == wanted
    assert store.passages.tokens_of(0)[1].shape == (256,)


def test_store_and_table_pickle_as_paths(tiny_store: Store) -> None:
    assert len(pickle.dumps(tiny_store)) < 1000
    assert len(pickle.dumps(tiny_store.passages)) < 2000
    again = pickle.loads(pickle.dumps(tiny_store.passages))
    assert again.text(5) == tiny_store.passages.text(5)


def test_wide_vocabularies_take_four_bytes(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    import copy

    wide = copy.deepcopy(tiny_wordpiece)
    wide.add_tokens([f"extra{number}" for number in range(1 << 16)])
    store = build_store(tmp_path / "store", wide, [{"_id": "a", "text": "river extra65535"}], [], {})
    assert store.info["token_dtype"] == "<u4"
    assert collate(store.passages, [0]).input_ids.max() > 1 << 16


def test_no_queries_at_all(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    store = build_store(tmp_path / "store", tiny_wordpiece, [{"_id": "only", "text": "one"}], [], {})
    assert store.splits == []
    with pytest.raises(DataError, match="no 'train' queries"):
        store.queries("train")


def test_a_folder_without_manifest_is_refused(tmp_path: Path, tiny_store: Store) -> None:
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        Store.open(tmp_path)


def test_too_small_a_maximum_is_an_error(tmp_path: Path, tiny_bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="max_passage_tokens = 5"):
        build_store(tmp_path / "store", tiny_bpe, [], [], {}, max_passage_tokens=5)


def test_length_batches_cover_each_position_once() -> None:
    lengths = [5, 100, 7, 7, 30, 1]
    batches = length_batches(lengths, 60)
    assert [batch.tolist() for batch in batches] == [[1], [4, 2], [3, 0, 5]]
    assert length_batches([], 60) == []


def test_bad_rows_are_named(tiny_store: Store) -> None:
    with pytest.raises(ShapeError, match=r"rows 0\.\.59"):
        collate(tiny_store.passages, [60])
    with pytest.raises(ShapeError, match="one row or more"):
        collate(tiny_store.passages, [])
    with pytest.raises(ShapeError, match="2 queries for 1 passages"):
        collate_pairs(tiny_store, "test", [0, 1], [0], max_tokens=32)


def test_real_tokenizers_give_the_same_sequences(tmp_path: Path, real_data: Path) -> None:
    from transformers import BertTokenizerFast

    for name, lowercase in (("uncased", True), ("cased", False), ("multilingual-cased", False)):
        tokenizer = BertTokenizerFast(vocab=str(_vocabulary(real_data, name)), do_lower_case=lowercase)
        passages = [*tiny_passages(), {"_id": "ko", "title": "수학", "text": "수학은 수, 양, 구조, 공간을 다루는 학문이다."}]
        store = build_store(tmp_path / name, tokenizer, passages, [], {})
        batch = collate(store.passages, np.arange(len(passages)))
        for row, line in enumerate(passages):
            pair = (line["title"], line["text"]) if line["title"] else (line["text"],)
            wanted = tokenizer(*pair, truncation=True, max_length=64)
            length = len(wanted["input_ids"])
            assert batch.input_ids[row, :length].tolist() == wanted["input_ids"]
            starts = [not token.startswith("##") for token in tokenizer.convert_ids_to_tokens(wanted["input_ids"])]
            assert (batch.word_starts[row, :length] | batch.special[row, :length]).tolist() == starts


def _vocabulary(real_data: Path, name: str) -> Path:
    return real_data / "bert-assets" / f"bert-base-{name}-vocab.txt".replace("bert-base-multilingual", "bert-multilingual")


def test_collating_is_quick_and_qrels_are_sorted(tiny_store: Store) -> None:
    offsets, passages, grades = tiny_store.qrel_arrays("test")
    assert offsets.tolist() == list(range(0, 25, 2))
    assert (np.diff(passages.reshape(-1, 2), axis=1) > 0).all()
    assert sorted(grades.tolist()) == [0] * 12 + [1] * 12


def test_qrels_fixture_has_every_split() -> None:
    assert [len(tiny_qrels(split)) for split in ("train", "dev", "test")] == [36, 12, 24]
    assert len(tiny_queries()) == 60
