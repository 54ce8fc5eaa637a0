"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simlm.cli import app
from simlm.errors import SimlmError
from simlm.recipe import load_recipe
from tests.toy.corpus import TINY, write_beir

RECIPES = Path(__file__).parents[2] / "recipes"
runner = CliRunner()


def invoke(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def toy_options(folder: Path) -> list[str]:
    changes = [*TINY, f"data.path={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / 'run'))}"]
    return [part for change in changes for part in ("--set", change)]


def test_version_and_help() -> None:
    assert invoke("--version").startswith("simlm 0.")
    text = invoke("--help")
    for command in (
        "run",
        "plan",
        "init",
        "pretrain",
        "train-retriever",
        "mine-negatives",
        "train-reranker",
        "rerank",
        "distill",
        "encode",
        "build-index",
        "search",
        "evaluate",
    ):
        assert command in text


def test_an_error_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "simlm", "run", str(tmp_path / "none.toml")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "no such recipe" in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_shows_states_and_estimates(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    options = [str(RECIPES / "medquad_cpu.toml"), *toy_options(tmp_path)]
    text = invoke("plan", *options)
    assert "to do" in text
    assert "distilled" in text
    assert "left: about" in text
    assert not (tmp_path / "run").exists(), "a plan writes nothing"
    invoke("build-index", *options, "--step", "bm25")
    text = invoke("plan", *options)
    assert text.count("done") == 2


def test_a_step_of_another_stage_is_refused(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    with pytest.raises(SimlmError, match="'store' is a prepare step, not build_index"):
        runner.invoke(
            app, ["build-index", str(RECIPES / "medquad_cpu.toml"), *toy_options(tmp_path), "--step", "store"], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search recipe.toml -k 3", "--depth is about a query to a finished run"),
        ("search recipe.toml --rerank", "--rerank is about a query to a finished run"),
        ("search run what --set a.b=1", "--set is about a recipe, and run is a run"),
        ("evaluate recipe.toml -m RR@10", "--measures goes with a run file"),
        ("evaluate recipe.toml qrels", "qrels goes with a run file"),
        ("evaluate run.trec qrels --set a.b=1", "--set is about a recipe, and run.trec is a run file"),
        ("encode recipe.toml --precision int8", "--precision goes with a corpus"),
        ("encode corpus --model m -o o --start-over store", "--start-over is about a recipe, and corpus is a corpus"),
        ("encode corpus --model m -o o --gpus 1", "--gpus is for --engine ray"),
        ("build-index recipe.toml --min-quality 0.9", "--min-quality goes with --budget"),
        ("build-index run --budget 1GB --step bm25", "--step is about a recipe, and run is a run"),
        ("serve run --mcp --port 1", "--port is about HTTP"),
        ("serve run --mcp --token-file t", "--token-file is about HTTP"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command: str, message: str) -> None:
    with pytest.raises(SimlmError, match=f"{message}.*; leave it out"):
        runner.invoke(app, command.split(), catch_exceptions=False)


def test_search_needs_a_run_and_a_query(tmp_path: Path) -> None:
    with pytest.raises(SimlmError, match="no query given"):
        runner.invoke(app, ["search", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(SimlmError, match="not the folder of a run"):
        runner.invoke(app, ["search", str(tmp_path), "what"], catch_exceptions=False)
    with pytest.raises(SimlmError, match="exclude each other"):
        runner.invoke(app, ["search", str(tmp_path), "what", "--bm25", "--hybrid"], catch_exceptions=False)


def test_search_bm25_over_a_run(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    invoke("build-index", str(RECIPES / "medquad_cpu.toml"), *toy_options(tmp_path), "--step", "bm25")
    from simlm.searcher import example_query

    lines = invoke("search", str(tmp_path / "run"), example_query(tmp_path / "run"), "--bm25", "--json", "-k", "2").splitlines()
    assert [json.loads(line)["rank"] for line in lines] == [1, 2]
    with pytest.raises(SimlmError, match=r"no finished index of any retriever \(finished here: none\); .*--bm25"):
        runner.invoke(app, ["search", str(tmp_path / "run"), "what"], catch_exceptions=False)


def test_evaluate_measures_trec_files(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("q1 Q0 a 1 2.0 x\nq1 Q0 b 2 1.0 x\n", encoding="utf-8")
    (tmp_path / "qrels.trec").write_text("q1 0 b 1\nq2 0 a 1\n", encoding="utf-8")
    # q1 finds its passage at rank 2, q2 is absent from the run and counts as 0.
    assert invoke("evaluate", str(tmp_path / "run.trec"), str(tmp_path / "qrels.trec"), "-m", "RR@10") == "RR@10\t0.2500\n"


def test_init_writes_a_recipe_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "my data")
    monkeypatch.chdir(tmp_path)
    text = invoke("init", "my data")
    assert "120 passages" in text
    assert "simlm plan my-data.toml" in text
    recipe = load_recipe(tmp_path / "my-data.toml")
    assert recipe.data.dataset == "beir"
    with pytest.raises(SimlmError, match="exists already"):
        runner.invoke(app, ["init", "my data"], catch_exceptions=False)
    assert "to do" in invoke("plan", "my-data.toml")


def test_init_of_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(SimlmError, match="no such file or folder"):
        runner.invoke(app, ["init", str(tmp_path / "none")], catch_exceptions=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SimlmError):
        runner.invoke(app, ["init", str(tmp_path / "empty")], catch_exceptions=False)


def test_the_allocator_is_tuned_on_linux_and_can_be_left_alone() -> None:
    code = "from simlm.runtime import tune_allocator; print(tune_allocator())"

    def run(**extra: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | extra, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run(SIMLM_MALLOC="0") == "False"
    if sys.platform.startswith("linux"):
        assert run(SIMLM_MALLOC="1") == "True"
