"""A training that was interrupted and whose recipe has changed since: refused with the reason, never thrown away unasked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simlm.artifacts import read_manifest
from simlm.cli import app
from simlm.errors import RecipeError
from simlm.objectives.steps import PassageSteps
from simlm.pipeline import make_plan, run_recipe
from simlm.recipe import Recipe, load_recipe
from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"


def changes(folder: Path, *more: str) -> list[str]:
    places = [f"data.path={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / 'run'))}"]
    return [*TINY, *places, "generator.training.save_steps=2", *more]


def toy(folder: Path, *more: str) -> Recipe:
    return load_recipe(RECIPE, changes(folder, *more))


def interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """Train the generator up to a step (counted from 0), then stop as a kill would."""
    load = PassageSteps.load

    def stopping(self: PassageSteps, step: int, rank: int, num_ranks: int) -> list[dict[str, Any]]:
        if step == at_step:
            raise KeyboardInterrupt
        return load(self, step, rank, num_ranks)

    with monkeypatch.context() as patch:
        patch.setattr(PassageSteps, "load", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(toy(folder), only=["generator"], quiet=True)


def test_a_changed_recipe_does_not_throw_away_an_interrupted_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    interrupt(tmp_path, monkeypatch, at_step=2)
    work = tmp_path / "run" / ".generator.work"
    kept = sorted(path for path in work.rglob("*") if path.is_file())

    changed = toy(tmp_path, "generator.training.learning_rate=0.01", "generator.mask_rate=0.2", "seed=7")
    expected = (
        r"interrupted after training step 2, changed since: .*mask_rate \S+ -> 0.2, .*"
        r"training.learning_rate (\S+|\(not set\)) -> 0.01, the input store, seed \d+ -> 7"
    )
    for only in (["generator"], None):
        with pytest.raises(RecipeError, match=f"step 'generator': {expected}.*simlm train-generator RECIPE --start-over generator"):
            run_recipe(changed, only=only, quiet=True)
    plan = make_plan(changed)
    state, why = plan.state(plan.step("generator"))
    assert state == "to do" and re.fullmatch(expected, why)
    assert sorted(path for path in work.rglob("*") if path.is_file()) == kept
    run_recipe(changed, only=["store"], quiet=True)  # what does not need the step goes on

    # The first way out: the old values. They are in the store's step too.
    recipe = toy(tmp_path)
    plan = make_plan(recipe)
    assert plan.state(plan.step("generator")) == ("to do", "interrupted, goes on where it was")
    capsys.readouterr()
    run_recipe(recipe, only=["generator"])
    assert "going on from step 2 of 3" in capsys.readouterr().err
    # Finished: a change does it again, as ever.
    run_recipe(toy(tmp_path, "generator.mask_rate=0.2"), only=["generator"], quiet=True)
    assert read_manifest(tmp_path / "run" / "generator").settings["mask_rate"] == 0.2


def test_starting_over_has_to_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    interrupt(tmp_path, monkeypatch, at_step=2)
    options = [part for change in changes(tmp_path, "generator.mask_rate=0.2") for part in ("--set", change)]
    runner = CliRunner()
    refused = runner.invoke(app, ["train-generator", str(RECIPE), *options])
    assert isinstance(refused.exception, RecipeError)
    wrong = runner.invoke(app, ["train-generator", str(RECIPE), *options, "--start-over", "generatr"])
    assert isinstance(wrong.exception, RecipeError) and "did you mean 'generator'" in str(wrong.exception)
    shown = runner.invoke(app, ["plan", str(RECIPE), *options])
    assert "to do (interrupted after" in shown.output
    done = runner.invoke(app, ["train-generator", str(RECIPE), *options, "--start-over", "generator", "--start-over", "store"])
    assert done.exit_code == 0, done.output
    assert "generator: its interrupted work is deleted" in done.output
    assert "store: has no interrupted work, nothing is deleted" in done.output
    assert "going on" not in done.output
    assert read_manifest(tmp_path / "run" / "generator").settings["mask_rate"] == 0.2


def test_without_a_whole_checkpoint_a_changed_step_is_just_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    interrupt(tmp_path, monkeypatch, at_step=1)
    assert (tmp_path / "run" / ".generator.work" / "resume" / "fingerprint").exists()
    run_recipe(toy(tmp_path, "generator.mask_rate=0.2"), only=["generator"], quiet=True)
    assert read_manifest(tmp_path / "run" / "generator").settings["mask_rate"] == 0.2


def test_work_of_a_version_that_kept_no_settings_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    interrupt(tmp_path, monkeypatch, at_step=2)
    (tmp_path / "run" / ".generator.work" / "resume" / "basis.json").unlink()
    with pytest.raises(RecipeError, match="changed since: not known, as an older version of simlm left it"):
        run_recipe(toy(tmp_path, "generator.mask_rate=0.2"), only=["generator"], quiet=True)
