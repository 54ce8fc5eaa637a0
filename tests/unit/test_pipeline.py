"""The plan: which steps, in which state, and what a change makes stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simlm.errors import DataError, DiskError, RecipeError, SimlmError
from simlm.pipeline import make_plan, run_recipe
from simlm.recipe import Recipe, parse_recipe
from tests.toy.corpus import write_beir


def recipe_for(folder: Path, **sections: object) -> Recipe:
    raw: dict[str, object] = {
        "name": "t",
        "output": str(folder / "run"),
        "data": {"dataset": "beir", "path": str(folder / "data")},
        "model": {
            "start": "scratch",
            "config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        },
        "prepare": {"train_vocabulary": 300, "max_passage_tokens": 32, "num_workers": 1},
    }
    return parse_recipe(raw | sections)


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in make_plan(recipe).steps]


def test_every_input_comes_before_the_step_that_reads_it(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    plan = make_plan(recipe_for(tmp_path))
    seen: set[str] = set()
    for step in plan.steps:
        assert set(step.inputs.values()) <= seen, step.name
        seen.add(step.name)
    assert plan.steps[-1].name == "report"
    assert {"pretrained", "retriever1", "retriever2", "reranker", "teacher_scores", "distilled", "hybrid_run"} <= seen
    assert plan.step("retriever2").inputs["groups"] == "retriever1_groups"
    assert plan.step("distilled").inputs == {
        "store": "store",
        "groups": "retriever2_groups",
        "teacher": "teacher_scores",
        "check": "teacher_check",
        "student": "retriever2",
        "student_scores": "student_scores",
        "model": "pretrained",
    }


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    assert "pretrained" not in names(recipe_for(tmp_path, skip=["pretrain"]))
    assert make_plan(recipe_for(tmp_path, skip=["retriever2"])).step("reranker").inputs["groups"] == "retriever1_groups"
    without = names(recipe_for(tmp_path, skip=["reranker"]))
    assert not {"reranker", "teacher_scores", "distilled", "reranker_run"} & set(without)
    assert "hybrid_run" in without


def test_a_corpus_without_training_queries_still_gets_all_that_needs_none(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", splits=("test",))
    plan = make_plan(recipe_for(tmp_path))
    have = {step.name for step in plan.steps}
    assert {"store", "bm25", "bm25_run", "generator", "pretrained", "pretrained_encoder_index", "report"} <= have
    assert "retriever1" not in have
    assert any("no training queries" in note for note in plan.notes)


def test_a_changed_setting_makes_its_step_and_what_follows_stale_and_nothing_else(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    before = {step.name: step.fingerprint for step in make_plan(recipe_for(tmp_path)).steps}
    after = {step.name: step.fingerprint for step in make_plan(recipe_for(tmp_path, retriever2={"temperature": 0.03})).steps}
    changed = {name for name in before if before[name] != after[name]}
    assert {"store", "bm25", "generator", "pretrained", "retriever1", "retriever1_groups"}.isdisjoint(changed)
    assert {"retriever2", "retriever2_run", "reranker", "distilled", "report"} <= changed


def test_changed_data_makes_the_store_stale_and_a_touched_file_does_not(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path)
    first = make_plan(recipe).step("store").fingerprint
    qrels = tmp_path / "data" / "qrels" / "test.tsv"
    text = qrels.read_text(encoding="utf-8")
    qrels.write_text(text, encoding="utf-8")
    assert make_plan(recipe).step("store").fingerprint == first
    qrels.write_text(text + "q0\tp1\t1\n", encoding="utf-8")
    assert make_plan(recipe).step("store").fingerprint != first


def test_steps_run_resume_and_say_why_they_are_stale(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path)
    folder = run_recipe(recipe, only=["bm25"], quiet=True)
    plan = make_plan(recipe)
    assert {step.name for step in plan.steps if plan.state(step)[0] == "done"} == {"store", "bm25"}
    changed = make_plan(recipe_for(tmp_path, bm25={"type": "bm25", "k1": 1.2}))
    assert changed.state(changed.step("bm25")) == ("stale", "changed: k1")
    (folder / "bm25" / "manifest.json").unlink()
    assert plan.state(plan.step("bm25"))[0] == "stale"
    run_recipe(recipe, only=["bm25"], quiet=True)
    assert plan.state(plan.step("bm25")) == ("done", "")


def test_damaged_inputs_are_refused(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path)
    folder = run_recipe(recipe, only=["store"], quiet=True)
    victim = max(
        (file for file in (folder / "store").rglob("*") if file.is_file() and file.suffix != ".json"), key=lambda file: file.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[0] ^= 255
    victim.write_bytes(bytes(content))
    with pytest.raises(SimlmError, match="SHA-256"):
        run_recipe(recipe, only=["bm25"], quiet=True)


def test_a_disk_too_small_is_told_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path)
    run_recipe(recipe, only=["store"], quiet=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DiskError, match="'bm25' needs about"):
        run_recipe(recipe, only=["bm25"], quiet=True)
    plan = make_plan(recipe)
    assert plan.state(plan.step("store"))[0] == "done"


def test_a_full_disk_in_the_middle_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from simlm.stages import build_index

    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_index, "run", full)
    with pytest.raises(DiskError, match="disk is full"):
        run_recipe(recipe, only=["bm25"], quiet=True)
    monkeypatch.undo()
    run_recipe(recipe, only=["bm25"], quiet=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiskError, match="cannot be written"):
        run_recipe(recipe_for(tmp_path, output=str(tmp_path / "file" / "run")), quiet=True)


def test_wrong_wiring_is_told_before_work(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    with pytest.raises(RecipeError, match="has no tokenizer"):
        make_plan(recipe_for(tmp_path, prepare={}))
    with pytest.raises(RecipeError, match="has its own"):
        make_plan(recipe_for(tmp_path, model={"start": "some/model"}))
    with pytest.raises(RecipeError, match="unknown measure 'RRR@10'"):
        make_plan(recipe_for(tmp_path, evaluate={"measures": ["RRR@10"]}))
    with pytest.raises(RecipeError, match="num_listz"):
        make_plan(recipe_for(tmp_path, index={"type": "ivf", "options": {"num_listz": 3}}))
    with pytest.raises(RecipeError, match="the baseline is always"):
        make_plan(recipe_for(tmp_path, bm25={"type": "flat"}))
    with pytest.raises(DataError):
        make_plan(recipe_for(tmp_path, data={"dataset": "beir", "path": str(tmp_path / "nowhere")}))
    with pytest.raises(RecipeError, match="no step 'retriever3'"):
        make_plan(recipe_for(tmp_path)).step("retriever3")


def test_digests_are_kept_with_the_run(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path)
    folder = run_recipe(recipe, only=["store"], quiet=True)
    make_plan(recipe)
    assert json.loads((folder / ".digests.json").read_text(encoding="utf-8"))
