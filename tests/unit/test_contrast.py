"""The contrast over a whole step: plain InfoNCE, and the gradient that one pass over everything would have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simlm.models.backbone import load_masked_lm
from simlm.objectives import Parts
from simlm.objectives.contrast import Contrast
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.steps import Feeding
from simlm.recipe import ModelSettings, PretrainSettings

if TYPE_CHECKING:
    from simlm.data.store import Store

torch.set_num_threads(1)

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {"model_type": "bert", "max_position_embeddings": 64, "initializer_range": 0.2, **SHAPE}

MicroBatches = list[dict[str, Any]]


def task_of(store: Store, objective: Any, *, dropout: float = 0.0, **changes: Any) -> Pretraining:
    settings = PretrainSettings.model_validate({"objective": objective, "model": {"start": "scratch", "config": ENCODER}} | changes)
    tokenizer = store.tokenizer()
    masked_lm = load_masked_lm(ModelSettings(start="scratch", config=ENCODER), tokenizer=tokenizer, seed=1, dropout=dropout)
    return Pretraining.build(settings, Parts(masked_lm, tokenizer, None, None))


def seeded(task: Pretraining, store: Store, num_passages: int, micro_batch_tokens: int, rank: int = 0, num_ranks: int = 1) -> MicroBatches:
    """A rank's micro-batches of one step with the seeds that the trainer gives them."""
    rows = np.arange(3, 3 + num_passages, dtype=np.int64)
    found = Feeding(store.passages, task.views(), micro_batch_tokens, True, 7).micro_batches(rows, rows % 2, rank, num_ranks)
    return [micro_batch | {"dropout_seed": 100 * rank + place} for place, micro_batch in enumerate(found)]


def two_passes(task: Pretraining, micro_batches: MicroBatches, autocast: bool = False) -> dict[str, float]:
    """As the trainer runs a step: summed outputs, gradients left in the task."""
    task.train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prepared = task.before_step(micro_batches, rank=0, num_ranks=1, seed=0)
    sums: dict[str, float] = {}
    for micro_batch in prepared:
        torch.manual_seed(micro_batch["dropout_seed"])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = task(**micro_batch)
        outputs["loss"].backward()
        for name, value in outputs.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums


def plain_info_nce(sequences: Tensor, partners: list[int], temperature: float) -> Tensor:
    """Written out pair by pair."""
    losses = []
    for own in range(len(sequences)):
        scores = [
            torch.dot(sequences[own], other) / (sequences[own].norm() * other.norm() * temperature)
            for place, other in enumerate(sequences)
            if place != own
        ]
        partner = torch.dot(sequences[own], sequences[partners[own]])
        partner = partner / (sequences[own].norm() * sequences[partners[own]].norm() * temperature)
        losses.append(torch.logsumexp(torch.stack(scores), 0) - partner)
    return torch.stack(losses)


def one_pass(task: Pretraining, micro_batches: MicroBatches, temperature: float = 0.05) -> float:
    """The mean of plain InfoNCE over all sequences of the step, whose graph is held at once; gradients left in the task."""
    task.train()
    firsts, seconds = [], []
    for micro_batch in micro_batches:
        torch.manual_seed(micro_batch["dropout_seed"])
        first, second = task._encode(micro_batch).hidden_BTH[:, 0].chunk(2)
        firsts.append(first)
        seconds.append(second)
    sequences = torch.cat([*firsts, *seconds])
    size = len(sequences) // 2
    loss = plain_info_nce(sequences, [(place + size) % (2 * size) for place in range(2 * size)], temperature).mean()
    loss.backward()
    return loss.item()


def gradients(task: Pretraining) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of all elements, as a share of the largest element expected (or of 1, if that is smaller)."""
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    assert size > 0.01
    return max(float((gradient - expected[name]).abs().max()) for name, gradient in found.items()) / max(size, 1.0)


def test_losses_by_hand() -> None:
    """Two passages, temperature 0.5: a = (1, 0), a' = (0, 1), b = b' = (1, 0)."""
    first, second = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = Contrast(0.5).losses(first, second)
    # Scores are cosine / 0.5. a: b, a', b' = 2, 0, 2, of which a' is right; a': all 0; b and b': 2, 2, 0 of which the other b is right.
    expected = [math.log(1 + 2 * math.e**2), math.log(2 + 1 / math.e**2), math.log(3), math.log(2 + 1 / math.e**2)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_losses_are_info_nce() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = torch.randn(2, 7, 5, generator=generator)
    contrast = Contrast(0.05)
    unit = [contrast.vectors(part[:, None], None) for part in (first, second)]
    expected = plain_info_nce(torch.cat([first, second]), [*range(7, 14), *range(7)], 0.05)
    torch.testing.assert_close(contrast.losses(*unit), expected, rtol=1e-5, atol=1e-5)
    assert contrast.measure(*unit) == pytest.approx(expected.mean().item(), rel=1e-5)
    many = [part.repeat(80, 1) for part in unit]  # 560 passages: two blocks of 256, the rest is left out
    blocks = [contrast.losses(many[0][start : start + 256], many[1][start : start + 256]).mean().item() for start in (0, 256)]
    assert contrast.measure(many[0], many[1]) == pytest.approx(sum(blocks) / 2, rel=1e-5)


def test_mean_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    found = Contrast(0.05, "mean").vectors(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(found, torch.full((1, 2), math.sqrt(0.5)))


def test_autocast_does_not_coarsen_the_scores() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = torch.nn.functional.normalize(torch.randn(2, 9, 16, generator=generator), dim=-1)
    plain = Contrast(0.02).losses(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Contrast(0.02).losses(first, second), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("objective", ["cropping", "ict"])
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 70])
def test_two_passes_have_the_gradient_of_one(tiny_store: Store, objective: str, dropout: float, micro_batch_tokens: int) -> None:
    task, plain = (task_of(tiny_store, objective, dropout=dropout) for _ in range(2))
    micro_batches = seeded(task, tiny_store, 7, micro_batch_tokens)
    assert (len(micro_batches) > 2) == (micro_batch_tokens == 70)
    found = two_passes(task, micro_batches)
    assert found == {
        "loss": pytest.approx(one_pass(plain, micro_batches), rel=1e-5),
        "contrast_loss": pytest.approx(found["loss"], rel=1e-5),
    }
    expected = gradients(plain)
    assert gradients(task).keys() == expected.keys()
    # The one-pass fp32 gradient is itself about 1e-6 from the one in fp64.
    assert relative_difference(gradients(task), expected) < 5e-6


def test_dropout_is_that_of_the_second_pass(tiny_store: Store) -> None:
    """With other seeds in the second pass the gradient is another one, so the test above tests something."""
    task, other = (task_of(tiny_store, "cropping", dropout=0.2) for _ in range(2))
    micro_batches = seeded(task, tiny_store, 7, 70)
    two_passes(task, micro_batches)
    two_passes(other, [micro_batch | {"dropout_seed": micro_batch["dropout_seed"] + 50} for micro_batch in micro_batches])
    assert relative_difference(gradients(task), gradients(other)) > 0.01


def test_bf16_is_finite_and_near(tiny_store: Store) -> None:
    task, plain = (task_of(tiny_store, "cropping") for _ in range(2))
    micro_batches = seeded(task, tiny_store, 7, 70)
    found, exact = two_passes(task, micro_batches, autocast=True), two_passes(plain, micro_batches)
    assert found["loss"] == pytest.approx(exact["loss"], rel=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(task).values())


def test_a_passage_alone_has_nothing_to_learn(tiny_store: Store) -> None:
    task = task_of(tiny_store, "cropping")
    assert two_passes(task, seeded(task, tiny_store, 1, 10_000)) == {"loss": 0.0, "contrast_loss": 0.0}
    assert all((gradient == 0).all() for gradient in gradients(task).values())


def test_both_passes_read_the_same_samples_of_the_encoders_own_generator(tiny_store: Store) -> None:
    """The copy of the encoder is taken before the first pass, not between the two."""
    objective = {"replaced_lm": 1.0, "cropping": 1.0}
    task = task_of(tiny_store, objective, generator="self", self_refresh_steps=1)
    with torch.no_grad():
        task.masked_lm.get_output_embeddings().bias.uniform_(-9, 9, generator=torch.Generator().manual_seed(0))
    micro_batches = [micro_batch | {"step": 4} for micro_batch in seeded(task, tiny_store, 6, 120)]
    task.train()
    with torch.no_grad():
        prepared = task.before_step(micro_batches, rank=0, num_ranks=1, seed=0)
        before = [task._encode(micro_batch).encoder_BT for micro_batch in prepared]
        task(**prepared[0])
        after = [task._encode(micro_batch).encoder_BT for micro_batch in prepared]
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))


def test_objectives_without_contrast_keep_their_micro_batches(tiny_store: Store) -> None:
    task = task_of(tiny_store, "masked_lm")
    micro_batches = seeded(task, tiny_store, 3, 10_000)
    assert task.before_step(micro_batches, rank=0, num_ranks=1, seed=0) is micro_batches
