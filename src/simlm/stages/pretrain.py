"""pretrain: passages -> encoder whose [CLS] vector holds the passage (method.md section 1).

Inputs: "store", "generator", and "pretrained" to continue from an earlier run of this stage.
Output: a masked-LM folder (AutoModel gives the encoder) with decoder.safetensors, tokenizer and simlm.json; log.jsonl beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from simlm.artifacts import open_artifact
from simlm.errors import ModelError
from simlm.recipe import ModelSettings, PretrainSettings, TrainingSettings
from simlm.stages import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from simlm.data.store import Store


def run(settings: PretrainSettings, inputs: dict[str, Path], context: Context) -> None:
    """Pre-train, continuing where an interrupted run stopped, and save encoder, head and decoder."""
    from torch import nn

    from simlm.data.store import Store
    from simlm.models.backbone import takes_token_types
    from simlm.objectives import Parts, find_objective
    from simlm.objectives.generator import require_mask_token
    from simlm.objectives.steps import Feeding, PassageSteps, held_out_measures, split_passages, step_size
    from simlm.training.precision import autocast, resolve_bf16, training_device
    from simlm.training.trainer import num_training_steps, train

    store = Store.open(inputs["store"])
    tokenizer = store.tokenizer()
    require_mask_token(tokenizer)
    start = _start(settings, inputs)
    masked_lm = _load(start, settings, store, tokenizer, context)
    parts = Parts(
        masked_lm,
        tokenizer,
        generator=open_artifact(inputs["generator"], "model").path if "generator" in inputs else None,
        continued=_continued(start),
    )
    objective = find_objective(settings.objective).build(settings, parts)
    assert isinstance(objective, nn.Module)

    training = paper_defaults(settings.training)
    rows, held_out = split_passages(len(store.passages), settings.held_out_passages, context.seed)
    size = step_size(settings.passages_per_step, len(rows), context.num_ranks, context.progress)
    feeding = Feeding(store.passages, objective.views(), settings.micro_batch_tokens, takes_token_types(masked_lm), context.seed)
    steps = PassageSteps(feeding, rows, passages_per_step=size, num_steps=num_training_steps(training, len(rows), size))
    device = training_device(bool((training.model_extra or {}).get("use_cpu", False)))
    bf16 = resolve_bf16(training.bf16, device.type)
    result = train(
        objective,
        steps,
        settings=training,
        context=context,
        dev=held_out_measures(objective, feeding, held_out, lambda: autocast(device.type, bf16), device),
        main_dev_measure="loss" if len(held_out) else None,
        greater_is_better=False,
        description="pretrain",
    )
    context.record(
        **result.facts(),
        objective=settings.objective,
        passages_per_step=size,
        train_passages=len(rows),
        held_out_passages=len(held_out),
        continued=parts.continued is not None,
    )
    if context.rank == 0:
        objective.save(context.work, tokenizer)


def paper_defaults(training: TrainingSettings) -> TrainingSettings:
    """The paper's learning rate and share of warm-up steps (4k of 80k) where the recipe gives none."""
    return training.with_defaults(learning_rate=3e-4, warmup_steps=0.05)


def _start(settings: PretrainSettings, inputs: dict[str, Path]) -> ModelSettings:
    if "pretrained" in inputs:
        return settings.model.model_copy(update={"start": str(open_artifact(inputs["pretrained"], "model").path), "revision": None})
    if settings.initial == "start":
        return settings.model
    return settings.model.model_copy(update={"start": settings.initial, "revision": None})


def _load(
    start: ModelSettings, settings: PretrainSettings, store: Store, tokenizer: PreTrainedTokenizerFast, context: Context
) -> PreTrainedModel:
    from simlm.models.backbone import has_fresh_head, load_masked_lm, set_output_bias
    from simlm.objectives.generator import check_same_vocabulary
    from simlm.objectives.start import check_length, log_frequencies

    if start.start != "scratch":
        check_same_vocabulary(start.start, tokenizer, role="model", revision=start.revision)
    masked_lm = load_masked_lm(start, tokenizer=tokenizer, seed=context.seed, dropout=settings.dropout)
    check_length(masked_lm, store, f"the model {start.start}")
    if has_fresh_head(masked_lm):
        if start.start != "scratch":
            context.progress.say(f"{start.start} has no language-model head: it starts fresh, on the model's own embeddings")
        set_output_bias(masked_lm, log_frequencies(store, masked_lm.config.vocab_size))
    return masked_lm


def _continued(start: ModelSettings) -> Path | None:
    """The folder to continue from, if what training starts from is the result of an earlier pre-training."""
    from simlm.models.backbone import resolve_model
    from simlm.objectives.bottleneck import DECODER_FILE

    if start.start == "scratch":
        return None
    folder = Path(resolve_model(start.start))
    if not (folder / DECODER_FILE).is_file():
        return None
    if (folder / "manifest.json").is_file():
        return open_artifact(folder, "model").path
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: a decoder without an encoder beside it; give the whole folder of the pre-trained model")
    return folder
