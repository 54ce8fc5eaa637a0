"""The three fine-tuning stages on a tiny store: what they write, what they refuse before training, and resuming."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simlm.artifacts import ArtifactBuilder, build_artifact
from simlm.data.store import Store
from simlm.errors import DataError, RecipeError
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.model_folder import read_model_folder
from simlm.models.retriever import load_retriever
from simlm.progress import Progress
from simlm.rankings import Groups, Run, offsets_of
from simlm.recipe import DistillSettings, ModelSettings, RerankerSettings, RetrieverSettings, TrainingSettings
from simlm.stages import Context, distill, train_reranker, train_retriever
from simlm.training import trainer
from simlm.training.callbacks import read_log

CONFIG = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 96,
}
MODEL = ModelSettings(start="scratch", config=CONFIG)


def training(**options: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(
        {"learning_rate": 1e-3, "max_steps": 6, "save_steps": 2, "logging_steps": 2, "use_cpu": True} | options
    )


def retriever_settings(kind: type[RetrieverSettings] = RetrieverSettings, **options: Any) -> Any:
    shared = {"initial": "start", "model": MODEL, "queries_per_step": 4, "group_size": 3, "micro_batch_tokens": 400, "training": training()}
    return kind(**(shared | options))


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """accelerate collects garbage at each start; what the imports have left is not looked through again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def inputs(tiny_store: Store, tmp_path: Path) -> dict[str, Path]:
    """Store, groups with four negatives each, a teacher that knows, and a dev run."""
    torch.set_num_threads(1)
    qrels = tiny_store.qrels("train")
    queries = list(range(len(tiny_store.queries("train"))))
    positives = [next(iter(qrels[query])) for query in queries]
    negatives = [[(positive + 7 * place) % 60 for place in range(1, 5)] for positive in positives]
    flat = np.array(negatives, dtype=np.int64).reshape(-1)
    nothing = np.full(len(flat), np.nan, dtype=np.float32)
    groups = Groups(
        "train",
        np.array(queries, dtype=np.int64),
        offsets_of([1] * len(queries)),
        np.array(positives, dtype=np.int64),
        nothing[: len(queries)],
        offsets_of([4] * len(queries)),
        flat,
        nothing,
    )
    with build_artifact(tmp_path / "groups", kind="groups") as builder:
        groups.save(builder.work)
    lists = [([positive, *rest[:3]], [4.0, 1.0, 0.0, -2.0]) for positive, rest in zip(positives, negatives, strict=True)]
    with build_artifact(tmp_path / "teacher", kind="run") as builder:
        Run.from_lists("train", queries, lists).save(builder.work)
    dev = tiny_store.qrels("dev")
    with build_artifact(tmp_path / "dev_run", kind="run") as builder:
        ranked = [([*dev[query], (query + 1) % 60, (query + 30) % 60], [3.0, 2.0, 1.0]) for query in range(12)]
        Run.from_lists("dev", list(range(12)), ranked).save(builder.work)
    return {"store": tiny_store.path, **{name: tmp_path / name for name in ("groups", "teacher", "dev_run")}}


def context(folder: Path, **options: Any) -> Context:
    builder = ArtifactBuilder(folder, kind="model", stage="test", code_version=1, fingerprint="same")
    builder.begin()
    return Context(builder, **({"seed": 1, "progress": Progress(quiet=True)} | options))


def test_train_retriever(inputs: dict[str, Path], tmp_path: Path, tiny_store: Store) -> None:
    made = context(tmp_path / "out")
    train_retriever.run(retriever_settings(), inputs, made)
    model = BiEncoder.load(made.work)
    with torch.no_grad():
        assert model(torch.tensor([[2, 7, 8, 3]])).shape == (1, 16)
    facts = made.builder.facts
    assert (facts["num_steps"], facts["num_groups"], facts["queries_per_step"]) == (6, 36, 4)
    assert 0 <= facts["dev"]["RR@10"] <= 1 and facts["dev_start"].keys() == {"RR@10"}
    lines = read_log(made.work / "log.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 4, 6]
    assert {"loss", "accuracy", "contrastive"} <= lines[-2]["measures"].keys()
    assert sum(file.stat().st_size for file in made.work.glob("*.safetensors")) > 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return BiEncoder.load(folder).state_dict()


@pytest.mark.parametrize(
    "options", [{"contrast": "all_pairs"}, {"temperature_mode": "learned", "temperature_learning_rate": 0.01, "matryoshka": [8]}]
)
def test_a_killed_stage_ends_as_if_it_had_not_been(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    settings = retriever_settings(dropout=0.1, **options)
    whole, killed = context(tmp_path / "whole"), context(tmp_path / "killed")
    train_retriever.run(settings, inputs, whole)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_seed", _stop_after(5, trainer.step_seed))
        with pytest.raises(KeyboardInterrupt):
            train_retriever.run(settings, inputs, killed)
    again = context(tmp_path / "killed")
    train_retriever.run(settings, inputs, again)
    expected = weights(whole.work)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again.work).items())
    assert again.builder.facts["dev"] == whole.builder.facts["dev"]
    assert again.builder.facts.get("temperature") == whole.builder.facts.get("temperature")
    if "temperature_mode" in options:
        # Linear decay without warm-up from 0.01: at most the sum of the learning rates.
        assert 0.001 < abs(math.log(whole.builder.facts["temperature"] / 0.02)) <= 0.01 * 6
        logged = [line["measures"]["temperature"] for line in read_log(whole.work / "log.jsonl") if line["kind"] == "train"]
        assert logged[0] == pytest.approx(0.02) and logged[-1] != logged[0]


def test_a_matryoshka_model_says_its_sizes_and_can_be_cut(inputs: dict[str, Path], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    made = context(tmp_path / "out")
    train_retriever.run(retriever_settings(matryoshka=[8, 4], quantisation="int8"), inputs, made)
    assert read_model_folder(str(made.work)).matryoshka == (8, 4)
    whole = load_retriever(made.work).encode_queries(["where is the granite kettle"])
    cut = SentenceTransformer(str(made.work), truncate_dim=8, device="cpu").encode_query(
        ["where is the granite kettle"], normalize_embeddings=True
    )
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-5)


def test_a_teachers_margin_needs_a_teacher(inputs: dict[str, Path], tmp_path: Path) -> None:
    without = {role: path for role, path in inputs.items() if role != "teacher"}
    made = context(tmp_path / "without")
    with pytest.raises(RecipeError, match="teacher_margin"):
        train_retriever.run(retriever_settings(teacher_margin=1.0), without, made)
    assert not (made.work / "log.jsonl").exists()
    made = context(tmp_path / "with")
    train_retriever.run(retriever_settings(teacher_margin=1.0), inputs, made)
    assert made.builder.facts["num_queries_without_teacher_margin"] == 0


@pytest.mark.parametrize("distill_loss", ["margin_mse", "listwise"])
def test_other_distillation_losses(inputs: dict[str, Path], tmp_path: Path, distill_loss: str) -> None:
    made = context(tmp_path / "out")
    distill.run(retriever_settings(DistillSettings, distill_loss=distill_loss, teacher_margin=2.0), inputs, made)
    lines = [line["measures"] for line in read_log(made.work / "log.jsonl") if line["kind"] == "train"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1][distill_loss] + 0.2 * lines[-1]["contrastive"], rel=1e-5)
    shares = [lines[0][f"{name}_gradient_share"] for name in (distill_loss, "contrastive")]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0 and lines[0]["teacher_entropy"] > 0


def _stop_after(calls: int, function: Callable[..., int]) -> Callable[..., int]:
    seen: list[int] = []

    def stopping(*arguments: int) -> int:
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopping


def test_starting_from_an_artifact(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = context(tmp_path / "first")
    train_retriever.run(retriever_settings(training=training(max_steps=1)), inputs, first)
    finished = first.builder.finish(settings={}, inputs={}, seed=1, seconds=1.0, peak_memory_bytes=0)
    second = context(tmp_path / "second")
    settings = retriever_settings(initial="pretrained", training=training(max_steps=1, learning_rate=1e-12))
    train_retriever.run(settings, inputs | {"model": finished.path}, second)
    expected = weights(finished.path)
    for name, weight in weights(second.work).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-9)
    with pytest.raises(RecipeError, match="no pre-trained model was given"):
        train_retriever.run(settings, inputs, context(tmp_path / "third"))


def test_distill(inputs: dict[str, Path], tmp_path: Path) -> None:
    made = context(tmp_path / "out")
    distill.run(retriever_settings(DistillSettings), inputs, made)
    assert made.builder.facts["teacher_depth"] == 3  # of four negatives
    measures = [line for line in read_log(made.work / "log.jsonl") if line["kind"] == "train"][-1]["measures"]
    assert measures["loss"] == pytest.approx(measures["kl"] + 0.2 * measures["contrastive"], rel=1e-5)
    assert BiEncoder.load(made.work).dim == 16


def test_distill_from_two_teachers(inputs: dict[str, Path], tmp_path: Path) -> None:
    teacher = Run.load(inputs["teacher"], "train")
    lists = [(teacher.ranked(position)[0], [0.0, 1.0, 2.0, 3.0]) for position in range(len(teacher))]  # the other way round
    with build_artifact(tmp_path / "other", kind="run") as builder:
        Run.from_lists("train", teacher.query_rows.tolist(), lists).save(builder.work)  # type: ignore[arg-type]
    entropies = {}
    for name, more in (("one", {}), ("two", {"teacher.2": tmp_path / "other"})):
        made = context(tmp_path / name)
        distill.run(retriever_settings(DistillSettings, group_size=4, training=training(max_steps=1)), inputs | more, made)
        assert made.builder.facts["num_teachers"] == 1 + len(more)
        measures = next(line for line in read_log(made.work / "log.jsonl") if line["kind"] == "train")["measures"]
        entropies[name] = measures["teacher_entropy"]
    assert entropies["two"] > entropies["one"] + 0.2  # teachers that contradict each other say little


def test_distill_refuses_missing_scores_before_training(inputs: dict[str, Path], tmp_path: Path, tiny_store: Store) -> None:
    teacher = Run.load(inputs["teacher"], "train")
    lists = [teacher.ranked(position) for position in range(len(teacher))]
    rows, scores = lists[4]
    lists[4] = (rows[1:], scores[1:])
    with build_artifact(tmp_path / "holes", kind="run") as builder:
        Run.from_lists("train", teacher.query_rows.tolist(), lists).save(builder.work)  # type: ignore[arg-type]
    query, passage = tiny_store.queries("train").ids[4], tiny_store.passages.ids[int(rows[0])]
    made = context(tmp_path / "out")
    with pytest.raises(DataError, match=rf"no score for 1 pairs .*\({query}, {passage}\)"):
        distill.run(retriever_settings(DistillSettings), inputs | {"teacher": tmp_path / "holes"}, made)
    assert not (made.work / "log.jsonl").exists()


@pytest.mark.parametrize(("train_hardest", "rdrop_weight"), [(2, 1.0), (None, 0.0)])
def test_train_reranker(inputs: dict[str, Path], tmp_path: Path, train_hardest: int | None, rdrop_weight: float) -> None:
    settings = RerankerSettings(
        initial="start",
        model=MODEL,
        queries_per_step=4,
        group_size=4,
        max_pair_tokens=64,
        train_hardest=train_hardest,
        rdrop_weight=rdrop_weight,
        micro_batch_tokens=300,
        training=training(),
    )
    made = context(tmp_path / "out")
    train_reranker.run(settings, inputs, made)
    assert 1 / 3 <= made.builder.facts["dev"]["RR@10"] <= 1  # the positive is among the three of the dev run
    measures = [line for line in read_log(made.work / "log.jsonl") if line["kind"] == "train"][-1]["measures"]
    assert ("rdrop" in measures) == (rdrop_weight > 0)
    assert CrossEncoder.load(made.work)(torch.tensor([[2, 7, 3, 8, 3]])).shape == (1,)


def test_fewer_queries_than_a_step_wants(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = context(tmp_path / "out", progress=Progress())
    train_retriever.run(retriever_settings(queries_per_step=64, training=training(max_steps=-1, num_train_epochs=2.0)), inputs, made)
    assert "36 training queries, so a step has 36 of them, not 64" in capsys.readouterr().err
    assert (made.builder.facts["num_steps"], made.builder.facts["queries_per_step"]) == (2, 36)
