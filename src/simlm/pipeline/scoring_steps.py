"""Steps in which pairs are scored: by the teachers, by those that check a teacher, and by the re-rankers of the report."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from simlm.errors import RecipeError
from simlm.pipeline.draft import Draft
from simlm.recipe import (
    CheckTeacherSettings,
    HybridTeacherSettings,
    OutsideRerankSettings,
    RerankSettings,
    SampledRerankSettings,
    expand_path,
    initialisation_name,
)
from simlm.types import Split


def add_teacher_scores(draft: Draft, groups: str, reranker: str) -> list[str]:
    """Score the groups with the recipe's own re-ranker, if there is one, and with each further teacher; the steps that do."""
    sample = {"num_queries": draft.recipe.teacher.num_queries}
    settings = SampledRerankSettings.model_validate(teacher_scoring(draft).model_dump() | sample)
    steps = []
    if reranker:
        draft.add("teacher_scores", "rerank", settings, {"store": "store", "model": reranker, "groups": groups})
        steps.append("teacher_scores")
    for checkpoint in draft.recipe.teacher.extra:
        name = f"teacher_scores_{initialisation_name(checkpoint)}"
        add_outside_scores(draft, name, settings, checkpoint, groups=groups)
        steps.append(name)
    return steps


def add_hybrid_teacher_scores(draft: Draft, section: HybridTeacherSettings, groups: str, best: str) -> str:
    """Score the groups with BM25 and a dense retriever together; the step that does."""
    inputs = {"store": "store", "groups": groups, "index": "bm25"}
    if section.dense == "best":
        inputs |= {"embeddings": f"{best}_embeddings", "model": best}
    else:
        draft.add_dense("start", None, [], {})
        inputs["embeddings"] = "start_embeddings"
    settings, outside = draft.with_model(section, "start" if section.dense == "start" else "")
    draft.add("hybrid_teacher_scores", "score_groups", settings, inputs, outside)
    return "hybrid_teacher_scores"


def add_teacher_check(draft: Draft, groups: str, teachers: list[str], student: str, student_run: str, reranker: str) -> dict[str, str]:
    """Compare what teaches with the last retriever, on dev where all that teach can score its run; the further inputs of distill."""
    section = draft.recipe.teacher
    inputs = {"store": "store", "groups": groups} | teacher_roles(teachers)
    scoring = HybridTeacherSettings(
        dense="best", dense_weight=1.0, temperature=draft.recipe.distilled.student_temperature, depth=section.depth
    )
    scored = {"store": "store", "groups": groups, "embeddings": f"{student}_embeddings", "model": student}
    draft.add("student_scores", "score_groups", draft.with_model(scoring, "")[0], scored)
    inputs["student_scores"] = "student_scores"
    if student_run and "dev" in draft.splits and section.check_queries and "hybrid_teacher_scores" not in teachers:
        inputs |= {"dev_student": student_run} | teacher_roles(_add_dev_teacher_scores(draft, student_run, reranker), "dev_teacher")
    settings = CheckTeacherSettings(
        depth=section.check_depth,
        interpolate=section.interpolate,
        if_worse=section.if_worse,
        student_temperature=draft.recipe.distilled.student_temperature,
        student=student,
    )
    draft.add("teacher_check", "check_teacher", settings, inputs)
    return {"check": "teacher_check", "student": student, "student_scores": "student_scores"}


def _add_dev_teacher_scores(draft: Draft, student_run: str, reranker: str) -> list[str]:
    """Re-rank the student's first passages for some dev queries with everyone who teaches; the steps that do."""
    section = draft.recipe.teacher
    sample: dict[str, Any] = {"splits": ["dev"], "depth": section.check_depth, "num_queries": section.check_queries}
    settings = SampledRerankSettings.model_validate(teacher_scoring(draft).model_dump() | sample)
    steps = []
    if reranker:
        draft.add("dev_teacher_scores", "rerank", settings, {"store": "store", "model": reranker, "run": student_run})
        steps.append("dev_teacher_scores")
    for checkpoint in section.extra:
        name = f"dev_teacher_scores_{initialisation_name(checkpoint)}"
        add_outside_scores(draft, name, settings, checkpoint, run=student_run)
        steps.append(name)
    return steps


def add_reranked_runs(draft: Draft, runs: dict[str, str], teacher: str) -> None:
    """The run that is best on dev, re-ranked with the re-ranker and with those that it is compared with; rows are added to `runs`."""
    settings = _with_pair_length(draft, draft.recipe.rerank).model_copy(update={"splits": _reported_splits(draft)})
    inputs = {f"run.{name}": step for name, step in runs.items() if name != "start"}
    chosen_by = draft.recipe.evaluate
    if chosen_by.main.startswith("Answer@"):
        chosen_by = chosen_by.model_copy(update={"main": "RR@10"})
    draft.add("best_run", "select_run", chosen_by, {"store": "store"} | inputs)
    for name in (teacher, *(compared_name(initial) for initial in draft.recipe.reranker.compare)):
        draft.add(f"{name}_run", "rerank", settings, {"store": "store", "model": name, "run": "best_run"})
        runs[name] = f"{name}_run"


def _reported_splits(draft: Draft) -> list[Split]:
    """The split of the report, as far as there are queries; dev where there is no other."""
    wanted = draft.recipe.evaluate.split
    return [wanted] if wanted in draft.splits else ["dev"]


def add_outside_scores(draft: Draft, name: str, settings: RerankSettings, checkpoint: str, **scored: str) -> None:
    """A rerank step with a cross-encoder that no step makes. scored: groups=STEP or run=STEP, and store=STEP if it is not "store"."""
    _check_outside_reranker(checkpoint)
    outside = OutsideRerankSettings.model_validate(settings.model_dump() | {"checkpoint": checkpoint})
    draft.add(name, "rerank", outside, {"store": "store"} | scored, draft.outside_model(checkpoint, None))


def teacher_scoring(draft: Draft) -> RerankSettings:
    """How teachers score: what [teacher] says, without the names of further teachers."""
    section = _with_pair_length(draft, draft.recipe.teacher)
    return RerankSettings.model_validate({name: getattr(section, name) for name in RerankSettings.model_fields})


def _with_pair_length(draft: Draft, settings: BaseModel) -> BaseModel:
    """Re-ranking settings with the pair length that the re-ranker was trained with, unless the recipe says otherwise."""
    if "max_pair_tokens" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"max_pair_tokens": draft.recipe.reranker.max_pair_tokens})


def _check_outside_reranker(checkpoint: str) -> None:
    """RecipeError if a checkpoint on this machine cannot score pairs: found here, not hours later; one of a hub is checked by its step."""
    path = expand_path(checkpoint)
    if not path.is_dir():
        if path.is_absolute() or checkpoint.startswith((".", "~", "$")) or checkpoint.count("/") > 1:
            raise RecipeError(f"{checkpoint}: no such folder; give the folder or hub id of a finished cross-encoder")
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RecipeError(f"{checkpoint}: no readable config.json here, so this is no checkpoint; give a finished cross-encoder") from None
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        raise RecipeError(f"{checkpoint}: an encoder without a head that scores pairs; give a finished cross-encoder")
    # Without names of labels transformers counts two.
    labels = len(config.get("id2label") or {}) or int(config.get("num_labels", 2))
    if labels != 1:
        raise RecipeError(f"{checkpoint}: a classifier of {labels} labels, a teacher has 1; give a cross-encoder trained to score pairs")


def teacher_roles(steps: list[str], role: str = "teacher") -> dict[str, str]:
    """The roles of several teachers' runs: "teacher", "teacher.2" ..."""
    return {f"{role}.{number}" if number > 1 else role: step for number, step in enumerate(steps, start=1)}


def compared_name(initial: str) -> str:
    """The step, and the row of the report, of a re-ranker that is there to be compared."""
    return f"reranker_from_{initialisation_name(initial)}"
