"""distill: groups with a re-ranker's scores -> bi-encoder, by KL(teacher, student) + alpha x InfoNCE (method.md section 2).

Inputs: "store", "groups", "teacher" (run of split train with raw logits for the pairs of the groups), and "model" where the recipe
starts from the pre-trained encoder. Output: as train_retriever.
"""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.recipe import DistillSettings
from simlm.stages import Context


def run(settings: DistillSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train on the teacher's scores and save the retriever. Pairs without a score are found before training starts."""
    from simlm.data.groups import TrainingGroups, teacher_groups
    from simlm.data.store import Store
    from simlm.models.backbone import load_encoder
    from simlm.models.biencoder import BiEncoder
    from simlm.models.vocabulary import check_vocabulary
    from simlm.rankings import Groups, Run
    from simlm.training.contrastive import train_biencoder
    from simlm.training.initial import initial_model

    store = Store.open(inputs["store"])
    query_ids, passage_ids = store.queries("train").ids, store.passages.ids
    taught = teacher_groups(
        Groups.load(open_artifact(inputs["groups"], "groups").path),
        Run.load(open_artifact(inputs["teacher"], "run").path, "train"),
        query_id=lambda row: query_ids[row],
        passage_id=lambda row: passage_ids[row],
    )
    if taught.num_constant:
        context.progress.say(
            f"distill: for {taught.num_constant:,} of {len(taught.groups):,} queries the teacher gives all passages the same score; "
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
    )
    tokenizer = store.tokenizer()
    start = initial_model(settings.initial, settings.model, inputs)
    if start.start != "scratch":
        check_vocabulary(start.start, tokenizer, revision=start.revision)
    encoder = load_encoder(start, seed=context.seed, dropout=settings.dropout, tokenizer=tokenizer)
    model = BiEncoder(encoder, settings.model.pooling)
    result = train_biencoder(model, store, groups, settings, context, description="distill")
    context.record(**result.facts(), **groups.facts(), teacher_depth=taught.depth, num_constant_teacher_queries=taught.num_constant)
    if context.rank == 0:
        model.save(
            context.work,
            tokenizer,
            max_query_tokens=settings.max_query_tokens or int(store.info["max_query_tokens"]),
            max_passage_tokens=settings.max_passage_tokens or int(store.info["max_passage_tokens"]),
        )
