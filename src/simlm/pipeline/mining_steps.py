"""Steps that mine hard negatives: searches with the training queries, and the groups made of what they find."""

from __future__ import annotations

from typing import Literal

from simlm.errors import RecipeError
from simlm.pipeline.draft import Draft
from simlm.pipeline.scoring_steps import add_outside_scores, teacher_scoring
from simlm.recipe import MiningPart, MiningSettings


def add_groups(draft: Draft, part: MiningPart, name: str, index: str) -> str:
    """Groups that a part is trained on, from what `name` ("bm25", or the retriever before) finds with its index, or from its mix.

    With a teacher the groups are mined twice: all candidates, to be scored, then those that its scores leave.
    """
    settings = draft.recipe.mining_of(part)
    inputs = {"store": "store"} | _add_mined_runs(draft, part, name, index)
    if settings.teacher is not None:
        filters = {key: MiningSettings.model_fields[key].default for key in ("teacher", "teacher_margin", "teacher_unscored")}
        draft.add(f"{name}_candidates", "mine_negatives", settings.model_copy(update=filters), inputs)
        scoring = teacher_scoring(draft).model_copy(update={"depth": settings.num_negatives})
        add_outside_scores(draft, f"{name}_candidate_scores", scoring, settings.teacher, groups=f"{name}_candidates")
        inputs["teacher"] = f"{name}_candidate_scores"
    draft.add(f"{name}_groups", "mine_negatives", settings, inputs)
    return f"{name}_groups"


def add_scored_groups(draft: Draft, name: str, index: str, reranker: str) -> str:
    """Groups of the distilled retriever, of what the recipe's own re-ranker has scored."""
    if not reranker:
        raise RecipeError(
            '[distilled_mining] reads scores of the re-ranker, which `skip` leaves out; drop "reranker" there, or the section'
        )
    inputs = {"store": "store"} | _add_mined_runs(draft, "distilled", name, index) | {"teacher": "teacher_scores"}
    draft.add("distilled_groups", "mine_negatives", draft.recipe.mining_of("distilled"), inputs)
    return "distilled_groups"


def scores_for(draft: Draft, part: Literal["retriever1", "retriever2"], groups: str) -> dict[str, str]:
    """Input of a retriever whose loss compares a teacher's scores: those that its groups were filtered by."""
    section = draft.recipe.retriever1 if part == "retriever1" else draft.recipe.retriever2
    if section.teacher_margin is None:
        return {}
    if draft.recipe.mining_of(part).teacher is None:
        raise RecipeError(
            f"{part}.teacher_margin compares a teacher's scores, and its negatives have none: "
            f"set {part}_mining.teacher to a cross-encoder, and {part}_mining.teacher_margin"
        )
    return {"teacher": f"{groups.removesuffix('_groups')}_candidate_scores"}


def _add_mined_runs(draft: Draft, part: MiningPart, name: str, index: str) -> dict[str, str]:
    """Role -> run over the training queries, one for each name of the part's mix; searched where no other part has done so."""
    mix = draft.recipe.mining_of(part).mix
    if not mix:
        return {"run": _add_train_search(draft, name, index)}
    of_source = {"bm25": ("bm25", "bm25"), "start": ("start", "start_index"), "dense": (name, index)}
    return {f"run.{source}": _add_train_search(draft, *of_source[source]) for source in mix}


def _add_train_search(draft: Draft, name: str, index: str) -> str:
    """The training queries searched with a retriever, where that is not planned already; the name of the step."""
    run = f"{name}_train_run"
    have = {step.name for step in draft.steps}
    if run in have:
        return run
    if name == "start" and index not in have:
        draft.add_dense("start", None, [], {})
    model = None if name in ("bm25", "start") else name
    return draft.add_search(run, index, model, ["train"], depth=_train_depth(draft, name))


def _train_depth(draft: Draft, name: str) -> int:
    """How deep the training queries are searched with a retriever: as the parts need that mine from it."""
    recipe = draft.recipe
    last = "retriever1" if "retriever2" in recipe.skip else "retriever2" if recipe.rounds == 1 else f"retriever2_round{recipe.rounds}"
    parts: list[MiningPart] = ["retriever1"]
    parts += ["retriever2"] if "retriever2" not in recipe.skip else []
    parts += ["reranker"] if "reranker" not in recipe.skip or recipe.teacher.extra or recipe.hybrid_teacher else []
    parts += ["distilled"] if recipe.distilled_mining.model_fields_set and "distilled" not in recipe.skip else []
    if name in ("bm25", "start"):
        users = [part for part in parts if name in recipe.mining_of(part).mix]
        users += ["retriever1"] if name == "bm25" and not recipe.mining_of("retriever1").mix else []
    elif name == last:
        users = [part for part in parts if part in ("reranker", "distilled")]
    else:
        users = ["retriever2"]
    return max(recipe.mining_of(part).depth for part in users)
