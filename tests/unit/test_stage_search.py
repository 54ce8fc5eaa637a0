"""build_index, search and fuse on the tiny store: results, facts, several splits, kills."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError

from simlm.artifacts import ArtifactBuilder, Kind, build_artifact, open_artifact
from simlm.errors import ArtifactError, DataError, RecipeError
from simlm.evaluation.measures import measure_run
from simlm.index import load_index
from simlm.index.bm25 import BM25Index
from simlm.index.flat import FlatIndex
from simlm.index.hybrid import fuse_runs
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.retriever import load_retriever
from simlm.progress import Progress
from simlm.rankings import Run
from simlm.recipe import FuseSettings, IndexSettings, ModelSettings, SearchSettings
from simlm.stages import Context, build_index, fuse, search
from simlm.types import Split
from tests.conftest import build_store, tiny_passages, tiny_qrels, tiny_queries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
ALL: list[Split] = ["train", "dev", "test"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_stage(stage: ModuleType, path: Path, kind: Kind, settings: BaseModel, inputs: dict[str, Path]) -> dict[str, Any]:
    with build_artifact(path, kind=kind, stage=stage.__name__, settings=settings.model_dump()) as builder:
        stage.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def save_model(path: Path, tokenizer: PreTrainedTokenizerFast, **config: Any) -> Path:
    encoder = load_encoder(ModelSettings(start="scratch", config=CONFIG | config), tokenizer=tokenizer, seed=3)
    with build_artifact(path, kind="model") as builder:
        BiEncoder(encoder, "cls").save(builder.work, tokenizer, max_query_tokens=24, max_passage_tokens=64)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    """Finished artifacts: model, embeddings, flat and bm25 (indexes), dense_run and bm25_run (all splits)."""
    path = tmp_path_factory.mktemp("search")
    retriever = load_retriever(save_model(path / "model", tiny_wordpiece))
    with build_artifact(path / "embeddings", kind="embeddings") as builder:
        table = tiny_store.passages
        np.save(builder.work / "vectors.npy", retriever.encode_passages([(table.title(row), table.text(row)) for row in range(60)]))
    inputs = {"store": tiny_store.path}
    run_stage(build_index, path / "flat", "index", IndexSettings(), inputs | {"embeddings": path / "embeddings"})
    run_stage(build_index, path / "bm25", "index", IndexSettings(type="bm25"), inputs)
    settings = SearchSettings(splits=ALL, depth=20, precision="fp32")
    run_stage(search, path / "dense_run", "run", settings, inputs | {"index": path / "flat", "model": path / "model"})
    run_stage(search, path / "bm25_run", "run", settings, inputs | {"index": path / "bm25"})
    return path


def facts_of(path: Path) -> dict[str, Any]:
    return open_artifact(path).manifest.facts


# build_index


def test_bm25_index(folder: Path, tiny_store: Store) -> None:
    index = load_index(folder / "bm25")
    assert type(index).__name__ == "BM25Index"
    assert len(index) == 60
    # "Marble" is in a title, and the texts have it too.
    assert 0 < (index.search(["marble"], 60)[1] >= 0).sum() <= 5
    facts = facts_of(folder / "bm25")
    assert facts["index_type"] == "bm25"
    assert facts["language"] == "english"
    assert facts["num_passages"] == 60
    files = [file for file in (folder / "bm25").rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert facts["bytes_total"] == sum(file.stat().st_size for file in files)
    assert facts["bytes_per_passage"] == round(facts["bytes_total"] / 60, 1)
    assert tiny_store.splits == ALL


def test_titles_are_searched(tiny_store: Store) -> None:
    texts = build_index.PassageTexts(tiny_store.passages)
    assert len(texts) == 60
    assert texts[0].startswith("Granite Kettle The granite kettle")
    assert texts[5] == " " + tiny_store.passages.text(5)  # no title
    assert list(texts)[59] == texts[59]
    with pytest.raises(IndexError):
        texts[60]


def test_flat_index(folder: Path) -> None:
    index = load_index(folder / "flat")
    assert type(index).__name__ == "FlatIndex"
    assert (folder / "flat" / "vectors.npy").samefile(folder / "embeddings" / "vectors.npy")
    facts = facts_of(folder / "flat")
    # 32 numbers of 4 bytes, and the descriptions of 60 passages' worth.
    assert 128 < facts["bytes_per_passage"] < 140
    assert (facts["dim"], facts["dtype"], facts["num_passages"]) == (32, "float32", 60)


@pytest.mark.parametrize("settings", [IndexSettings(), IndexSettings(type="bm25")])
def test_index_built_again_after_a_kill(tmp_path: Path, folder: Path, tiny_store: Store, settings: IndexSettings) -> None:
    builder = ArtifactBuilder(tmp_path / "index", kind="index", stage="build_index", code_version=1, fingerprint="f")
    for _ in range(2):
        builder.begin()
        inputs = {"store": tiny_store.path, "embeddings": folder / "embeddings"}
        build_index.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    builder.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    index = load_index(tmp_path / "index")
    queries: Any = ["marble bicycle"] if index.takes == "text" else np.eye(3, 32, dtype=np.float32)
    for left, right in zip(index.search(queries, 9), load_index(folder / settings.type).search(queries, 9), strict=True):
        np.testing.assert_array_equal(left, right)


def test_vectors_of_another_corpus_are_refused(tmp_path: Path, tiny_store: Store) -> None:
    with build_artifact(tmp_path / "embeddings", kind="embeddings") as builder:
        np.save(builder.work / "vectors.npy", np.zeros((59, 4), np.float32))
    with pytest.raises(ArtifactError, match="59 vectors for a corpus of 60 passages"):
        run_stage(build_index, tmp_path / "i", "index", IndexSettings(), {"store": tiny_store.path, "embeddings": tmp_path / "embeddings"})


def test_an_unknown_option_is_refused(tmp_path: Path, folder: Path, tiny_store: Store) -> None:
    settings = IndexSettings(type="hnsw", options={"ef_serch": 5})
    with pytest.raises(RecipeError, match="did you mean 'ef_search'"):
        run_stage(build_index, tmp_path / "i", "index", settings, {"store": tiny_store.path, "embeddings": folder / "embeddings"})


# search


@pytest.mark.parametrize("split", ALL)
def test_dense_search_is_the_product_of_the_vectors(folder: Path, tiny_store: Store, split: Split) -> None:
    run = Run.load(folder / "dense_run", split)
    table = tiny_store.queries(split)
    vectors = load_retriever(folder / "model").encode_queries([table.text(row) for row in range(len(table))])
    exact = vectors @ np.load(folder / "embeddings" / "vectors.npy").T
    assert run.query_rows.tolist() == list(range(len(table)))
    for query, rows, scores in run:
        assert len(set(rows.tolist())) == 20
        np.testing.assert_allclose(scores, -np.sort(-exact[query])[:20], atol=1e-5)
        np.testing.assert_allclose(scores, exact[query, rows], atol=1e-5)


@pytest.mark.parametrize("split", ALL)
def test_bm25_search_finds_the_answers(folder: Path, tiny_store: Store, split: Split) -> None:
    run = Run.load(folder / "bm25_run", split)
    assert len(run) == len(tiny_store.queries(split))
    # Five passages are about a query's subject, one of them is the answer.
    assert measure_run(run, tiny_store.qrels(split), ["R@10"])["R@10"] > 0.9
    index = load_index(folder / "bm25")
    for query, rows, scores in run:
        expected_scores, expected_rows = index.search([tiny_store.queries(split).text(query)], 20)
        np.testing.assert_array_equal(rows, expected_rows[expected_rows >= 0])
        np.testing.assert_array_equal(scores, expected_scores[expected_rows >= 0])


@pytest.mark.parametrize(("name", "index"), [("dense_run", "flat"), ("bm25_run", "bm25")])
def test_facts_of_a_search(folder: Path, name: str, index: str) -> None:
    facts = facts_of(folder / name)
    assert facts.pop("milliseconds_per_query") > 0
    assert facts == {
        "bytes_per_passage": facts_of(folder / index)["bytes_per_passage"],
        "num_queries": 60,
        "num_passages": 60,
        "depth": 20,
        "index_type": index,
    }


def test_only_the_splits_asked_for_and_each_once(tmp_path: Path, folder: Path, tiny_store: Store) -> None:
    settings = SearchSettings(splits=["dev", "dev"], depth=1000)
    facts = run_stage(search, tmp_path / "run", "run", settings, {"store": tiny_store.path, "index": folder / "bm25"})
    assert [entry.name for entry in (tmp_path / "run").iterdir() if entry.is_dir()] == ["dev"]
    assert facts["num_queries"] == 12
    assert facts["depth"] == 1000
    assert np.diff(Run.load(tmp_path / "run", "dev").offsets).max() <= 60


def test_the_starting_model_where_no_model_is_given(tmp_path: Path, folder: Path, tiny_store: Store) -> None:
    settings = SearchSettings(splits=["dev"], depth=20, precision="fp32", model=ModelSettings(start=str(folder / "model")))
    run_stage(search, tmp_path / "run", "run", settings, {"store": tiny_store.path, "index": folder / "flat"})
    for name in ("passage_rows", "scores"):
        left, right = (np.load(path / "dev" / f"{name}.npy") for path in (tmp_path / "run", folder / "dense_run"))
        np.testing.assert_array_equal(left, right)


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("kind", [FlatIndex, BM25Index])
def test_goes_on_after_a_kill_with_equal_results(
    tmp_path: Path, folder: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    settings = SearchSettings(splits=ALL, depth=20, batch_queries=5, precision="fp32")
    index = folder / ("flat" if kind is FlatIndex else "bm25")
    inputs = {"store": tiny_store.path, "index": index, "model": folder / "model"}
    monkeypatch.setattr(search, "SHARD_QUERIES", 5)
    run_stage(search, tmp_path / "whole", "run", settings, inputs)
    real, calls = kind.search, []

    def dies_in_the_ninth_shard(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise Killed
        return real(self, *args, **kwargs)

    builder = ArtifactBuilder(tmp_path / "resumed", kind="run", stage="search", code_version=1, fingerprint="f")
    builder.begin()
    with monkeypatch.context() as patched:
        patched.setattr(kind, "search", dies_in_the_ninth_shard)
        with pytest.raises(Killed):
            search.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    # 36 training queries in shards of 5: seven and one query over.
    finished = {file.name: file.stat().st_mtime_ns for file in builder.resume.glob("*.npz")}
    assert sorted(finished) == sorted(f"train-{start}.npz" for start in range(0, 36, 5))
    (builder.resume / "dev-0.tmp").write_bytes(b"half a shard")

    again = ArtifactBuilder(tmp_path / "resumed", kind="run", stage="search", code_version=1, fingerprint="f")
    assert again.begin()
    search.run(settings, inputs, Context(again, 0, Progress(quiet=True)))
    assert {name: (again.resume / name).stat().st_mtime_ns for name in finished} == finished
    again.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    for split in ALL:
        for name in ("query_rows", "offsets", "passage_rows", "scores"):
            left, right = (tmp_path / run / split / f"{name}.npy" for run in ("whole", "resumed"))
            assert left.read_bytes() == right.read_bytes()
    assert not (tmp_path / "resumed" / "resume").exists()


def test_shards_do_not_change_the_run(tmp_path: Path, folder: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARD_QUERIES", 7)
    settings = SearchSettings(splits=["train"], depth=20, batch_queries=3)
    run_stage(search, tmp_path / "run", "run", settings, {"store": tiny_store.path, "index": folder / "bm25"})
    for name in ("query_rows", "offsets", "passage_rows", "scores"):
        assert (tmp_path / "run" / "train" / f"{name}.npy").read_bytes() == (folder / "bm25_run" / "train" / f"{name}.npy").read_bytes()


def test_queries_that_find_nothing_have_empty_lists(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    queries = [{"_id": "a", "text": "zzz"}, {"_id": "b", "text": "granite kettle"}, {"_id": "c", "text": "the"}]
    qrels = [(query["_id"], "granite-kettle/where", 1) for query in queries]
    store = build_store(tmp_path / "s", tiny_wordpiece, tiny_passages(), queries, {"test": qrels})
    run_stage(build_index, tmp_path / "i", "index", IndexSettings(type="bm25"), {"store": store.path})
    run_stage(search, tmp_path / "r", "run", SearchSettings(depth=2), {"store": store.path, "index": tmp_path / "i"})
    assert np.diff(Run.load(tmp_path / "r", "test").offsets).tolist() == [0, 2, 0]


def test_a_split_that_the_store_lacks(tmp_path: Path, folder: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    store = build_store(tmp_path / "s", tiny_wordpiece, tiny_passages(), tiny_queries(), {"test": tiny_qrels("test")})
    with pytest.raises(DataError, match="no 'dev' queries"):
        run_stage(search, tmp_path / "r", "run", SearchSettings(splits=["test", "dev"]), {"store": store.path, "index": folder / "bm25"})
    # Nothing of the run was finished.
    assert not (tmp_path / "r").exists()


def test_an_index_of_another_store_is_refused(tmp_path: Path, folder: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    qrels = {"test": tiny_qrels("test")}
    store = build_store(tmp_path / "s", tiny_wordpiece, tiny_passages(), tiny_queries(), qrels, max_passage_tokens=40)
    with pytest.raises(ArtifactError, match="another version of the corpus"):
        run_stage(search, tmp_path / "r", "run", SearchSettings(), {"store": store.path, "index": folder / "bm25"})


def test_a_model_of_another_dimension_is_refused(
    tmp_path: Path, folder: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast
) -> None:
    model = save_model(tmp_path / "model", tiny_wordpiece, hidden_size=16)
    with pytest.raises(ArtifactError, match="dimension 32, the model makes 16"):
        run_stage(search, tmp_path / "r", "run", SearchSettings(), {"store": tiny_store.path, "index": folder / "flat", "model": model})


# fuse


def test_fuse_tunes_on_dev_and_writes_every_split(tmp_path: Path, folder: Path, tiny_store: Store) -> None:
    inputs = {"store": tiny_store.path, "dense": folder / "dense_run", "bm25": folder / "bm25_run"}
    facts = run_stage(fuse, tmp_path / "run", "run", FuseSettings(depth=15), inputs)
    for split in ALL:
        runs = (Run.load(folder / name, split) for name in ("dense_run", "bm25_run"))
        expected = fuse_runs(*runs, dense_weight=facts["dense_weight"], constant=60, depth=15, method="score")
        fused = Run.load(tmp_path / "run", split)
        np.testing.assert_array_equal(fused.passage_rows, expected.passage_rows)
        np.testing.assert_array_equal(fused.scores, expected.scores)
    # An untrained model against BM25.
    assert facts["dense_weight"] <= 0.5
    assert facts["chosen_on"] == "dev"
    assert list(facts["dev_curve"]) == [f"{step / 20:.2f}" for step in range(21)]
    dev = measure_run(Run.load(tmp_path / "run", "dev"), tiny_store.qrels("dev"), ["RR@10"])["RR@10"]
    assert dev == pytest.approx(max(facts["dev_curve"].values()), abs=1e-6)
    assert (facts["num_queries"], facts["depth"], facts["index_type"]) == (60, 15, "hybrid")
    for name in ("milliseconds_per_query", "bytes_per_passage"):
        assert facts[name] == pytest.approx(sum(facts_of(folder / run)[name] for run in ("dense_run", "bm25_run")), abs=1e-3)
    json.dumps(facts, allow_nan=False)


def test_a_constant_of_ranks_is_refused_where_scores_are_summed() -> None:
    with pytest.raises(ValidationError, match='constant is for method = "rank"'):
        FuseSettings(constant=10)
    assert FuseSettings(method="rank", constant=10).constant == 10
    settings = FuseSettings()
    assert FuseSettings.model_validate(settings.model_dump()) == settings


def one_split(path: Path, source: Path, split: Split) -> Path:
    with build_artifact(path, kind="run") as builder:
        Run.load(source, split).save(builder.work)
    return path


def test_fuse_without_dev_takes_equal_weights(tmp_path: Path, folder: Path, tiny_store: Store) -> None:
    # Only the test split is in both; nothing says what the parts cost.
    dense = one_split(tmp_path / "dense", folder / "dense_run", "test")
    inputs = {"store": tiny_store.path, "dense": dense, "bm25": folder / "bm25_run"}
    facts = run_stage(fuse, tmp_path / "run", "run", FuseSettings(), inputs)
    assert (facts["dense_weight"], facts["chosen_on"], facts["dev_curve"]) == (0.5, "default", {})
    assert [entry.name for entry in (tmp_path / "run").iterdir() if entry.is_dir()] == ["test"]
    assert facts["milliseconds_per_query"] is None
    assert facts["bytes_per_passage"] is None


@pytest.mark.parametrize(("weight", "single"), [(1.0, "dense_run"), (0.0, "bm25_run")])
def test_fuse_with_a_given_weight(tmp_path: Path, folder: Path, tiny_store: Store, weight: float, single: str) -> None:
    inputs = {"store": tiny_store.path, "dense": folder / "dense_run", "bm25": folder / "bm25_run"}
    facts = run_stage(fuse, tmp_path / "run", "run", FuseSettings(dense_weight=weight), inputs)
    assert (facts["dense_weight"], facts["chosen_on"]) == (weight, "settings")
    np.testing.assert_array_equal(Run.load(tmp_path / "run", "test").passage_rows, Run.load(folder / single, "test").passage_rows)


def test_fuse_of_runs_without_a_common_split(tmp_path: Path, folder: Path, tiny_store: Store) -> None:
    dense = one_split(tmp_path / "dense", folder / "dense_run", "test")
    bm25 = one_split(tmp_path / "bm25", folder / "bm25_run", "dev")
    with pytest.raises(ArtifactError, match="no split in common"):
        run_stage(fuse, tmp_path / "run", "run", FuseSettings(), {"store": tiny_store.path, "dense": dense, "bm25": bm25})
