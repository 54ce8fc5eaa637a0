"""distill: groups with a re-ranker's scores -> bi-encoder, by KL(teacher, student) + alpha x InfoNCE (method.md section 2).

Inputs: "store", "groups", "teacher" (run of split train with raw logits for the pairs of the groups), "teacher.2", "teacher.3" ... where
several are to be averaged, and "model" where the recipe starts from the pre-trained encoder. Output: as train_retriever.
"""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.recipe import DistillSettings
from simlm.stages import Context


def run(settings: DistillSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train on the teacher's scores and save the retriever. Pairs without a score are found before training starts."""
    from simlm.data.duplicates import Duplicates
    from simlm.data.false_negatives import TeacherMargin
    from simlm.data.groups import Ambiguous, TrainingGroups
    from simlm.data.store import Store
    from simlm.data.teachers import teacher_groups
    from simlm.rankings import Groups, Run
    from simlm.training.contrastive import train_biencoder
    from simlm.training.retriever_model import save_biencoder, start_biencoder

    store = Store.open(inputs["store"])
    query_ids, passage_ids = store.queries("train").ids, store.passages.ids
    teachers = [Run.load(open_artifact(path, "run").path, "train") for role, path in inputs.items() if role.split(".")[0] == "teacher"]
    taught = teacher_groups(
        Groups.load(open_artifact(inputs["groups"], "groups").path),
        teachers,
        query_id=lambda row: query_ids[row],
        passage_id=lambda row: passage_ids[row],
        folder=context.resume / f"teachers-{context.rank}",
    )
    if taught.num_bare:
        context.progress.say(f"distill: {taught.num_bare:,} queries have no negative with a teacher's score and are left out")
    if taught.num_constant:
        context.progress.say(
            f"distill: for {taught.num_constant:,} of {len(taught.groups):,} queries all passages have the same teacher score; "
            "they teach nothing"
        )
    groups = TrainingGroups(
        taught.groups,
        num_passages=len(store.passages),
        group_size=settings.group_size,
        queries_per_step=settings.queries_per_step,
        seed=context.seed,
        num_ranks=context.num_ranks,
        judged=store.qrels("train"),
        fill_with_random=False,
        duplicates=Duplicates(store.passages, store.queries("train"), taught.groups, store.qrels("train")),
        margin=None if settings.teacher_margin is None else TeacherMargin(settings.teacher_margin, taught.groups),
        sampling=Ambiguous.of(settings),
    )
    tokenizer = store.tokenizer()
    model, settings = start_biencoder(settings, inputs, tokenizer, seed=context.seed)
    result = train_biencoder(model, store, groups, settings, context, description="distill")
    context.record(
        **result.facts(),
        **groups.facts(),
        num_teachers=len(teachers),
        teacher_depth=taught.depth,
        num_constant_teacher_queries=taught.num_constant,
        num_queries_without_negatives=taught.num_bare,
    )
    if context.rank == 0:
        save_biencoder(model, context.work, tokenizer, settings, store)
