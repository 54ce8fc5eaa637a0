"""Choosing an index for a budget: sizes, candidates, what is chosen and opened, the report."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from simlm import index_choice
from simlm.additions import add_passages
from simlm.artifacts import open_artifact
from simlm.cli import app
from simlm.errors import ArtifactError, DataError, SimlmError
from simlm.evaluation.report.index_choice import conclusion, markdown, terminal_table
from simlm.index import check_options
from simlm.index.flat import FlatIndex
from simlm.index.rescoring import RescoredIndex
from simlm.index.vectors import SourceVectors
from simlm.index_choice import Candidate, candidates, choose_index, parse_bytes
from simlm.recipe import IndexSettings
from simlm.searcher import Searcher
from tests.unit.test_additions import artifact, encode_and_index, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    shutil.copytree(tiny_store.path, run / "store")
    save_model(run / "distilled", tiny_wordpiece, 3)
    encode_and_index(run, IndexSettings())
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


SMALL = [
    Candidate("flat", {"dtype": "float32"}),
    Candidate("flat", {"dtype": "int8"}),
    Candidate("rabitq", {"bits": 1, "rescore": 10, "rescore_dtype": "float32"}),
    Candidate("flat", {"dtype": "int8", "dim": 1}),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_choice, "candidates", lambda source, sizes: SMALL)


@pytest.mark.parametrize(
    ("text", "count"), [("1GB", 10**9), ("1 GiB", 2**30), ("800mb", 8 * 10**8), ("1.5k", 1500), ("4096", 4096), ("2KiB", 2048)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "1XB", "1e9", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SimlmError, match="for example 800MB"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [60, 60_000])
def test_candidates_are_indexes_that_can_be_built(tmp_path: Path, count: int) -> None:
    np.save(tmp_path / "v.npy", np.zeros((count, 48), np.float16))
    found = candidates(SourceVectors(tmp_path / "v.npy"), [48, 24, 6])
    assert found[0] == Candidate("flat", {"dtype": "float32"})
    assert len({candidate.label for candidate in found}) == len(found)
    for candidate in found:
        check_options(candidate.type, candidate.options)
        check_options(candidate.inner.type, candidate.inner.options)
    assert any("in lists" in candidate.label for candidate in found) == (count == 60_000)
    # Those that are built once stand together.
    inner = [json.dumps([candidate.inner.type, candidate.inner.options], sort_keys=True) for candidate in found]
    assert len(set(inner)) == 1 + sum(left != right for left, right in itertools.pairwise(inner))


def test_the_smallest_that_is_good_is_chosen_and_opened(run: Path, few: None) -> None:
    choice = choose_index(run, budget=10**6, min_quality=0.9)
    rows = {row["label"]: row for row in choice.content["candidates"]}
    exact = rows["flat float32"]
    assert (exact["quality"], exact["bytes_ratio"]) == (1.0, 1.0)
    good = [row for row in rows.values() if row["quality"] >= 0.9]
    assert choice.content["chosen"] == min(good, key=lambda row: row["resident_bytes"])["label"] == "rabitq 1 bit + 10 x float32"
    # All passages are candidates, so nothing is missed.
    assert rows["rabitq 1 bit + 10 x float32"]["quality"] == 1.0
    # One number says only on which side of 0 a vector is.
    assert rows["flat int8 1 numbers"]["quality"] < 0.9
    assert rows["flat int8 1 numbers"]["resident_bytes"] < rows["rabitq 1 bit + 10 x float32"]["resident_bytes"]
    assert choice.folder == run / "distilled_chosen_index"
    manifest = open_artifact(choice.folder, "index").manifest
    assert manifest.settings["type"] == "rabitq"
    assert manifest.facts["rescore"] == 10
    searcher = Searcher(run, retriever=None, mode="dense", rerank=False)
    assert searcher.dense is not None
    assert isinstance(searcher.dense[1], RescoredIndex)
    assert len(searcher.search("copper violin", depth=60)) == 60
    shutil.rmtree(choice.folder)
    assert Searcher(run, retriever=None, mode="dense", rerank=False).dense is not None
    assert not list(run.glob(".*candidates"))


def test_what_was_added_is_brought_up_to_the_chosen_index(run: Path, few: None, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"_id": "new", "text": "A wooden owl."}\n', encoding="utf-8")
    add_passages(run, tmp_path / "new.jsonl")
    choice = choose_index(run, budget=10**6, min_quality=0.01)
    assert choice.content["chosen"] == "flat int8 1 numbers"
    assert len(Searcher(run, retriever=None, mode="dense", rerank=False).search("owl", depth=99)) == 61


def test_what_was_measured_is_kept(run: Path, few: None) -> None:
    choice = choose_index(run, budget=10**6, min_quality=0.9)
    folder = open_artifact(run / "distilled_index_choice", "report").path
    assert json.loads((folder / "choice.json").read_text(encoding="utf-8")) == json.loads(json.dumps(choice.content))
    text = (folder / "choice.md").read_text(encoding="utf-8")
    assert text == markdown(choice.content)
    assert "| **rabitq 1 bit + 10 x float32** |" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(SMALL)
    plot = (folder / "choice.svg").read_text(encoding="utf-8")
    assert plot.startswith("<?xml")
    assert "<dc:date>" not in plot
    console = Console(width=140, record=True)
    console.print(terminal_table(choice.content))
    assert "rabitq 1 bit" in console.export_text()
    for row in choice.content["candidates"]:
        assert row["build_seconds"] > 0
        assert 0 < row["p50_milliseconds"] <= row["p95_milliseconds"]
        assert row["disk_bytes"] >= row["resident_bytes"]


def test_times_are_of_one_core(run: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    search = FlatIndex.search
    seen: set[tuple[int, int]] = set()

    def watched(self: FlatIndex, *arguments: Any, **options: Any) -> Any:
        seen.add((faiss.omp_get_max_threads(), torch.get_num_threads()))
        return search(self, *arguments, **options)

    monkeypatch.setattr(FlatIndex, "search", watched)
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(2)
    torch.set_num_threads(2)
    try:
        choose_index(run, budget=10**6, min_quality=0.9)
        assert seen == {(1, 1)}
        assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == (2, 2)
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def test_a_budget_that_nothing_fits(run: Path, few: None) -> None:
    choice = choose_index(run, budget=500, min_quality=0.9)
    assert choice.folder is None
    assert choice.content["chosen"] is None
    assert not (run / "distilled_chosen_index").exists()
    rows = {row["label"]: row for row in choice.content["candidates"]}
    assert rows["flat int8"]["left_out"] == "more memory than the budget"
    assert rows["flat int8"]["quality"] is None
    assert rows["flat float32"]["quality"] == 1.0  # what the others are shares of
    assert "nothing fits into 500 B" in conclusion(choice.content)
    assert "over budget" in markdown(choice.content)


def test_a_quality_that_nothing_has(run: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_choice, "candidates", lambda source, sizes: [SMALL[0], SMALL[3]])
    choice = choose_index(run, budget=5000, min_quality=1.0)
    assert choice.folder is None
    assert "the best within the budget is flat int8 1 numbers" in conclusion(choice.content)


def test_an_index_chosen_for_earlier_vectors_is_refused(run: Path, few: None, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    choose_index(run, budget=10**6, min_quality=0.9)
    save_model(run / "distilled", tiny_wordpiece, 4)
    encode_and_index(run, IndexSettings())
    with pytest.raises(ArtifactError, match=r"distilled_chosen_index: was made from an earlier.*simlm build-index"):
        Searcher(run, retriever=None, mode="dense", rerank=False)
    choose_index(run, budget=10**6, min_quality=0.9)
    Searcher(run, retriever=None, mode="dense", rerank=False)


def test_runs_that_cannot_be_measured(run: Path, few: None) -> None:
    for quality in (0.0, 1.5):
        with pytest.raises(SimlmError, match="min_quality"):
            choose_index(run, budget=10**6, min_quality=quality)
    with pytest.raises(ArtifactError, match="no finished index of retriever1"):
        choose_index(run, budget=10**6, retriever="retriever1")
    artifact(run / "distilled_embeddings", "embeddings", _Nothing, IndexSettings(), {})  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="made from earlier embeddings"):
        choose_index(run, budget=10**6)


class _Nothing:
    """A stage that writes nothing."""

    @staticmethod
    def run(*_: Any) -> None:
        pass


def test_no_dev_queries(run: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from simlm.data.store import Store

    monkeypatch.setattr(Store, "splits", ["train", "test"])
    with pytest.raises(DataError, match="no dev queries"):
        choose_index(run, budget=10**6)


def test_the_command(run: Path, few: None) -> None:
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["build-index", *arguments])

    done = invoke(str(run), "--budget", "1MB", "--min-quality", "0.9")
    assert done.exit_code == 0, done.output
    assert "Chosen: rabitq 1 bit + 10 x float32" in " ".join(done.output.split())
    assert "choice.md" in done.output
    for arguments, message in (
        ([str(run)], "say how much memory"),
        ([str(run), "--budget", "much"], "for example 800MB"),
        (["recipe.toml", "--budget", "1MB"], "a budget is for a finished run"),
    ):
        failed = invoke(*arguments)
        assert isinstance(failed.exception, SimlmError), failed.output
        assert message in str(failed.exception)
