"""Dev measures by hand, on made-up scores and on a tiny store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simlm.data.store import Store
from simlm.rankings import Run
from simlm.recipe import DevSettings, TrainingSettings
from simlm.training.dev import best_rank, mean_reciprocal_rank, reranker_dev, retriever_dev
from simlm.training.precision import cpu_has_bf16, resolve_bf16
from simlm.training.trainer import mixed_precision


def test_best_rank() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.9, 0.2], dtype=np.float32)
    assert best_rank(scores, np.array([0])) == 5
    assert best_rank(scores, np.array([0, 2])) == 3
    assert best_rank(scores, np.array([3])) == 2  # ties: the earlier place first
    assert best_rank(scores, np.array([1])) == 1
    assert best_rank(scores, np.array([], dtype=np.int64)) == 0


def test_mean_reciprocal_rank() -> None:
    assert mean_reciprocal_rank([1, 2, 10, 11, 0]) == pytest.approx((1 + 0.5 + 0.1) / 5)


class BagOfWords(nn.Module):
    """Unit vector of word counts: overlap decides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        counts = nn.functional.one_hot(input_ids, 600)[..., 5:].sum(dim=1).float()
        return nn.functional.normalize(counts * self.scale, dim=1)


def plain_rr(store: Store, queries: list[int], pool: list[int]) -> float:
    model, total = BagOfWords().requires_grad_(False), 0.0
    tokenizer = store.tokenizer()

    def vector(text: str) -> Tensor:
        return model(torch.tensor([tokenizer(text)["input_ids"]]), torch.ones(1))[0]

    vectors = {row: vector(f"{store.passages.title(row)} {store.passages.text(row)}") for row in pool}
    for query in queries:
        asked = vector(store.queries("dev").text(query))
        ranked = sorted(pool, key=lambda row: (-float(asked @ vectors[row]), row))
        ranks = [place for place, row in enumerate(ranked, start=1) if store.qrels("dev")[query].get(row, 0) > 0]
        total += 1 / ranks[0] if ranks[0] <= 10 else 0
    return total / len(queries)


@pytest.mark.parametrize("batch_tokens", [30, 10_000])
def test_retriever_dev_over_the_whole_corpus(tiny_store: Store, batch_tokens: int) -> None:
    model = BagOfWords()
    measure = retriever_dev(tiny_store, model, DevSettings(pool_passages=1000), seed=1, batch_tokens=batch_tokens, bf16=False)
    assert measure is not None
    expected = plain_rr(tiny_store, list(range(12)), list(range(60)))
    assert measure() == {"RR@10": pytest.approx(expected, abs=1e-6)}
    assert measure() == measure()


def test_a_smaller_pool_is_seeded_and_easier(tiny_store: Store) -> None:
    model, settings = BagOfWords(), DevSettings(num_queries=5, pool_passages=20)
    small = [retriever_dev(tiny_store, model, settings, seed=seed, batch_tokens=500, bf16=False) for seed in (1, 1)]
    assert small[0] is not None and small[1] is not None and small[0]() == small[1]()
    only = retriever_dev(tiny_store, model, DevSettings(num_queries=1, pool_passages=1), seed=1, batch_tokens=500, bf16=False)
    assert only is not None and only() == {"RR@10": 1.0}  # a pool of the positive alone


def test_no_dev_measure_without_dev_queries(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BagOfWords()
    assert retriever_dev(tiny_store, model, DevSettings(num_queries=0), seed=1, batch_tokens=500, bf16=False) is None
    monkeypatch.setattr(Store, "splits", ["train"])
    assert retriever_dev(tiny_store, model, DevSettings(), seed=1, batch_tokens=500, bf16=False) is None


class Shortest(nn.Module):
    """Likes short pairs: the logit is minus the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return -attention_mask.sum(dim=1) * self.scale


def test_reranker_dev(tiny_store: Store) -> None:
    qrels = tiny_store.qrels("dev")
    positives = [next(iter(qrels[query])) for query in range(12)]
    others = [[row for row in range(60) if row != positive][:5] for positive in positives]
    # The positive is in the first three for even queries, at place four for odd ones; query 11 is not in the run.
    lists = [
        [*rest[:2], positive, *rest[2:]] if query % 2 == 0 else [*rest[:3], positive]
        for query, (positive, rest) in enumerate(zip(positives, others, strict=True))
    ]
    run = Run.from_lists("dev", list(range(11)), [(rows, [-float(place) for place in range(len(rows))]) for rows in lists[:11]])
    measure = reranker_dev(tiny_store, Shortest(), run, DevSettings(), depth=3, max_pair_tokens=60, seed=0, batch_tokens=100, bf16=False)
    assert measure is not None
    tokenizer, expected = tiny_store.tokenizer(), 0.0
    for query in range(0, 11, 2):
        lengths = []
        for row in lists[query][:3]:
            passage = f"{tiny_store.passages.title(row)} {tiny_store.passages.text(row)}".strip()
            tokens = tokenizer(tiny_store.queries("dev").text(query), passage, truncation="only_second", max_length=60)["input_ids"]
            lengths.append(len(tokens))
        place = lists[query].index(positives[query])
        rank = 1 + sum(length < lengths[place] for length in lengths) + sum(length == lengths[place] for length in lengths[:place])
        expected += 1 / rank
    assert measure() == {"RR@10": pytest.approx(expected / 12)}


# --- precision


def test_processor_flags(tmp_path: Path) -> None:
    for name, text, expected in (
        ("x86", "processor: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("amx", "flags : fpu amx_bf16\n", True),
        ("old", "flags : fpu avx2 avx512f\n", False),
        ("arm", "Features : fp asimd bf16 i8mm\n", True),
        ("bare", "", False),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert cpu_has_bf16(tmp_path / name) is expected, name
    assert cpu_has_bf16(tmp_path / "absent") is False


def test_what_is_asked_for_is_done() -> None:
    assert resolve_bf16(True, "cpu") and not resolve_bf16(False, "cpu")
    assert resolve_bf16("auto", "mps") is False
    assert mixed_precision(TrainingSettings.model_validate({"fp16": True, "use_cpu": True})) == ("cpu", False)
    assert mixed_precision(TrainingSettings.model_validate({"bf16": True, "use_cpu": True})) == ("cpu", True)
