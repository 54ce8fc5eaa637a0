"""Prompts: the store's tokens behind a prompt are those of `prompt + text`, and every way to a vector gives the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sentence_transformers import SentenceTransformer

from simlm import load_retriever
from simlm.data.batches import collate, sequence_lengths
from simlm.data.prompts import Prompt
from simlm.data.tokens import plain_tokenizer
from simlm.errors import ModelError, RecipeError
from simlm.models.backbone import load_encoder, quiet
from simlm.models.biencoder import BiEncoder
from simlm.models.model_folder import prompts_of, read_model_folder
from simlm.recipe import ModelSettings
from tests.conftest import build_store
from tests.parity.test_sentence_transformers import FAMILIES, PASSAGE_TOKENS, PLAIN, QUERIES, QUERY_TOKENS, TITLED, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

torch.set_num_threads(1)

PROMPTS = ["query: ", "look for", "the: \n"]
TOKENIZERS = ["tiny_wordpiece", "tiny_bpe", "tiny_unigram"]
TEXTS = [("", text) for text in [*PLAIN, *QUERIES, "(in brackets)", "42 geese", "  two  spaces first", "don't they?"] if text.strip()]
QUERY_PROMPT, PASSAGE_PROMPT = "where: ", "of the "


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def store_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> Store:
    passages = [{"_id": str(row), "title": title, "text": text} for row, (title, text) in enumerate([*TITLED, *TEXTS])]
    queries = [{"_id": "q/granite-kettle/where", "text": "where is it"}]
    return build_store(
        path, tokenizer, passages, queries, {"test": [("q/granite-kettle/where", "0", 1)]}, max_passage_tokens=PASSAGE_TOKENS
    )


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("max_tokens", [None, 14])
def test_tokens_are_those_of_one_string(tokenizer: Any, tmp_path: Path, prompt: str, max_tokens: int | None) -> None:
    table = store_of(tmp_path / "store", tokenizer).passages
    rows = np.arange(len(table))
    limit = max_tokens or PASSAGE_TOKENS
    found = Prompt.of(tokenizer, prompt, limit, key="passage_prompt")
    batch = collate(table, rows, max_tokens=max_tokens, prompt=found)
    assert_array_equal(batch.attention_mask.sum(axis=1), sequence_lengths(table, rows, max_tokens=max_tokens, prompt=found))
    backend = plain_tokenizer(tokenizer)
    backend.enable_truncation(limit)
    for row, (title, text) in enumerate([*TITLED, *TEXTS]):
        expected = backend.encode(prompt + title, text) if title else backend.encode(prompt + text)
        length = len(expected.ids)
        assert batch.input_ids[row, :length].tolist() == expected.ids, (title, text)
        assert batch.attention_mask[row].sum() == length
        if batch.token_type_ids is not None:
            assert batch.token_type_ids[row, :length].tolist() == expected.type_ids, (title, text)


def test_a_prompt_by_hand(tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    prompt = Prompt.of(tiny_wordpiece, "the of ", 64, key="query_prompt")
    assert prompt is not None and prompt.backend is None
    the, of, cls, sep = tiny_wordpiece.convert_tokens_to_ids(["the", "of", "[CLS]", "[SEP]"])
    titled, plain = 0, 5
    bare = collate(tiny_store.passages, [titled, plain])
    batch = collate(tiny_store.passages, [titled, plain], prompt=prompt)
    for row in range(2):
        without = bare.input_ids[row, 1 : bare.attention_mask[row].sum()].tolist()
        assert batch.input_ids[row, : len(without) + 3].tolist() == [cls, the, of, *without]
        assert without[-1] == sep
    assert Prompt.of(tiny_wordpiece, "", 64, key="query_prompt") is None


def test_the_store_does_not_know_of_prompts(tiny_store: Store) -> None:
    rows = np.arange(10)
    assert_array_equal(sequence_lengths(tiny_store.passages, rows), tiny_store.passages.lengths[:10])
    assert_array_equal(sequence_lengths(tiny_store.passages, rows, max_tokens=9), np.minimum(tiny_store.passages.lengths[:10], 9))


@pytest.mark.parametrize("max_tokens", [5, 6])
def test_a_prompt_without_room_for_a_text(tokenizer: Any, max_tokens: int) -> None:
    with pytest.raises(RecipeError, match=r"retriever1.query_prompt 'where what made: '.*no room is left for the text"):
        Prompt.of(tokenizer, "where what made: ", max_tokens, key="retriever1.query_prompt")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_the_same_vectors(family: str, pooling: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, config = FAMILIES[family]
    tokenizer = request.getfixturevalue(name)
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config={"model_type": family, **config}), tokenizer=tokenizer), pooling)
    spread(model)
    model.save(
        tmp_path / "model",
        tokenizer,
        max_query_tokens=QUERY_TOKENS,
        max_passage_tokens=PASSAGE_TOKENS,
        query_prompt=QUERY_PROMPT,
        passage_prompt=PASSAGE_PROMPT,
    )
    ours = load_retriever(tmp_path / "model", device="cpu")
    with quiet():
        theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert (ours.query_prompt, ours.passage_prompt) == (QUERY_PROMPT, PASSAGE_PROMPT)
    queries_QD, passages_PD = ours.encode_queries(QUERIES), ours.encode_passages([*TITLED, *PLAIN])
    assert_allclose(theirs.encode_query(QUERIES), queries_QD, atol=1e-5)
    assert_allclose(theirs.encode_document([*TITLED, *PLAIN]), passages_PD, atol=1e-5)
    # Without the prompts they are others.
    assert np.abs(theirs.encode([*TITLED, *PLAIN]) - passages_PD).max() > 1e-3

    table = store_of(tmp_path / "store", tokenizer).passages
    prompt = Prompt.of(tokenizer, PASSAGE_PROMPT, PASSAGE_TOKENS, key="passage_prompt")
    with torch.inference_mode():
        from_store = model.eval()(**collate(table, np.arange(len(table)), prompt=prompt).tensors()).numpy()
    assert_allclose(
        from_store, theirs.encode_document([text if not title else (title, text) for title, text in [*TITLED, *TEXTS]]), atol=1e-5
    )


def test_prompts_of_a_folder(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    config = {"model_type": "bert", **FAMILIES["bert"][1]}
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config=config), tokenizer=tiny_wordpiece), "mean")
    lengths = {"max_query_tokens": QUERY_TOKENS, "max_passage_tokens": PASSAGE_TOKENS}
    model.save(tmp_path, tiny_wordpiece, **lengths, query_prompt="a: ")
    wanted = ModelSettings(start=str(tmp_path), query_prompt="b: ", passage_prompt="c: ")
    # A retriever of ours was trained with its own, which may be none.
    assert prompts_of(wanted) == ("a: ", "")
    (tmp_path / "simlm.json").unlink()
    found = read_model_folder(str(tmp_path))
    assert (found.role, found.query_prompt, found.passage_prompt) == ("retriever", "a: ", None)
    assert prompts_of(wanted) == ("b: ", "c: ")
    assert prompts_of(wanted.model_copy(update={"query_prompt": None})) == ("a: ", "c: ")
    assert prompts_of(wanted.model_copy(update={"query_prompt": ""})) == ("", "c: ")
    file = tmp_path / "config_sentence_transformers.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**stored, "prompts": {"passage": "p: ", "document": ""}}), encoding="utf-8")
    assert prompts_of(ModelSettings(start=str(tmp_path))) == ("", "p: ")


def test_a_prompt_longer_than_the_sequences(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    config = {"model_type": "bert", **FAMILIES["bert"][1]}
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config=config), tokenizer=tiny_wordpiece))
    model.save(tmp_path, tiny_wordpiece, max_query_tokens=8, max_passage_tokens=24, query_prompt="the of the of the ")
    with pytest.raises(ModelError, match=r"query_prompt 'the of the of the '.*all of the 8 tokens"):
        load_retriever(tmp_path, device="cpu")
    load_retriever(tmp_path, device="cpu", max_query_tokens=9)


def test_prompts_are_pickled_for_worker_processes(tiny_bpe: PreTrainedTokenizerFast) -> None:
    import pickle

    prompt = Prompt.of(tiny_bpe, "query: ", 24, key="query_prompt")
    assert prompt is not None and prompt.backend is not None
    again = pickle.loads(pickle.dumps(prompt))
    assert again.heads(["where is it", ""]) == prompt.heads(["where is it", ""])
