"""`simlm teacher-scores RUN`: what is kept of which teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from simlm.artifacts import build_artifact, read_manifest
from simlm.cli import app
from simlm.data.teacher_scores import Teacher, TeacherScores
from simlm.errors import ArtifactError, SimlmError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with build_artifact(tmp_path / "store", kind="store") as builder:
        (builder.work / "store.json").write_text("{}", encoding="utf-8")
    fingerprint = read_manifest(tmp_path / "store").fingerprint
    teacher = Teacher("reranker", weights="w", tokenizer="", max_pair_tokens=192, precision="fp32", store=fingerprint)
    scores = TeacherScores.open(tmp_path / "pair_scores", teacher)
    scores.append("train", np.repeat(np.arange(3), 7), np.tile(np.arange(7), 3), np.linspace(-10, 10, 21, dtype=np.float32))
    scores.append("test", np.array([0]), np.array([1]), np.array([0.0], np.float32))
    older = replace(teacher, name="[big] one", tokenizer="t", store="older")
    other = TeacherScores.open(tmp_path / "pair_scores", older)
    other.append("train", np.array([0]), np.array([1]), np.array([0.25], np.float32))
    return tmp_path


def test_the_table_says_what_is_there(run: Path) -> None:
    shown = CliRunner().invoke(app, ["teacher-scores", str(run)])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    own = next(line for line in lines if "reranker" in line)
    for text in ("fp32", "192", "train 3, test 1", "22", "-10.00", "0.00", "10.00"):
        assert text in own
    assert any("[big] one" in line for line in lines)
    assert "Scores of another store are not used" in shown.output


def test_json_has_one_teacher_a_line_and_names_damage(run: Path) -> None:
    (first,) = sorted((run / "pair_scores").glob("*/00000001-00000001.scores"))
    first.write_bytes(first.read_bytes()[:-1])
    shown = CliRunner().invoke(app, ["teacher-scores", str(run), "--json"])
    older, own = (json.loads(line) for line in shown.output.splitlines())
    assert (own["teacher"], own["pairs"], own["queries"], own["of_this_store"]) == ("reranker", 21, {"train": 3}, True)
    assert own["damaged"] == ["00000001-00000001.scores"]
    assert own["quantiles"] == {"least": -10.0, "5%": -9.0, "median": 0.0, "95%": 9.0, "most": 10.0}
    assert (older["teacher"], older["own_tokenizer"], older["of_this_store"]) == ("[big] one", True, False)
    assert "damaged" in CliRunner().invoke(app, ["teacher-scores", str(run)]).output


def test_where_nothing_is_kept(tmp_path: Path) -> None:
    nothing = CliRunner().invoke(app, ["teacher-scores", str(tmp_path)])
    assert isinstance(nothing.exception, ArtifactError) and "holds no teacher's scores yet" in str(nothing.exception)
    absent = CliRunner().invoke(app, ["teacher-scores", str(tmp_path / "none")])
    assert isinstance(absent.exception, SimlmError) and "no such folder" in str(absent.exception)
