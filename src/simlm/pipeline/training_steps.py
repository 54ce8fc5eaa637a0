"""Steps that train: the generator and the pre-trained encoder, retrievers, and re-rankers."""

from __future__ import annotations

from pydantic import BaseModel

from simlm.errors import RecipeError
from simlm.pipeline.draft import Draft
from simlm.pipeline.scoring_steps import compared_name, teacher_roles
from simlm.recipe import RerankerSettings


def add_pretraining(draft: Draft, store: str = "store") -> str:
    """The pre-trained encoder, and before it the generator where the objective samples from one; the step of the encoder."""
    recipe = draft.recipe
    inputs = {"store": store}
    if recipe.pretrain.needs_generator:
        source = recipe.generator.source
        outside = {} if source in ("train", "random") else draft.outside_model(source, None)
        draft.add("generator", "train_generator", recipe.generator, {"store": store}, outside)
        inputs["generator"] = "generator"
    settings, outside = draft.with_model(recipe.pretrain, recipe.pretrain.initial)
    draft.add("pretrained", "pretrain", settings, inputs, outside)
    return "pretrained"


def add_training(
    draft: Draft, name: str, section: BaseModel, groups: str, pretrained: str, stage: str = "train_retriever", **inputs: str
) -> None:
    """A model trained on groups, from the pre-trained encoder where the recipe has one and the section asks for it."""
    initial = section.initial  # type: ignore[attr-defined]
    if initial == "pretrained" and pretrained:
        inputs["model"] = pretrained
    elif initial == "pretrained":
        initial = "start"
        section = section.model_copy(update={"initial": "start"})
    settings, outside = draft.with_model(section, initial)
    draft.add(name, stage, settings, {"store": "store", "groups": groups} | inputs, outside)


def add_rerankers(draft: Draft, groups: str, dev_run: str, pretrained: str) -> str:
    """The re-ranker, and those that it is compared with; the step of the first."""
    inputs = {"dev_run": dev_run} if dev_run and "dev" in draft.splits else {}
    section = draft.recipe.reranker
    given = section.model_fields_set & RerankerSettings.model_fields.keys()
    settings = RerankerSettings.model_validate({name: getattr(section, name) for name in given})
    add_training(draft, "reranker", settings, groups, pretrained, stage="train_reranker", **inputs)
    for initial in section.compare:
        if initial == "pretrained" and not pretrained:
            raise RecipeError('reranker.compare names "pretrained", but `skip` leaves pre-training out; drop one of the two')
        other = settings.model_copy(update={"initial": initial})
        add_training(draft, compared_name(initial), other, groups, pretrained, stage="train_reranker", **inputs)
    return "reranker"


def add_distillation(draft: Draft, groups: str, pretrained: str, before: str, teachers: list[str], inputs: dict[str, str]) -> None:
    """The distilled retriever. inputs: of the check of the teacher, empty where there is none."""
    if draft.recipe.distilled.initial == "retriever2":
        inputs = inputs | {"model": before}
    add_training(draft, "distilled", draft.recipe.distilled, groups, pretrained, stage="distill", **teacher_roles(teachers), **inputs)
