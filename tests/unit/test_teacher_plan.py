"""Teachers and compared re-rankers in a recipe: which steps they make, what a change makes stale, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simlm.errors import RecipeError
from simlm.estimates import estimate_step
from simlm.evaluation.report.results import Row, measure_rows, row_label
from simlm.evaluation.report.verdicts import verdicts
from simlm.pipeline import make_plan
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings, OutsideRerankSettings, Recipe, initialisation_name, parse_recipe
from tests.toy.corpus import write_beir


def recipe_for(folder: Path, **sections: Any) -> Recipe:
    if not (folder / "data").exists():
        write_beir(folder / "data")
    raw: dict[str, Any] = {
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


def checkpoint(folder: Path, **config: Any) -> str:
    """What of a checkpoint is looked at before work begins."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]} | config), encoding="utf-8")
    return str(folder)


def prints(recipe: Recipe) -> dict[str, str]:
    return {step.name: step.fingerprint for step in make_plan(recipe).steps}


def test_every_further_teacher_has_a_step_of_its_own_and_distill_reads_all(tmp_path: Path) -> None:
    local = checkpoint(tmp_path / "teachers" / "big one", id2label={"0": "LABEL_0"})
    recipe = recipe_for(tmp_path, teacher={"extra": [local, "owner/cross-encoder"], "depth": 7}, reranker={"max_pair_tokens": 48})
    plan = make_plan(recipe)
    assert {role: name for role, name in plan.step("distilled").inputs.items() if role.startswith("teacher")} == {
        "teacher": "teacher_scores",
        "teacher.2": "teacher_scores_big-one",
        "teacher.3": "teacher_scores_cross-encoder",
    }
    step = plan.step("teacher_scores_big-one")
    assert isinstance(step.settings, OutsideRerankSettings)
    assert (step.stage, step.settings.checkpoint, step.settings.depth, step.settings.max_pair_tokens) == ("rerank", local, 7, 48)
    assert step.inputs == {"store": "store", "groups": plan.step("teacher_scores").inputs["groups"]}
    assert estimate_step(plan, step).seconds > 0


def test_another_teacher_makes_stale_what_reads_it_and_nothing_else(tmp_path: Path) -> None:
    local = checkpoint(tmp_path / "teacher", id2label={"0": "x"})
    before, after = prints(recipe_for(tmp_path)), prints(recipe_for(tmp_path, teacher={"extra": [local]}))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("distilled")} | {
        "teacher_check",
        "hybrid_run",
        "best_run",
        "reranker_run",
        "report",
    }
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"other weights")
    again = prints(recipe_for(tmp_path, teacher={"extra": [local]}))
    assert again["teacher_scores_teacher"] != after["teacher_scores_teacher"] and again["teacher_scores"] == after["teacher_scores"]


def test_teachers_from_outside_alone(tmp_path: Path) -> None:
    local = checkpoint(tmp_path / "teacher", num_labels=1)
    plan = make_plan(recipe_for(tmp_path, teacher={"extra": [local]}, skip=["reranker"]))
    names = [step.name for step in plan.steps]
    assert plan.step("distilled").inputs["teacher"] == "teacher_scores_teacher"
    assert not {"reranker", "teacher_scores", "reranker_run"} & set(names)
    assert plan.step("teacher_scores_teacher").inputs["groups"] == plan.step("distilled").inputs["groups"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "no", "1": "maybe", "2": "yes"}}, "a classifier of 3 labels, a teacher has 1"),
        ({}, "a classifier of 2 labels"),
        ({"architectures": ["BertModel"], "id2label": {"0": "x"}}, "an encoder without a head that scores pairs"),
        ({"architectures": None}, "an encoder without a head"),
    ],
)
def test_a_checkpoint_that_cannot_teach_is_refused_in_the_plan(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    local = checkpoint(tmp_path / "teacher", **config)
    with pytest.raises(RecipeError, match=message):
        make_plan(recipe_for(tmp_path, teacher={"extra": [local]}))


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for reference, message in ((str(tmp_path / "nothing"), "no such folder"), (str(tmp_path / "empty"), r"no readable config\.json here")):
        with pytest.raises(RecipeError, match=message):
            make_plan(recipe_for(tmp_path, teacher={"extra": [reference]}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"extra": ["a/b", "c/b"]}}, "teacher.extra: two teachers are called 'b'"),
        ({"teacher": {"extra": ["reranker"]}}, "'reranker' names no finished cross-encoder"),
        ({"teacher": {"extra": ["a/b"]}, "skip": ["distilled"]}, "teacher.extra scores for the distilled retriever"),
        ({"teacher": {"splits": ["test"]}}, "teacher.splits: a teacher scores training groups"),
        ({"reranker": {"compare": ["a/b"]}, "skip": ["reranker"]}, "reranker.compare trains re-rankers"),
        ({"reranker": {"compare": ["start"]}}, "compare: 'start' would be the second row named 'start'"),
        ({"reranker": {"initial": "x/a", "compare": ["y/b", "z/b"]}}, "compare: 'y/b' would be the second row named 'b'"),
    ],
)
def test_settings_that_do_not_fit_together(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_for(tmp_path, **sections)


def test_names_of_initialisations() -> None:
    names = [initialisation_name(name) for name in ("google/electra-base-discriminator", "/x/My Model/", "start", "..", "a/b@c")]
    assert names == ["electra-base-discriminator", "My-Model", "start", "model", "b-c"]


def test_compared_rerankers_are_trained_alike_and_are_rows_of_the_report(tmp_path: Path) -> None:
    alone = make_plan(recipe_for(tmp_path))
    plan = make_plan(recipe_for(tmp_path, reranker={"compare": ["pretrained", "owner/electra"]}))
    own, pretrained, electra = (plan.step(name) for name in ("reranker", "reranker_from_pretrained", "reranker_from_electra"))
    assert own.fingerprint == alone.step("reranker").fingerprint
    assert pretrained.inputs == own.inputs | {"model": "pretrained"}
    assert electra.inputs == own.inputs
    for step in (pretrained, electra):
        assert step.settings.model_dump(exclude={"initial"}) == own.settings.model_dump(exclude={"initial"})
    for name in ("reranker", "reranker_from_pretrained", "reranker_from_electra"):
        assert plan.step(f"{name}_run").inputs == {"store": "store", "model": name, "run": "best_run"}
        assert plan.step("report").inputs[f"run.{name}"] == f"{name}_run"
    assert plan.step("distilled").inputs["teacher"] == "teacher_scores"
    with pytest.raises(RecipeError, match=r'reranker\.compare names "pretrained"'):
        make_plan(recipe_for(tmp_path, reranker={"compare": ["pretrained"]}, skip=["pretrain"]))


class FakeStore:
    """60 queries, each with passage 0 relevant."""

    splits = ("test",)
    passages = [""] * 10

    def queries(self, split: str) -> list[str]:
        return [""] * 60

    def qrels(self, split: str) -> dict[int, dict[int, int]]:
        return {query: {0: 1} for query in range(60)}


def test_the_report_says_whether_a_compared_reranker_differs(tmp_path: Path) -> None:
    def run(rank: int) -> Run:
        """The relevant passage at `rank` for every query."""
        passages = [1, 2, 3, 4]
        passages.insert(rank - 1, 0)
        return Run.from_lists("test", range(60), [(passages, [5.0, 4.0, 3.0, 2.0, 1.0])] * 60)

    rows = [Row("bm25", run(3)), Row("reranker", run(2)), Row("reranker_from_better", run(1)), Row("reranker_from_same", run(2))]
    settings = EvaluateSettings(num_samples=200, measures=["RR@10"])
    metrics = measure_rows(rows, FakeStore(), settings, name="t", seed=1).metrics  # type: ignore[arg-type]
    against = {item["row"]: item["difference"] for item in metrics["comparisons"] if item["against"] == "reranker"}
    assert against == {"reranker_from_better": pytest.approx(0.5), "reranker_from_same": 0.0}
    texts = [str(verdict) for verdict in verdicts(metrics)]
    assert any(text.startswith("Re-ranker from better is better than the recipe's own: RR@10 1.000 against 0.500") for text in texts)
    assert any(text.startswith("Re-ranker from same is not measurably different") for text in texts)
    assert row_label("reranker_from_same") == "Re-ranker from same"
