"""Options of the contrastive step: temperature, matryoshka, rounding, distillation terms and their shares of the gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from simlm.data.groups import TrainingGroups
from simlm.errors import DataError, RecipeError
from simlm.losses.compression import binary_rounded, int8_rounded
from simlm.losses.contrastive import info_nce
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.recipe import DistillSettings, ModelSettings, RetrieverSettings
from simlm.training.contrastive import ContrastiveBatches, ContrastiveTask, train_biencoder, warmed_up
from tests.golden.test_finetuning_steps import load_one, make_groups
from tests.unit.test_trainer import FakeContext

if TYPE_CHECKING:
    from pathlib import Path

    from simlm.data.store import Store

torch.set_num_threads(1)
SHARED: dict[str, Any] = {"queries_per_step": 4, "group_size": 3}


class Lookup(nn.Module):
    """Knows its vectors: of the step's 12 passages and 4 queries, whatever they say."""

    def __init__(self) -> None:
        super().__init__()
        vectors = torch.randn(16, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.passages, self.queries = (nn.Parameter(F.normalize(part, dim=1)) for part in (vectors[:12], vectors[12:]))

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        return self.passages if len(input_ids) == 12 else self.queries


def step_of(store: Store, settings: RetrieverSettings) -> tuple[dict[str, Tensor], Lookup, dict[str, Any]]:
    """Outputs of step 1, with the gradients left in the vectors."""
    model, batch = Lookup(), load_one(ContrastiveBatches(store, make_groups(store, 3), settings, 9), 1)
    outputs = ContrastiveTask(model, settings)(**batch)
    outputs["loss"].backward()
    return outputs, model, batch


def ordered(model: Lookup, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries, and passages in the order of the groups."""
    vectors = torch.cat([model.passages, model.queries])[batch["order"]].detach()
    return vectors[:4], vectors[4:]


# --- temperature

WARMUP = RetrieverSettings(temperature_mode="warmup", temperature_start=0.1, temperature_warmup_steps=4, **SHARED)


def test_a_temperature_warms_up_step_by_step(tiny_store: Store) -> None:
    assert [round(warmed_up(WARMUP, step), 9) for step in (0, 1, 2, 3, 4, 5, 99)] == [0.1, 0.08, 0.06, 0.04, 0.02, 0.02, 0.02]
    outputs, model, batch = step_of(tiny_store, WARMUP)
    queries, passages = ordered(model, batch)
    expected = info_nce(queries, passages, torch.arange(4) * 3, temperature=0.08, excluded_QP=batch["excluded_QP"])
    assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert outputs["temperature"].item() == pytest.approx(0.08)


def learned(**options: Any) -> tuple[ContrastiveTask, torch.optim.Optimizer]:
    task = ContrastiveTask(nn.Linear(2, 2), RetrieverSettings(temperature_mode="learned", **options))
    optimizer = torch.optim.AdamW([{"params": list(task.parameters()), "weight_decay": 0.1}], lr=1e-5)
    task.prepare_optimizer(optimizer)
    return task, optimizer


def test_a_learned_temperature_has_its_own_learning_rate_and_does_not_decay() -> None:
    task, optimizer = learned(temperature_learning_rate=0.01)
    assert task.log_temperature is not None and task.facts() == {"temperature": pytest.approx(0.02)}
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (2, 1e-5, 0.1),
        (1, 0.01, 0.0),
    ]
    task.log_temperature.grad = torch.tensor([-3.0])
    optimizer.step()
    # Adam's first step is the learning rate, whatever the gradient.
    assert task.facts()["temperature"] == pytest.approx(0.02 * math.exp(0.01), rel=1e-5)


def test_a_learned_temperature_stays_at_a_hundredth_or_above() -> None:
    task, optimizer = learned(temperature_learning_rate=0.5)
    assert task.log_temperature is not None
    for gradient in (1.0, 1.0, 1.0):
        task.log_temperature.grad = torch.tensor([gradient])
        optimizer.step()
    assert task.facts()["temperature"] == pytest.approx(0.01, rel=1e-6)


def test_a_fixed_temperature_is_no_parameter_and_no_fact() -> None:
    task = ContrastiveTask(nn.Linear(2, 2), RetrieverSettings())
    optimizer = torch.optim.AdamW(task.parameters())
    task.prepare_optimizer(optimizer)
    assert len(optimizer.param_groups) == 1 and task.facts() == {} and len(list(task.parameters())) == 2


# --- matryoshka and rounding


def test_the_loss_is_the_mean_over_the_sizes(tiny_store: Store) -> None:
    settings = RetrieverSettings(matryoshka=[4, 2], temperature=0.5, **SHARED)
    outputs, model, batch = step_of(tiny_store, settings)
    losses = []
    for size in (6, 4, 2):
        queries, passages = (F.normalize(rows[:, :size], dim=1) for rows in ordered(model, batch))
        losses.append(info_nce(queries, passages, torch.arange(4) * 3, temperature=0.5, excluded_QP=batch["excluded_QP"]).item())
    assert len({round(loss, 6) for loss in losses}) == 3
    assert outputs["loss"].item() == pytest.approx(sum(losses) / 3, rel=1e-12)


@pytest.mark.parametrize(("name", "rounded"), [("int8", int8_rounded), ("binary", binary_rounded)])
def test_passages_are_rounded_after_they_are_cut_and_queries_never(tiny_store: Store, name: Any, rounded: Any) -> None:
    outputs, model, batch = step_of(tiny_store, RetrieverSettings(quantisation=name, matryoshka=[3], temperature=0.5, **SHARED))
    losses = []
    for size in (6, 3):
        queries, passages = (F.normalize(rows[:, :size], dim=1) for rows in ordered(model, batch))
        scores = {"temperature": 0.5, "excluded_QP": batch["excluded_QP"]}
        losses.append(info_nce(queries, rounded(passages), torch.arange(4) * 3, **scores).item())
    assert outputs["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-12)


# --- distillation


@pytest.mark.parametrize("contrast", ["query_to_passages", "all_pairs"])
@pytest.mark.parametrize("name", ["kl", "margin_mse", "listwise"])
def test_shares_of_the_gradient(tiny_store: Store, name: Any, contrast: Any) -> None:
    def gradient(weight: float) -> Tensor:
        settings = DistillSettings(distill_loss=name, contrast=contrast, contrastive_weight=weight, **SHARED)
        _, model, _ = step_of(tiny_store, settings)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    # The loss is D + w C: its gradients at w = 1 and w = 2 tell those of D and C.
    contrastive = gradient(2.0) - gradient(1.0)
    distilled = gradient(1.0) - contrastive
    settings = DistillSettings(distill_loss=name, contrast=contrast, contrastive_weight=0.2, **SHARED)
    outputs, _, batch = step_of(tiny_store, settings)
    norms = (distilled.norm(), 0.2 * contrastive.norm())
    assert outputs[f"{name}_gradient_share"].item() == pytest.approx((norms[0] / sum(norms)).item(), rel=1e-5)
    assert outputs["contrastive_gradient_share"].item() == pytest.approx((norms[1] / sum(norms)).item(), rel=1e-5)
    assert outputs["loss"].item() == pytest.approx((outputs[name] + 0.2 * outputs["contrastive"]).item(), rel=1e-9)
    with torch.no_grad():
        assert f"{name}_gradient_share" not in ContrastiveTask(Lookup(), settings)(**batch)


def test_a_term_without_weight_has_no_share(tiny_store: Store) -> None:
    outputs, _, _ = step_of(tiny_store, DistillSettings(contrastive_weight=0.0, **SHARED))
    assert outputs["contrastive_gradient_share"].item() == 0.0 and outputs["kl_gradient_share"].item() == 1.0
    assert outputs["loss"].item() == pytest.approx(outputs["kl"].item())


# --- what is refused before training


def biencoder() -> BiEncoder:
    config = {
        "model_type": "bert",
        "vocab_size": 500,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    return BiEncoder(load_encoder(ModelSettings(start="scratch", config=config), seed=0))


def attempt(store: Store, folder: Path, settings: RetrieverSettings, groups: TrainingGroups) -> None:
    work = folder / "work"
    work.mkdir()
    try:
        train_biencoder(biencoder(), store, groups, settings, FakeContext(work), description="train")
    finally:
        assert not list(work.iterdir())


@pytest.mark.parametrize("size", [8, 9])
def test_matryoshka_sizes_are_below_the_models(tiny_store: Store, tmp_path: Path, size: int) -> None:
    with pytest.raises(RecipeError, match=rf"matryoshka = \[4, {size}\]: the model's embeddings have 8 numbers"):
        attempt(tiny_store, tmp_path, RetrieverSettings(matryoshka=[4, size], **SHARED), make_groups(tiny_store, 3))


@pytest.mark.parametrize("part", ["positive_scores", "negative_scores"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_to_distil_are_finite(tiny_store: Store, tmp_path: Path, part: str, value: float) -> None:
    groups = make_groups(tiny_store, 3)
    scores = getattr(groups.groups, part).copy()
    scores[-1] = value
    groups.groups = dataclasses.replace(groups.groups, **{part: scores})
    with pytest.raises(DataError, match=f"training query row {groups.groups.query_rows[-1]} has no finite teacher score"):
        attempt(tiny_store, tmp_path, DistillSettings(**SHARED), groups)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RetrieverSettings, {"temperature_mode": "warmup", "temperature_start": 0.1}, "needs temperature_warmup_steps"),
        (RetrieverSettings, {"temperature_mode": "warmup", "temperature_warmup_steps": 9}, "needs temperature_start"),
        (RetrieverSettings, {"temperature_start": 0.1}, "temperature_start changes nothing"),
        (RetrieverSettings, {"temperature_learning_rate": 0.1}, "temperature_learning_rate changes nothing"),
        (RetrieverSettings, {"temperature_mode": "learned", "temperature": 0.005}, "kept at 0.01 or above"),
        (RetrieverSettings, {"temperature": math.inf}, "finite number"),
        (RetrieverSettings, {"matryoshka": [4, 4]}, "there twice"),
        (RetrieverSettings, {"matryoshka": [0]}, "greater than or equal to 1"),
        (RetrieverSettings, {"teacher_margin": -0.1}, "greater than or equal to 0"),
        (RetrieverSettings, {"quantisation": "int4"}, "'none', 'int8' or 'binary'"),
        (DistillSettings, {"contrastive_weight": -0.2}, "greater than or equal to 0"),
        (DistillSettings, {"contrastive_weight": math.nan}, "finite number"),
        (DistillSettings, {"distill_loss": "listwise", "teacher_temperature": 2.0}, "teacher_temperature 2 changes nothing"),
        (DistillSettings, {"contrastive_weight": 0.0, "teacher_margin": 1.0}, "teacher_margin is of InfoNCE"),
        (DistillSettings, {"contrastive_weight": 0.0, "temperature_mode": "learned"}, "temperature_mode is of InfoNCE"),
    ],
)
def test_settings_that_make_no_sense(kind: type[RetrieverSettings], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**options)
