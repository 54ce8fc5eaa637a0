"""Steps that make the store: passages, queries and judgements tokenised, or queries made from the passages and filtered."""

from __future__ import annotations

from dataclasses import replace

from simlm.artifacts import json_digest
from simlm.errors import RecipeError
from simlm.pipeline.draft import Draft
from simlm.pipeline.folder import run_folder
from simlm.pipeline.scoring_steps import add_outside_scores, teacher_scoring
from simlm.recipe import ConsistencySettings, DataSettings, FuseSettings
from simlm.types import Split


def splits_of_store(draft: Draft) -> list[Split]:
    """Splits that there are queries of: those of the data set, and those that pseudo queries are made for."""
    from simlm.data.datasets import find_splits

    found = find_splits(_data_of(draft))
    pseudo = draft.recipe.pseudo_queries
    if pseudo is None:
        return found
    made: list[Split] = ["train", "dev"] if pseudo.dev_fraction else ["train"]
    return [*made, *found]


def _data_of(draft: Draft) -> DataSettings:
    """[data]; where queries are made, without the training and dev queries that the data set may have."""
    data = draft.recipe.data
    if draft.recipe.pseudo_queries is None:
        return data
    return data.model_copy(update={"splits": ["test"] if data.splits is None else data.splits})


def add_store(draft: Draft) -> None:
    """The store that training reads, and BM25 over its passages; where queries are made, from the store of the corpus alone."""
    pseudo = draft.recipe.pseudo_queries
    draft.corpus = "store" if pseudo is None else "corpus"
    _add_prepared(draft)
    draft.add("bm25", "build_index", draft.recipe.bm25, {"store": draft.corpus})
    if pseudo is not None:
        draft.add("pseudo_queries", "make_queries", pseudo, {"store": draft.corpus, "index": "bm25"})
        _add_filtered_store(draft, draft.recipe.consistency, ["train", "dev"] if pseudo.dev_fraction else ["train"])


def _add_prepared(draft: Draft) -> None:
    """The passages tokenised, with the queries of the data set that are read."""
    from simlm.data.datasets import signature

    tokenizer = draft.recipe.model.start
    given = draft.recipe.prepare
    if "tokenizer" in given.model_fields_set:
        tokenizer = given.tokenizer
    elif tokenizer == "scratch":
        if given.train_vocabulary is None:
            raise RecipeError(
                'model.start is "scratch", which has no tokenizer: set prepare.tokenizer to a checkpoint, '
                "or prepare.train_vocabulary to a size"
            )
        tokenizer = ""
    if given.train_vocabulary is not None and draft.recipe.model.start != "scratch":
        raise RecipeError(
            f"prepare.train_vocabulary makes a new vocabulary, but model.start {draft.recipe.model.start!r} has its own; "
            'set model.start = "scratch" or leave prepare.train_vocabulary out'
        )
    data = _data_of(draft)
    settings = given.model_copy(update={"data": data, "tokenizer": tokenizer})
    outside = {"data": json_digest(signature(data, draft.digests))}
    if tokenizer:
        outside |= draft.outside_model(tokenizer, None)
    draft.add(draft.corpus, "prepare", settings, {}, outside)


def _add_filtered_store(draft: Draft, settings: ConsistencySettings, splits: list[Split]) -> None:
    """Search the pseudo queries as the consistency filter wants it, and keep those that find their passage."""
    inputs = {"store": "pseudo_queries"}
    by_words = settings.by in ("bm25", "hybrid", "reranker") or settings.trivial_share < 1
    if by_words:
        _add_pseudo_search(draft, "bm25", "bm25", splits)
    if settings.by in ("start", "hybrid"):
        draft.add_dense("start", None, [], {})
        _add_pseudo_search(draft, "start", "start_index", splits)
    if settings.by == "hybrid":
        equal = FuseSettings(method="score", dense_weight=0.5, depth=settings.depth)
        parts = {"dense": "pseudo_start_run", "bm25": "pseudo_bm25_run"}
        draft.add("pseudo_hybrid_run", "fuse", equal, inputs | parts)
    if settings.reranker is not None:
        scoring = teacher_scoring(draft).model_copy(update={"depth": settings.depth, "splits": splits})
        add_outside_scores(draft, "pseudo_reranker_run", scoring, settings.reranker, store="pseudo_queries", run="pseudo_bm25_run")
    if settings.by != "none":
        inputs["run"] = f"pseudo_{settings.by}_run"
    if settings.trivial_share < 1:
        inputs["bm25"] = "pseudo_bm25_run"
    draft.add("store", "filter_queries", settings, inputs)


def _add_pseudo_search(draft: Draft, name: str, index: str, splits: list[Split]) -> None:
    draft.add_search(f"pseudo_{name}_run", index, None, splits, depth=draft.recipe.consistency.depth, store="pseudo_queries")


def add_other_store(draft: Draft, data: DataSettings) -> str:
    """A corpus other than the recipe's, with the tokenizer of the recipe's store."""
    from simlm.data.datasets import signature

    (store,) = (step for step in draft.steps if step.name == draft.corpus)
    tokenizer = run_folder(draft.recipe).resolve() / draft.corpus / "tokenizer"
    settings = store.settings.model_copy(update={"data": data, "tokenizer": "", "train_vocabulary": None})
    outside = {"data": json_digest(signature(data, draft.digests)), "tokenizer": store.fingerprint}
    draft.add("other_store", "prepare", settings, {}, outside)
    # The fingerprint does not hold the tokenizer's place, as the folder of a run may be moved.
    draft.steps[-1] = replace(draft.steps[-1], settings=settings.model_copy(update={"tokenizer": str(tokenizer)}))
    return "other_store"
