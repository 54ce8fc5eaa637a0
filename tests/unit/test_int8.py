"""Products in 8-bit integers: values worked out by hand, independence of rows, nearness to float32 in every architecture."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch.testing import assert_close

from simlm.artifacts import MANIFEST, Kind, build_artifact, read_manifest
from simlm.errors import ModelError
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.int8 import Int8Linear, to_int8
from simlm.models.precision import has_int8, resolve_precision
from simlm.models.reranker import load_reranker
from simlm.models.retriever import load_retriever
from simlm.progress import Progress
from simlm.rankings import Run
from simlm.recipe import EncodeSettings, IndexSettings, ModelSettings, SearchSettings, Section
from simlm.searcher import open_run
from simlm.stages import Context, build_index, encode, search
from tests.conftest import build_store, tiny_passages, tiny_qrels, tiny_queries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytestmark = pytest.mark.skipif(not has_int8("cpu"), reason="int8 products need an x86 processor and oneDNN")

SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 40}
MODEL_TYPES = ("bert", "electra", "roberta", "distilbert", "modernbert")


def heavier(model: PreTrainedModel) -> PreTrainedModel:
    """Fresh layers add next to nothing to what passes by them; these weigh as much as trained ones."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(8)
    return model


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


@torch.inference_mode()
def test_values_worked_out_by_hand() -> None:
    # Output 1: weights of two signs, the largest 12.7, so the step is 0.1, the levels 127 and -40. Output 2: weights of one sign, 1.27
    # together, so the step is 0.01, the levels 100 and 27.
    layer = Int8Linear(linear([[12.7, -4.0], [1.0, 0.27]], [1.0, -1.0]))
    # Input 1: from -1 to 4.1, so the step is 0.02, the levels 255 and 0. Input 2: from 10 to 265, step 1, levels 0 and 255.
    inputs = torch.tensor([[4.1, -1.0], [10.0, 265.0]])
    # Both are exact: 12.7 * 4.1 + 4 + 1, 4.1 - 0.27 - 1; 127 - 1060 + 1, 10 + 71.55 - 1.
    assert_close(layer(inputs), torch.tensor([[57.07, 2.83], [-932.0, 80.55]]), rtol=1e-6, atol=1e-5)
    # Three values: 0.3 of steps of 0.02 is level 15; 0.305 is 15.25 and rounds to 15, 0.313 is 15.65 and rounds to 16.
    wide = Int8Linear(linear([[0.0, 0.0, 1.0, 0.0]]))
    for value, wanted in ((0.3, 0.3), (0.305, 0.3), (0.313, 0.32)):
        assert_close(wide(torch.tensor([[0.0, 5.1, value, 0.0]])), torch.tensor([[wanted]]), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_rows_of_one_value_are_exact_and_what_is_not_finite_stays_so() -> None:
    layer = Int8Linear(linear([[1.0, 2.0], [0.0, 0.0]], [3.0, 4.0]))
    assert_close(layer(torch.zeros(1, 2)), torch.tensor([[3.0, 4.0]]))
    assert_close(layer(torch.tensor([[5.0, 5.0]])), torch.tensor([[18.0, 4.0]]), rtol=0.01, atol=0)
    for broken in (float("nan"), float("inf"), float("-inf")):
        assert not torch.isfinite(layer(torch.tensor([[1.0, broken]]))).any(), broken


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (32, 16), (384, 384), (385, 7), (1536, 40)])
@torch.inference_mode()
def test_sums_do_not_overflow_16_bits(inputs: int, outputs: int, rows: int) -> None:
    # Inputs at the ends of their range where a weight of one sign stands: two products of full 8-bit numbers would be cut at 32,767.
    generator = torch.Generator().manual_seed(inputs)
    dense = nn.Linear(inputs, outputs)
    dense.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    layer = Int8Linear(dense)
    eye = torch.eye(inputs)
    # Rows of 0 and 1 have levels 0 and 255, so the layer's own weights are the answers to unit vectors.
    rounded = torch.stack([layer(eye[column]) - dense.bias for column in range(inputs)], dim=1)
    signs = (dense.weight[torch.arange(rows) % outputs] > 0).float()
    assert_close(layer(signs), signs @ rounded.T + dense.bias, rtol=1e-5, atol=1e-4 * inputs**0.5)


@torch.inference_mode()
def test_weights_have_more_than_7_bits() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(512, 64, bias=False)
    rounded = torch.stack([Int8Linear(dense)(unit) for unit in torch.eye(512)[:32]], dim=1)
    error = (rounded - dense.weight[:, :32]).abs().amax(dim=1)
    assert (error <= dense.weight.abs().amax(dim=1) / 63 * 0.51).all()


@torch.inference_mode()
def test_where_other_pairs_are_added_weights_have_7_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simlm.models.int8._neighbours_are_added", lambda: False)
    # The step is 0.1, and 0.24 is 2.4 steps; in 8 bits it would be 4.76 steps of 0.0504.
    layer = Int8Linear(linear([[6.3, 0.24, 0.0, -6.3]]))
    assert_close(layer(torch.tensor([[0.0, 1.0, 0.0, 0.0]])), torch.tensor([[0.2]]), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(48, 24))
    rows = torch.randn(3, 5, 48)
    rows[1] *= 1000
    together = layer(rows)
    assert together.shape == (3, 5, 24)
    assert torch.equal(together[0, 2], layer(rows[0, 2]))
    assert torch.equal(together[2], layer(rows[2:])[0])


def test_weights_are_kept_by_neither_the_layer_nor_the_original() -> None:
    original = linear([[1.0, -2.0]], [1.0])
    before = original.weight.clone()
    layer = Int8Linear(original)
    assert torch.equal(original.weight, before)
    assert not list(layer.parameters())


@torch.inference_mode()
def test_only_plain_linear_layers_are_replaced() -> None:
    class Exact(nn.Linear):
        pass

    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "exact": Exact(4, 1)})
    to_int8(model)
    assert [type(module) for module in model["inner"]] == [Int8Linear, nn.LayerNorm]
    assert type(model["exact"]) is Exact


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_vectors_are_near_those_of_float32(model_type: str, pooling: str) -> None:
    config: dict[str, object] = {"model_type": model_type, "vocab_size": 50, **SHAPE, "pad_token_id": 1}
    if model_type == "distilbert":
        config["hidden_dim"] = config.pop("intermediate_size")
    encoder = heavier(load_encoder(ModelSettings(start="scratch", config=config), seed=3)).eval()
    model = BiEncoder(encoder, pooling)  # type: ignore[arg-type]
    ids = torch.randint(5, 50, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    exact = model(ids, mask)
    to_int8(encoder)
    near = model(ids, mask)
    cosines = (exact * near).sum(dim=1)
    assert cosines.min() > 0.995
    assert not torch.equal(near, exact)


# --- where it is used ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_a_precision_comes_to(monkeypatch: pytest.MonkeyPatch, machine: str, bf16: bool) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("simlm.models.precision.cpu_has_bf16", lambda: bf16)
    assert resolve_precision("fp32", "cpu") == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "cpu") == ("bf16" if bf16 else "fp32")
    assert resolve_precision("fast", "cpu") == ("bf16" if bf16 else "int8" if machine == "x86_64" else "fp32")
    if machine == "x86_64":
        assert resolve_precision("int8", "cpu") == "int8"
    else:
        with pytest.raises(ModelError, match=r"int8.*on cpu of aarch64"):
            resolve_precision("int8", "cpu")
    with pytest.raises(ModelError, match="on cuda of"):
        resolve_precision("int8", "cuda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    config = {"model_type": "bert", **SHAPE, "max_position_embeddings": 64}
    encoder = heavier(load_encoder(ModelSettings(start="scratch", config=config), tokenizer=tiny_wordpiece, seed=3))
    path = tmp_path_factory.mktemp("int8") / "model"
    with build_artifact(path, kind="model") as builder:
        BiEncoder(encoder, "cls").save(builder.work, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=64)
    return path


def run_stage(stage: ModuleType, path: Path, kind: Kind, settings: Section, inputs: dict[str, Path]) -> dict[str, Any]:
    made_from = {role: read_manifest(folder).fingerprint for role, folder in inputs.items() if (folder / MANIFEST).is_file()}
    with build_artifact(path, kind=kind, stage=stage.__name__, settings=settings.model_dump(), inputs=made_from) as builder:
        stage.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def test_stages_and_searcher_compute_in_it(
    tmp_path: Path, model: Path, tiny_wordpiece: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simlm.models.precision.cpu_has_bf16", lambda: False)
    store = build_store(tmp_path / "store", tiny_wordpiece, tiny_passages(), tiny_queries(), {"test": tiny_qrels("test")})
    inputs = {"store": store.path, "model": model}
    start = ModelSettings(start=str(model))
    vectors = {}
    for precision in ("fp32", "int8"):
        settings = EncodeSettings(precision=precision, model=start, cache=False)  # type: ignore[arg-type]
        facts = run_stage(encode, tmp_path / f"{precision}_embeddings", "embeddings", settings, inputs)
        assert facts["precision"] == precision
        vectors[precision] = np.load(tmp_path / f"{precision}_embeddings" / "vectors.npy")
    assert 0.99 < (vectors["fp32"] * vectors["int8"]).sum(axis=1).min() < 0.999999
    texts = [(store.passages.title(row), store.passages.text(row)) for row in range(60)]
    assert_allclose(load_retriever(model, precision="fast").encode_passages(texts), vectors["int8"], atol=2e-3)

    (tmp_path / "int8_embeddings").rename(tmp_path / "start_embeddings")
    run_stage(build_index, tmp_path / "start_index", "index", IndexSettings(), inputs | {"embeddings": tmp_path / "start_embeddings"})
    runs = {}
    for precision in ("fp32", "int8"):
        settings = SearchSettings(precision=precision, depth=60)  # type: ignore[arg-type]
        run_stage(search, tmp_path / f"{precision}_run", "run", settings, inputs | {"index": tmp_path / "start_index"})
        runs[precision] = Run.load(tmp_path / f"{precision}_run", "test")
    assert_allclose(np.sort(runs["int8"].scores), np.sort(runs["fp32"].scores), atol=0.05)
    assert not np.array_equal(runs["int8"].scores, runs["fp32"].scores)

    searcher = open_run(tmp_path)
    assert searcher.dense[0].precision == "int8"
    query = store.queries("test").text(0)
    found = searcher.search(query, depth=60)
    assert_allclose([passage.score for passage in found], runs["int8"].scores[:60], atol=2e-3)


def test_a_re_ranker_computes_in_it(tmp_path: Path, model: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    CrossEncoder.from_encoder(model, seed=1).save(tmp_path / "reranker", tiny_wordpiece, max_pair_tokens=48)
    texts = ["the granite kettle", "a silent drum wakes nobody", "x"]
    near = load_reranker(tmp_path / "reranker", precision="int8")
    assert near.precision == "int8"
    assert_allclose(near.score("kettle", texts), load_reranker(tmp_path / "reranker").score("kettle", texts), atol=0.03)


def test_batches_on_a_cpu_stay_small(model: Path) -> None:
    assert load_retriever(model, device="cpu").batch_tokens == 2048
    assert load_retriever(model, device="cpu", batch_tokens=20_000).batch_tokens == 2048
    assert load_retriever(model, device="cpu", batch_tokens=300).batch_tokens == 300
