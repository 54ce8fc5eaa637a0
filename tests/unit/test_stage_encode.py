"""encode: vectors from the store's tokens, one shard at a time, the same after a kill."""

from __future__ import annotations

import json
import shutil
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
from tests.conftest import build_store, tiny_passages, tiny_qrels, tiny_queries

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


# the cache


def longer_store(path: Path, tokenizer: PreTrainedTokenizerFast, extra: int, **options: int) -> Store:
    """The tiny corpus with passages in front, in between and at the end."""
    passages = tiny_passages()
    for number in range(extra):
        passages.insert((7 * number) % 61, {"_id": f"new/{number}", "title": "", "text": f"the kettle number {number} is of wool"})
    return build_store(path, tokenizer, passages, tiny_queries(), {"test": tiny_qrels("test")}, **options)


def encode_again(
    folder: Path, settings: EncodeSettings, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], int]:
    """(facts, passages that went through the model) of the step `embeddings` in `folder`."""
    rows: list[int] = []
    real = Inference.run

    def counting(self: Inference, batches: Any, results: Any, **options: Any) -> None:
        rows.append(len(results))
        real(self, batches, results, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Inference, "run", counting)
        facts = run_encode(folder / "embeddings", settings, inputs)
    return facts, sum(rows)


def test_only_new_passages_are_encoded(
    tmp_path: Path, tiny_store: Store, model: Path, tiny_wordpiece: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EncodeSettings(precision="fp32", shard_passages=16)
    facts, encoded = encode_again(tmp_path, settings, {"store": tiny_store.path, "model": model}, monkeypatch)
    assert (facts["num_cached"], encoded) == (0, 60)
    before = vectors_of(tmp_path / "embeddings").copy()
    longer = longer_store(tmp_path / "longer", tiny_wordpiece, 10)
    facts, encoded = encode_again(tmp_path, settings, {"store": longer.path, "model": model}, monkeypatch)
    assert (facts["num_cached"], encoded, facts["num_passages"]) == (60, 10, 70)
    after = vectors_of(tmp_path / "embeddings")
    table = longer.passages
    old = [row for row in range(70) if not table.ids[row].startswith("new/")]
    np.testing.assert_array_equal(after[old], before)
    expected = load_retriever(model).encode_passages([(table.title(row), table.text(row)) for row in range(70)])
    np.testing.assert_allclose(after, expected, atol=1e-5)
    # Both corpora share one file of vectors a corpus, and 24 bytes a passage.
    assert facts["cache_bytes"] < 70 * 24 + 2000
    assert encode_again(tmp_path, settings, {"store": tiny_store.path, "model": model}, monkeypatch)[1] == 0


def test_other_shards_and_batches_take_everything_from_the_cache(
    tmp_path: Path, tiny_store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"store": tiny_store.path, "model": model}
    encode_again(tmp_path, EncodeSettings(precision="fp32"), inputs, monkeypatch)
    before = (tmp_path / "embeddings" / "vectors.npy").read_bytes()
    facts, encoded = encode_again(tmp_path, EncodeSettings(precision="fp32", shard_passages=7, batch_tokens=100), inputs, monkeypatch)
    assert (facts["num_cached"], encoded) == (60, 0)
    assert "passages_per_second" not in facts
    assert (tmp_path / "embeddings" / "vectors.npy").read_bytes() == before


def copied(model: Path, target: Path, tokenizer: PreTrainedTokenizerFast, change: str) -> None:
    """The model at another path, with one thing changed."""
    biencoder = BiEncoder.load(model)
    options: dict[str, Any] = {"max_query_tokens": 24, "max_passage_tokens": 40}
    if change == "pooling":
        biencoder.pooling = "mean"
    elif change == "prompt":
        options["passage_prompt"] = "of the "
    elif change == "max_tokens":
        options["max_passage_tokens"] = 39
    elif change == "linear":
        # Of a matrix product alone, as low-rank adapters change it.
        with torch.no_grad():
            biencoder.encoder.encoder.layer[0].attention.self.query.weight[0, 0] += 1e-3
    elif change == "config":
        biencoder.encoder.config.layer_norm_eps = 1e-3
    shutil.rmtree(target, ignore_errors=True)
    with build_artifact(target, kind="model") as builder:
        biencoder.save(builder.work, tokenizer, **options)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("change", ["nothing", "linear", "config", "pooling", "prompt", "max_tokens"])
def test_another_model_at_the_same_path(
    tmp_path: Path,
    tiny_store: Store,
    model: Path,
    tiny_wordpiece: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    precision: Any,
) -> None:
    inputs = {"store": tiny_store.path, "model": tmp_path / "model"}
    settings = EncodeSettings(precision=precision)
    copied(model, inputs["model"], tiny_wordpiece, "nothing")
    try:
        encode_again(tmp_path, settings, inputs, monkeypatch)
    except ModelError as error:
        pytest.skip(str(error))
    copied(model, inputs["model"], tiny_wordpiece, change)
    facts, encoded = encode_again(tmp_path, settings, inputs, monkeypatch)
    assert (facts["num_cached"], encoded) == ((60, 0) if change == "nothing" else (0, 60))


@pytest.mark.parametrize(
    "change", [{"precision": "bf16"}, {"storage": "fp16"}, {"model": {"pooling": "mean"}}, {"model": {"attention": "eager"}}]
)
def test_settings_that_change_vectors(
    tmp_path: Path, tiny_store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    bare = tmp_path / "bare"
    load_encoder(str(model)).save_pretrained(bare)
    shutil.copy(model / "tokenizer.json", bare)
    shutil.copy(model / "tokenizer_config.json", bare)
    base: dict[str, Any] = {"precision": "fp32", "model": {"start": str(bare)}}
    inputs = {"store": tiny_store.path}
    encode_again(tmp_path, EncodeSettings.model_validate(base), inputs, monkeypatch)
    assert encode_again(tmp_path, EncodeSettings.model_validate(base), inputs, monkeypatch)[1] == 0
    other = EncodeSettings.model_validate(base | change | {"model": base["model"] | change.get("model", {})})
    facts, encoded = encode_again(tmp_path, other, inputs, monkeypatch)
    assert (facts["num_cached"], encoded) == (0, 60)


def test_without_the_cache_nothing_is_kept(tmp_path: Path, tiny_store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EncodeSettings(precision="fp32", cache=False)
    for _ in range(2):
        facts, encoded = encode_again(tmp_path, settings, {"store": tiny_store.path, "model": model}, monkeypatch)
        assert (facts["num_cached"], encoded) == (0, 60)
    assert not (tmp_path / "embedding_cache").exists()
    assert "cache_bytes" not in facts


def test_what_a_killed_step_had_encoded_is_there_for_another_corpus(
    tmp_path: Path, tiny_store: Store, model: Path, tiny_wordpiece: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EncodeSettings(precision="fp32", shard_passages=16)
    builder = ArtifactBuilder(tmp_path / "embeddings", kind="embeddings", stage="encode", code_version=1, fingerprint="killed")
    builder.begin()
    real, calls = Inference.run, []

    def dies_in_the_third_shard(self: Inference, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Inference, "run", dies_in_the_third_shard)
        with pytest.raises(Killed):
            encode.run(settings, {"store": tiny_store.path, "model": model}, Context(builder, 0, Progress(quiet=True)))
    longer = longer_store(tmp_path / "longer", tiny_wordpiece, 3)
    facts, encoded = encode_again(tmp_path, settings, {"store": longer.path, "model": model}, monkeypatch)
    assert (facts["num_cached"], encoded) == (32, 31)


def test_a_prompt_is_encoded_with(tmp_path: Path, tiny_store: Store, model: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    copied(model, tmp_path / "model", tiny_wordpiece, "prompt")
    run_encode(tmp_path / "embeddings", EncodeSettings(precision="fp32"), {"store": tiny_store.path, "model": tmp_path / "model"})
    table = tiny_store.passages
    texts = [(f"of the {table.title(row)}", table.text(row)) if table.title(row) else f"of the {table.text(row)}" for row in range(60)]
    np.testing.assert_allclose(vectors_of(tmp_path / "embeddings"), load_retriever(model).encode_passages(texts), atol=1e-5)
