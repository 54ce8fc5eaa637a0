"""rerank: raw logits of pairs from the store's tokens, ranked, one shard at a time, the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.artifacts import ArtifactBuilder, build_artifact, open_artifact
from simlm.errors import ArtifactError, ModelError
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.inference import Inference
from simlm.models.reranker import load_reranker
from simlm.progress import Progress
from simlm.rankings import Groups, Run, offsets_of
from simlm.recipe import ModelSettings, RerankSettings
from simlm.stages import Context, rerank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

SCRATCH = ModelSettings(
    start="scratch",
    config={
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    },
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    """A finished re-ranker artifact with fresh weights."""
    path = tmp_path_factory.mktemp("rerank") / "model"
    with build_artifact(path, kind="model") as builder:
        CrossEncoder.from_encoder(SCRATCH, seed=5, tokenizer=tiny_wordpiece).save(builder.work, tiny_wordpiece, max_pair_tokens=48)
    return path


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: test query q has passages q, q + 1 ... (4 to 15 of them), query 3 none; dev query 0 has passage 9."""
    path = tmp_path_factory.mktemp("runs") / "run"
    lists = [(range(query, query + 4 + query), np.arange(4 + query, 0, -1)) if query != 3 else ([], []) for query in range(12)]
    with build_artifact(path, kind="run") as builder:
        Run.from_lists("test", range(12), lists).save(builder.work)  # type: ignore[arg-type]
        Run.from_lists("dev", [0], [([9], [1.0])]).save(builder.work)
        builder.facts.update(milliseconds_per_query=100.0, bytes_per_passage=1536.0)
    return path


def run_rerank(path: Path, settings: RerankSettings, inputs: dict[str, Path]) -> dict[str, Any]:
    with build_artifact(path, kind="run", stage="rerank", settings=settings.model_dump()) as builder:
        rerank.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def assert_ranked(run: Run) -> None:
    for _, rows, scores in run:
        keys = list(zip((-scores).tolist(), rows.tolist(), strict=True))
        assert keys == sorted(keys)


def test_scores_are_those_of_the_texts(tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path) -> None:
    settings = RerankSettings(precision="fp32", depth=6, shard_pairs=10, batch_tokens=400)
    facts = run_rerank(tmp_path / "run", settings, {"store": tiny_store.path, "model": model, "run": first_stage})
    reranked = Run.load(open_artifact(tmp_path / "run", "run").path, "test")
    assert_ranked(reranked)
    assert reranked.query_rows.tolist() == list(range(12))
    # 4, 5 and 6 passages for queries 0 to 2, none for query 3, the first 6 of the other eight.
    assert np.diff(reranked.offsets).tolist() == [4, 5, 6, 0, 6, 6, 6, 6, 6, 6, 6, 6]
    reranker, table = load_reranker(model), tiny_store.passages
    for query, rows, scores in reranked:
        assert sorted(rows.tolist()) == ([] if query == 3 else list(range(query, query + min(4 + query, 6))))
        passages = [(table.title(int(row)), table.text(int(row))) for row in rows]
        np.testing.assert_allclose(scores, reranker.score(tiny_store.queries("test").text(query), passages), atol=1e-5)
    assert facts["num_queries"] == 12
    assert facts["num_pairs"] == 63
    assert facts["max_pair_tokens"] == 48
    assert facts["pairs_per_second"] > 0


def test_time_and_size_of_both_stages(tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path) -> None:
    facts = run_rerank(tmp_path / "run", RerankSettings(depth=2), {"store": tiny_store.path, "model": model, "run": first_stage})
    assert facts["milliseconds_per_query"] == pytest.approx(100.0 + facts["reranking_milliseconds_per_query"], abs=1e-3)
    assert facts["reranking_milliseconds_per_query"] > 0
    assert facts["bytes_per_passage"] == 1536.0


def test_only_the_splits_asked_for(tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path) -> None:
    inputs = {"store": tiny_store.path, "model": model, "run": first_stage}
    run_rerank(tmp_path / "dev", RerankSettings(splits=["dev"]), inputs)
    assert [entry.name for entry in (tmp_path / "dev").iterdir() if entry.is_dir()] == ["dev"]
    assert Run.load(tmp_path / "dev", "dev").passage_rows.tolist() == [9]
    with pytest.raises(ArtifactError, match="nothing for split 'train'"):
        run_rerank(tmp_path / "train", RerankSettings(splits=["train"]), inputs)


def test_groups_give_positives_and_the_hardest_negatives(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    nothing = np.full(4, np.nan, np.float32)
    with build_artifact(tmp_path / "groups", kind="groups") as builder:
        Groups(
            "train",
            query_rows=np.array([2, 7]),
            positive_offsets=offsets_of([1, 3]),
            positive_rows=np.array([50, 10, 11, 12]),
            positive_scores=nothing,
            negative_offsets=offsets_of([3, 1]),
            negative_rows=np.array([1, 2, 3, 20]),
            negative_scores=nothing,
        ).save(builder.work)
    inputs = {"store": tiny_store.path, "model": model, "groups": tmp_path / "groups"}
    facts = run_rerank(tmp_path / "scores", RerankSettings(depth=2, precision="fp32"), inputs)
    scored = Run.load(tmp_path / "scores", "train")
    assert_ranked(scored)
    assert scored.query_rows.tolist() == [2, 7]
    assert sorted(scored.ranked(0)[0].tolist()) == [1, 2, 50]
    assert sorted(scored.ranked(1)[0].tolist()) == [10, 11, 12, 20]
    assert "milliseconds_per_query" not in facts
    table = tiny_store.passages
    rows, scores = scored.ranked(1)
    pairs = [(tiny_store.queries("train").text(7), (table.title(int(row)), table.text(int(row)))) for row in rows]
    np.testing.assert_allclose(scores, load_reranker(model).score_pairs(pairs), atol=1e-5)


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def test_goes_on_after_a_kill_with_equal_scores(
    tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RerankSettings(precision="fp32", shard_pairs=30)
    inputs = {"store": tiny_store.path, "model": model, "run": first_stage}
    run_rerank(tmp_path / "whole", settings, inputs)
    real = Inference.run
    calls = []

    def dies_in_the_third_shard(self: Inference, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        real(self, *args, **kwargs)

    builder = ArtifactBuilder(tmp_path / "resumed", kind="run", stage="rerank", code_version=1, fingerprint="f")
    builder.begin()
    with monkeypatch.context() as patched:
        patched.setattr(Inference, "run", dies_in_the_third_shard)
        with pytest.raises(Killed):
            rerank.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    finished = {file.name: file.stat().st_mtime_ns for file in builder.resume.glob("test-*.npz")}
    assert len(finished) == 2

    again = ArtifactBuilder(tmp_path / "resumed", kind="run", stage="rerank", code_version=1, fingerprint="f")
    assert again.begin()
    rerank.run(settings, inputs, Context(again, 0, Progress(quiet=True)))
    assert {file.name: file.stat().st_mtime_ns for file in again.resume.glob("test-*.npz") if file.name in finished} == finished
    again.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    for name in ("query_rows", "offsets", "passage_rows", "scores"):
        left, right = (tmp_path / run / "test" / f"{name}.npy" for run in ("whole", "resumed"))
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("num_pairs", [1, 5, 12, 1000])
def test_shards_cover_the_queries_in_order(num_pairs: int) -> None:
    counts = [4, 0, 5, 3, 0]
    run = Run("test", np.arange(5), offsets_of(counts), np.arange(12), np.zeros(12, np.float32))
    bounds = rerank._Lists("test", run.query_rows, run, 200).shards(num_pairs)
    assert [begin for begin, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == 5
    assert all(sum(counts[begin : end - 1]) < num_pairs for begin, end in bounds)


def test_a_run_without_queries(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    with build_artifact(tmp_path / "empty", kind="run") as builder:
        Run.from_lists("test", [], []).save(builder.work)
    facts = run_rerank(tmp_path / "run", RerankSettings(), {"store": tiny_store.path, "model": model, "run": tmp_path / "empty"})
    assert len(Run.load(tmp_path / "run", "test")) == 0
    assert facts["milliseconds_per_query"] is None
    assert facts["pairs_per_second"] is None


def test_equal_logits_are_ordered_by_row() -> None:
    run = rerank._ranked("test", np.array([4, 5]), offsets_of([3, 2]), np.array([8, 2, 5, 1, 0]), np.array([1, 1, 2, 0, 3], np.float32))
    assert run.passage_rows.tolist() == [5, 2, 8, 0, 1]
    assert run.scores.tolist() == [2, 1, 1, 3, 0]


def test_a_retriever_is_refused(tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast, first_stage: Path) -> None:
    with build_artifact(tmp_path / "retriever", kind="model") as builder:
        encoder = load_encoder(SCRATCH, tokenizer=tiny_wordpiece)
        BiEncoder(encoder).save(builder.work, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=40)
    with pytest.raises(ModelError, match="this is a retriever"):
        run_rerank(tmp_path / "run", RerankSettings(), {"store": tiny_store.path, "model": tmp_path / "retriever", "run": first_stage})


def test_a_run_of_another_corpus_is_refused(tmp_path: Path, tiny_store: Store, model: Path) -> None:
    builder = ArtifactBuilder(tmp_path / "foreign", kind="run", stage="search", code_version=1, fingerprint="f")
    builder.begin()
    Run.from_lists("test", [0], [([9], [1.0])]).save(builder.work)
    builder.finish(settings={}, inputs={"store": "another"}, seed=0, seconds=0.0, peak_memory_bytes=0)
    with pytest.raises(ArtifactError, match="another version of the corpus"):
        run_rerank(tmp_path / "run", RerankSettings(), {"store": tiny_store.path, "model": model, "run": tmp_path / "foreign"})
