"""Passages of a step, their cut into micro-batches, and their sharing among processes."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.models.backbone import load_masked_lm
from simlm.objectives.bottleneck import Decoder
from simlm.objectives.generator import Generator
from simlm.objectives.masked_lm import MaskedLM
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.replaced_lm import ReplacedLM
from simlm.objectives.steps import Feeding, PassageSteps, held_out_measures, token_counts
from simlm.objectives.views import PretrainViews
from simlm.recipe import ModelSettings
from tests.unit.test_backbone import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simlm.data.store import Store
    from simlm.objectives import Sequences

torch.set_num_threads(1)

VIEWS = PretrainViews(0.3, 0.5, sampled=True)


def feeding(store: Store, micro_batch_tokens: int = 300, seed: int = 1) -> Feeding:
    return Feeding(store.passages, VIEWS, micro_batch_tokens, True, seed)


def steps(store: Store, *, passages_per_step: int = 25, micro_batch_tokens: int = 300, num_rows: int = 60, seed: int = 1) -> PassageSteps:
    rows = np.arange(num_rows, dtype=np.int64)
    return PassageSteps(feeding(store, micro_batch_tokens, seed), rows, passages_per_step=passages_per_step, num_steps=10)


def model(store: Store) -> Pretraining:
    tokenizer = store.tokenizer()
    config = CONFIGS["bert"] | {"max_position_embeddings": 64, "initializer_range": 0.3}
    settings = ModelSettings(start="scratch", config=config)
    masked_lm = load_masked_lm(settings, tokenizer=tokenizer, dropout=0.0)
    return Pretraining(
        masked_lm,
        {"replaced_lm": ReplacedLM(Decoder(masked_lm))},
        mask_token_id=int(tokenizer.mask_token_id),
        views=VIEWS,
        generator=Generator(load_masked_lm(settings, tokenizer=tokenizer, seed=1), tokenizer),
    )


def test_every_passage_once_an_epoch(tiny_store: Store) -> None:
    batches = steps(tiny_store)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(12):  # 12 x 25 = 5 epochs of 60
        rows, epochs = batches.passages(step)
        assert len(rows) == 25
        seen.update(zip(epochs.tolist(), rows.tolist(), strict=True))
    assert seen == Counter((epoch, row) for epoch in range(5) for row in range(60))
    assert batches.passages(2)[1].tolist() == [0] * 10 + [1] * 15
    first = [steps(tiny_store, seed=seed).passages(0)[0].tolist() for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_a_step_does_not_depend_on_the_steps_before(tiny_store: Store) -> None:
    walked = steps(tiny_store)
    for step in range(7):
        walked.load(step, 0, 1)
    fresh: PassageSteps = pickle.loads(pickle.dumps(steps(tiny_store)))
    for found, expected in zip(fresh.load(7, 0, 1), walked.load(7, 0, 1), strict=True):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]


def test_micro_batches_are_bounded_and_complete(tiny_store: Store) -> None:
    micro_batches = steps(tiny_store).load(0, 0, 1)
    assert all(micro_batch["input_ids"].numel() <= 300 for micro_batch in micro_batches)
    assert sum(len(micro_batch["input_ids"]) for micro_batch in micro_batches) == 25
    scored = sum(len(micro_batch["scored"]) for micro_batch in micro_batches)
    assert {micro_batch["step_tokens"] for micro_batch in micro_batches} == {scored}
    for micro_batch in micro_batches:
        # Told by absence where there is no padding.
        padded = bool((micro_batch["input_ids"] == tiny_store.tokenizer().pad_token_id).any())
        assert padded == ("attention_mask" in micro_batch)
        assert (
            set(micro_batch["encoder_positions"].tolist())
            <= set(micro_batch["decoder_positions"].tolist())
            <= set(micro_batch["scored"].tolist())
        )
        assert len(micro_batch["encoder_uniforms"]) == len(micro_batch["encoder_positions"])


def test_token_counts_are_those_of_the_batches(tiny_store: Store) -> None:
    counts = token_counts(tiny_store.passages, np.arange(60))
    assert counts[5] == int(tiny_store.passages.lengths[5]) - 2  # the sixth passage has no title
    assert counts[4] == int(tiny_store.passages.lengths[4]) - 3


def total(outputs: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for output in outputs:
        sums.update({name: value.item() for name, value in output.items()})
    return dict(sums)


@pytest.mark.parametrize(("num_ranks", "micro_batch_tokens"), [(1, 90), (1, 4000), (2, 300), (3, 300), (7, 4000)])
def test_loss_depends_on_neither_processes_nor_micro_batches(tiny_store: Store, num_ranks: int, micro_batch_tokens: int) -> None:
    objective = model(tiny_store)
    expected = total(objective(**micro_batch) for micro_batch in steps(tiny_store).load(3, 0, 1))
    shared = steps(tiny_store, micro_batch_tokens=micro_batch_tokens)
    found = total(objective(**micro_batch) for rank in range(num_ranks) for micro_batch in shared.load(3, rank, num_ranks))
    assert found == pytest.approx(expected, rel=1e-5)
    own = [sum(micro_batch["input_ids"].numel() for micro_batch in shared.load(3, rank, num_ranks)) for rank in range(num_ranks)]
    assert max(own) < 2 * min(own)  # 4 passages against 3 at worst


def test_gradients_do_not_depend_on_the_cut(tiny_store: Store) -> None:
    def gradients(micro_batch_tokens: int) -> dict[str, torch.Tensor]:
        objective = model(tiny_store)
        for micro_batch in steps(tiny_store, micro_batch_tokens=micro_batch_tokens).load(0, 0, 1):
            objective(**micro_batch)["loss"].backward()
        return {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}

    whole, pieces = gradients(10_000), gradients(100)
    assert whole.keys() == pieces.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["neighbours", "crops", "sentence_and_rest"])
def test_cut_passages_keep_to_the_budget(tiny_store: Store, kind: Sequences) -> None:
    fed = Feeding(tiny_store.passages, PretrainViews(0.3, cut_into=kind), 300, True, 1)
    micro_batches = fed.micro_batches(np.arange(60), np.zeros(60, dtype=np.int64))
    sizes = [micro_batch["input_ids"].numel() for micro_batch in micro_batches]
    assert max(sizes) <= 300 and sum(len(micro_batch["input_ids"]) for micro_batch in micro_batches) == 120
    assert sum(len(micro_batch["scored"]) for micro_batch in micro_batches) == micro_batches[0]["step_tokens"]


def test_masked_lm_counts_its_budget(tiny_store: Store) -> None:
    views = PretrainViews(0.3)
    fed = Feeding(tiny_store.passages, views, 500, True, 3)
    micro_batches = fed.micro_batches(np.arange(60), np.zeros(60, dtype=np.int64))
    masked = sum(len(micro_batch["encoder_positions"]) for micro_batch in micro_batches)
    assert 0.97 * micro_batches[0]["step_encoder_masked"] <= masked <= micro_batches[0]["step_encoder_masked"]
    settings = ModelSettings(start="scratch", config=CONFIGS["electra"] | {"max_position_embeddings": 64})
    masked_lm = load_masked_lm(settings, tokenizer=tiny_store.tokenizer(), dropout=0.0)
    task = Pretraining(masked_lm, {"masked_lm": MaskedLM()}, mask_token_id=int(tiny_store.tokenizer().mask_token_id), views=views)
    loss = sum(task(**micro_batch)["loss"].item() for micro_batch in micro_batches)
    dev = held_out_measures(task, fed, np.arange(60), torch.no_grad, torch.device("cpu"))
    assert dev is not None
    assert loss == pytest.approx(np.log(len(tiny_store.tokenizer())), rel=0.05)
    assert dev()["loss"] == pytest.approx(np.log(len(tiny_store.tokenizer())), rel=0.05)


def test_dev_measures_are_always_of_the_same_masks(tiny_store: Store) -> None:
    objective = model(tiny_store)
    arguments: tuple[Any, ...] = (torch.no_grad, torch.device("cpu"))
    first, second = (held_out_measures(objective, feeding(tiny_store, tokens), np.arange(20), *arguments) for tokens in (200, 5000))
    assert first is not None and second is not None
    found = first()
    assert found == first() == pytest.approx(second(), rel=1e-5)
    assert found["encoder_accuracy_at_replaced"] <= 1.0
    assert held_out_measures(objective, feeding(tiny_store), np.arange(0), *arguments) is None
