"""Adding passages to a finished run and deleting some: what is found, what is encoded, kills, damage, other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from typer.testing import CliRunner

from simlm import additions
from simlm.additions import Additions, add_passages, delete_passages, refresh
from simlm.artifacts import ArtifactBuilder, Kind, build_artifact, json_digest, read_manifest
from simlm.cli import app
from simlm.errors import ArtifactError, DataError, SimlmError
from simlm.index import open_index
from simlm.index.bm25 import BM25Index
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.inference import Inference
from simlm.progress import Progress
from simlm.recipe import EncodeSettings, IndexSettings, ModelSettings
from simlm.searcher import Searcher
from simlm.stages import Context, build_index, encode

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
NEW = [
    {
        "_id": "new/clock",
        "title": "Wooden Clock",
        "text": "The wooden clock ticks backwards under the marble stairs.",
        "metadata": {"kind": "clock"},
    },
    {"_id": "new/owl", "title": "", "text": "An owl of porcelain watches the harbour and never blinks."},
    {"_id": "new/spoon", "title": "Tin Spoon", "text": "The tin spoon sings in hot soup, a hum that the copper violin answers."},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def artifact(path: Path, kind: Kind, stage: ModuleType, settings: BaseModel, inputs: dict[str, Path]) -> None:
    """As the pipeline makes it: a fingerprint of settings and inputs, the inputs' fingerprints in the manifest."""
    given = settings.model_dump()
    fingerprints = {role: read_manifest(place).fingerprint for role, place in inputs.items()}
    builder = ArtifactBuilder(path, kind=kind, stage="s", code_version=1, fingerprint=json_digest([path.name, given, fingerprints]))
    builder.begin()
    stage.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    builder.finish(settings=given, inputs=fingerprints, seed=0, seconds=0.0, peak_memory_bytes=0)


def save_model(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    encoder = load_encoder(ModelSettings(start="scratch", config=CONFIG), tokenizer=tokenizer, seed=seed)
    builder = ArtifactBuilder(path, kind="model", stage="s", code_version=1, fingerprint=f"model {seed}")
    builder.begin()
    BiEncoder(encoder, "cls").save(builder.work, tokenizer, max_query_tokens=24, max_passage_tokens=64)
    builder.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)


def encode_and_index(run: Path, index: IndexSettings) -> None:
    model = {"model": run / "distilled"}
    artifact(run / "distilled_embeddings", "embeddings", encode, EncodeSettings(precision="fp32"), {"store": run / "store"} | model)
    inputs = {"store": run / "store", "embeddings": run / "distilled_embeddings"}
    artifact(run / "distilled_index", "index", build_index, index, inputs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    """A run: store, bm25, a distilled retriever with its embeddings and flat index."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    shutil.copytree(tiny_store.path, run / "store")
    artifact(run / "bm25", "index", build_index, IndexSettings(type="bm25"), {"store": run / "store"})
    save_model(run / "distilled", tiny_wordpiece, 3)
    encode_and_index(run, IndexSettings())
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "new.jsonl", NEW)


def written(path: Path, passages: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages), encoding="utf-8")
    return path


def found(run: Path, query: str, mode: Any = "dense", depth: int = 100) -> list[str]:
    return [passage.passage_id for passage in Searcher(run, retriever=None, mode=mode, rerank=False).search(query, depth=depth)]


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_what_was_added_is_found_among_the_rest(run: Path, file: Path, mode: Any) -> None:
    query = "wooden clock ticks backwards under the marble stairs"
    before = found(run, query, mode)
    change = add_passages(run, file)
    assert (change.added, change.deleted, change.encoded, change.total) == (3, 0, 3, 63)
    after = found(run, query, mode)
    assert after[0] == "new/clock" or mode == "dense"  # vectors of a model that was never trained
    assert "new/clock" in after
    others = [name for name in after if not name.startswith("new/")]
    # Sums of standardised scores depend on all scores of a list, so that neighbours may change places.
    assert sorted(others) == sorted(before) if mode == "hybrid" else others == before
    shown = {p.passage_id: p for p in Searcher(run, retriever=None, mode=mode, rerank=False).search(query, depth=100)}
    assert (shown["new/clock"].title, shown["new/clock"].text) == (NEW[0]["title"], NEW[0]["text"])


def test_dense_scores_are_those_of_one_index_over_all(run: Path, file: Path) -> None:
    add_passages(run, file)
    searcher = Searcher(run, retriever=None, mode="dense", rerank=False)
    assert searcher.dense is not None
    model, index = searcher.dense
    vectors_ND = np.concatenate(
        [np.load(run / "distilled_embeddings/vectors.npy"), np.load(run / "added/0001/distilled_embeddings/vectors.npy")]
    )
    # Encoded by the very same model: what it makes of the texts.
    own = model.encode_passages([(passage["title"], passage["text"]) for passage in NEW])
    np.testing.assert_allclose(vectors_ND[60:], own, atol=1e-6)
    queries_QD = model.encode_queries(["copper violin", "an owl", "where"])
    scores, rows = index.search(queries_QD, 63)
    exact = queries_QD @ vectors_ND.T
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1), atol=1e-6)
    assert sorted(rows[0].tolist()) == list(range(63))
    scores, rows = index.search(queries_QD, 70)
    assert (rows[:, 63:] == -1).all()
    only = np.zeros(63, dtype=bool)
    only[[2, 60, 62]] = True
    assert sorted(index.search(queries_QD, 5, allowed=only)[1][0].tolist()) == [-1, -1, 2, 60, 62]
    # A passage that is deleted is not found where it is allowed.
    delete_passages(run, ["new/owl", searcher.store.passages.ids[2]])
    left = Searcher(run, retriever=None, mode="dense", rerank=False).dense
    assert left is not None
    only[61] = True
    assert sorted(left[1].search(queries_QD, 5, allowed=only)[1][0].tolist()) == [-1, -1, -1, 60, 62]


def test_only_the_new_passages_are_encoded(run: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    encoded = Inference.run

    def counting(self: Inference, batches: Any, results: Any, **options: Any) -> None:
        counts.append(len(results))
        encoded(self, batches, results, **options)

    monkeypatch.setattr(Inference, "run", counting)
    add_passages(run, file)
    assert counts == [3]
    add_passages(run, written(file.with_name("more.jsonl"), [{"_id": "more", "text": "One passage more."}]))
    assert counts == [3, 1]
    assert refresh(run).encoded == 0
    assert counts == [3, 1]


def test_deleted_passages_are_found_no_more(run: Path, file: Path) -> None:
    add_passages(run, file)
    query = "copper violin"
    gone = ["copper-violin/what", "new/spoon"]
    assert set(gone) <= set(found(run, query, "dense"))
    change = delete_passages(run, gone)
    assert (change.added, change.deleted, change.encoded, change.total) == (0, 2, 0, 61)
    for mode in ("dense", "bm25", "hybrid"):
        assert not set(gone) & set(found(run, query, mode))
    assert len(found(run, query, "dense")) == 61
    searcher = Searcher(run, retriever=None, mode="bm25", rerank=False)
    assert searcher.store.passages.ids.find("new/spoon") is None
    assert searcher.store.passages.ids.find("new/owl") == 61
    assert searcher.store.passages.metadata(60) == {"kind": "clock"}
    with pytest.raises(DataError, match=r"'new/spoon': no passage of .* has this id"):
        delete_passages(run, ["new/owl", "new/spoon"])
    assert "new/owl" in found(run, query, "dense")


def test_deleted_without_anything_added(run: Path) -> None:
    delete_passages(run, ["copper-violin/what"])
    delete_passages(run, ["copper-violin/made"])
    assert len(found(run, "copper violin")) == 58
    # Older lists go, but that of the state before stays for who is reading it.
    assert [path.name for path in sorted((run / "added").glob("deleted-*"))] == ["deleted-0001.npy", "deleted-0002.npy"]
    delete_passages(run, ["copper-violin/needs"])
    assert [path.name for path in sorted((run / "added").glob("deleted-*"))] == ["deleted-0002.npy", "deleted-0003.npy"]


def test_a_deleted_id_may_be_added_again(run: Path, file: Path) -> None:
    add_passages(run, file)
    delete_passages(run, ["new/owl"])
    again = written(file.with_name("again.jsonl"), [{"_id": "new/owl", "text": "Another owl, of glass."}])
    assert add_passages(run, again).total == 63
    (shown,) = [p for p in Searcher(run, retriever=None, mode="bm25", rerank=False).search("owl", depth=9) if "owl" in p.passage_id]
    assert shown.text == "Another owl, of glass."


def test_scores_of_other_numbers_are_not_mixed(run: Path, file: Path) -> None:
    add_passages(run, file)
    (name,) = [path.name for path in run.glob("*_index")]
    cut = IndexSettings(type="flat", options={"dim": 4})
    inputs = {"store": run / "store", "embeddings": run / name.replace("_index", "_embeddings")}
    with build_artifact(run / "cut", kind="index") as builder:
        build_index.run(cut, inputs, Context(builder, 0, Progress(quiet=True)))
    with pytest.raises(ArtifactError, match=r"compares \d+ numbers of a vector, the run's index 4.*simlm add-passages"):
        Additions.open(run).extend_index(name, open_index(run / "cut"))
    assert len(Additions.open(run).extend_index(name, open_index(run / name))) == 63


@pytest.mark.parametrize("damage", [{"segments": None}, {"segments": 3}, {"deleted": 7}, {"deleted": {"file": "x"}}])
def test_a_list_of_additions_of_another_shape_is_told(run: Path, file: Path, damage: dict[str, Any]) -> None:
    add_passages(run, file)
    current = run / "added" / "current.json"
    current.write_text(json.dumps(json.loads(current.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    with pytest.raises(ArtifactError, match="not readable"):
        Additions.open(run)


def test_ids_that_are_there_are_refused_or_replaced(run: Path, file: Path) -> None:
    changed = written(file.with_name("changed.jsonl"), [NEW[0], {"_id": "copper-violin/what", "text": "It is a harp now."}])
    with pytest.raises(DataError, match=r"1 of 2 ids are there already \('copper-violin/what'\).*--replace"):
        add_passages(run, changed)
    assert not Additions.open(run)
    change = add_passages(run, changed, replace=True)
    assert (change.added, change.deleted, change.total) == (2, 1, 61)
    (shown,) = Searcher(run, retriever=None, mode="bm25", rerank=False).search("harp", depth=9)
    assert (shown.passage_id, shown.text) == ("copper-violin/what", "It is a harp now.")


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([NEW[0], NEW[0]], r"new\.jsonl:2.*'new/clock' is used twice"),
        ([{"_id": "a", "text": ""}], r"new\.jsonl:1"),
        ([], r"new\.jsonl: no field of a usual name for the text"),
    ],
)
def test_passages_that_cannot_be_used(run: Path, file: Path, passages: list[dict[str, Any]], message: str) -> None:
    written(file, passages)
    with pytest.raises(DataError, match=message):
        add_passages(run, file)
    assert not Additions.open(run)


def test_files_that_are_none(run: Path, file: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        add_passages(run, file.with_name("absent.jsonl"))
    other = file.rename(file.with_suffix(".doc"))
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.csv"):
        add_passages(run, other)
    with pytest.raises(ArtifactError, match="not the folder of a run"):
        add_passages(run.parent, file)
    with pytest.raises(SimlmError, match="did you mean 'retriever1'"):
        add_passages(run, written(file, NEW), retriever="retriver1")


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def killing(function: Any, after: int) -> Any:
    calls: list[int] = []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("place", ["store", "encode", "index", "bm25", "state", "deletions"])
def test_a_kill_leaves_what_was_and_the_next_call_goes_on(run: Path, file: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    delete_passages(run, ["glass-orchard/what"])
    before = found(run, "copper violin", "hybrid")
    with monkeypatch.context() as patch:
        finish = ArtifactBuilder.finish
        if place in ("store", "encode", "index", "bm25"):
            patch.setattr(ArtifactBuilder, "finish", killing(finish, ["store", "encode", "index", "bm25"].index(place)))
        elif place == "state":
            patch.setattr(additions, "write_json", killing(additions.write_json, 1))  # the first is in the segment's bm25
        else:
            patch.setattr(additions, "file_digest", killing(additions.file_digest, 2))  # after the list was put in place
        with pytest.raises(Killed):
            add_passages(run, file)
    assert found(run, "copper violin", "hybrid") == before
    assert len(Additions.open(run).segments) == 0
    assert add_passages(run, file).total == 62
    assert "new/spoon" in found(run, "copper violin", "hybrid")
    assert "glass-orchard/what" not in found(run, "glass orchard", "hybrid")
    assert sorted(path.name for path in (run / "added").iterdir() if path.is_dir()) == ["0001"]


def test_another_call_at_the_same_time_is_refused(run: Path, file: Path) -> None:
    with additions._alone(run), pytest.raises(SimlmError, match="another process is adding"):
        add_passages(run, file)
    add_passages(run, file)


def test_additions_to_an_earlier_corpus_are_refused(run: Path, file: Path) -> None:
    add_passages(run, file)
    manifest = json.loads((run / "store" / "manifest.json").read_text(encoding="utf-8"))
    (run / "store" / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="belongs to an earlier 'store'"):
        Additions.open(run)


@pytest.mark.parametrize("damage", ["{", "[]", '{"store": 1}'])
def test_damaged_state_is_refused(run: Path, file: Path, damage: str) -> None:
    add_passages(run, file)
    (run / "added" / "current.json").write_text(damage, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"current\.json: not readable"):
        found(run, "owl")


def test_damaged_files_are_refused(run: Path, file: Path) -> None:
    add_passages(run, file)
    delete_passages(run, ["new/owl"])
    deletions = run / "added" / "deleted-0001.npy"
    whole = deletions.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"\x01"):
        deletions.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"deleted-0001\.npy: absent or not the file"):
            found(run, "owl")
    deletions.write_bytes(whole)
    vectors = run / "added" / "0001" / "distilled_index" / "vectors.npy"
    content = vectors.read_bytes()
    vectors.unlink()
    vectors.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"vectors\.npy: .*the manifest says"):
        found(run, "owl")


def test_another_model_encodes_what_was_added_again(run: Path, file: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    add_passages(run, file)
    save_model(run / "distilled", tiny_wordpiece, 4)
    encode_and_index(run, IndexSettings())
    with pytest.raises(ArtifactError, match=r"encoded by an earlier model.*simlm add-passages"):
        found(run, "owl")
    assert "new/owl" in found(run, "owl", "bm25")
    assert refresh(run).encoded == 3
    searcher = Searcher(run, retriever=None, mode="dense", rerank=False)
    assert searcher.dense is not None
    np.testing.assert_allclose(
        np.load(run / "added/0001/distilled_embeddings/vectors.npy"),
        searcher.dense[0].encode_passages([(passage["title"], passage["text"]) for passage in NEW]),
        atol=1e-6,
    )


def test_an_index_that_was_cut_has_its_additions_cut_alike(run: Path, file: Path) -> None:
    encode_and_index(run, IndexSettings(options={"dim": 8}))
    add_passages(run, file)
    searcher = Searcher(run, retriever=None, mode="dense", rerank=False)
    assert searcher.dense is not None
    model, index = searcher.dense
    scores, rows = index.search(model.encode_queries([NEW[1]["text"]]), 63)
    first = np.concatenate(
        [np.load(run / name / "vectors.npy")[:, :8] for name in ("distilled_embeddings", "added/0001/distilled_embeddings")]
    )
    query = model.encode_queries([NEW[1]["text"]])[0, :8]
    exact = first @ query / np.linalg.norm(first, axis=1) / np.linalg.norm(query)
    np.testing.assert_allclose(scores[0], exact[rows[0]], atol=1e-6)


def test_a_run_of_bm25_alone(run: Path, file: Path) -> None:
    for name in ("distilled_index", "distilled_embeddings", "distilled"):
        shutil.rmtree(run / name)
    assert add_passages(run, file).encoded == 0
    assert found(run, "owl", "bm25") == ["new/owl"]


def test_bm25_of_an_earlier_version(run: Path, file: Path) -> None:
    description = json.loads((run / "bm25" / "index.json").read_text(encoding="utf-8"))
    average = description.pop("average_terms")
    builder = ArtifactBuilder(run / "bm25", kind="index", stage="s", code_version=1, fingerprint="old")
    builder.begin()
    shutil.copytree(run / "bm25", builder.work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    (builder.work / "index.json").write_text(json.dumps(description), encoding="utf-8")
    builder.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    add_passages(run, file)
    added = json.loads((run / "added" / "0001" / "bm25" / "index.json").read_text(encoding="utf-8"))
    assert added["average_terms"] == pytest.approx(average)


def test_bm25_scores_of_added_passages_are_those_of_the_corpus(run: Path, tiny_store: Store) -> None:
    base: Any = open_index(run / "bm25")
    again = run / "again"
    again.mkdir()
    texts = build_index.PassageTexts(tiny_store.passages)
    info = BM25Index.build_addition([*texts, "", "unheard-of words"], again, base, [])
    added = BM25Index(again, info)
    for query in ("where is the copper violin", "wool gloves wool", "unheard", "the"):
        scores, rows = base.search([query], 60)
        own, own_rows = added.search([query], 62)
        found = rows[0] >= 0
        np.testing.assert_array_equal(own_rows[0][own_rows[0] < 60][: found.sum()], rows[0][found])
        np.testing.assert_allclose(own[0][own_rows[0] < 60][: found.sum()], scores[0][found], rtol=1e-5)
    assert added.search(["unheard"], 5)[1][0].tolist() == [61, -1, -1, -1, -1]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_commands(run: Path, file: Path) -> None:
    added = invoke("add-passages", str(run), str(file))
    assert added.exit_code == 0, added.output
    assert added.output == "added 3 passages, deleted 0; 3 were encoded; 63 can be found now\n"
    (run / "gone.txt").write_text("new/owl\n\nnew/spoon\n", encoding="utf-8")
    deleted = invoke("delete-passages", str(run), "new/clock", "--file", str(run / "gone.txt"))
    assert deleted.output == "added 0 passages, deleted 3; 0 were encoded; 60 can be found now\n"
    again = invoke("add-passages", str(run), str(file))
    assert again.output == "added 3 passages, deleted 0; 3 were encoded; 63 can be found now\n"
    assert invoke("add-passages", str(run)).output == "added 0 passages, deleted 0; 0 were encoded; 63 can be found now\n"
    for arguments, message in (
        (["delete-passages", str(run)], "no ids given"),
        (["delete-passages", str(run), "--file", str(run / "absent")], "not readable as a list of ids"),
        (["add-passages", str(run), "--replace"], "--replace is for passages of a file"),
    ):
        failed = invoke(*arguments)
        assert isinstance(failed.exception, SimlmError), failed.output
        assert message in str(failed.exception)


def test_rows_beyond_all_tables(run: Path, file: Path) -> None:
    add_passages(run, file)
    passages = Searcher(run, retriever=None, mode="bm25", rerank=False).store.passages
    assert [passages.ids[row] for row in (0, 59, 60, 62)] == [*list(passages.ids)[:60:59], "new/clock", "new/spoon"]
    for row in (-1, 63):
        with pytest.raises(IndexError, match=f"row {row} is outside 0..62"):
            passages.text(row)
