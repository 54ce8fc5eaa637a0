"""Mining in the plan: rounds, mixes, teachers, and that a filter never makes anything be encoded or searched again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simlm.errors import RecipeError
from simlm.estimates import estimate_step
from simlm.pipeline import Plan, make_plan, retriever1_steps, run_recipe
from simlm.recipe import MiningSettings, Recipe, parse_recipe
from tests.toy.corpus import write_beir
from tests.unit.test_pipeline import recipe_for

START = {"model": {"start": "some/checkpoint"}, "prepare": {}}
"""Sections of a recipe whose start can retrieve; nothing is downloaded for a plan."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_beir(tmp_path / "data")
    return tmp_path


def plan_of(folder: Path, **sections: Any) -> Plan:
    return make_plan(recipe_for(folder, **sections))


def mining(plan: Plan, name: str) -> dict[str, Any]:
    settings = plan.step(name).settings
    assert isinstance(settings, MiningSettings)
    return settings.model_dump()


def test_one_round_has_the_steps_it_always_had(folder: Path) -> None:
    plan = plan_of(folder)
    mined = {step.name: step.inputs for step in plan.steps if step.stage == "mine_negatives"}
    assert mined == {
        name: {"store": "store", "run": f"{name.removesuffix('_groups')}_train_run"}
        for name in ("bm25_groups", "retriever1_groups", "retriever2_groups")
    }
    assert plan.step("reranker").inputs["groups"] == plan.step("distilled").inputs["groups"] == "retriever2_groups"
    assert not any("round" in step.name or "candidate" in step.name for step in plan.steps)


def test_rounds_mine_with_the_retriever_of_the_round_before(folder: Path) -> None:
    plan = plan_of(folder, rounds=3)
    assert plan.step("retriever2").inputs == {"store": "store", "groups": "retriever1_groups", "model": "pretrained"}
    assert plan.step("retriever2_round2").inputs == {"store": "store", "groups": "retriever2_groups", "model": "pretrained"}
    assert plan.step("retriever2_round3").inputs == {"store": "store", "groups": "retriever2_round2_groups", "model": "pretrained"}
    assert plan.step("retriever2_round2_groups").inputs["run"] == "retriever2_round2_train_run"
    assert plan.step("retriever2_round2_train_run").inputs["model"] == "retriever2_round2"
    # What comes later reads the last round; the report shows them all, in order.
    for name in ("reranker", "distilled", "teacher_scores"):
        assert plan.step(name).inputs["groups"] == "retriever2_round3_groups"
    assert plan.step("reranker").inputs["dev_run"] == "retriever2_round3_run"
    rows = [role.removeprefix("run.") for role in plan.step("report").inputs if role.startswith("run.")]
    assert rows[:4] == ["bm25", "retriever1", "retriever2", "retriever2_round2"]
    assert "retriever2_round3" in rows
    skipping = plan_of(folder, rounds=2, skip=["reranker"])
    assert skipping.step("hybrid_run").inputs["dense"] == "retriever2_round2_run"


def test_a_further_round_leaves_the_earlier_ones_as_they_are(folder: Path) -> None:
    one, two = plan_of(folder, rounds=1), plan_of(folder, rounds=2)
    before = {step.name: step.fingerprint for step in one.steps}
    kept = {step.name for step in two.steps if before.get(step.name) == step.fingerprint}
    assert {"retriever1", "retriever1_groups", "retriever2", "retriever2_embeddings", "retriever2_train_run", "retriever2_groups"} <= kept


def test_each_part_may_mine_by_its_own_settings(folder: Path) -> None:
    plan = plan_of(
        folder,
        mining={"depth": 50, "skip_top": 1},
        retriever1_mining={"depth": 60},
        retriever2_mining={"below_positive": 0.95},
        reranker_mining={"depth": 90, "skip_top": 0},
    )
    assert (mining(plan, "bm25_groups")["depth"], mining(plan, "bm25_groups")["skip_top"]) == (60, 1)
    assert (mining(plan, "retriever1_groups")["depth"], mining(plan, "retriever1_groups")["below_positive"]) == (50, 0.95)
    assert (mining(plan, "retriever2_groups")["depth"], mining(plan, "retriever2_groups")["skip_top"]) == (90, 0)
    depths = {name: plan.step(f"{name}_train_run").settings.model_dump()["depth"] for name in ("bm25", "retriever1", "retriever2")}
    assert depths == {"bm25": 60, "retriever1": 50, "retriever2": 90}


def test_a_mix_reads_each_of_its_runs(folder: Path) -> None:
    plan = plan_of(folder, retriever2_mining={"mix": {"bm25": 0.25, "dense": 0.75}, "depth": 300}, **START)
    assert plan.step("retriever1_groups").inputs == {"store": "store", "run.bm25": "bm25_train_run", "run.dense": "retriever1_train_run"}
    assert plan.step("bm25_groups").inputs == {"store": "store", "run": "bm25_train_run"}
    # One search for all who read it, as deep as the deepest asks.
    assert plan.step("bm25_train_run").settings.model_dump()["depth"] == 300
    assert plan.step("retriever2_groups").inputs["run"] == "retriever2_train_run"


def test_the_starting_model_may_be_mined_from(folder: Path) -> None:
    plan = plan_of(folder, retriever1_mining={"mix": {"bm25": 1.0, "start": 1.0}}, **START)
    assert plan.step("bm25_groups").inputs == {"store": "store", "run.bm25": "bm25_train_run", "run.start": "start_train_run"}
    assert plan.step("start_train_run").inputs == {"store": "store", "index": "start_index"}
    left_out = plan_of(folder, retriever1_mining={"mix": {"start": 1.0}}, skip=["start"], **START)
    assert left_out.step("bm25_groups").inputs == {"store": "store", "run.start": "start_train_run"}
    have = {step.name for step in left_out.steps}
    assert {"start_index", "start_embeddings"} <= have and not {"start_run", "bm25_train_run"} & have
    steps = retriever1_steps(recipe_for(folder, retriever1_mining={"mix": {"start": 1.0}}, **START), seed=42, splits=["dev"])
    own = {step.name: step.fingerprint for step in left_out.steps}
    assert all(own[step.name] == step.fingerprint for step in steps if step.name in ("start_train_run", "bm25_groups"))


def test_a_teacher_scores_all_candidates_before_they_are_filtered(folder: Path) -> None:
    plan = plan_of(folder, retriever2_mining={"teacher": "some/cross-encoder", "teacher_margin": 1.5, "num_negatives": 70})
    open_ = mining(plan, "retriever1_candidates")
    assert (open_["teacher"], open_["teacher_margin"], open_["num_negatives"]) == (None, None, 70)
    scores = plan.step("retriever1_candidate_scores")
    assert (scores.stage, scores.inputs) == ("rerank", {"store": "store", "groups": "retriever1_candidates"})
    assert (scores.settings.model_dump()["checkpoint"], scores.settings.model_dump()["depth"]) == ("some/cross-encoder", 70)
    assert plan.step("retriever1_groups").inputs == {
        "store": "store",
        "run": "retriever1_train_run",
        "teacher": "retriever1_candidate_scores",
    }
    assert mining(plan, "retriever1_groups")["teacher_margin"] == 1.5
    assert not any(step.name.startswith("bm25_candidate") for step in plan.steps)
    for name in ("retriever1_candidates", "retriever1_candidate_scores"):
        assert estimate_step(plan, plan.step(name)).seconds > 0


def test_a_retriever_whose_loss_has_a_margin_gets_the_scores_of_its_candidates(folder: Path) -> None:
    sections = {"retriever2": {"teacher_margin": 1.0}, "rounds": 2}
    plan = plan_of(folder, retriever2_mining={"teacher": "some/cross-encoder", "teacher_margin": 1.5}, **sections)
    assert plan.step("retriever2").inputs["teacher"] == "retriever1_candidate_scores"
    assert plan.step("retriever2_round2").inputs["teacher"] == "retriever2_candidate_scores"
    assert "teacher" not in plan.step("retriever1").inputs
    with pytest.raises(RecipeError, match=r"retriever2.teacher_margin compares a teacher's scores, and its negatives have none"):
        plan_of(folder, **sections)


def test_the_distilled_retriever_may_be_mined_by_the_recipes_own_re_ranker(folder: Path) -> None:
    plan = plan_of(folder, distilled_mining={"teacher": "reranker", "teacher_margin": 0.5})
    assert plan.step("distilled_groups").inputs == {"store": "store", "run": "retriever2_train_run", "teacher": "teacher_scores"}
    assert mining(plan, "distilled_groups")["teacher_unscored"] == "drop"
    assert plan.step("distilled").inputs["groups"] == "distilled_groups"
    assert plan.step("teacher_scores").inputs["groups"] == plan.step("reranker").inputs["groups"] == "retriever2_groups"
    with pytest.raises(RecipeError, match="which `skip` leaves out"):
        plan_of(
            folder,
            distilled_mining={"teacher": "reranker", "teacher_margin": 0.5},
            skip=["reranker"],
            teacher={"extra": ["some/cross-encoder"]},
        )


TAUGHT = {"teacher": "some/cross-encoder", "teacher_margin": 1.0}
SCORED_ANEW = {"retriever1_candidates", "retriever1_candidate_scores"}
"""Stale too where there is a teacher, as other candidates are to be scored: the rerank step looks up what the model has scored before."""


@pytest.mark.parametrize(
    "change",
    [{"skip_top": 2}, {"num_negatives": 10}, {"below_positive": 0.9}, {"mix": {"bm25": 0.5, "dense": 0.5}}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_filter_makes_the_mining_stale_and_nothing_that_it_reads(folder: Path, change: dict[str, Any]) -> None:
    mixed = {"mix": {"bm25": 0.25, "dense": 0.75}, "below_positive": 0.95}
    assert stale(folder, mixed, mixed | change) == {"retriever1_groups"}
    assert stale(folder, mixed | TAUGHT, mixed | TAUGHT | change) == SCORED_ANEW | {"retriever1_groups"}


@pytest.mark.parametrize("change", [{"teacher_margin": 3.0}, {"teacher_unscored": "drop"}], ids=lambda change: next(iter(change)))
def test_a_changed_teacher_filter_makes_the_mining_stale_and_nothing_that_it_reads(folder: Path, change: dict[str, Any]) -> None:
    assert stale(folder, TAUGHT, TAUGHT | change) == {"retriever1_groups"}


def stale(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Of the steps that retriever 2 is mined from and its groups themselves, those that another mining makes stale."""
    old = {step.name: step.fingerprint for step in plan_of(folder, retriever2_mining=before).steps}
    steps = plan_of(folder, retriever2_mining=after).needed(["retriever1_groups"])
    assert {"encode", "search", "build_index", "train_retriever"} <= {step.stage for step in steps}
    return {step.name for step in steps if old[step.name] != step.fingerprint}


def test_a_changed_filter_of_distillation_scores_nothing_again(folder: Path) -> None:
    def fingerprints(margin: float) -> dict[str, str]:
        plan = plan_of(folder, distilled_mining={"teacher": "reranker", "teacher_margin": margin})
        return {step.name: step.fingerprint for step in plan.needed(["distilled"])}

    before, after = fingerprints(1.0), fingerprints(2.0)
    assert {name for name in before if before[name] != after[name]} == {"distilled_groups", "distilled"}


def test_a_changed_filter_of_a_run_that_is_there(folder: Path) -> None:
    run_recipe(recipe_for(folder), only=["bm25_groups"], quiet=True)
    changed = plan_of(folder, mining={"below_positive": 0.95, "skip_top": 1})
    states = {step.name: changed.state(step) for step in changed.needed(["bm25_groups"])}
    assert states.pop("bm25_groups") == ("stale", "changed: below_positive, skip_top")
    assert states == dict.fromkeys(("store", "bm25", "bm25_train_run"), ("done", ""))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mining": {"mix": {"bm25": 0.0}}}, "mining.mix: the share of 'bm25' is 0.0, a number above 0 was expected"),
        ({"mining": {"mix": {"bm25": -1.0}}}, "mining.mix: the share of 'bm25' is -1.0"),
        ({"retriever2_mining": {"mix": {"bm52": 1.0}}}, "retriever2_mining.mix: unknown run 'bm52'; did you mean 'bm25'"),
        ({"mining": {"mix": {"dense": 1.0}}}, "mining.mix: before retriever 1 no dense retriever is trained"),
        ({"mining": {"mix": {"start": 1.0}}, "model": {"start": "scratch"}}, 'mining.mix: "start" needs a starting model'),
        ({"mining": {"teacher_margin": 1.0}}, "mining.teacher_margin compares a teacher's scores: name a cross-encoder in mining.teacher"),
        ({"retriever2_mining": {"teacher": "a/b"}}, "retriever2_mining.teacher has no effect without mining.teacher_margin"),
        ({"mining": {"teacher_unscored": "drop"}}, "mining.teacher_unscored has no effect without mining.teacher"),
        ({"mining": {"teacher": "reranker", "teacher_margin": 1.0}}, "mining.teacher: the recipe's re-ranker is trained on these"),
        ({"distilled_mining": {"depth": 10}}, 'set distilled_mining.teacher = "reranker" and distilled_mining.teacher_margin'),
        (
            {"distilled_mining": {"teacher": "reranker", "teacher_margin": 1.0, "teacher_unscored": "keep"}},
            'distilled_mining.teacher_unscored: distillation needs a score for every pair, so only "drop" fits',
        ),
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1"),
        ({"rounds": 2, "skip": ["retriever2"]}, "rounds = 2 repeats retriever 2, which `skip` leaves out"),
        ({"retriever1": {"ambiguous_a": 1.0}}, 'retriever1: ambiguous_a: no effect with negatives = "walk"'),
        (
            {"distilled": {"negatives": "ambiguous", "ambiguous_a": -1.0}},
            "distilled.ambiguous_a: Input should be greater than or equal to 0",
        ),
        ({"retriever1": {"negatives": "hard"}}, "retriever1.negatives: Input should be 'walk' or 'ambiguous'"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "x"} | sections)
    assert message in str(caught.value)


def test_integers_are_shares_too() -> None:
    recipe: Recipe = parse_recipe({"name": "x", "retriever2_mining": {"mix": {"bm25": 1, "dense": 3}}})
    assert recipe.mining_of("retriever2").mix == {"bm25": 1.0, "dense": 3.0}
