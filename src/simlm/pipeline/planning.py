"""From a recipe to its plan: the parts of the SimLM pipeline in the order of the paper's figure 2, and what is left out."""

from __future__ import annotations

import re

from simlm.errors import RecipeError, require_extra
from simlm.pipeline.corpus_steps import add_other_store, add_store, splits_of_store
from simlm.pipeline.draft import Draft
from simlm.pipeline.folder import kept_digests, run_folder
from simlm.pipeline.mining_steps import add_groups, add_scored_groups, scores_for
from simlm.pipeline.plan import Plan
from simlm.pipeline.scoring_steps import add_hybrid_teacher_scores, add_reranked_runs, add_teacher_check, add_teacher_scores, compared_name
from simlm.pipeline.steps import Step
from simlm.pipeline.training_steps import add_distillation, add_pretraining, add_rerankers, add_training
from simlm.recipe import DataSettings, Recipe
from simlm.types import Split


def make_plan(recipe: Recipe) -> Plan:
    """The steps of a recipe. Reads the sizes and dates of the data files (and their digests, cached), trains nothing.

    Raises DataError or RecipeError if the data set is not there or the recipe does not fit together.
    """
    folder = run_folder(recipe)
    with kept_digests(folder) as digests:
        draft = Draft(recipe, digests)
        _add_all(draft)
    return Plan(recipe, folder, tuple(draft.steps), tuple(draft.notes))


def retriever1_steps(recipe: Recipe, *, seed: int, splits: list[Split], pretrain_on: DataSettings | None = None) -> tuple[Step, ...]:
    """Pre-training and retriever 1 alone, on BM25's negatives, as far as a run over the queries of `splits`.

    Names are those of the recipe's own plan, and so are the fingerprints where nothing differs. seed: of pre-training and of the retriever,
    everything else keeps the recipe's. pretrain_on: pre-train, and train the generator, on this corpus instead ("other_store", with the
    tokenizer of the recipe's store); the rest stays on the recipe's data.
    """
    with kept_digests(run_folder(recipe)) as digests:
        draft = Draft(recipe, digests)
        draft.seeds = {"pretrain": seed, "train_retriever": seed}
        _add_retriever1_alone(draft, splits, pretrain_on)
    return tuple(draft.steps)


def store_splits(recipe: Recipe) -> list[Split]:
    """Splits of the store that training reads, with the pseudo queries' where the recipe makes them."""
    return splits_of_store(Draft(recipe, {}))


def _add_all(draft: Draft) -> None:
    """All steps of the recipe."""
    _check_names(draft)
    recipe, skip = draft.recipe, {str(part) for part in draft.recipe.skip}
    draft.splits = splits_of_store(draft)
    searched: list[Split] = [split for split in ("dev", "test") if split in draft.splits]
    add_store(draft)
    runs: dict[str, str] = {}
    has_train = "train" in draft.splits

    if searched:
        runs["bm25"] = draft.add_search("bm25_run", "bm25", None, searched)
    if "start" not in skip and recipe.model.start != "scratch":
        draft.add_dense("start", None, searched, runs)

    groups = ""
    if has_train:
        # Before pre-training: what is wrong with queries and judgements shows here, not after days.
        groups = add_groups(draft, "retriever1", "bm25", "bm25")
    pretrained = "" if "pretrain" in skip else add_pretraining(draft)
    if not has_train:
        draft.notes.append(
            "the data set has no training queries: no retriever or re-ranker is trained. "
            "BM25, pre-training and the indexes work; add queries and qrels for `train`, or a section [pseudo_queries] to make queries "
            "from the passages, then run the same command again"
        )
        if pretrained:
            draft.add_dense("pretrained_encoder", pretrained, [], runs)
    else:
        _add_trained(draft, groups, pretrained, searched, runs, skip)
    if not searched:
        draft.notes.append("the data set has no dev or test queries: nothing is measured, the report says so")
    _add_report(draft, runs)


def _add_retriever1_alone(draft: Draft, splits: list[Split], pretrain_on: DataSettings | None) -> None:
    """The steps of `retriever1_steps`."""
    add_store(draft)
    groups = add_groups(draft, "retriever1", "bm25", "bm25")
    store = "store" if pretrain_on is None else add_other_store(draft, pretrain_on)
    pretrained = add_pretraining(draft, store)
    add_training(draft, "retriever1", draft.recipe.retriever1, groups, pretrained, **scores_for(draft, "retriever1", groups))
    draft.add_dense("retriever1", "retriever1", splits, {})


def _check_names(draft: Draft) -> None:
    """What only a late step looks up, checked before any work: measures, options of the index, an optional library."""
    from simlm.evaluation.measures import parse_measure
    from simlm.index import check_options

    for name in (*draft.recipe.evaluate.measures, draft.recipe.evaluate.main):
        if not re.fullmatch(r"Answer@\d+", name):
            parse_measure(name)
    check_options(draft.recipe.index.type, draft.recipe.index.options)
    check_options(draft.recipe.bm25.type, draft.recipe.bm25.options)
    for name in Recipe.model_fields:
        if getattr(getattr(draft.recipe, name), "lora", None) is not None and name not in draft.recipe.skip:
            require_extra("peft", "lora", f"[{name}] lora")
    if draft.recipe.bm25.type != "bm25":
        raise RecipeError(f'bm25.type is {draft.recipe.bm25.type!r}; the baseline is always "bm25", vector indexes are set in [index]')


def _add_trained(draft: Draft, groups: str, pretrained: str, searched: list[Split], runs: dict[str, str], skip: set[str]) -> None:
    """What needs training queries: retrievers, re-rankers, and the runs that are made with them."""
    recipe = draft.recipe
    add_training(draft, "retriever1", recipe.retriever1, groups, pretrained, **scores_for(draft, "retriever1", groups))
    dense = draft.add_dense("retriever1", "retriever1", searched, runs)
    best = "retriever1"
    if "retriever2" not in skip:
        for number in range(1, recipe.rounds + 1):
            groups = add_groups(draft, "retriever2", best, dense)
            best = "retriever2" if number == 1 else f"retriever2_round{number}"
            add_training(draft, best, recipe.retriever2, groups, pretrained, **scores_for(draft, "retriever2", groups))
            dense = draft.add_dense(best, best, searched, runs)
    teacher = ""
    if "reranker" not in skip or recipe.teacher.extra or recipe.hybrid_teacher:
        groups = add_groups(draft, "reranker", best, dense)
    if "reranker" not in skip:
        teacher = add_rerankers(draft, groups, runs.get(best, ""), pretrained)
    hybrid = recipe.hybrid_teacher
    teachers = [] if "distilled" in skip or (hybrid and hybrid.alone) else add_teacher_scores(draft, groups, teacher)
    checked = bool(teachers)
    if hybrid is not None:
        teachers.append(add_hybrid_teacher_scores(draft, hybrid, groups, best))
    if teachers:
        # On what the teacher has scored, before [distilled_mining] leaves some of it out: a changed filter compares nothing again.
        inputs = add_teacher_check(draft, groups, teachers, best, runs.get(best, ""), teacher) if checked else {}
        if recipe.distilled_mining.model_fields_set:
            groups = add_scored_groups(draft, best, dense, teacher)
        add_distillation(draft, groups, pretrained, best, teachers, inputs)
        draft.add_dense("distilled", "distilled", searched, runs)
        best = "distilled"
    if searched and "hybrid" not in skip:
        draft.add("hybrid_run", "fuse", recipe.hybrid, {"store": "store", "dense": runs[best], "bm25": runs["bm25"]})
        runs["hybrid"] = "hybrid_run"
    if searched and teacher:
        add_reranked_runs(draft, runs, teacher)


def _add_report(draft: Draft, runs: dict[str, str]) -> None:
    """The report on all runs; it reads what every step before has taken."""
    compared = [compared_name(initial) for initial in draft.recipe.reranker.compare]
    rounds = [f"retriever2_round{number}" for number in range(2, draft.recipe.rounds + 1)]
    order = ("bm25", "start", "retriever1", "retriever2", *rounds, "reranker", *compared, "distilled", "hybrid")
    inputs = {"store": "store"} | {f"run.{name}": runs[name] for name in order if name in runs}
    inputs |= {f"step.{step.name}": step.name for step in draft.steps}
    settings = draft.recipe.evaluate
    if settings.split not in draft.splits and "dev" in draft.splits:
        draft.notes.append(
            f"no {settings.split!r} queries: the report is on the dev queries, which the training has seen as its dev measure"
            + (" and which are made from passages as the training queries are" if draft.recipe.pseudo_queries else "")
        )
        settings = settings.model_copy(update={"split": "dev"})
    draft.add("report", "evaluate", settings, inputs)
