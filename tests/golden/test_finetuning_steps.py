"""Each fine-tuning loss against a re-computation written out in plain loops, from the text of method.md and not from the package."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simlm.data.groups import TrainingGroups
from simlm.data.store import Store
from simlm.rankings import Groups, offsets_of
from simlm.recipe import DistillSettings, RerankerSettings, RetrieverSettings
from simlm.training.contrastive import ContrastiveBatches, ContrastiveTask
from simlm.training.reranking import ListBatches, ListwiseTask

torch.set_num_threads(1)


class ToyEncoder(nn.Module):
    """Token tensors -> unit vectors, or one logit a row."""

    def __init__(self, outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types, self.layer = nn.Embedding(500, 12), nn.Embedding(2, 12), nn.Linear(12, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.words(input_ids) + (self.types(token_type_ids) if token_type_ids is not None else 0)
        pooled = (self.dropout(torch.tanh(hidden)) * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        outputs = self.layer(pooled)
        return nn.functional.normalize(outputs, dim=1) if outputs.shape[1] > 1 else outputs[:, 0]


def make_groups(store: Store, group_size: int, **options: Any) -> TrainingGroups:
    """Positives of the qrels (query 0 has two of them), five negatives each; query 1 shares its positive with query 2."""
    import numpy as np

    qrels = store.qrels("train")
    qrels[0] = {**qrels[0], 50: 1}
    qrels[1] = dict(qrels[2])
    positives = [list(qrels[query]) for query in range(6)]
    negatives = [[(13 * query + 7 * place + 3) % 60 for place in range(5)] for query in range(6)]
    negatives = [[row for row in rows if row not in positives[query]] for query, rows in enumerate(negatives)]
    flat_positives, flat_negatives = (np.array([row for rows in lists for row in rows], dtype=np.int64) for lists in (positives, negatives))
    groups = Groups(
        "train",
        np.arange(6, dtype=np.int64),
        offsets_of([len(rows) for rows in positives]),
        flat_positives,
        np.sin(flat_positives).astype(np.float32) * 4,
        offsets_of([len(rows) for rows in negatives]),
        flat_negatives,
        np.cos(flat_negatives).astype(np.float32) * 4,
    )
    chosen = {"num_passages": 60, "group_size": group_size, "queries_per_step": 4, "seed": 5, "judged": qrels} | options
    return TrainingGroups(groups, **chosen)


def sequence(store: Store, text: str, title: str = "", limit: int = 64) -> tuple[list[int], list[int]]:
    tokens = (
        store.tokenizer()(title, text, truncation=True, max_length=limit)
        if title
        else store.tokenizer()(text, truncation=True, max_length=limit)
    )
    return tokens["input_ids"], tokens["token_type_ids"]


def apply(model: nn.Module, ids: list[int], types: list[int]) -> list[float] | float:
    """One row alone, no padding, no batch."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64), torch.tensor([types]))[0]
    return output.tolist()


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def encoded(store: Store, model: nn.Module, groups: TrainingGroups, step: int) -> tuple[list[Any], list[list[Any]]]:
    whole = groups.step(step)
    queries = [apply(model, *sequence(store, store.queries("train").text(int(row)), limit=24)) for row in whole.query_rows]
    passages = [
        [apply(model, *sequence(store, store.passages.text(int(row)), store.passages.title(int(row)))) for row in rows]
        for rows in whole.passage_rows
    ]
    return queries, passages


def plain_info_nce(queries: list[Any], passages: list[list[Any]], groups: TrainingGroups, step: int, *, all_pairs: bool) -> float:
    whole = groups.step(step)
    relevant = [set(groups.relevant(int(position)).tolist()) for position in whole.positions]
    total = 0.0
    for i, query in enumerate(queries):
        scores = [dot(query, passages[i][0]) / 0.02]
        for j, group in enumerate(passages):
            for place, passage in enumerate(group):
                if int(whole.passage_rows[j, place]) in relevant[i]:
                    continue  # its own positive, counted above, or another relevant one, which is no negative
                scores.append(dot(query, passage) / 0.02)
        for j, other in enumerate(queries):
            shared = int(whole.passage_rows[j, 0]) in relevant[i] or int(whole.passage_rows[i, 0]) in relevant[j]
            if all_pairs and j != i and not shared:
                scores.append(dot(passages[i][0], other) / 0.02)
                scores.append(dot(query, other) / 0.02)
                scores.append(dot(passages[i][0], passages[j][0]) / 0.02)
        total -= math.log(softmax(scores)[0])
    return total / len(queries)


def load_one(batches: Any, step: int) -> dict[str, Any]:
    (batch,) = batches.load(step, 0, 1)
    return batch


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("contrast", ["query_to_passages", "all_pairs"])
@pytest.mark.parametrize("micro_batch_tokens", [40, 100_000])
def test_contrastive_step(tiny_store: Store, contrast: Any, micro_batch_tokens: int, step: int) -> None:
    settings = RetrieverSettings(queries_per_step=4, group_size=3, contrast=contrast, micro_batch_tokens=micro_batch_tokens)
    groups, model = make_groups(tiny_store, 3), ToyEncoder(6)
    outputs = ContrastiveTask(model, settings)(**load_one(ContrastiveBatches(tiny_store, groups, settings, 9), step))
    queries, passages = encoded(tiny_store, model, groups, step)
    expected = plain_info_nce(queries, passages, groups, step, all_pairs=contrast == "all_pairs")
    assert outputs["loss"].item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("step", [0, 2])
def test_distillation_step(tiny_store: Store, step: int) -> None:
    settings = DistillSettings(queries_per_step=4, group_size=4, micro_batch_tokens=60, contrastive_weight=0.2, teacher_temperature=1.5)
    groups, model = make_groups(tiny_store, 4), ToyEncoder(6)
    outputs = ContrastiveTask(model, settings)(**load_one(ContrastiveBatches(tiny_store, groups, settings, 9), step))
    queries, passages = encoded(tiny_store, model, groups, step)
    whole, kl, entropy = groups.step(step), 0.0, 0.0
    for i, query in enumerate(queries):
        teacher = softmax([float(score) / 1.5 for score in whole.scores[i]])
        student = softmax([dot(query, passage) / 0.02 for passage in passages[i]])
        kl += sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True)) / len(queries)
        entropy -= sum(p * math.log(p) for p in teacher) / len(queries)
    contrastive = plain_info_nce(queries, passages, groups, step, all_pairs=False)
    assert outputs["kl"].item() == pytest.approx(kl, rel=2e-5)
    assert outputs["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert outputs["loss"].item() == pytest.approx(kl + 0.2 * contrastive, rel=2e-5)


def pair_logits(store: Store, model: nn.Module, groups: TrainingGroups, step: int, limit: int) -> list[list[float]]:
    whole, lists = groups.step(step), []
    for query, rows in zip(whole.query_rows, whole.passage_rows, strict=True):
        logits = []
        for row in rows:
            title, text = store.passages.title(int(row)), store.passages.text(int(row))
            passage = f"{title} {text}" if title else text
            tokens = store.tokenizer()(store.queries("train").text(int(query)), passage, truncation="only_second", max_length=limit)
            logits.append(apply(model, tokens["input_ids"], tokens["token_type_ids"]))
        lists.append(logits)
    return lists  # type: ignore[return-value]


@pytest.mark.parametrize("train_hardest", [None, 3])
@pytest.mark.parametrize("micro_batch_tokens", [60, 400, 100_000])
def test_listwise_step(tiny_store: Store, train_hardest: int | None, micro_batch_tokens: int) -> None:
    settings = RerankerSettings(
        queries_per_step=4,
        group_size=5,
        train_hardest=train_hardest,
        rdrop_weight=0.0,
        max_pair_tokens=48,
        micro_batch_tokens=micro_batch_tokens,
    )
    groups, model = make_groups(tiny_store, 5), ToyEncoder(1)
    task, expected = ListwiseTask(model, settings), 0.0
    micro_batches = ListBatches(tiny_store, groups, settings, 9).load(1, 0, 1)
    assert (len(micro_batches) > 1) == (micro_batch_tokens < 100_000)
    loss = sum(task(**batch)["loss"].item() for batch in micro_batches)
    for logits in pair_logits(tiny_store, model, groups, 1, 48):
        negatives = sorted(logits[1:], reverse=True)[: (train_hardest or 5) - 1]
        expected -= math.log(softmax([logits[0], *negatives])[0]) / 4
    assert loss == pytest.approx(expected, rel=2e-5)


def test_listwise_step_with_rdrop(tiny_store: Store) -> None:
    """Two dropout passes: half the sum of their losses, plus the weight times half of the two divergences."""
    settings = RerankerSettings(queries_per_step=4, group_size=3, train_hardest=None, rdrop_weight=0.7, max_pair_tokens=48)
    groups, task = make_groups(tiny_store, 3), ListwiseTask(ToyEncoder(1, dropout=0.3), settings).train()
    (batch,) = ListBatches(tiny_store, groups, settings, 9).load(0, 0, 1)
    seen: list[Tensor] = []
    score = task._score
    task._score = lambda *arguments: seen.append(score(*arguments)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    torch.manual_seed(0)
    outputs = task(**batch)
    first, second = seen[0].view(2, 4, 3).tolist()
    assert first != second
    expected = 0.0
    for one, two in zip(first, second, strict=True):
        p, q = softmax(one), softmax(two)
        expected -= (math.log(p[0]) + math.log(q[0])) / 2 / 4
        forth = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        back = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        expected += 0.7 * (forth + back) / 2 / 4
    assert outputs["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["query_to_passages", "all_pairs", "distill"])
def test_bounded_memory_changes_neither_loss_nor_gradient(tiny_store: Store, kind: Any) -> None:
    results = []
    for micro_batch_tokens in (100_000, 30):
        shared: dict[str, Any] = {"queries_per_step": 4, "group_size": 3, "micro_batch_tokens": micro_batch_tokens}
        settings = DistillSettings(**shared) if kind == "distill" else RetrieverSettings(contrast=kind, **shared)
        model = ToyEncoder(6)
        batch = load_one(ContrastiveBatches(tiny_store, make_groups(tiny_store, 3), settings, 9), 1)
        loss = ContrastiveTask(model, settings)(**batch)["loss"]
        loss.backward()
        results.append((loss.item(), [parameter.grad for parameter in model.parameters()]))
    # Equal to float32's resolution: the loss of untrained vectors at temperature 0.02 is around 40.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for left, right in zip(results[0][1], results[1][1], strict=True):
        assert left is not None and right is not None
        assert (left - right).norm() <= 1e-6 * left.norm()
