"""rerank: raw logits of pairs from the store's tokens, ranked, one shard at a time, the same after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.artifacts import ArtifactBuilder, build_artifact, open_artifact
from simlm.data.teacher_scores import TeacherScores, teachers_of
from simlm.errors import ArtifactError, DataError, ModelError
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.inference import Inference
from simlm.models.reranker import load_reranker
from simlm.progress import Progress
from simlm.rankings import Groups, Run, offsets_of
from simlm.recipe import ModelSettings, OutsideRerankSettings, RerankSettings
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
    whole_facts = run_rerank(tmp_path / "whole" / "run", settings, inputs)
    assert (whole_facts["num_pairs"], whole_facts["num_known_pairs"]) == (107, 0)
    real = Inference.run
    scored: list[int] = []

    def dies_in_the_third_shard(self: Inference, batches: Any, results: Any, **kwargs: Any) -> None:
        if len(scored) == 2:
            raise Killed
        scored.append(len(results))
        real(self, batches, results, **kwargs)

    builder = ArtifactBuilder(tmp_path / "resumed" / "run", kind="run", stage="rerank", code_version=1, fingerprint="f")
    builder.begin()
    with monkeypatch.context() as patched:
        patched.setattr(Inference, "run", dies_in_the_third_shard)
        with pytest.raises(Killed):
            rerank.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))

    again = ArtifactBuilder(tmp_path / "resumed" / "run", kind="run", stage="rerank", code_version=1, fingerprint="f")
    assert again.begin()
    rerank.run(settings, inputs, Context(again, 0, Progress(quiet=True)))
    assert again.facts["num_known_pairs"] == sum(scored) >= 60
    again.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    for name in ("query_rows", "offsets", "passage_rows", "scores"):
        left, right = (tmp_path / run / "run" / "test" / f"{name}.npy" for run in ("whole", "resumed"))
        assert left.read_bytes() == right.read_bytes()


def test_another_depth_scores_only_what_is_new(
    tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"store": tiny_store.path, "model": model, "run": first_stage}
    facts = [run_rerank(tmp_path / f"run{depth}", RerankSettings(precision="fp32", depth=depth), inputs) for depth in (3, 5, 4, 5)]
    # 11 queries with passages: 3 each; then the fourth of 11 and the fifth of the 10 that have one; then nothing.
    assert [(fact["num_pairs"], fact["num_known_pairs"]) for fact in facts] == [(33, 0), (54, 33), (44, 44), (54, 54)]
    assert facts[-1]["pairs_per_second"] is None
    fresh = run_rerank(tmp_path / "fresh" / "run", RerankSettings(precision="fp32", depth=5), inputs)
    assert fresh["num_known_pairs"] == 0
    one, other = Run.load(tmp_path / "run5", "test"), Run.load(tmp_path / "fresh" / "run", "test")
    np.testing.assert_array_equal(one.passage_rows, other.passage_rows)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_a_shorter_pair_or_another_precision_is_scored_anew(tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path) -> None:
    inputs = {"store": tiny_store.path, "model": model, "run": first_stage}
    for number, changes in enumerate(({"precision": "fp32"}, {"precision": "bf16"}, {"precision": "fp32", "max_pair_tokens": 24})):
        settings = RerankSettings(depth=1, **changes)  # type: ignore[arg-type]
        assert run_rerank(tmp_path / f"run{number}", settings, inputs)["num_known_pairs"] == 0


def test_other_weights_at_the_same_path_share_no_score(
    tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast, first_stage: Path
) -> None:
    inputs = {"store": tiny_store.path, "model": tmp_path / "reranker", "run": first_stage}
    found = []
    for seed in (5, 6, 5):
        with build_artifact(tmp_path / "reranker", kind="model", seed=seed) as builder:
            made = CrossEncoder.from_encoder(SCRATCH, seed=seed, tokenizer=tiny_wordpiece)
            made.save(builder.work, tiny_wordpiece, max_pair_tokens=48)
        facts = run_rerank(tmp_path / "run", RerankSettings(precision="fp32", depth=2), inputs)
        found.append((facts["num_known_pairs"], facts["teacher"], Run.load(tmp_path / "run", "test").scores.copy()))
    assert [known for known, _, _ in found] == [0, 0, 22]
    assert found[0][1] == found[2][1] != found[1][1]
    np.testing.assert_array_equal(found[0][2], found[2][2])
    assert abs(found[0][2] - found[1][2]).max() > 1e-3


def test_another_corpus_shares_no_score(tmp_path: Path, tiny_store: Store, model: Path, first_stage: Path) -> None:
    settings = RerankSettings(precision="fp32", depth=2)
    run_rerank(tmp_path / "run", settings, {"store": tiny_store.path, "model": model, "run": first_stage})
    shutil.copytree(tiny_store.path, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}), encoding="utf-8")
    facts = run_rerank(tmp_path / "other", settings, {"store": tmp_path / "store", "model": model, "run": first_stage})
    assert facts["num_known_pairs"] == 0


# --- cross-encoders from outside


def save_outside(folder: Path, tokenizer: PreTrainedTokenizerFast, *, num_labels: int = 1, model_type: str = "bert", seed: int = 3) -> Path:
    """A sequence classifier as transformers saves it, with weights large enough to tell pairs apart."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    sizes = {key: value for key, value in SCRATCH.config.items() if key != "model_type"}
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def groups_artifact(path: Path, positives: list[list[int]], negatives: list[list[int]]) -> Path:
    nothing = np.full(sum(map(len, positives)), np.nan, np.float32), np.full(sum(map(len, negatives)), np.nan, np.float32)
    with build_artifact(path, kind="groups") as builder:
        Groups(
            "train",
            query_rows=np.arange(len(positives)) + 2,
            positive_offsets=offsets_of([len(rows) for rows in positives]),
            positive_rows=np.array([row for rows in positives for row in rows], dtype=np.int64),
            positive_scores=nothing[0],
            negative_offsets=offsets_of([len(rows) for rows in negatives]),
            negative_rows=np.array([row for rows in negatives for row in rows], dtype=np.int64),
            negative_scores=nothing[1],
        ).save(builder.work)
    return path


@pytest.mark.parametrize("family", ["same tokens", "another vocabulary"])
def test_a_cross_encoder_from_outside_scores_as_sentence_transformers_reads_it(
    tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast, tiny_bpe: PreTrainedTokenizerFast, family: str
) -> None:
    import sentence_transformers

    tokenizer, model_type = (tiny_wordpiece, "electra") if family == "same tokens" else (tiny_bpe, "roberta")
    plain = save_outside(tmp_path / "plain", tokenizer, model_type=model_type)
    # It squashes what it predicts, and says so in its files: its raw logits are wanted all the same.
    peer = sentence_transformers.CrossEncoder(str(plain), max_length=40, activation_fn=torch.nn.Sigmoid(), device="cpu")
    peer.save_pretrained(str(tmp_path / "teacher"), create_model_card=False)
    groups = groups_artifact(tmp_path / "groups", [[50], [10, 11]], [[1, 2, 3], [20]])
    settings = OutsideRerankSettings(checkpoint=str(tmp_path / "teacher"), depth=2, precision="fp32", max_pair_tokens=40)
    facts = run_rerank(tmp_path / "run", settings, {"store": tiny_store.path, "groups": groups})
    teacher = TeacherScores(tmp_path / "pair_scores" / facts["teacher"]).teacher
    assert bool(teacher.tokenizer) == (family == "another vocabulary")
    assert (facts["num_pairs"], len(TeacherScores(tmp_path / "pair_scores" / facts["teacher"]))) == (6, 6)
    scored, table = Run.load(tmp_path / "run", "train"), tiny_store.passages
    for query, rows, scores in scored:
        pairs = [(tiny_store.queries("train").text(query), f"{table.title(int(row))} {table.text(int(row))}".strip()) for row in rows]
        np.testing.assert_allclose(scores, peer.predict(pairs, activation_fn=torch.nn.Identity()), atol=1e-5)
        squashed = peer.predict(pairs)
        np.testing.assert_allclose(1 / (1 + np.exp(-scores.astype(np.float64))), squashed, atol=1e-5)  # the peer's default does squash
    again = run_rerank(tmp_path / "again", settings, {"store": tiny_store.path, "groups": groups})
    assert again["num_known_pairs"] == 6


def test_a_teacher_of_three_labels_is_refused_before_scoring(
    tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast
) -> None:
    save_outside(tmp_path / "teacher", tiny_wordpiece, num_labels=3)
    groups = groups_artifact(tmp_path / "groups", [[50]], [[1]])
    with pytest.raises(ModelError, match="a classifier of 3 labels"):
        run_rerank(
            tmp_path / "run", OutsideRerankSettings(checkpoint=str(tmp_path / "teacher")), {"store": tiny_store.path, "groups": groups}
        )
    assert not (tmp_path / "pair_scores").exists()


# --- groups that teach nothing


@pytest.mark.parametrize(
    ("positives", "negatives", "message"),
    [
        ([[50], []], [[1], [2]], r"1 groups have no positive passage, the first is of query 'q/"),
        ([[50], [51]], [[], []], r"all negatives of all 2 groups are filtered away"),
    ],
)
def test_groups_that_teach_nothing_are_refused_before_the_model_is_loaded(
    tmp_path: Path, tiny_store: Store, positives: list[list[int]], negatives: list[list[int]], message: str
) -> None:
    groups = groups_artifact(tmp_path / "groups", positives, negatives)
    with pytest.raises(DataError, match=message):
        run_rerank(tmp_path / "run", RerankSettings(), {"store": tiny_store.path, "groups": groups, "model": tmp_path / "none"})


def test_a_logit_that_is_not_finite_is_refused_and_not_kept(
    tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast, first_stage: Path
) -> None:
    with build_artifact(tmp_path / "reranker", kind="model") as builder:
        broken = CrossEncoder.from_encoder(SCRATCH, seed=5, tokenizer=tiny_wordpiece)
        with torch.no_grad():
            broken.classifier.get_submodule("classifier").weight.fill_(float("nan"))
        broken.save(builder.work, tiny_wordpiece, max_pair_tokens=48)
    with pytest.raises(ModelError, match=r"output for query 'q/.*' with passage '.*' is not finite"):
        run_rerank(tmp_path / "run", RerankSettings(), {"store": tiny_store.path, "model": tmp_path / "reranker", "run": first_stage})
    assert sum(len(scores) for scores in teachers_of(tmp_path / "pair_scores")) == 0


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
    rows, scores = rerank._best_first(offsets_of([3, 2]), np.array([8, 2, 5, 1, 0]), np.array([1, 1, 2, 0, 3], np.float32))
    assert rows.tolist() == [5, 2, 8, 0, 1]
    assert scores.tolist() == [2, 1, 1, 3, 0]


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
