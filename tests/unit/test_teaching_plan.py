"""Comparing teacher and student in a recipe: which steps it makes, what a change makes stale, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simlm.errors import RecipeError
from simlm.estimates import estimate_step
from simlm.pipeline import Plan, make_plan
from simlm.recipe import CheckTeacherSettings, OutsideRerankSettings, Recipe, SampledRerankSettings, parse_recipe
from tests.toy.corpus import write_beir


def recipe_for(folder: Path, splits: tuple[str, ...] = ("train", "dev", "test"), **sections: Any) -> Recipe:
    if not (folder / "data").exists():
        write_beir(folder / "data", splits=splits)
    raw: dict[str, Any] = {
        "name": "t",
        "output": str(folder / "run"),
        "data": {"dataset": "beir", "path": str(folder / "data"), "dev_fraction": 0.0},
        "model": {
            "start": "scratch",
            "config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        },
        "prepare": {"train_vocabulary": 300, "max_passage_tokens": 32, "num_workers": 1},
    }
    return parse_recipe(raw | sections)


def prints(recipe: Recipe) -> dict[str, str]:
    return {step.name: step.fingerprint for step in make_plan(recipe).steps}


def names(plan: Plan) -> set[str]:
    return {step.name for step in plan.steps}


def test_the_teacher_is_compared_before_it_teaches(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path, teacher={"check_queries": 9, "check_depth": 5, "if_worse": "skip"}))
    check, distilled, dev = plan.step("teacher_check"), plan.step("distilled"), plan.step("dev_teacher_scores")
    groups = distilled.inputs["groups"]
    assert check.stage == "check_teacher"
    assert check.inputs == {
        "store": "store",
        "groups": groups,
        "teacher": "teacher_scores",
        "student_scores": "student_scores",
        "dev_student": "retriever2_run",
        "dev_teacher": "dev_teacher_scores",
    }
    assert isinstance(check.settings, CheckTeacherSettings)
    assert (check.settings.if_worse, check.settings.depth, check.settings.student) == ("skip", 5, "retriever2")
    assert distilled.inputs.items() >= {"check": "teacher_check", "student": "retriever2", "student_scores": "student_scores"}.items()
    assert plan.step("student_scores").inputs == {
        "store": "store",
        "groups": groups,
        "embeddings": "retriever2_embeddings",
        "model": "retriever2",
    }
    assert isinstance(dev.settings, SampledRerankSettings)
    assert (dev.settings.splits, dev.settings.depth, dev.settings.num_queries) == (["dev"], 5, 9)
    assert dev.inputs == {"store": "store", "model": "reranker", "run": "retriever2_run"}
    assert plan.step("report").inputs["step.teacher_check"] == "teacher_check"


def test_the_cost_of_the_comparison_is_in_the_estimate(tmp_path: Path) -> None:
    seconds = {}
    for queries in (2, 20):
        plan = make_plan(recipe_for(tmp_path, teacher={"check_queries": queries}))
        seconds[queries] = estimate_step(plan, plan.step("dev_teacher_scores")).seconds - 3
        assert estimate_step(plan, plan.step("teacher_check")).seconds > 0
    assert seconds[20] == pytest.approx(10 * seconds[2])


def test_every_teacher_is_compared_with_the_last_retriever(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path, teacher={"extra": ["owner/cross-encoder"]}, rounds=2))
    check, further = plan.step("teacher_check"), plan.step("dev_teacher_scores_cross-encoder")
    assert (check.inputs["teacher.2"], check.inputs["dev_teacher.2"]) == ("teacher_scores_cross-encoder", further.name)
    assert isinstance(further.settings, OutsideRerankSettings) and further.settings.num_queries == 200
    assert check.inputs["dev_student"] == further.inputs["run"] == "retriever2_round2_run"
    assert plan.step("distilled").inputs["student"] == "retriever2_round2"
    alone = make_plan(recipe_for(tmp_path, teacher={"extra": ["owner/cross-encoder"]}, skip=["reranker", "retriever2"]))
    assert alone.step("teacher_check").inputs["dev_teacher"] == "dev_teacher_scores_cross-encoder"
    assert alone.step("distilled").inputs["student"] == "retriever1"


def test_without_dev_queries_there_is_nothing_to_re_rank(tmp_path: Path) -> None:
    for folder, splits, teacher in (
        (tmp_path / "a", ("train", "test"), {}),
        (tmp_path / "b", ("train", "dev", "test"), {"check_queries": 0}),
    ):
        folder.mkdir()
        plan = make_plan(recipe_for(folder, splits, teacher=teacher))
        assert "dev_teacher_scores" not in names(plan)
        assert not {"dev_student", "dev_teacher"} & plan.step("teacher_check").inputs.keys()
        assert plan.step("distilled").inputs["check"] == "teacher_check"


def test_a_teacher_without_a_dev_run_is_compared_on_the_groups(tmp_path: Path) -> None:
    beside = make_plan(recipe_for(tmp_path, hybrid_teacher={"alone": False, "dense": "best"}))
    assert beside.step("teacher_check").inputs["teacher.2"] == "hybrid_teacher_scores"
    assert "dev_teacher" not in beside.step("teacher_check").inputs
    alone = make_plan(recipe_for(tmp_path, hybrid_teacher={"dense": "best"}))
    assert not {"teacher_check", "student_scores", "dev_teacher_scores"} & names(alone)
    assert alone.step("distilled").inputs.keys() == {"store", "groups", "model", "teacher"}


def test_what_a_change_makes_stale(tmp_path: Path) -> None:
    before = prints(recipe_for(tmp_path))
    after_distilling = {name for name in before if name.startswith("distilled")} | {"hybrid_run", "best_run", "reranker_run", "report"}
    for teacher, own in (
        ({"if_worse": "skip"}, {"teacher_check"}),
        ({"interpolate": True}, {"teacher_check"}),
        ({"check_depth": 10}, {"teacher_check", "dev_teacher_scores"}),
        ({"num_queries": 40}, {"teacher_check", "teacher_scores"}),
    ):
        after = prints(recipe_for(tmp_path, teacher=teacher))
        assert {name for name in before if before[name] != after[name]} == after_distilling | own, teacher


def test_a_sample_of_the_training_queries_is_for_the_teachers_alone(tmp_path: Path) -> None:
    plan = make_plan(
        recipe_for(
            tmp_path,
            teacher={"num_queries": 11, "extra": ["owner/cross-encoder"]},
            mining={"teacher": "owner/other", "teacher_margin": 1.0},
        )
    )
    for name in ("teacher_scores", "teacher_scores_cross-encoder"):
        assert plan.step(name).settings.num_queries == 11  # type: ignore[attr-defined]
    assert "num_queries" not in plan.step("bm25_candidate_scores").settings.model_dump()
    every, some = make_plan(recipe_for(tmp_path)), make_plan(recipe_for(tmp_path, teacher={"num_queries": 8}))
    costs = [estimate_step(plan, plan.step("teacher_scores")).seconds - 3 for plan in (every, some)]
    assert costs[1] == pytest.approx(costs[0] / 10)  # of 80 training queries


@pytest.mark.parametrize(("skip", "model"), [([], "retriever2"), (["retriever2"], "retriever1")])
def test_the_distilled_retriever_can_start_from_the_one_before(tmp_path: Path, skip: list[str], model: str) -> None:
    plan = make_plan(recipe_for(tmp_path, distilled={"initial": "retriever2"}, skip=skip))
    step = plan.step("distilled")
    assert (step.inputs["model"], step.outside) == (model, {})
    assert step.settings.initial == "retriever2"  # type: ignore[attr-defined]
    assert make_plan(recipe_for(tmp_path, skip=skip)).step("distilled").inputs["model"] == "pretrained"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"if_worse": "stop"}}, r"teacher\.if_worse: Input should be 'mix', 'skip' or 'go_on'"),
        ({"teacher": {"check_queries": -1}}, r"teacher\.check_queries"),
        ({"teacher": {"interpolate": True, "if_worse": "skip"}}, r'teacher\.if_worse = "skip" changes nothing with teacher\.interpolate'),
        ({"teacher": {"check_queries": 0, "check_depth": 5}}, r"teacher\.check_depth changes nothing with teacher\.check_queries = 0"),
        ({"teacher": {"if_worse": "skip"}, "skip": ["distilled"]}, r"teacher\.if_worse is about a cross-encoder that teaches"),
        ({"teacher": {"interpolate": True}, "skip": ["reranker"]}, r"teacher\.interpolate is about a cross-encoder that teaches"),
        ({"teacher": {"num_queries": 5}, "hybrid_teacher": {"dense": "best"}}, r"teacher\.num_queries is about a cross-encoder"),
        ({"retriever1": {"initial": "retriever2"}}, r"retriever1\.initial = \"retriever2\": only \[distilled\] can start from it"),
        ({"reranker": {"initial": "retriever2"}}, r"reranker\.initial = \"retriever2\""),
    ],
)
def test_settings_that_do_not_fit_together(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_for(tmp_path, **sections)
