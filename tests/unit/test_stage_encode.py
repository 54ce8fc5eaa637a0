"""encode: vectors from the store's tokens, one shard at a time, the same after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.artifacts import ArtifactBuilder, build_artifact, open_artifact
from simlm.errors import ArtifactError, ModelError
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.inference import Inference
from simlm.models.retriever import load_retriever
from simlm.progress import Progress
from simlm.recipe import EncodeSettings, ModelSettings
from simlm.stages import Context, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    """A finished retriever artifact with fresh weights."""
    path = tmp_path_factory.mktemp("encode") / "model"
    encoder = load_encoder(ModelSettings(start="scratch", config=CONFIG), tokenizer=tiny_wordpiece, seed=3)
    with build_artifact(path, kind="model") as builder:
        BiEncoder(encoder, "cls").save(builder.work, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=40)
    return path


def run_encode(path: Path, settings: EncodeSettings, inputs: dict[str, Path]) -> dict[str, Any]:
    with build_artifact(path, kind="embeddings", stage="encode", settings=settings.model_dump()) as builder:
        encode.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def vectors_of(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(open_artifact(path, "embeddings").file("vectors.npy"), mmap_mode="r", allow_pickle=False))


def test_vectors_are_those_of_the_texts(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    settings = EncodeSettings(precision="fp32", shard_passages=25, batch_tokens=300)
    facts = run_encode(tmp_path / "embeddings", settings, {"store": tiny_store.path, "model": model})
    vectors = vectors_of(tmp_path / "embeddings")
    table = tiny_store.passages
    expected = load_retriever(model).encode_passages([(table.title(row), table.text(row)) for row in range(len(table))])
    assert vectors.shape == (60, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    info = json.loads((tmp_path / "embeddings" / "embeddings.json").read_text(encoding="utf-8"))
    assert info == {"dim": 32, "count": 60, "normalised": True, "precision": "fp32", "storage": "fp32"}
    assert facts["num_passages"] == 60
    assert facts["bytes_total"] == (tmp_path / "embeddings" / "vectors.npy").stat().st_size
    assert facts["passages_per_second"] > 0
    assert 0 <= facts["padding"] < 1


def test_files_of_the_artifact(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    run_encode(tmp_path / "embeddings", EncodeSettings(precision="fp32"), {"store": tiny_store.path, "model": model})
    assert sorted(entry.name for entry in (tmp_path / "embeddings").iterdir()) == ["embeddings.json", "manifest.json", "vectors.npy"]


def test_half_precision_storage(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    inputs = {"store": tiny_store.path, "model": model}
    run_encode(tmp_path / "full", EncodeSettings(precision="fp32"), inputs)
    run_encode(tmp_path / "half", EncodeSettings(precision="fp32", storage="fp16", shard_passages=7), inputs)
    half = vectors_of(tmp_path / "half")
    assert half.dtype == np.float16
    # float16 has 11 significant bits: a value below 1 is off by 2 ** -12 at most; batches of other lengths add rounding.
    np.testing.assert_allclose(half.astype(np.float32), vectors_of(tmp_path / "full"), atol=2**-12 + 1e-6)


def test_bf16_points_the_same_way(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    inputs = {"store": tiny_store.path, "model": model}
    run_encode(tmp_path / "full", EncodeSettings(precision="fp32"), inputs)
    facts = run_encode(tmp_path / "bf16", EncodeSettings(precision="bf16"), inputs)
    cosines = (vectors_of(tmp_path / "full") * vectors_of(tmp_path / "bf16")).sum(axis=1)
    assert facts["precision"] == "bf16"
    assert cosines.min() > 0.99


def test_the_starting_model_where_no_model_is_given(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    settings = EncodeSettings(precision="fp32", model=ModelSettings(start=str(model)))
    run_encode(tmp_path / "start", settings, {"store": tiny_store.path})
    run_encode(tmp_path / "trained", EncodeSettings(precision="fp32"), {"store": tiny_store.path, "model": model})
    np.testing.assert_array_equal(vectors_of(tmp_path / "start"), vectors_of(tmp_path / "trained"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("torn_bytes", [0, 100])
def test_goes_on_after_a_kill_with_equal_vectors(
    tmp_path: Path, tiny_store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, torn_bytes: int
) -> None:
    settings = EncodeSettings(precision="fp32", shard_passages=16)
    inputs = {"store": tiny_store.path, "model": model}
    run_encode(tmp_path / "whole", settings, inputs)

    real = Inference.run
    calls = []

    def dies_in_the_third_shard(self: Inference, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        real(self, *args, **kwargs)

    builder = ArtifactBuilder(tmp_path / "resumed", kind="embeddings", stage="encode", code_version=1, fingerprint="f")
    builder.begin()
    with monkeypatch.context() as patched:
        patched.setattr(Inference, "run", dies_in_the_third_shard)
        with pytest.raises(Killed):
            encode.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    assert not (tmp_path / "resumed").exists()
    with open(builder.work / "vectors.npy", "ab") as file:
        file.write(b"\x7f" * torn_bytes)

    again = ArtifactBuilder(tmp_path / "resumed", kind="embeddings", stage="encode", code_version=1, fingerprint="f")
    assert again.begin()
    shards = []
    monkeypatch.setattr(Inference, "run", lambda *args, **kwargs: shards.append(1) or real(*args, **kwargs))  # type: ignore[func-returns-value]
    encode.run(settings, inputs, Context(again, 0, Progress(quiet=True)))
    again.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    # 60 passages in shards of 16: two were done, two were left.
    assert len(shards) == 2
    assert (tmp_path / "resumed" / "vectors.npy").read_bytes() == (tmp_path / "whole" / "vectors.npy").read_bytes()


def test_killed_after_the_last_shard_encodes_nothing_again(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    settings = EncodeSettings(precision="fp32")
    inputs = {"store": tiny_store.path, "model": model}
    builder = ArtifactBuilder(tmp_path / "done", kind="embeddings", stage="encode", code_version=1, fingerprint="f")
    builder.begin()
    encode.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    before = (builder.work / "vectors.npy").read_bytes()
    again = ArtifactBuilder(tmp_path / "done", kind="embeddings", stage="encode", code_version=1, fingerprint="f")
    again.begin()
    encode.run(settings, inputs, Context(again, 0, Progress(quiet=True)))
    assert "passages_per_second" not in again.facts
    assert (again.work / "vectors.npy").read_bytes() == before


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path, tiny_store: Store, tiny_bpe: PreTrainedTokenizerFast) -> None:
    encoder = load_encoder(ModelSettings(start="scratch", config=CONFIG), tokenizer=tiny_bpe)
    with build_artifact(tmp_path / "other", kind="model") as builder:
        BiEncoder(encoder, "cls").save(builder.work, tiny_bpe, max_query_tokens=24, max_passage_tokens=40)
    with pytest.raises(ModelError, match=r"its vocabulary .* is not the store's"):
        run_encode(tmp_path / "embeddings", EncodeSettings(), {"store": tiny_store.path, "model": tmp_path / "other"})


def test_a_model_with_nan_names_the_passage(tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    encoder = load_encoder(ModelSettings(start="scratch", config=CONFIG), tokenizer=tiny_wordpiece)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with build_artifact(tmp_path / "nan", kind="model") as builder:
        BiEncoder(encoder, "cls").save(builder.work, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=40)
    with pytest.raises(ModelError, match=r"passage 'granite-kettle/where' is not finite"):
        run_encode(tmp_path / "embeddings", EncodeSettings(precision="fp32"), {"store": tiny_store.path, "model": tmp_path / "nan"})
    assert not (tmp_path / "embeddings").exists()


def test_a_damaged_model_is_refused(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        run_encode(tmp_path / "embeddings", EncodeSettings(), {"store": tiny_store.path, "model": tmp_path / "damaged"})
