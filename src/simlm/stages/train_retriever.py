"""train_retriever: groups -> bi-encoder, trained contrastively (method.md section 2, retrievers 1 and 2).

Inputs: "store", "groups", and "model" where the recipe starts from the pre-trained encoder.
Output: a model folder that simlm, sentence-transformers and AutoModel load; log.jsonl beside it.
"""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.recipe import RetrieverSettings
from simlm.stages import Context


def run(settings: RetrieverSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train on the mined groups and save the retriever."""
    from simlm.data.groups import TrainingGroups
    from simlm.data.store import Store
    from simlm.models.backbone import load_encoder
    from simlm.models.biencoder import BiEncoder
    from simlm.models.vocabulary import check_vocabulary
    from simlm.rankings import Groups
    from simlm.training.contrastive import train_biencoder
    from simlm.training.initial import initial_model

    store = Store.open(inputs["store"])
    groups = TrainingGroups(
        Groups.load(open_artifact(inputs["groups"], "groups").path),
        num_passages=len(store.passages),
        group_size=settings.group_size,
        queries_per_step=settings.queries_per_step,
        seed=context.seed,
        num_ranks=context.num_ranks,
        judged=store.qrels("train"),
    )
    tokenizer = store.tokenizer()
    start = initial_model(settings.initial, settings.model, inputs)
    if start.start != "scratch":
        check_vocabulary(start.start, tokenizer, revision=start.revision)
    encoder = load_encoder(start, seed=context.seed, dropout=settings.dropout, tokenizer=tokenizer)
    model = BiEncoder(encoder, settings.model.pooling)
    result = train_biencoder(model, store, groups, settings, context, description="train retriever")
    context.record(**result.facts(), **groups.facts())
    if context.rank == 0:
        model.save(
            context.work,
            tokenizer,
            max_query_tokens=settings.max_query_tokens or int(store.info["max_query_tokens"]),
            max_passage_tokens=settings.max_passage_tokens or int(store.info["max_passage_tokens"]),
        )
