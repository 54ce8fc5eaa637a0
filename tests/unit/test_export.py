"""Exports of a small run that is put together here, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simlm import export
from simlm.artifacts import ArtifactBuilder, json_digest, read_manifest, write_json
from simlm.errors import ArtifactError, DataError
from simlm.evaluation.measures import evaluate_run
from simlm.export import export_run
from simlm.export.finished_run import FinishedRun
from simlm.export.model_card import UNKNOWN, model_card, without_places
from simlm.index import INFO, build_vectors
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.retriever import load_retriever
from simlm.progress import Progress
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings, ModelSettings
from simlm.stages import Context, evaluate
from tests.conftest import build_store, tiny_passages, tiny_qrels, tiny_queries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
QUIET = Progress(quiet=True)


def artifact(
    path: Path, kind: Any, stage: str, write: Callable[[ArtifactBuilder], None], settings: dict[str, Any], inputs: dict[str, str]
) -> str:
    """Make an artifact with inputs; its fingerprint."""
    fingerprint = json_digest([path.name, stage, settings, inputs])
    builder = ArtifactBuilder(path, kind=kind, stage=stage, code_version=1, fingerprint=fingerprint)
    builder.begin()
    write(builder)
    builder.finish(settings=settings, inputs=inputs, seed=7, seconds=60.0, peak_memory_bytes=1)
    return fingerprint


def make_run(folder: Path, tokenizer: PreTrainedTokenizerFast, *, index: str = "flat") -> Path:
    """A run with BM25 that is perfect, a distilled retriever that is not, and a re-ranker."""
    torch.manual_seed(3)
    qrels = {split: tiny_qrels(split) for split in ("train", "dev", "test")}
    store = build_store(folder / "store", tokenizer, tiny_passages(), tiny_queries(), qrels)
    of_store = read_manifest(folder / "store").fingerprint
    start = ModelSettings(start="scratch", config=CONFIG)
    model = {"start": "scratch", "config": CONFIG}
    training = {"model": model, "initial": "pretrained", "training": {"learning_rate": 3e-5}, "place": str(folder / "somewhere")}
    biencoder = BiEncoder(load_encoder(start, seed=1, tokenizer=tokenizer), "cls")
    crossencoder = CrossEncoder.from_encoder(start, seed=2, tokenizer=tokenizer)
    distilled = artifact(
        folder / "distilled",
        "model",
        "distill",
        lambda b: biencoder.save(b.work, tokenizer, max_query_tokens=24, max_passage_tokens=64, query_prompt="ask: "),
        training,
        {"store": of_store},
    )
    reranker = artifact(
        folder / "reranker",
        "model",
        "train_reranker",
        lambda b: crossencoder.save(b.work, tokenizer, max_pair_tokens=64),
        training | {"initial": "start"},
        {"store": of_store},
    )
    table = store.passages
    vectors = load_retriever(folder / "distilled").encode_passages([(table.title(row), table.text(row)) for row in range(len(table))])

    def embeddings(builder: ArtifactBuilder) -> None:
        np.save(builder.work / "vectors.npy", vectors)
        write_json(builder.work / "embeddings.json", {"dim": 32, "count": len(vectors)})

    made = artifact(
        folder / "distilled_embeddings", "embeddings", "encode", embeddings, {"model": model}, {"model": distilled, "store": of_store}
    )

    def build(builder: ArtifactBuilder) -> None:
        file = folder / "distilled_embeddings" / "vectors.npy"
        info = build_vectors(index, file, builder.work, options={}, seed=1)
        write_json(builder.work / INFO, info | {"type": index, "store_fingerprint": of_store})

    artifact(folder / "distilled_index", "index", "build_index", build, {}, {"embeddings": made, "store": of_store})
    rng = np.random.default_rng(5)
    runs = {}
    for name, of_model in (("bm25", None), ("distilled", distilled), ("reranker", reranker)):

        def search(builder: ArtifactBuilder, name: str = name) -> None:
            for split in ("dev", "test"):
                judged = store.qrels(split)  # type: ignore[arg-type]
                right = [max(grades, key=lambda row: grades[row]) for grades in (judged[row] for row in sorted(judged))]
                rows = [[row, (row + 1) % 60, (row + 2) % 60] if name == "bm25" else rng.permutation(60)[:10].tolist() for row in right]
                lists = [(found, [1.0 / (1 + rank) for rank in range(len(found))]) for found in rows]
                Run.from_lists(split, sorted(judged), lists).save(builder.work)  # type: ignore[arg-type]

        inputs = {"store": of_store} | ({"model": of_model} if of_model else {})
        runs[f"run.{name}"] = artifact(folder / f"{name}_run", "run", "search", search, {}, inputs)

    def report(builder: ArtifactBuilder) -> None:
        inputs = {"store": folder / "store"} | {role: folder / f"{role.removeprefix('run.')}_run" for role in runs}
        evaluate.run(EvaluateSettings(num_samples=200, measures=["R@50"]), inputs, Context(builder, 7, QUIET))

    artifact(folder / "report", "report", "evaluate", report, {}, runs | {"store": of_store})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "my-run", tiny_wordpiece)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but ONNX, in one go."""
    folder = tmp_path_factory.mktemp("exports") / "all"
    export_run(run, folder, ["sentence-transformers", "faiss", "parquet", "trec"], progress=QUIET)
    return folder


def texts_of(run: Path) -> list[tuple[str, str]]:
    table = FinishedRun(run).store.passages
    return [(table.title(row), table.text(row)) for row in range(len(table))]


def test_the_export_says_what_it_holds(exported: Path, run: Path) -> None:
    info = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    assert info["run"] == "my-run"
    assert list(info["targets"]) == ["faiss", "parquet", "sentence-transformers", "trec"]
    assert info["targets"]["parquet"]["passages"] == 60
    assert not [entry for entry in exported.parent.iterdir() if entry != exported], "nothing is left beside it"


def test_sentence_transformers_gives_the_vectors_of_the_run(exported: Path, run: Path) -> None:
    from sentence_transformers import CrossEncoder as Theirs
    from sentence_transformers import SentenceTransformer

    folder = exported / "sentence-transformers"
    texts = texts_of(run)
    theirs = SentenceTransformer(str(folder / "retriever"), device="cpu")
    ours = load_retriever(run / "distilled")
    inputs = [text if text[0] else text[1] for text in texts]
    np.testing.assert_allclose(theirs.encode_document(inputs), np.load(run / "distilled_embeddings" / "vectors.npy"), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(["what is it"]), ours.encode_queries(["what is it"]), atol=1e-5)
    again = load_retriever(folder / "retriever")
    np.testing.assert_array_equal(again.encode_queries(["what is it"]), ours.encode_queries(["what is it"]))
    scores = Theirs(str(folder / "reranker"), device="cpu").predict([("what is it", texts[0][1])])
    assert scores.shape == (1,)
    assert not (folder / "retriever" / "manifest.json").exists()


def test_the_card_says_data_recipe_measures_and_licence(exported: Path) -> None:
    card = (exported / "sentence-transformers" / "retriever" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n")
    assert "12 judged test queries over 60 passages" in card
    assert "| BM25 | 1.0000 |" in card
    assert "0 queries better, " in card
    assert "p = " in card or "p < 0.001" in card
    assert "On these queries it is worse than BM25." in card
    assert "| distilled (this model) | distill | pretrained |" in card
    assert '"learning_rate": 3e-05' in card
    assert f"- Data: {UNKNOWN}" in card
    assert "Starting model (scratch): none, the weights were drawn at random" in card
    assert "SentenceTransformer(" in card
    other = (exported / "sentence-transformers" / "reranker" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-ranking" in other
    assert "reranker (this model)" in other
    assert "CrossEncoder(" in other


def test_nothing_tells_where_it_was_made(exported: Path, run: Path) -> None:
    for file in exported.rglob("*"):
        if file.is_file():
            assert str(run.parent).encode() not in file.read_bytes(), file


def test_what_is_known_of_licences_is_said(run: Path, tmp_path: Path) -> None:
    found = FinishedRun(run)
    found.store.info["source"] = {"dataset": "beir", "path": "/data/of/mine/medquad", "licence": "CC BY 4.0", "lang": "en"}
    card = model_card(found, "retriever", "")
    assert "- Data: CC BY 4.0" in card
    assert "- Data set: medquad (read as beir)" in card
    assert 'language: "en"' in card
    (tmp_path / "README.md").write_text("---\ntags:\n- x\nlicense: mit\n---\n", encoding="utf-8")
    object.__setattr__(found.chosen.settings, "start", str(tmp_path))
    found.chosen.__dict__["model"] = None
    card = model_card(found, "retriever", "")
    assert f"- Starting model ({tmp_path.name}): mit (its model card says)" in card
    assert str(tmp_path) not in card
    assert "Not trained in this run" in card


def test_measures_of_an_earlier_try_are_not_those_of_this_model(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    folder = make_run(tmp_path / "run", tiny_wordpiece)
    manifest = folder / "distilled_run" / "manifest.json"
    other = json.loads(manifest.read_text(encoding="utf-8")) | {"fingerprint": "another"}
    write_json(manifest, other)
    card = model_card(FinishedRun(folder), "retriever", "")
    assert "Not measured: the run's report has no row of this model" in card


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/somebody/models/mine", "mine"),
        ("~/models/mine/", "mine"),
        ("$DATA/squad", "squad"),
        ("../shared/data/squad", "squad"),
        ("C:\\models\\mine", "mine"),
        ("runs/other/distilled", "distilled"),
        ("intfloat/e5-base", "intfloat/e5-base"),
        ("packaged:all-MiniLM-L6-v2", "packaged:all-MiniLM-L6-v2"),
        (["/a/b", 3, None, {"x": "/c/d"}], ["b", 3, None, {"x": "d"}]),
    ],
)
def test_of_a_path_the_last_part_is_shown(value: Any, shown: Any) -> None:
    assert without_places(value) == shown


def test_faiss_alone_finds_the_passages(exported: Path, run: Path) -> None:
    import faiss

    index = faiss.read_index(str(exported / "faiss" / "index.faiss"))
    ids = pq.read_table(exported / "faiss" / "passage_ids.parquet").to_pydict()
    vectors = np.load(run / "distilled_embeddings" / "vectors.npy")
    scores, rows = index.search(vectors[7:8], 3)
    assert ids["row"] == list(range(60))
    assert ids["passage_id"][rows[0, 0]] == tiny_passages()[7]["_id"]
    assert scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_an_index_that_faiss_made_is_taken_as_it_is(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    folder = make_run(tmp_path / "run", tiny_wordpiece, index="hnsw")
    info = export_run(folder, tmp_path / "out", ["faiss"], progress=QUIET)
    assert info["targets"]["faiss"]["index_type"] == "hnsw"
    assert (tmp_path / "out" / "faiss" / "index.faiss").read_bytes() == (folder / "distilled_index" / "index.faiss").read_bytes()


def test_parquet_has_every_vector_under_its_id(exported: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = pq.read_table(exported / "parquet")
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 32)
    assert table["passage_id"].to_pylist() == [passage["_id"] for passage in tiny_passages()]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), np.load(run / "distilled_embeddings" / "vectors.npy"))
    monkeypatch.setattr("simlm.export.vectors.PART_PASSAGES", 25)
    monkeypatch.setattr("simlm.export.vectors.BLOCK_PASSAGES", 10)
    export_run(run, tmp_path / "parts", ["parquet"], progress=QUIET)
    parts = sorted((tmp_path / "parts" / "parquet").iterdir())
    assert [pq.ParquetFile(part).metadata.num_rows for part in parts] == [25, 25, 10]
    assert [pq.ParquetFile(part).metadata.num_row_groups for part in parts] == [3, 3, 1]
    assert pq.read_table(tmp_path / "parts" / "parquet").equals(table)


def test_what_was_added_is_there_and_what_was_deleted_is_not(run: Path, tmp_path: Path) -> None:
    import faiss

    from simlm.additions import add_passages, delete_passages

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    new = [{"_id": f"new{row}", "title": "", "text": f"a paper lighthouse number {row}"} for row in range(3)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in new), encoding="utf-8")
    add_passages(folder, tmp_path / "new.jsonl", progress=QUIET)
    delete_passages(folder, [tiny_passages()[5]["_id"], "new1"])
    export_run(folder, tmp_path / "out", ["parquet", "faiss"], progress=QUIET)
    table = pq.read_table(tmp_path / "out" / "parquet")
    ids = [passage["_id"] for place, passage in enumerate(tiny_passages()) if place != 5] + ["new0", "new2"]
    assert table["passage_id"].to_pylist() == ids
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors[-1], load_retriever(folder / "distilled").encode_passages([new[2]["text"]])[0], atol=1e-5)
    index = faiss.read_index(str(tmp_path / "out" / "faiss" / "index.faiss"))
    assert pq.read_table(tmp_path / "out" / "faiss" / "passage_ids.parquet")["passage_id"].to_pylist() == ids
    assert index.search(vectors[-1:], 1)[1].tolist() == [[len(ids) - 1]]


def test_trec_has_all_runs_and_gives_the_measures_of_the_report(exported: Path, run: Path) -> None:
    folder = exported / "trec"
    assert sorted(file.name for file in folder.glob("*.trec")) == [
        f"{name}.{split}.trec" for name in ("bm25", "distilled", "reranker") for split in ("dev", "test")
    ]
    metrics = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
    for row in metrics["rows"]:
        found = evaluate_run(folder / f"{row['name']}.test.trec", folder / "test.qrels", ["R@50", "RR@10"])
        assert found["R@50"] == pytest.approx(row["measures"]["R@50"])
        assert found["RR@10"] == pytest.approx(row["measures"]["RR@10"])


# --- what is refused


def test_unknown_target(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown export target 'parqet'; did you mean 'parquet'\? \(known: sentence-transformers, onnx"):
        export_run(run, tmp_path / "out", ["parqet"], progress=QUIET)
    with pytest.raises(DataError, match="nothing to export"):
        export_run(run, tmp_path / "out", [], progress=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_as_it_is(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    export_run(run, place, ["trec"], progress=QUIET)
    with pytest.raises(DataError, match=r"not empty, so nothing was written; .*--overwrite"):
        export_run(run, place, ["trec"], progress=QUIET)
    export_run(run, place, ["parquet"], overwrite=True, progress=QUIET)
    assert [entry.name for entry in sorted(place.iterdir())] == ["export.json", "parquet"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds no export\.json, so it is not an export and is not replaced"):
        export_run(run, tmp_path / "mine", ["trec"], overwrite=True, progress=QUIET)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(DataError, match="a file or a link is there"):
        export_run(run, tmp_path / "mine" / "thesis.txt", ["trec"], overwrite=True, progress=QUIET)


@pytest.mark.parametrize("fails", ["target", "rename"])
def test_an_export_that_fails_leaves_the_earlier_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    place = tmp_path / "out"
    export_run(run, place, ["trec"], progress=QUIET)
    before = sorted(place.rglob("*"))
    if fails == "target":
        monkeypatch.setattr("simlm.export.vectors.write_parquet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            if str(source).endswith(".work"):
                raise OSError(errno.ENOSPC, "no space")
            rename(source, target)

        monkeypatch.setattr(export.os, "rename", failing)
    with pytest.raises(BaseException, match=r"disk is full|^$"):
        export_run(run, place, ["parquet"], overwrite=True, progress=QUIET)
    assert sorted(place.rglob("*")) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run(run: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "report")
    with pytest.raises(ArtifactError, match=r"no finished report.*--retriever \(finished here: distilled\)"):
        export_run(unfinished, tmp_path / "out", ["parquet"], progress=QUIET)
    info = export_run(unfinished, tmp_path / "out", ["parquet"], retriever="distilled", progress=QUIET)
    assert info["targets"]["parquet"]["retriever"] == "distilled"
    with pytest.raises(ArtifactError, match="no finished embeddings of retriever1"):
        export_run(unfinished, tmp_path / "other", ["parquet"], retriever="retriever1", progress=QUIET)
    with pytest.raises(DataError, match="did you mean 'distilled'"):
        export_run(unfinished, tmp_path / "other", ["parquet"], retriever="distiled", progress=QUIET)
    shutil.rmtree(unfinished / "distilled_index")
    with pytest.raises(ArtifactError, match="no finished index 'distilled_index'"):
        export_run(unfinished, tmp_path / "other", ["faiss"], retriever="distilled", progress=QUIET)
    for folder in unfinished.glob("*_run"):
        shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match="no finished search"):
        export_run(unfinished, tmp_path / "other", ["trec"], progress=QUIET)
    with pytest.raises(ArtifactError, match="not the folder of a run"):
        export_run(tmp_path, tmp_path / "other", ["trec"], progress=QUIET)
    assert not (tmp_path / "other").exists()


def test_vectors_of_an_earlier_model(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "distilled_embeddings" / "manifest.json"
    found = json.loads(manifest.read_text(encoding="utf-8"))
    write_json(manifest, found | {"inputs": found["inputs"] | {"model": "earlier"}})
    with pytest.raises(ArtifactError, match="made by an earlier 'distilled'"):
        export_run(tmp_path / "run", tmp_path / "out", ["parquet"], progress=QUIET)


def test_from_the_command_line(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from simlm.cli import app

    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), "--to", "trec", "--to", "parquet"])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out' / 'trec'}: " in result.output
    assert (tmp_path / "out" / "parquet" / "part-00000.parquet").exists()
    assert CliRunner().invoke(app, ["export", str(run), str(tmp_path / "none")]).exit_code == 2
