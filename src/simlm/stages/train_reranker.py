"""train_reranker: groups -> cross-encoder, trained listwise (method.md section 2).

Inputs: "store", "groups", "model" where the recipe starts from the pre-trained encoder, and "dev_run" (a first-stage run with split dev)
for the dev measure. Output: a model folder that simlm, CrossEncoder and AutoModel load; log.jsonl beside it.
"""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.recipe import RerankerSettings
from simlm.stages import Context


def run(settings: RerankerSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train on the mined groups and save the re-ranker."""
    from simlm.data.groups import TrainingGroups
    from simlm.data.store import Store
    from simlm.models.backbone import encoder_of
    from simlm.models.crossencoder import CrossEncoder
    from simlm.models.lora import add_lora, merge_lora
    from simlm.models.vocabulary import check_vocabulary
    from simlm.rankings import Groups, Run
    from simlm.training.initial import initial_model
    from simlm.training.reranking import train_crossencoder

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
    dev_run = None
    if "dev_run" in inputs and "dev" in store.splits and settings.dev.num_queries:
        dev_run = Run.load(open_artifact(inputs["dev_run"], "run").path, "dev")
    tokenizer = store.tokenizer()
    start = initial_model(settings.initial, settings.model, inputs)
    if start.start != "scratch":
        check_vocabulary(start.start, tokenizer, revision=start.revision)
    model = CrossEncoder.from_encoder(start, seed=context.seed, dropout=settings.dropout, tokenizer=tokenizer)
    if settings.lora is not None:
        add_lora(encoder_of(model.classifier), settings.lora, seed=context.seed)
    result = train_crossencoder(model, store, groups, settings, context, dev_run=dev_run)
    context.record(**result.facts(), **groups.facts())
    if context.rank == 0:
        merge_lora(encoder_of(model.classifier))
        model.save(context.work, tokenizer, max_pair_tokens=settings.max_pair_tokens)
