"""train_generator and pretrain on a tiny store: artifacts, resuming, continuing, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from simlm.artifacts import ArtifactBuilder
from simlm.errors import ModelError, RecipeError
from simlm.models.backbone import load_masked_lm, load_tokenizer
from simlm.objectives import Parts
from simlm.objectives.bottleneck import Decoder, save_masked_lm
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.start import log_frequencies
from simlm.objectives.steps import split_passages, step_size
from simlm.progress import Progress
from simlm.recipe import GeneratorSettings, ModelSettings, PretrainSettings, TrainingSettings
from simlm.stages import Context, pretrain, train_generator
from simlm.training.callbacks import read_log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

torch.set_num_threads(1)

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {"model_type": "bert", "max_position_embeddings": 64, **SHAPE}
TRAINING = TrainingSettings.model_validate({"learning_rate": 3e-3, "max_steps": 4, "bf16": False, "logging_steps": 2, "use_cpu": True})
GENERATOR = GeneratorSettings(
    **SHAPE, passages_per_step=16, micro_batch_tokens=512, held_out_passages=6, training=TRAINING.model_copy(update={"max_steps": 60})
)
PRETRAIN = PretrainSettings(
    model=ModelSettings(start="scratch", config=ENCODER),
    passages_per_step=16,
    micro_batch_tokens=512,
    held_out_passages=6,
    training=TRAINING,
)


def run_stage(run: Callable[[Any, dict[str, Path], Context], None], settings: Any, inputs: dict[str, Path], path: Path) -> Path:
    """One stage as the pipeline runs it."""
    builder = ArtifactBuilder(path, kind="model", stage="test", code_version=0, fingerprint="x")
    builder.begin()
    run(settings, inputs, Context(builder, seed=5, progress=Progress(quiet=True)))
    builder.finish(settings={}, inputs={}, seed=5, seconds=0.0, peak_memory_bytes=0)
    return path


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["facts"]
    return found


@pytest.fixture(scope="module")
def generator(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(train_generator.run, GENERATOR, {"store": tiny_store.path}, tmp_path_factory.mktemp("generator") / "generator")


@pytest.fixture(scope="module")
def pretrained(tiny_store: Store, generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = {"store": tiny_store.path, "generator": generator}
    return run_stage(pretrain.run, PRETRAIN, inputs, tmp_path_factory.mktemp("pretrained") / "pretrained")


def test_generator_artifact(generator: Path, tiny_store: Store) -> None:
    model = load_masked_lm(str(generator))
    assert model.config.model_type == "electra" and model.config.embedding_size == 16
    assert load_tokenizer(str(generator)).get_vocab() == tiny_store.tokenizer().get_vocab()
    assert json.loads((generator / "simlm.json").read_text())["role"] == "generator"
    assert {"loss", "encoder_loss", "encoder_accuracy_at_masked"} <= facts(generator)["dev"].keys()
    assert facts(generator)["dev"]["loss"] < facts(generator)["dev_start"]["loss"] < np.log(len(tiny_store.tokenizer()))


def test_pretrained_artifact(pretrained: Path, tiny_store: Store) -> None:
    info = json.loads((pretrained / "simlm.json").read_text())
    assert info == {"role": "pretrained", "objective": "replaced_lm", "objectives": {"replaced_lm": 1.0}, "num_decoder_layers": 2}
    dev = facts(pretrained)["dev"]
    assert {"loss", "encoder_loss", "decoder_loss", "encoder_replaced", "decoder_replaced", "encoder_accuracy_at_replaced"} <= dev.keys()
    assert dev["loss"] == pytest.approx(dev["encoder_loss"] + dev["decoder_loss"])
    assert 0.1 < dev["encoder_replaced"] <= 0.35 and dev["encoder_replaced"] < dev["decoder_replaced"] <= 0.55
    lines = [line["measures"] for line in read_log(pretrained / "log.jsonl") if line["kind"] == "train"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["encoder_loss"] + lines[-1]["decoder_loss"], rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"] * 1.2


def test_saved_encoder_and_decoder_give_the_same_outputs(pretrained: Path, generator: Path, tiny_store: Store) -> None:
    tokenizer = tiny_store.tokenizer()
    batch = tokenizer(["the granite kettle boils", "a silent drum"], padding=True, return_tensors="pt")
    masked_lm = load_masked_lm(str(pretrained)).eval()
    first = Pretraining.build(PRETRAIN, Parts(masked_lm, tokenizer, generator, continued=pretrained)).eval()
    with torch.no_grad():
        bare = AutoModel.from_pretrained(pretrained, add_pooling_layer=False).eval()
        encoded = first.pooled(dict(batch), "cls")
        torch.testing.assert_close(bare(**batch).last_hidden_state[:, 0], encoded, rtol=0, atol=1e-6)
        full = AutoModelForMaskedLM.from_pretrained(pretrained).eval()
        torch.testing.assert_close(full(**batch).logits, masked_lm(**batch).logits, rtol=0, atol=0)
    again = pretrained.parent / "again"
    again.mkdir(exist_ok=True)
    first.save(again, tokenizer)
    second = Pretraining.build(PRETRAIN, Parts(load_masked_lm(str(again)), tokenizer, generator, continued=again))
    for (name, tensor), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, msg=name)
    before = Decoder(load_masked_lm(str(pretrained))).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in load_file(pretrained / "decoder.safetensors").items())


def test_same_seed_gives_the_same_weights(pretrained: Path, generator: Path, tiny_store: Store, tmp_path: Path) -> None:
    other = run_stage(pretrain.run, PRETRAIN, {"store": tiny_store.path, "generator": generator}, tmp_path / "other")
    for name in ("model.safetensors", "decoder.safetensors"):
        assert (other / name).read_bytes() == (pretrained / name).read_bytes()


def test_continuing_takes_decoder_and_head_along(pretrained: Path, generator: Path, tiny_store: Store, tmp_path: Path) -> None:
    inputs = {"store": tiny_store.path, "generator": generator, "pretrained": pretrained}
    longer = run_stage(pretrain.run, PRETRAIN, inputs, tmp_path / "by-input")
    assert facts(longer)["continued"] is True
    assert facts(longer)["dev_start"]["loss"] == pytest.approx(facts(pretrained)["dev"]["loss"], abs=1e-6)
    settings = PRETRAIN.model_copy(update={"initial": str(pretrained)})
    same = run_stage(pretrain.run, settings, {"store": tiny_store.path, "generator": generator}, tmp_path / "by-path")
    assert (same / "decoder.safetensors").read_bytes() == (longer / "decoder.safetensors").read_bytes()
    one_layer = PRETRAIN.model_copy(update={"decoder_layers": 1})
    with pytest.raises(ModelError, match="decoder_layers"):
        run_stage(pretrain.run, one_layer, inputs, tmp_path / "one")


def test_generator_from_a_folder(generator: Path, tiny_store: Store, tmp_path: Path) -> None:
    settings = GENERATOR.model_copy(update={"source": str(generator)})
    copied = run_stage(train_generator.run, settings, {"store": tiny_store.path}, tmp_path / "copied")
    assert (copied / "model.safetensors").read_bytes() == (generator / "model.safetensors").read_bytes()
    assert not (copied / "log.jsonl").exists()


def test_generator_of_another_vocabulary(tiny_store: Store, tiny_bpe: PreTrainedTokenizerFast, pretrained: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    masked_lm = load_masked_lm(ModelSettings(start="scratch", config={"model_type": "roberta", **SHAPE}), tokenizer=tiny_bpe)
    foreign.mkdir()
    save_masked_lm(masked_lm, foreign, tiny_bpe, role="generator")
    with pytest.raises(ModelError, match=r"generator .*foreign has another vocabulary .* first '.*', id"):
        run_stage(train_generator.run, GENERATOR.model_copy(update={"source": str(foreign)}), {"store": tiny_store.path}, tmp_path / "g")
    settings = PRETRAIN.model_copy(update={"model": ModelSettings(start=str(foreign))})
    with pytest.raises(ModelError, match=r"model .*foreign has another vocabulary"):
        run_stage(pretrain.run, settings, {"store": tiny_store.path, "generator": pretrained}, tmp_path / "p")


def test_tokenizer_without_mask_token(tiny_store: Store, generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simlm.data.store import Store

    tokenizer = tiny_store.tokenizer().__class__.from_pretrained(tiny_store.path / "tokenizer")
    tokenizer.mask_token = None
    monkeypatch.setattr(Store, "tokenizer", lambda self: tokenizer)
    with pytest.raises(ModelError, match="no mask token"):
        run_stage(train_generator.run, GENERATOR, {"store": tiny_store.path}, tmp_path / "g")
    with pytest.raises(ModelError, match="no mask token"):
        run_stage(pretrain.run, PRETRAIN, {"store": tiny_store.path, "generator": generator}, tmp_path / "p")


def test_positions_too_few(tiny_store: Store, generator: Path, tmp_path: Path) -> None:
    model = ModelSettings(start="scratch", config=ENCODER | {"max_position_embeddings": 32})
    with pytest.raises(ModelError, match="positions for 32 tokens"):
        inputs = {"store": tiny_store.path, "generator": generator}
        run_stage(pretrain.run, PRETRAIN.model_copy(update={"model": model}), inputs, tmp_path / "p")


def test_corpus_smaller_than_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_size(2048, 60, 1, Progress()) == 60
    assert "60 passages" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="3 processes"):
        step_size(2, 60, 3, Progress())


def test_split_holds_out_at_most_a_tenth() -> None:
    train, held_out = split_passages(1000, 50, 1)
    assert len(held_out) == 50 and sorted([*train, *held_out]) == list(range(1000))
    assert len(split_passages(100, 4096, 1)[1]) == 10
    assert len(split_passages(1, 4096, 1)[1]) == 0


def test_log_frequencies(tiny_store: Store) -> None:
    found = log_frequencies(tiny_store, len(tiny_store.tokenizer()) + 3)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    counts = np.bincount(tiny_store.passages.tokens, minlength=len(found))
    assert int(found.argmax()) == int(counts.argmax())
    assert found[-1] == found.min()
