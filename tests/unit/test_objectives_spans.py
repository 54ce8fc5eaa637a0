"""Objectives on two sequences a passage: what is read, what is trained, and that nothing depends on how a step is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.models.backbone import encoder_of, load_masked_lm
from simlm.objectives import Parts, Tokens, at
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.steps import Feeding, held_out_measures
from simlm.recipe import ModelSettings, PretrainSettings
from tests.conftest import build_store, tiny_passages
from tests.unit.test_backbone import CONFIGS
from tests.unit.test_contrast import gradients, relative_difference, seeded, task_of, two_passes

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

torch.set_num_threads(1)

OBJECTIVES = ("cocondenser", "context", "ict", "cropping")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_depend_on_its_cut(tiny_store: Store, objective: str) -> None:
    whole, cut_up = (task_of(tiny_store, objective) for _ in range(2))
    one, many = (seeded(whole, tiny_store, 8, tokens) for tokens in (10_000, 90))
    assert len(one) == 1 < len(many)
    assert two_passes(whole, one) == pytest.approx(two_passes(cut_up, many), rel=1e-5)
    assert relative_difference(gradients(cut_up), gradients(whole)) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_trained_gets_a_gradient(tiny_store: Store, objective: str) -> None:
    """DDP waits for every parameter that requires one, so the head that no term reads is frozen."""
    task = task_of(tiny_store, objective)
    two_passes(task, seeded(task, tiny_store, 5, 10_000))
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in task.named_parameters() if parameter.grad is None} == frozen
    inside = {id(parameter) for parameter in encoder_of(task.masked_lm).parameters()}
    head = {name for name, parameter in task.masked_lm.named_parameters() if id(parameter) not in inside}
    assert frozen == ({f"masked_lm.{name}" for name in head} if objective in ("ict", "cropping") else set())
    assert len(head) == 5 and (frozen == set()) == any(own.uses_head for _, own in task._all())


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        ("cocondenser", {"encoder_loss": 1.0, "decoder_loss": 1.0, "contrast_loss": 1.0}),
        ("context", {"encoder_loss": 1.0, "decoder_loss": 1.0}),
        ("ict", {"contrast_loss": 1.0}),
        ({"masked_lm": 1.0, "cropping": 0.5}, {"encoder_loss": 1.0, "contrast_loss": 0.5}),
        ({"cropping": 2.0, "bow": 0.1}, {"contrast_loss": 2.0, "bow_loss": 0.1}),
        ({"ict": 1.0}, {"contrast_loss": 1.0}),
    ],
)
def test_the_loss_is_the_weighted_sum_of_what_is_logged(tiny_store: Store, objective: Any, parts: dict[str, float]) -> None:
    task = task_of(tiny_store, objective)
    found = two_passes(task, seeded(task, tiny_store, 6, 120))
    assert found.keys() == parts.keys() | {"loss"}
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in parts.items()), rel=1e-5)
    assert all(found[name] > 0 for name in parts)
    feeding = Feeding(tiny_store.passages, task.views(), 10_000, True, 7)
    measure = held_out_measures(task.eval(), feeding, np.arange(5), torch.no_grad, torch.device("cpu"))
    assert measure is not None
    measures = measure()
    assert measures["loss"] == pytest.approx(sum(weight * measures[name] for name, weight in parts.items()), rel=1e-5)


@pytest.mark.parametrize("objective", ["ict", "cropping"])
def test_the_encoder_reads_clean_text(tiny_store: Store, objective: str) -> None:
    task = task_of(tiny_store, objective)
    (micro_batch,) = seeded(task, tiny_store, 4, 10_000)
    seen = task._encode(micro_batch)
    assert torch.equal(seen.encoder_BT, micro_batch["input_ids"]) and len(seen.encoder_BT) == 8
    assert task._terms(seen) == []


def test_context_is_decoded_behind_the_neighbours_vector(tiny_store: Store) -> None:
    """The loss at a span's tokens has a gradient at its neighbour's [CLS] state and at no other state of the encoder."""
    task = task_of(tiny_store, "context").eval()
    (micro_batch,) = seeded(task, tiny_store, 3, 10_000)
    seen = task._encode(micro_batch)
    (term,) = task.objectives["context"].terms(seen)  # type: ignore[operator]
    assert isinstance(term, Tokens)
    width = micro_batch["input_ids"].shape[1]
    span_of = micro_batch["decoder_positions"] // width
    assert torch.equal(term.labels_N, at(micro_batch["input_ids"], micro_batch["decoder_positions"]))
    for span in range(6):
        (gradient,) = torch.autograd.grad((term.hidden_NH[span_of == span] ** 2).sum(), seen.hidden_BTH, retain_graph=True)
        reached = {tuple(place) for place in gradient.abs().sum(-1).nonzero().tolist()}
        assert reached == {((span + 3) % 6, 0)}
    # The decoder sees no token that it is to predict.
    embedded = seen.decoder_masked_BT.flatten()[micro_batch["decoder_positions"]]
    assert set(embedded.tolist()) == {tiny_store.tokenizer().mask_token_id}


def test_the_retrievers_pooling_is_contrasted(tiny_store: Store) -> None:
    pooling = {"model": {"start": "packaged:all-MiniLM-L6-v2", "pooling": "mean"}}
    task = task_of(tiny_store, "cropping", **pooling)
    (micro_batch,) = seeded(task, tiny_store, 4, 10_000)
    with torch.no_grad():
        (prepared,) = task.before_step([micro_batch], rank=0, num_ranks=1, seed=0)
    assert task.contrast is not None
    seen = task._encode(prepared)
    share = task.contrast.share(seen.hidden_BTH, seen.attention_mask, prepared)
    (gradient,) = torch.autograd.grad(share, seen.hidden_BTH)
    has_gradient = gradient.abs().sum(-1) > 0
    mask = prepared["attention_mask"].bool()
    assert torch.equal(has_gradient, mask)


def test_cocondenser_contrasts_the_late_vector_and_condenses(tiny_store: Store) -> None:
    """What it adds to condenser on the same spans is the contrast."""
    task = task_of(tiny_store, "cocondenser")
    micro_batches = seeded(task, tiny_store, 6, 10_000)
    found = two_passes(task, micro_batches)
    plain = task_of(tiny_store, "condenser")
    losses = two_passes(plain, micro_batches)
    assert found["encoder_loss"] == pytest.approx(losses["encoder_loss"]) and found["decoder_loss"] == pytest.approx(losses["decoder_loss"])
    assert found["loss"] == pytest.approx(losses["loss"] + found["contrast_loss"], rel=1e-6)


@pytest.mark.parametrize(("family", "tokenizer"), [("roberta", "tiny_bpe"), ("xlm-roberta", "tiny_unigram"), ("modernbert", "tiny_bpe")])
def test_other_families(family: str, tokenizer: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    own: PreTrainedTokenizerFast = request.getfixturevalue(tokenizer)
    store = build_store(tmp_path / "store", own, tiny_passages()[:6], [], {})
    model = ModelSettings(start="scratch", config=CONFIGS[family] | {"max_position_embeddings": 80})
    for objective in ("cropping", "cocondenser"):
        masked_lm = load_masked_lm(model, tokenizer=own, seed=1, dropout=0.0)
        task = Pretraining.build(PretrainSettings(objective=objective, decoder_layers=1), Parts(masked_lm, own, None, None))
        rows = np.arange(6, dtype=np.int64)
        micro_batches = Feeding(store.passages, task.views(), 100, False, 7).micro_batches(rows, rows)
        found = two_passes(task, [micro_batch | {"dropout_seed": 0} for micro_batch in micro_batches])
        assert found["contrast_loss"] > 0
        assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)
