"""The re-ranker's training: what is trained on, how often it is computed, and from which checkpoints it starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from simlm.models.crossencoder import CrossEncoder
from simlm.recipe import RerankerSettings
from simlm.stages import train_reranker
from simlm.training.reranking import ListBatches, ListwiseTask
from tests.golden.test_finetuning_steps import ToyEncoder, make_groups
from tests.unit.test_training_stages import context, inputs, training  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

torch.set_num_threads(1)


class Table(nn.Module):
    """The logit of a pair is looked up by its one token; `scored` keeps which rows were asked for, with and without gradient."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.scored: list[tuple[bool, bool, list[int]]] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.scored.append((torch.is_grad_enabled(), self.training, input_ids[:, 0].tolist()))
        return self.logits[input_ids[:, 0]]


def step_of(model: Table, settings: RerankerSettings, num_queries: int | None = None) -> dict[str, Tensor]:
    """One step with all lists of the table, each of group_size."""
    pairs = {"input_ids": torch.arange(len(model.logits))[:, None]}
    lists = len(model.logits) // settings.group_size
    return ListwiseTask(model, settings).train()(pairs, [1] * len(model.logits), num_queries or lists)  # type: ignore[no-any-return]


def cross_entropy(*logits: float) -> float:
    """Of the first among all."""
    return math.log(sum(math.exp(logit - logits[0]) for logit in logits))


def test_the_positive_is_trained_on_even_where_it_is_the_easiest() -> None:
    # The positive of the first list scores lowest of all, that of the second highest.
    model = Table([-5.0, 1.0, 3.0, 2.0, 4.0, 0.5, -1.0, 0.0])
    outputs = step_of(model, RerankerSettings(group_size=4, train_hardest=2, rdrop_weight=0.0))
    expected = (cross_entropy(-5.0, 3.0) + cross_entropy(4.0, 0.5)) / 2
    assert outputs["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert outputs["accuracy"].item() == 0.5
    outputs["loss"].backward()  # type: ignore[no-untyped-call]
    assert model.logits.grad is not None
    trained = [0, 2, 4, 5]
    assert model.logits.grad.nonzero().flatten().tolist() == trained
    # d/d logit of the mean over two queries: (softmax - 1) / 2 at the positive, softmax / 2 at the negative.
    share = 1 / (1 + math.exp(-8.0))
    assert model.logits.grad[[0, 2]].tolist() == pytest.approx([-share / 2, share / 2], rel=1e-6)


def test_the_forward_factor_scores_everything_once_without_gradient_and_dropout() -> None:
    model = Table([-5.0, 1.0, 3.0, 2.0])
    step_of(model, RerankerSettings(group_size=4, train_hardest=3, rdrop_weight=0.0))
    (look, all_rows), (train, kept) = [((grad, training), rows) for grad, training, rows in model.scored]
    assert (look, sorted(all_rows)) == ((False, False), [0, 1, 2, 3])
    assert (train, sorted(kept)) == ((True, True), [0, 2, 3])
    assert model.training


@pytest.mark.parametrize("rdrop_weight", [0.0, 1.0])
def test_training_on_the_hardest_of_all_is_plain_training(rdrop_weight: float) -> None:
    results = []
    for train_hardest in (None, 4, 9):
        model = Table([0.3, 1.0, -3.0, 2.0, 4.0, 0.5, -1.0, 0.0])
        outputs = step_of(model, RerankerSettings(group_size=4, train_hardest=train_hardest, rdrop_weight=rdrop_weight))
        outputs["loss"].backward()  # type: ignore[no-untyped-call]
        assert model.logits.grad is not None
        assert all(grad for grad, _, _ in model.scored)  # no look beforehand
        results.append((outputs["loss"].item(), model.logits.grad.tolist()))
    assert results[0] == results[1] == results[2]
    assert results[0][0] == pytest.approx((cross_entropy(0.3, 1.0, -3.0, 2.0) + cross_entropy(4.0, 0.5, -1.0, 0.0)) / 2, rel=1e-6)


@pytest.mark.parametrize(("rdrop_weight", "passes"), [(0.0, 1), (0.5, 2)])
def test_rdrop_costs_a_second_pass_only_where_it_counts(rdrop_weight: float, passes: int) -> None:
    model = Table([0.3, 1.0, -3.0, 2.0])
    outputs = step_of(model, RerankerSettings(group_size=4, train_hardest=None, rdrop_weight=rdrop_weight))
    assert sorted(row for _, _, rows in model.scored for row in rows) == sorted([0, 1, 2, 3] * passes)
    assert ("rdrop" in outputs) == (passes == 2)
    assert outputs["loss"].item() == pytest.approx(cross_entropy(0.3, 1.0, -3.0, 2.0), rel=1e-6)  # passes that agree add nothing


class Noisy(Table):
    """The second pass over a list sees its negative a nat lower."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = super().forward(input_ids)
        half = len(logits) // 2
        return logits - torch.cat([torch.zeros(half), torch.tensor([0.0, 1.0])])


def test_rdrop_by_hand() -> None:
    # Passes (0, 0) and (0, -1): p = 1/2, q = 1 / (1 + 1/e); (KL(p, q) + KL(q, p)) / 2 = (q - p) (log odds of q - of p) / 2 = (q - 1/2) / 2.
    outputs = step_of(Noisy([0.0, 0.0]), RerankerSettings(group_size=2, train_hardest=None, rdrop_weight=3.0))
    q = 1 / (1 + math.exp(-1.0))
    listwise = (math.log(2) - math.log(q)) / 2
    assert outputs["listwise"].item() == pytest.approx(listwise, rel=1e-6)
    assert outputs["rdrop"].item() == pytest.approx((q - 0.5) / 2, rel=1e-6)
    assert outputs["loss"].item() == pytest.approx(listwise + 3.0 * (q - 0.5) / 2, rel=1e-6)


@pytest.mark.parametrize("options", [{"train_hardest": 3, "rdrop_weight": 0.0}, {"train_hardest": None, "rdrop_weight": 1.0}])
def test_neither_processes_nor_micro_batches_change_loss_or_gradient(tiny_store: Store, options: dict[str, Any]) -> None:
    results = {}
    for num_ranks in (1, 2, 4):
        for budget in (60, 400, 100_000):
            settings = RerankerSettings(queries_per_step=4, group_size=5, max_pair_tokens=48, micro_batch_tokens=budget, **options)
            model = ToyEncoder(1).double()
            task = ListwiseTask(model, settings).train()
            batches = ListBatches(tiny_store, make_groups(tiny_store, 5, num_ranks=num_ranks), settings, 9)
            loss = 0.0
            for rank in range(num_ranks):
                for batch in batches.load(1, rank, num_ranks):
                    part = task(**batch)["loss"]
                    part.backward()
                    loss += part.item()
            results[num_ranks, budget] = loss, [parameter.grad for parameter in model.parameters()]
    loss, gradients = results[1, 100_000]
    assert loss > 0.1
    for other, other_gradients in results.values():
        assert other == pytest.approx(loss, rel=1e-6)
        for left, right in zip(gradients, other_gradients, strict=True):
            assert left is not None and right is not None
            # Logits are float32 (the loss is computed in it); the bias gets no gradient but rounding.
            assert (left - right).norm() <= 1e-6 * max(left.norm().item(), 1e-2)


# --- from any checkpoint


def save_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast, model_type: str) -> Path:
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if model_type == "electra":
        sizes["embedding_size"] = 8
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), max_position_embeddings=96, pad_token_id=0, **sizes)
    auto = AutoModelForPreTraining if model_type == "electra" else AutoModelForMaskedLM  # as ELECTRA's discriminator and BERT are published
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["electra", "bert"])
def test_starts_from_any_checkpoint(
    inputs: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    tiny_wordpiece: PreTrainedTokenizerFast,
    model_type: str,
) -> None:
    start = save_encoder(tmp_path / "start", tiny_wordpiece, model_type)
    settings = RerankerSettings(
        initial=str(start),
        queries_per_step=4,
        group_size=4,
        max_pair_tokens=64,
        train_hardest=2,
        micro_batch_tokens=600,
        training=training(max_steps=2),
    )
    weights = []
    for learning_rate in (1e-12, 1e-2):
        made = context(tmp_path / f"out{learning_rate}")
        changed = settings.model_copy(update={"training": training(max_steps=2, learning_rate=learning_rate)})
        train_reranker.run(changed, inputs, made)
        assert json.loads((made.work / "config.json").read_text(encoding="utf-8"))["model_type"] == model_type
        model = CrossEncoder.load(made.work)
        assert model(torch.tensor([[2, 7, 3, 8, 3]])).shape == (1,)
        weights.append({name: weight for name, weight in model.classifier.base_model.state_dict().items() if weight.is_floating_point()})
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(start).state_dict()
    shared = [name for name in weights[0] if "pooler" not in name]
    assert len(shared) > 10
    for name in shared:
        torch.testing.assert_close(weights[0][name], theirs[name], rtol=0, atol=1e-8)
    assert any((weights[1][name] - theirs[name]).abs().max() > 1e-3 for name in shared)
