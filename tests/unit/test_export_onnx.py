"""ONNX exports: the graphs compute what the models compute, for any number of rows and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.errors import MissingExtraError, ModelError
from simlm.export import export_run, onnx_models
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.reranker import load_reranker
from simlm.models.retriever import load_retriever
from simlm.recipe import ModelSettings
from tests.conftest import tiny_passages
from tests.unit.test_export import CONFIG, QUIET, make_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "my-run", tiny_wordpiece)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    export_run(run, folder, ["onnx"], progress=QUIET)
    return folder


def session(file: Path) -> Any:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def outputs(file: Path, tokens: dict[str, Any]) -> np.ndarray[Any, Any]:
    opened = session(file)
    (found,) = opened.run(None, {name.name: tokens[name.name] for name in opened.get_inputs()})
    return np.asarray(found)


def test_the_retriever_as_its_card_uses_it(run: Path, exported: Path) -> None:
    from transformers import AutoTokenizer

    folder = exported / "onnx" / "retriever"
    opened = session(folder / "model.onnx")
    assert [item.name for item in opened.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [item.name for item in opened.get_outputs()] == ["sentence_embedding"]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    limit = json.loads((folder / "simlm.json").read_text(encoding="utf-8"))["max_passage_tokens"]
    retriever = load_retriever(run / "distilled")
    chosen = [passage for passage in tiny_passages() if passage["title"]]
    titles, texts = [passage["title"] for passage in chosen], [passage["text"] for passage in chosen]
    expected = retriever.encode_passages(list(zip(titles, texts, strict=True)))
    for size in (1, 3, len(chosen)):
        tokens = tokenizer(titles[:size], texts[:size], truncation=True, max_length=limit, padding=True, return_tensors="np")
        found = outputs(folder / "model.onnx", tokens)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:size], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(outputs(folder / "model_int8.onnx", tokens), axis=1), 1, atol=1e-5)
    query = tokenizer(["ask: x"], return_tensors="np")
    np.testing.assert_allclose(outputs(folder / "model.onnx", query), retriever.encode_queries(["x"]), atol=1e-5)


def test_the_reranker_as_its_card_uses_it(run: Path, exported: Path) -> None:
    from transformers import AutoTokenizer

    folder = exported / "onnx" / "reranker"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    passages = [f"{passage['title']} {passage['text']}".strip() for passage in tiny_passages()[:9]]
    tokens = tokenizer(["what is it made of"] * 9, passages, truncation=True, max_length=64, padding=True, return_tensors="np")
    expected = load_reranker(run / "reranker").score("what is it made of", passages)
    np.testing.assert_allclose(outputs(folder / "model.onnx", tokens), expected, atol=1e-5)


def test_comparisons_are_kept_and_told(exported: Path) -> None:
    info = json.loads((exported / "export.json").read_text(encoding="utf-8"))["targets"]["onnx"]["comparisons"]
    for role in ("retriever", "reranker"):
        folder = exported / "onnx" / role
        fp32, int8 = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        assert info[role] == [fp32, int8]
        assert (fp32["file"], int8["file"]) == ("model.onnx", "model_int8.onnx")
        assert fp32["max_abs_difference"] < 1e-5 < int8["max_abs_difference"]
        assert int8["bytes"] < fp32["bytes"] == (folder / "model.onnx").stat().st_size
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert onnx_models.describe(onnx_models.Comparison(**{"min_cosine": None, "mean_cosine": None, "correlation": None} | int8)) in card
    assert info["retriever"][0]["num_texts"] == 60 + 60
    assert info["retriever"][1]["min_cosine"] > 0.99


def test_only_what_belongs_to_the_files_is_there_and_no_place(run: Path, exported: Path) -> None:
    names = {file.name for file in (exported / "onnx" / "retriever").iterdir()}
    assert names == {"model.onnx", "model_int8.onnx", "comparison.json", "README.md", *onnx_models.KEPT}
    for file in exported.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(run.parent).encode() not in content, file
            assert b"site-packages" not in content, file
            assert b"biencoder.py" not in content, file


def samples_of(model: torch.nn.Module, vocabulary: int, *, types: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows, tokens in ((1, 2), (3, 17), (5, 48)):
        ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, max(tokens // 2, 1) :] = 0
        made.append({"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": torch.zeros_like(ids)} if types else {}))
    return made


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_models, "PROTOBUF_BYTES", 1000)
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config=CONFIG), seed=1, tokenizer=tiny_wordpiece), "mean").eval()
    samples = samples_of(model, len(tiny_wordpiece), types=True)
    onnx_models.export_graph(model, samples, tmp_path / "model.onnx", output="sentence_embedding")
    onnx_models.quantise(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    with torch.inference_mode():
        expected = [model(**sample).numpy() for sample in samples]
    found = onnx_models.compare(tmp_path / "model.onnx", samples, expected)
    assert found.max_abs_difference < 1e-5
    assert found.bytes > (tmp_path / "model.onnx.data").stat().st_size
    assert 0.99 < onnx_models.compare(tmp_path / "model_int8.onnx", samples, expected).min_cosine < 1  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "modernbert", "xlm-roberta"])
def test_other_architectures(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast, model_type: str, pooling: Any) -> None:
    config = CONFIG | {"model_type": model_type}
    if model_type == "distilbert":
        config = {"model_type": model_type, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    if model_type in ("roberta", "xlm-roberta"):
        config = config | {"max_position_embeddings": 70}
    encoder = load_encoder(ModelSettings(start="scratch", config=config), seed=1, tokenizer=tiny_wordpiece)
    model = BiEncoder(encoder, pooling).eval()
    samples = samples_of(model, len(tiny_wordpiece), types=model_type in ("bert", "electra"))
    onnx_models.export_graph(model, samples, tmp_path / "model.onnx", output="sentence_embedding")
    with torch.inference_mode():
        expected = [model(**sample).numpy() for sample in samples]
    assert onnx_models.compare(tmp_path / "model.onnx", samples, expected).max_abs_difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["roberta", "electra"])
def test_other_rerankers(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast, model_type: str) -> None:
    config = CONFIG | {"model_type": model_type, "max_position_embeddings": 70}
    model = CrossEncoder.from_encoder(ModelSettings(start="scratch", config=config), seed=1, tokenizer=tiny_wordpiece).eval()
    samples = samples_of(model, len(tiny_wordpiece), types=model_type == "electra")
    onnx_models.export_graph(model, samples, tmp_path / "model.onnx", output="logits")
    with torch.inference_mode():
        expected = [model(**sample).numpy() for sample in samples]
    assert onnx_models.compare(tmp_path / "model.onnx", samples, expected).max_abs_difference < 1e-5


def test_a_graph_that_computes_something_else_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simlm.export.finished_run import FinishedRun

    wrong = onnx_models.Comparison("model.onnx", 1, 3, 0.5, 0.9, 0.9, None)
    monkeypatch.setattr(onnx_models, "export_graph", lambda *_, **__: None)
    monkeypatch.setattr(onnx_models, "quantise", lambda *_: None)
    monkeypatch.setattr(onnx_models, "compare", lambda *_: wrong)
    with pytest.raises(ModelError, match=r"graph of the retriever differs from the model by 0\.5 on texts of the run"):
        onnx_models.write(FinishedRun(run), tmp_path, QUIET)


def test_without_the_extra(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"exporting to ONNX needs the library 'onnx'.*simlm\[onnx\]"):
        export_run(run, tmp_path / "out", ["onnx"], progress=QUIET)
    assert not (tmp_path / "out").exists()
