"""Bi-encoder, cross-encoder, retriever and re-ranker: hand-computed pooling, batches, limits, wrong folders, wrong input."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

from simlm.data.batches import collate, collate_pairs
from simlm.errors import DataError, DiskError, ModelError
from simlm.models.backbone import load_encoder, load_masked_lm
from simlm.models.biencoder import BiEncoder, pool
from simlm.models.crossencoder import CrossEncoder
from simlm.models.inference import Inference, without_full_mask
from simlm.models.model_folder import read_model_folder, save_tokenizer
from simlm.models.precision import has_half_weights, resolve_precision
from simlm.models.reranker import load_reranker
from simlm.models.retriever import load_retriever
from simlm.models.text_batches import Sequences, TextTokenizer, batches
from simlm.recipe import ModelSettings
from simlm.types import Passage
from tests.conftest import build_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

torch.set_num_threads(1)

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 80,
}
SCRATCH = ModelSettings(start="scratch", config=BERT)


@pytest.fixture(scope="module")
def retriever_folder(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("retriever")
    encoder = load_encoder(SCRATCH, tokenizer=tiny_wordpiece)
    BiEncoder(encoder, "cls").save(folder, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=64)
    return folder


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    CrossEncoder.from_encoder(SCRATCH, tokenizer=tiny_wordpiece).save(folder, tiny_wordpiece, max_pair_tokens=48)
    return folder


# --- the bi-encoder -----------------------------------------------------------------------------------------------------------------


def test_pooling_by_hand() -> None:
    hidden_BTH = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[2.0, 0.0], [4.0, 0.0], [6.0, 3.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden_BTH, mask, "cls").tolist() == [[1.0, 2.0], [2.0, 0.0]]
    assert pool(hidden_BTH, mask, "mean").tolist() == [[2.0, 4.0], [4.0, 1.0]]
    assert pool(hidden_BTH[1:], None, "mean").tolist() == [[4.0, 1.0]]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_no_mask_equals_a_mask_of_ones_and_padding_changes_nothing(pooling: Any) -> None:
    model = BiEncoder(load_encoder(SCRATCH, vocab_size=50), pooling).eval()
    ids = torch.randint(5, 50, (2, 9))
    padded, mask = nn.functional.pad(ids, (0, 4)), nn.functional.pad(torch.ones_like(ids), (0, 4))
    torch.testing.assert_close(model(ids), model(ids, torch.ones_like(ids)))
    torch.testing.assert_close(model(ids), model(padded, mask))
    torch.testing.assert_close(model(ids).norm(dim=-1), torch.ones(2))


def test_saving_and_loading_keep_weights_pooling_and_limits(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    model = BiEncoder(load_encoder(SCRATCH, tokenizer=tiny_wordpiece), "mean")
    model.save(tmp_path, tiny_wordpiece, max_query_tokens=10, max_passage_tokens=30)
    loaded = BiEncoder.load(tmp_path)
    assert (loaded.pooling, loaded.dim) == ("mean", 16)
    assert BiEncoder.load(tmp_path, pooling="cls").pooling == "cls"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    found = read_model_folder(str(tmp_path))
    assert (found.role, found.max_query_tokens, found.max_passage_tokens) == ("retriever", 10, 30)
    retriever = load_retriever(tmp_path, max_passage_tokens=12)
    assert (retriever.max_query_tokens, retriever.max_passage_tokens) == (10, 12)


def test_a_bare_encoder_is_pooled_as_the_settings_say(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    load_encoder(SCRATCH, tokenizer=tiny_wordpiece).save_pretrained(tmp_path)
    assert BiEncoder.load(tmp_path).pooling == "cls"
    assert BiEncoder.load(ModelSettings(start=str(tmp_path), pooling="mean")).pooling == "mean"


def test_saving_leaves_the_given_tokenizer_alone(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    names = list(tiny_wordpiece.model_input_names)
    save_tokenizer(tmp_path, tiny_wordpiece, token_types=False)
    assert tiny_wordpiece.model_input_names == names
    assert "token_type_ids" in names
    assert "token_type_ids" not in json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"]


def test_more_tokens_than_positions_is_an_error(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast, retriever_folder: Path) -> None:
    model = BiEncoder(load_encoder(SCRATCH, tokenizer=tiny_wordpiece))
    with pytest.raises(ModelError, match="up to 81 tokens, but the model has 80 positions"):
        model.save(tmp_path, tiny_wordpiece, max_query_tokens=8, max_passage_tokens=81)
    with pytest.raises(ModelError, match="80 positions"):
        load_retriever(retriever_folder, max_query_tokens=200)
    with pytest.raises(ModelError, match="80 positions"):
        CrossEncoder.from_encoder(SCRATCH, tokenizer=tiny_wordpiece).save(tmp_path, tiny_wordpiece, max_pair_tokens=192)


def test_a_place_that_cannot_be_written_is_a_disk_error(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        BiEncoder(load_encoder(SCRATCH, tokenizer=tiny_wordpiece)).save(
            tmp_path / "file" / "model", tiny_wordpiece, max_query_tokens=8, max_passage_tokens=24
        )


# --- the cross-encoder --------------------------------------------------------------------------------------------------------------


def test_a_fresh_head_depends_on_the_seed_alone(retriever_folder: Path) -> None:
    first, second, other = (CrossEncoder.from_encoder(retriever_folder, seed=seed).classifier for seed in (1, 1, 2))
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    encoder = load_encoder(str(retriever_folder))
    for name, value in encoder.state_dict().items():
        assert torch.equal(first.base_model.state_dict()[name], value), name


def test_a_reranker_goes_on_from_its_own_head(reranker_folder: Path) -> None:
    saved = CrossEncoder.load(reranker_folder).classifier.classifier.weight
    assert torch.equal(CrossEncoder.from_encoder(reranker_folder, seed=9).classifier.classifier.weight, saved)
    assert read_model_folder(str(reranker_folder)).max_pair_tokens == 48


def test_a_classifier_of_another_label_count_is_refused(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    from simlm.models.backbone import load_classifier

    load_classifier(SCRATCH, num_labels=3, tokenizer=tiny_wordpiece).save_pretrained(tmp_path)
    tiny_wordpiece.save_pretrained(tmp_path)
    for load in (CrossEncoder.load, CrossEncoder.from_encoder, load_reranker):
        with pytest.raises(ModelError, match="3 labels"):
            load(tmp_path)  # type: ignore[operator]


def test_the_last_layer_computes_in_float32_under_autocast(tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    model = CrossEncoder.from_encoder(SCRATCH, tokenizer=tiny_wordpiece).eval()
    with torch.no_grad():
        model.classifier.classifier.bias.fill_(9.001)
    ids = torch.randint(5, 50, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model(ids)
    # Between 8 and 16 bf16 counts in steps of 1/16.
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


# --- folders that are not what was asked for ----------------------------------------------------------------------------------------


def test_the_other_role_is_an_error(retriever_folder: Path, reranker_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"re-ranker.*use load_reranker"):
        load_retriever(reranker_folder)
    with pytest.raises(ModelError, match="reranker, a retriever was expected"):
        BiEncoder.load(reranker_folder)
    with pytest.raises(ModelError, match="retriever, a reranker was expected"):
        load_reranker(retriever_folder)


def test_a_classifier_without_simlm_json_is_known_by_its_architecture(tmp_path: Path, reranker_folder: Path) -> None:
    for file in reranker_folder.iterdir():
        if file.is_file() and file.name != "simlm.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert read_model_folder(str(tmp_path)).role == "reranker"
    with pytest.raises(ModelError, match="re-ranker"):
        load_retriever(tmp_path)
    assert_array_equal(load_reranker(tmp_path).score("a", ["b"]), load_reranker(reranker_folder).score("a", ["b"]))


def test_not_a_model(tmp_path: Path, retriever_folder: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_retriever(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_reranker(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        load_retriever(tmp_path / "absent")
    with pytest.raises(ModelError, match="scratch"):
        BiEncoder.load("scratch")
    load_encoder(SCRATCH, tokenizer=tiny_wordpiece).save_pretrained(tmp_path / "bare")
    tiny_wordpiece.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="without a trained re-ranking head"):
        load_reranker(tmp_path / "bare")
    (tmp_path / "bare" / "simlm.json").write_text("{")
    with pytest.raises(ModelError, match=r"simlm\.json: not readable as JSON"):
        load_retriever(tmp_path / "bare")


def test_a_masked_lm_is_no_reranker_but_a_start_for_one(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    model = load_masked_lm(SCRATCH, tokenizer=tiny_wordpiece)
    model.save_pretrained(tmp_path)
    assert CrossEncoder.from_encoder(tmp_path).classifier.config.num_labels == 1
    vectors = BiEncoder.load(tmp_path).eval()
    ids = torch.randint(5, 50, (1, 7))
    expected = nn.functional.normalize(model.eval().base_model(ids).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(vectors(ids), expected)


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "Dense module"),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, "pools by 'lasttoken'"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "pools by 'mean.pooling_mode_max_tokens'",
        ),
    ],
)
def test_pooling_of_others_that_is_not_ours(tmp_path: Path, modules: list[str], pooling: dict[str, Any], message: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling" if kind == "Pooling" else ""} for kind in modules]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ModelError, match=message):
        read_model_folder(str(tmp_path))


# --- texts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_wordpiece", "tiny_bpe", "tiny_unigram"])
def test_texts_make_the_tokens_of_the_store(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    long = "The granite kettle boils river water. " * 400
    passages = [
        {"_id": "0", "title": "Salt Library", "text": "pressed salt bricks [SEP] </s>"},
        {"_id": "1", "title": "", "text": "  Glass   orchard\n grows transparent pears "},
        {"_id": "2", "title": "Silent Drum", "text": long},
        {"_id": "3", "title": long[:900], "text": "short"},
        {"_id": "4", "title": "", "text": long},
    ]
    queries = [{"_id": "q", "text": "what does the kettle do?"}, {"_id": "r", "text": long}]
    store = build_store(tmp_path / "store", tokenizer, passages, queries, {"test": [("q", "0", 1), ("r", "2", 1)]})
    texts = TextTokenizer(tokenizer)
    pairs = [(line["title"], line["text"]) if line["title"] else line["text"] for line in passages]
    check_rows(texts.encode(pairs, 64), collate(store.passages, range(5)))
    check_rows(texts.encode(pairs, 20), collate(store.passages, range(5), max_tokens=20))
    check_rows(texts.encode([line["text"] for line in queries], 24), collate(store.queries("test"), [0, 1]))
    one_string = [f"{line['title']} {line['text']}" if line["title"] else line["text"] for line in passages]
    wanted = collate_pairs(store, "test", [0] * 5, list(range(5)), max_tokens=48)
    check_rows(texts.encode([(queries[0]["text"], text) for text in one_string], 48), wanted)


def check_rows(sequences: Sequences, batch: Any) -> None:
    found = sequences.tensors(np.arange(len(sequences.input_ids)))
    for name, wanted in batch.tensors().items():
        assert_array_equal(found.get(name, torch.ones_like(wanted)), wanted, err_msg=name)


def test_a_huge_text_costs_no_more_than_a_long_one(tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    texts = TextTokenizer(tiny_wordpiece)
    huge = {"words": "salt bricks " * 400_000, "one word": "x" * 4_000_000, "spaces": " " * 4_000_000}
    started = time.perf_counter()
    sequences = texts.encode([*huge.values(), ("title", huge["words"]), (huge["words"], "text")], 64)
    assert time.perf_counter() - started < 2
    assert sequences.lengths().tolist() == [64, 3, 2, 64, 64]
    assert sequences.input_ids[0] == texts.encode(["salt bricks " * 200], 64).input_ids[0]
    assert sequences.input_ids[4] == texts.encode([("salt bricks " * 200, "text")], 64).input_ids[0]


def test_a_long_text_of_few_tokens_is_looked_at_again(tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    texts = TextTokenizer(tiny_wordpiece)
    gap = " " * 2000
    assert texts.encode([f"salt{gap}bricks"], 64).input_ids == texts.encode(["salt bricks"], 64).input_ids
    assert texts.encode([("title", f"salt{gap}bricks")], 64).input_ids == texts.encode([("title", "salt bricks")], 64).input_ids


def test_batches_by_length() -> None:
    lengths = np.array([3, 9, 3, 5, 30])
    assert [part.tolist() for part in batches(lengths, 10)] == [[4], [1], [3, 0], [2]]
    assert list(batches(np.array([], dtype=np.int64), 10)) == []


def test_rows_of_equal_length_need_no_mask() -> None:
    sequences = Sequences([[1, 2], [3], [4, 5]], [[0, 1], [0], [0, 0]], pad=7)
    padded = sequences.tensors(np.array([0, 1]))
    assert {name: tensor.tolist() for name, tensor in padded.items()} == {
        "input_ids": [[1, 2], [3, 7]],
        "token_type_ids": [[0, 1], [0, 0]],
        "attention_mask": [[1, 1], [1, 0]],
    }
    assert set(sequences.tensors(np.array([0, 2]))) == {"input_ids", "token_type_ids"}
    assert set(without_full_mask({"input_ids": 0, "attention_mask": torch.ones(2, 2)})) == {"input_ids"}


# --- retriever and re-ranker --------------------------------------------------------------------------------------------------------


def test_the_order_and_company_of_texts_change_nothing(retriever_folder: Path, tiny_store: Store) -> None:
    retriever = load_retriever(retriever_folder, batch_tokens=200)
    table = tiny_store.passages
    passages = [Passage(table.ids[row], table.text(row), table.title(row)) for row in range(len(table))]
    vectors = retriever.encode_passages(passages)
    assert vectors.shape == (60, 16)
    assert vectors.dtype == np.float32
    assert_allclose(retriever.encode_passages(passages[::-1])[::-1], vectors, atol=1e-6)
    assert_allclose(retriever.encode_passages([passages[7]])[0], vectors[7], atol=1e-6)
    from_store = np.empty((60, 16), dtype=np.float32)
    retriever.inference.run([(np.arange(60), collate(table, range(60)).tensors())], from_store)
    assert_allclose(from_store, vectors, atol=1e-6)


def test_texts_are_encoded_in_chunks(retriever_folder: Path, reranker_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one", "two words", "three words here", "", "five"]
    whole = load_retriever(retriever_folder).encode_queries(texts), load_reranker(reranker_folder).score("what", texts)
    monkeypatch.setattr("simlm.models.retriever.CHUNK", 2)
    monkeypatch.setattr("simlm.models.reranker.CHUNK", 2)
    assert_allclose(load_retriever(retriever_folder).encode_queries(texts), whole[0], atol=1e-6)
    assert_allclose(load_reranker(reranker_folder).score("what", texts), whole[1], atol=1e-6)


def test_nothing_gives_nothing(retriever_folder: Path, reranker_folder: Path) -> None:
    assert load_retriever(retriever_folder).encode_queries([]).shape == (0, 16)
    assert load_retriever(retriever_folder).encode_passages([]).shape == (0, 16)
    assert load_reranker(reranker_folder).score("what", []).shape == (0,)
    assert load_reranker(reranker_folder).score_pairs([]).shape == (0,)


def test_an_empty_text_has_a_vector(retriever_folder: Path) -> None:
    retriever = load_retriever(retriever_folder)
    assert_allclose(retriever.encode_queries([""]), retriever.encode_passages([("", "")]), atol=1e-6)
    assert_allclose(np.linalg.norm(retriever.encode_queries([""]), axis=1), 1, rtol=1e-6)


def test_a_blank_title_is_none(retriever_folder: Path, reranker_folder: Path) -> None:
    blank, none = [("  ", "text"), Passage("id", "text", "")], ["text", "text"]
    assert_array_equal(load_retriever(retriever_folder).encode_passages(blank), load_retriever(retriever_folder).encode_passages(none))
    assert_array_equal(load_reranker(reranker_folder).score("q", blank), load_reranker(reranker_folder).score("q", none))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ("one", r"queries: one string was given.*write \[text\]"),
        (["good", None], r"queries\[1\]: NoneType was given"),
        ([3], r"queries\[0\]: int was given"),
        (["good", "broken \ud800"], r"text 1 .*not valid Unicode"),
    ],
)
def test_queries_that_are_no_strings(retriever_folder: Path, queries: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_retriever(retriever_folder).encode_queries(queries)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ("one", r"one str was given"),
        (Passage("id", "text"), r"one Passage was given"),
        (["good", ("title", None)], r"passages\[1\]: tuple was given"),
        ([("a", "b", "c")], r"passages\[0\]: tuple was given"),
        ([b"bytes"], r"passages\[0\]: bytes was given"),
    ],
)
def test_passages_that_are_none(retriever_folder: Path, reranker_folder: Path, passages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_retriever(retriever_folder).encode_passages(passages)
    with pytest.raises(DataError, match=message):
        load_reranker(reranker_folder).score("query", passages)


def test_pairs_that_are_none(reranker_folder: Path) -> None:
    reranker = load_reranker(reranker_folder)
    with pytest.raises(DataError, match="query"):
        reranker.score(None, ["text"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"pairs\[1\]: str was given"):
        reranker.score_pairs([("a", "b"), "ab "])  # type: ignore[list-item]


def test_weights_of_16_bits_are_near_fp32(retriever_folder: Path, reranker_folder: Path) -> None:
    if not has_half_weights("cpu"):
        with pytest.raises(ModelError, match='precision = "fp16" was asked for'):
            load_retriever(retriever_folder, precision="fp16", device="cpu")
        return
    exact, half = (load_retriever(retriever_folder, precision=precision, device="cpu") for precision in ("fp32", "fp16"))
    texts = ["who keeps a granite kettle", "a", "the marble bicycle stands in the square " * 3]
    vectors = half.encode_queries(texts)
    assert half.precision == "fp16"
    assert 0 < np.abs(vectors - exact.encode_queries(texts)).max() < 1e-3
    # Each text by itself, whatever its company.
    assert_allclose(vectors, np.concatenate([half.encode_queries([text]) for text in texts]), atol=1e-6)
    scores = [load_reranker(reranker_folder, precision=precision, device="cpu").score(texts[0], texts) for precision in ("fp32", "fp16")]
    assert_allclose(scores[1], scores[0], atol=1e-2)
    assert not np.array_equal(scores[0], scores[1])


def test_weights_of_16_bits_are_refused_on_an_accelerator() -> None:
    with pytest.raises(ModelError, match=r'"fp16" was asked for on cuda'):
        resolve_precision("fp16", "cuda")


def test_bf16_is_near_fp32(retriever_folder: Path, reranker_folder: Path) -> None:
    texts = ["where is the kettle", "a drum wakes nobody at dawn", "x"]
    exact, near = load_retriever(retriever_folder), load_retriever(retriever_folder, precision="bf16")
    assert (exact.precision, near.precision) == ("fp32", "bf16")
    assert near.encode_queries(texts).dtype == np.float32
    assert_allclose(near.encode_queries(texts), exact.encode_queries(texts), atol=0.03)
    scores = load_reranker(reranker_folder, precision="bf16").score("what", texts)
    assert_allclose(scores, load_reranker(reranker_folder).score("what", texts), atol=0.03)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_where_the_processor_has_it(retriever_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr("simlm.models.precision.resolve_bf16", lambda wanted, device: fast if wanted == "auto" else wanted)
    assert load_retriever(retriever_folder, precision="auto").precision == ("bf16" if fast else "fp32")
    assert load_retriever(retriever_folder).precision == "fp32"


def test_an_output_that_is_not_finite_names_its_input() -> None:
    class Broken(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.where(input_ids[:, 0] == 3, float("nan"), 1.0)

    def parts() -> Iterator[tuple[Any, dict[str, Tensor]]]:
        yield np.array([2, 0]), {"input_ids": torch.tensor([[1], [2]])}
        yield np.array([1]), {"input_ids": torch.tensor([[3]])}

    with pytest.raises(ModelError, match="passage 1 is not finite"):
        Inference(Broken(), device="cpu").run(parts(), np.empty(3, dtype=np.float32), name="passage {}".format)
