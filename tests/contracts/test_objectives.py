"""What holds for every row of the table of objectives: finite losses, gradients through [CLS], exact resuming, folders that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel

from simlm.artifacts import ArtifactBuilder, build_artifact
from simlm.data.batches import collate
from simlm.errors import ModelError, RecipeError
from simlm.models.backbone import load_masked_lm
from simlm.objectives import OBJECTIVES, Parts, Summed, Tokens, find_objective
from simlm.objectives.bottleneck import save_masked_lm
from simlm.objectives.masking import Draws, Masking, idf_weights
from simlm.objectives.pretraining import Pretraining, unused_settings
from simlm.objectives.start import corpus_ids
from simlm.objectives.steps import Feeding, PassageSteps, held_out_measures
from simlm.progress import Progress
from simlm.recipe import OBJECTIVE_NAMES, SAMPLING_OBJECTIVES, ModelSettings, PretrainSettings, parse_recipe
from simlm.stages import Context, pretrain
from simlm.training.callbacks import read_log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from simlm.data.store import Store

torch.set_num_threads(1)

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {"model_type": "bert", "max_position_embeddings": 64, "initializer_range": 0.2, **SHAPE}
TRAINED = sorted(set(OBJECTIVES) - {"none"})
DIVIDED = [name for name in TRAINED if find_objective(name).bottleneck]


def settings_of(objective: str | dict[str, float], **changes: Any) -> PretrainSettings:
    training = {"learning_rate": 3e-3, "max_steps": 4, "save_steps": 2, "bf16": False, "logging_steps": 1, "use_cpu": True}
    given = {
        "objective": objective,
        "model": {"start": "scratch", "config": ENCODER},
        "passages_per_step": 8,
        "micro_batch_tokens": 160,
        "held_out_passages": 6,
        "training": training,
    }
    return PretrainSettings.model_validate(given | changes)


@pytest.fixture(scope="module")
def generator(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives") / "generator"
    with build_artifact(folder, kind="model", stage="train_generator", settings={}) as builder:
        save_masked_lm(encoder(tiny_store, seed=3), builder.work, tiny_store.tokenizer(), role="generator")
    return folder


def encoder(store: Store, seed: int = 1) -> PreTrainedModel:
    return load_masked_lm(ModelSettings(start="scratch", config=ENCODER), tokenizer=store.tokenizer(), seed=seed, dropout=0.0)


def build(settings: PretrainSettings, store: Store, generator: Path | None, continued: Path | None = None, seed: int = 1) -> Pretraining:
    masked_lm = encoder(store, seed)
    num_entries = masked_lm.config.vocab_size
    parts = Parts(
        masked_lm,
        store.tokenizer(),
        generator,
        continued,
        idf_V=idf_weights(store.passages, num_entries),
        corpus_ids=corpus_ids(store, num_entries),
    )
    return Pretraining.build(settings, parts)


def one_step(task: Pretraining, store: Store, micro_batch_tokens: int = 10_000, step: int = 1) -> dict[str, float]:
    """Loss and its parts of one step of 12 passages, gradients left in the task, as the trainer does it."""
    feeding = Feeding(store.passages, task.views(), micro_batch_tokens, True, 7)
    steps = PassageSteps(feeding, np.arange(60, dtype=np.int64), passages_per_step=12, num_steps=4)
    with torch.no_grad():
        micro_batches = task.before_step(steps.load(step, 0, 1), rank=0, num_ranks=1, seed=7)
    sums: dict[str, float] = {}
    for micro_batch in micro_batches:
        outputs = task(**micro_batch)
        outputs["loss"].backward()
        for name, value in outputs.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums


def test_names_are_known_without_torch() -> None:
    assert sorted(OBJECTIVE_NAMES) == sorted(OBJECTIVES)
    assert {name for name in OBJECTIVES if find_objective(name).reads == "replaced"} == SAMPLING_OBJECTIVES
    with pytest.raises(RecipeError, match="did you mean 'replaced_lm'"):
        find_objective("replaced_ml")
    for wrong, message in (
        ("replaced_ml", "unknown objective 'replaced_ml'"),
        ({}, "empty table"),
        ({"bow": 0.0}, "weight of 'bow'"),
        ({"none": 1.0, "bow": 1.0}, "none"),
        ({"bow": float("inf")}, "weight of 'bow'"),
        (5, "a name, or a table of names and weights"),
        ({"bow": "much"}, "a name, or a table of names and weights"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({"name": "x", "pretrain": {"objective": wrong}})


@pytest.mark.parametrize("name", TRAINED)
def test_loss_is_finite_and_every_parameter_learns(name: str, tiny_store: Store, generator: Path) -> None:
    task = build(settings_of(name), tiny_store, generator)
    found = one_step(task, tiny_store)
    assert all(np.isfinite(value) for value in found.values()), found
    assert found["loss"] > 0
    # What requires a gradient gets one: under DDP the others would be waited for.
    without = [key for key, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not without
    optimizer = torch.optim.AdamW([parameter for parameter in task.parameters() if parameter.requires_grad], lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        last = one_step(task, tiny_store)
        optimizer.step()
    assert last["loss"] < 0.95 * found["loss"]


@pytest.mark.parametrize("name", TRAINED)
def test_neither_the_cut_nor_padding_changes_loss_or_gradient(name: str, tiny_store: Store, generator: Path) -> None:
    losses, gradients = [], []
    for micro_batch_tokens in (10_000, 120):
        task = build(settings_of(name), tiny_store, generator)
        losses.append(one_step(task, tiny_store, micro_batch_tokens))
        gradients.append({key: parameter.grad for key, parameter in task.named_parameters() if parameter.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", DIVIDED)
def test_gradient_reaches_the_bottleneck(name: str, tiny_store: Store, generator: Path) -> None:
    """The objective's own terms (not the encoder's loss) pull at the [CLS] state of every sequence."""
    task = build(settings_of(name), tiny_store, generator)
    feeding = Feeding(tiny_store.passages, task.views(), 10_000, True, 7)
    steps = PassageSteps(feeding, np.arange(60, dtype=np.int64), passages_per_step=6, num_steps=1)
    with torch.no_grad():
        (micro_batch,) = task.before_step(steps.load(0, 0, 1), rank=0, num_ranks=1, seed=7)
    seen = task._encode(micro_batch)
    loss = torch.zeros(())
    for term in task.objectives[name].terms(seen):
        if isinstance(term, Tokens):
            features, weight, bias = seen.head(term.hidden_NH)
            loss = loss + torch.nn.functional.cross_entropy(features @ weight.T + (0 if bias is None else bias), term.labels_N)
        else:
            assert isinstance(term, Summed)
            loss = loss + term.total / term.divisor
    if task.contrast is not None:
        loss = loss + task.contrast.share(seen.hidden_BTH, seen.attention_mask, micro_batch)
    (gradient,) = torch.autograd.grad(loss, seen.hidden_BTH)
    assert (gradient[:, 0].abs().sum(-1) > 0).all()


class KilledError(Exception):
    pass


def run_stage(settings: PretrainSettings, inputs: dict[str, Path], path: Path) -> Path:
    builder = ArtifactBuilder(path, kind="model", stage="pretrain", code_version=0, fingerprint="x")
    builder.begin()
    pretrain.run(settings, inputs, Context(builder, seed=5, progress=Progress(quiet=True)))
    builder.finish(settings={}, inputs={}, seed=5, seconds=0.0, peak_memory_bytes=0)
    return path


@pytest.mark.parametrize("name", [*TRAINED, "self", "joint"])
def test_resumes_bit_exactly_and_exports(
    name: str, tiny_store: Store, generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(name) if name in OBJECTIVES else settings_of("replaced_lm", generator=name, self_refresh_steps=3)
    settings = settings.model_copy(update={"dropout": 0.1})
    inputs = {"store": tiny_store.path, "generator": generator}
    whole = run_stage(settings, inputs, tmp_path / "whole")

    load = PassageSteps.load

    def killed(self: PassageSteps, step: int, rank: int, num_ranks: int) -> list[dict[str, Any]]:
        if step == 3:
            raise KilledError
        return load(self, step, rank, num_ranks)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(PassageSteps, "load", killed)
        run_stage(settings, inputs, tmp_path / "resumed")
    resumed = run_stage(settings, inputs, tmp_path / "resumed")
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(resumed) for file in resumed.rglob("*.safetensors"))
    for file in files:
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file
    curves = [[(line["step"], line["kind"], line["measures"]) for line in read_log(path / "log.jsonl")] for path in (whole, resumed)]
    for (step, kind, one), (step_two, kind_two, two) in zip(*curves, strict=True):
        assert (step, kind) == (step_two, kind_two)
        assert {key: value for key, value in one.items() if "_per_second" not in key} == pytest.approx(
            {key: value for key, value in two.items() if "_per_second" not in key}, rel=1e-6
        )

    bare = AutoModel.from_pretrained(whole, add_pooling_layer=False).eval()
    ids = torch.arange(5, 15)[None]
    continued = build(settings, tiny_store, generator, continued=whole, seed=9)
    continued.masked_lm = load_masked_lm(str(whole))
    continued.eval()
    torch.testing.assert_close(continued.pooled({"input_ids": ids}, "cls"), bare(ids).last_hidden_state[:, 0], rtol=0, atol=1e-6)
    other = build(settings, tiny_store, generator, continued=resumed, seed=9)
    for (key, tensor), (_, again) in zip(continued.objectives.state_dict().items(), other.objectives.state_dict().items(), strict=True):
        assert torch.equal(tensor, again), key
    fresh = build(settings, tiny_store, generator, seed=9).objectives.state_dict()
    assert not fresh or any(not torch.equal(tensor, fresh[key]) for key, tensor in other.objectives.state_dict().items())


def test_none_saves_the_start(tiny_store: Store, tmp_path: Path) -> None:
    path = run_stage(settings_of("none"), {"store": tiny_store.path}, tmp_path / "none")
    settings = settings_of("none")
    start = load_masked_lm(settings.model, tokenizer=tiny_store.tokenizer(), seed=5)
    saved = load_masked_lm(str(path))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(saved.state_dict()[name], start.state_dict()[name])
    assert json.loads((path / "manifest.json").read_text())["facts"]["num_steps"] == 0


def test_terms_add_up(tiny_store: Store, generator: Path) -> None:
    both = one_step(build(settings_of({"replaced_lm": 1.0, "bow": 0.1}), tiny_store, generator), tiny_store)
    alone = one_step(build(settings_of("replaced_lm"), tiny_store, generator), tiny_store)
    assert both["encoder_loss"] == pytest.approx(alone["encoder_loss"]) and both["decoder_loss"] == pytest.approx(alone["decoder_loss"])
    assert both["loss"] == pytest.approx(alone["loss"] + 0.1 * both["bow_loss"], rel=1e-6)
    # The first objective decides what the encoder reads and its own loss.
    turned = one_step(build(settings_of({"bow": 0.1, "replaced_lm": 1.0}), tiny_store, generator), tiny_store)
    assert turned["loss"] == pytest.approx(0.1 * (turned["encoder_loss"] + turned["bow_loss"]) + turned["decoder_loss"], rel=1e-6)
    assert "encoder_replaced" not in turned and turned["decoder_replaced"] > 0


def test_objectives_that_cut_differently_are_refused(tiny_store: Store) -> None:
    with pytest.raises(ModelError, match=r"cocondenser \(neighbours\).*cropping \(crops\)"):
        build(settings_of({"cocondenser": 1.0, "cropping": 1.0}), tiny_store, None)


def test_generators(tiny_store: Store, generator: Path) -> None:
    with pytest.raises(ModelError, match="samples from a generator"):
        build(settings_of("replaced_lm"), tiny_store, None)
    joint = build(settings_of("replaced_lm", generator="joint"), tiny_store, generator)
    found = one_step(joint, tiny_store)
    assert found["loss"] == pytest.approx(found["encoder_loss"] + found["decoder_loss"] + 0.2 * found["generator_loss"], rel=1e-6)
    assert joint.generator is not None and all(parameter.grad is not None for parameter in joint.generator.parameters())
    frozen = one_step(build(settings_of("replaced_lm"), tiny_store, generator), tiny_store)
    assert found["encoder_loss"] == pytest.approx(frozen["encoder_loss"], rel=1e-6)

    own = build(settings_of("replaced_lm", generator="self", self_refresh_steps=2), tiny_store, None)
    before = own.generator.masked_lm.state_dict()["bert.embeddings.word_embeddings.weight"].clone()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        own.masked_lm.get_input_embeddings().weight.add_(1.0)
    own.train()
    for step, taken in ((1, False), (2, True)):
        one_step(own, tiny_store, step=step)
        now = own.generator.masked_lm.state_dict()["bert.embeddings.word_embeddings.weight"]  # type: ignore[union-attr, operator]
        assert torch.equal(now, before + taken)
    assert not any(parameter.requires_grad for parameter in own.generator.parameters())  # type: ignore[union-attr]


def test_softmax_over_the_corpus(tiny_store: Store, generator: Path) -> None:
    """Equal to the plain loss once what never occurs has probability 0."""
    restricted = build(settings_of("replaced_lm", softmax="corpus"), tiny_store, generator)
    plain = build(settings_of("replaced_lm"), tiny_store, generator)
    outside = torch.ones(plain.masked_lm.config.vocab_size, dtype=torch.bool)
    outside[corpus_ids(tiny_store, len(outside))] = False
    assert outside.any()
    found = one_step(restricted, tiny_store)["loss"]
    assert found < one_step(plain, tiny_store)["loss"]
    with torch.no_grad():
        plain.masked_lm.get_output_embeddings().bias[outside] = -1e4
    assert found == pytest.approx(one_step(plain, tiny_store)["loss"], rel=1e-5)


def test_masking_of_the_recipe_decides_what_is_masked(tiny_store: Store, generator: Path) -> None:
    rows = np.arange(60, dtype=np.int64)
    batch, draws = collate(tiny_store.passages, rows), Draws(7, np.zeros(60, dtype=np.int64), rows)
    masks = {}
    for kind in ("whole_word", "token", "span", "idf"):
        task = build(settings_of("replaced_lm", masking=kind), tiny_store, generator)
        weights_V = idf_weights(tiny_store.passages, task.masked_lm.config.vocab_size)
        found = task.views()(batch, draws)["encoder_positions"].numpy()
        expected = Masking(kind, weights_V).mask(batch, 0.3, draws.uniforms(0, batch.input_ids.shape[1]))
        np.testing.assert_array_equal(found, np.flatnonzero(expected))
        masks[kind] = found.tobytes()
    assert len(set(masks.values())) == 4


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "masked_lm"])
def test_every_objective_counts_behind_another(name: str, tiny_store: Store, generator: Path) -> None:
    """Its terms add to the loss of bag of words (or of cropping, where it cuts passages), and no parameter waits for a gradient."""
    first = "cropping" if find_objective(name).sequences == "crops" else "condenser" if name == "bow" else "bow"
    if name == first:
        return
    both = build(settings_of({first: 1.0, name: 2.0}), tiny_store, generator)
    found = one_step(both, tiny_store)
    assert all(parameter.grad is not None for parameter in both.parameters() if parameter.requires_grad)
    doubled = one_step(build(settings_of({first: 1.0, name: 4.0}), tiny_store, generator), tiny_store)
    assert doubled["loss"] > found["loss"] * 1.01


def test_masked_lm_behind_another_objective_is_refused() -> None:
    with pytest.raises(ValidationError, match="adds nothing behind another"):
        settings_of({"bow": 1.0, "masked_lm": 1.0})


def test_settings_without_effect_are_named(tiny_store: Store, generator: Path) -> None:
    settings = settings_of("bow", decoder_layers=1, masking="token", softmax="corpus", skip_layer=1, generator="joint")
    assert unused_settings(settings, build(settings, tiny_store, generator)) == ["decoder_layers", "skip_layer", "generator"]
    settings = settings_of("cropping", contrast_temperature=0.1, encoder_mask_rate=0.2, self_refresh_steps=3)
    assert unused_settings(settings, build(settings, tiny_store, None)) == ["encoder_mask_rate", "self_refresh_steps"]


def test_dev_loss_of_a_contrast_does_not_depend_on_micro_batches(tiny_store: Store) -> None:
    task = build(settings_of("ict"), tiny_store, None).eval()
    found = []
    for micro_batch_tokens in (10_000, 150):
        feeding = Feeding(tiny_store.passages, task.views(), micro_batch_tokens, True, 7)
        measure = held_out_measures(task, feeding, np.arange(30), torch.no_grad, torch.device("cpu"))
        assert measure is not None
        found.append(measure())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_generator_loss_counts_the_passes_that_were_made(tiny_store: Store, generator: Path) -> None:
    for weight in (0.2, 1.0):
        task = build(settings_of({"bow": 1.0, "replaced_lm": 1.0}, generator="joint", generator_weight=weight), tiny_store, generator)
        found = one_step(task, tiny_store)
        parts = found["encoder_loss"] + found["bow_loss"] + found["decoder_loss"] + weight * found["generator_loss"]
        assert found["loss"] == pytest.approx(parts, rel=1e-6)
    # An untrained generator is about as good as chance; with a pass too many in the divisor it would look better than that.
    both = one_step(build(settings_of("replaced_lm", generator="joint"), tiny_store, generator), tiny_store)
    assert found["generator_loss"] == pytest.approx(both["generator_loss"], rel=0.05)


@pytest.mark.parametrize("name", TRAINED)
def test_dev_measures_sum_to_the_loss(name: str, tiny_store: Store, generator: Path) -> None:
    task = build(settings_of(name), tiny_store, generator).eval()
    feeding = Feeding(tiny_store.passages, task.views(), 10_000, True, 7)
    measure = held_out_measures(task, feeding, np.arange(20), torch.no_grad, torch.device("cpu"))
    assert measure is not None
    found = measure()
    parts = sum(value * (0.1 if key == "ordinary_loss" else 1.0) for key, value in found.items() if key.endswith("_loss"))
    assert found["loss"] == pytest.approx(parts, rel=1e-6)
    assert found == measure()
