"""train_retriever: groups -> bi-encoder, trained contrastively (method.md section 2, retrievers 1 and 2).

Inputs: "store", "groups", "model" where the recipe starts from the pre-trained encoder, and "teacher" (run of split train with raw
logits for pairs of the groups) where teacher_margin is set.
Output: a model folder that simlm, sentence-transformers and AutoModel load; log.jsonl beside it.
"""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.errors import RecipeError
from simlm.recipe import RetrieverSettings
from simlm.stages import Context


def run(settings: RetrieverSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train on the mined groups and save the retriever."""
    from simlm.data.duplicates import Duplicates
    from simlm.data.false_negatives import TeacherMargin
    from simlm.data.groups import Ambiguous, TrainingGroups
    from simlm.data.store import Store
    from simlm.rankings import Groups, Run
    from simlm.training.contrastive import train_biencoder
    from simlm.training.retriever_model import save_biencoder, start_biencoder

    store = Store.open(inputs["store"])
    mined = Groups.load(open_artifact(inputs["groups"], "groups").path)
    margin = None
    if settings.teacher_margin is not None:
        if "teacher" not in inputs:
            raise RecipeError('teacher_margin: there is no "teacher" input with scores to compare; give one, or leave teacher_margin out')
        margin = TeacherMargin(settings.teacher_margin, mined, Run.load(open_artifact(inputs["teacher"], "run").path, "train"))
    groups = TrainingGroups(
        mined,
        num_passages=len(store.passages),
        group_size=settings.group_size,
        queries_per_step=settings.queries_per_step,
        seed=context.seed,
        num_ranks=context.num_ranks,
        judged=store.qrels("train"),
        duplicates=Duplicates(store.passages, store.queries("train"), mined, store.qrels("train")),
        margin=margin,
        sampling=Ambiguous.of(settings),
    )
    tokenizer = store.tokenizer()
    model, settings = start_biencoder(settings, inputs, tokenizer, seed=context.seed)
    result = train_biencoder(model, store, groups, settings, context, description="train retriever")
    context.record(**result.facts(), **groups.facts())
    if context.rank == 0:
        save_biencoder(model, context.work, tokenizer, settings, store)
