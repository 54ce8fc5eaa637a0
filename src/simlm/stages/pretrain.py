"""pretrain: passages -> encoder whose [CLS] vector holds the passage (method.md section 1).

Inputs: "store", "generator", and "pretrained" to continue from an earlier run of this stage.
Output: a masked-LM folder (AutoModel gives the encoder) with decoder.safetensors, tokenizer and simlm.json; log.jsonl beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from simlm.artifacts import open_artifact
from simlm.errors import ModelError, RecipeError
from simlm.recipe import ModelSettings, PretrainSettings, TrainingSettings
from simlm.stages import Context

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from simlm.data.store import Store
    from simlm.objectives.pretraining import Pretraining
    from simlm.objectives.steps import Feeding


LEAST_LEAP = 1.0
"""Nats above the running mean that a loss spike has at least. Ours: well above what a loss near 0 does by chance."""


def run(settings: PretrainSettings, inputs: dict[str, Path], context: Context) -> None:
    """Pre-train, continuing where an interrupted run stopped, and save encoder, head and decoder."""
    from simlm.data.store import Store
    from simlm.models.backbone import takes_token_types
    from simlm.objectives import Parts
    from simlm.objectives.masking import idf_weights
    from simlm.objectives.pretraining import Pretraining, unused_settings
    from simlm.objectives.start import corpus_ids
    from simlm.objectives.steps import Feeding, PassageSteps, split_passages, step_size, token_counts
    from simlm.training.spikes import SpikeGuard
    from simlm.training.trainer import num_training_steps, train

    store = Store.open(inputs["store"])
    tokenizer = store.tokenizer()
    start = _start(settings, inputs)
    masked_lm = _load(start, settings, store, tokenizer, context)
    num_entries = masked_lm.config.vocab_size
    continued = _continued(start)
    parts = Parts(
        masked_lm,
        tokenizer,
        generator=open_artifact(inputs["generator"], "model").path if "generator" in inputs else None,
        continued=continued,
        idf_V=idf_weights(store.passages, num_entries) if settings.masking == "idf" else None,
        corpus_ids=corpus_ids(store, num_entries) if settings.softmax == "corpus" else None,
    )
    task = Pretraining.build(settings, parts)
    for name in task.fresh:
        context.progress.say(f"pretrain: {continued} has no state of {name}: what it trains beside the encoder starts fresh")
    for key in unused_settings(settings, task):
        context.progress.say(f"pretrain: {key} has no effect on {', '.join(settings.objective_weights)}")
    if "none" in settings.objective_weights:
        context.record(objective="none", num_steps=0, continued=continued is not None)
        if context.rank == 0:
            task.save(context.work, tokenizer)
        return

    training = paper_defaults(settings.training)
    rows, held_out = split_passages(len(store.passages), settings.held_out_passages, context.seed)
    size = step_size(settings.passages_per_step, len(rows), context.num_ranks, context.progress)
    feeding = Feeding(store.passages, task.views(), settings.micro_batch_tokens, takes_token_types(masked_lm), context.seed)
    steps = PassageSteps(feeding, rows, passages_per_step=size, num_steps=num_training_steps(training, len(rows), size))
    dev, measured = _dev(task, settings, feeding, held_out, tokenizer, training)
    main = {"loss": "loss", "probe": "probe_RR@10", "last": "loss"}[settings.best_by]
    if settings.best_by != "last" and main not in measured:
        raise RecipeError(
            f'pretrain.best_by is "{settings.best_by}", but there is nothing to measure {main} on ({len(held_out)} passages held out of '
            f'{len(store.passages):,}, probe.num_passages {settings.probe.num_passages}); raise them, or set best_by = "last"'
        )
    result = train(
        task,
        steps,
        settings=training,
        context=context,
        dev=dev,
        main_dev_measure=main if main in measured else None,
        greater_is_better=settings.best_by == "probe",
        keep_best=settings.best_by != "last",
        spikes=None if settings.spike_ratio is None else SpikeGuard(settings.spike_ratio, settings.max_spikes, LEAST_LEAP),
        optimizer_from=continued,
        keep_optimizer_in=context.work if settings.keep_optimizer else None,
        description="pretrain",
    )
    mean_tokens = float(token_counts(store.passages, rows).mean())
    context.record(
        **result.facts(),
        objective=settings.objective,
        passages_per_step=size,
        train_passages=len(rows),
        held_out_passages=len(held_out),
        continued=continued is not None,
        tokens=round(mean_tokens * size * result.num_steps),
        tokens_per_second=round(mean_tokens * size * result.num_steps / max(result.seconds, 1e-9), 1),
    )
    if context.rank == 0:
        task.save(context.work, tokenizer)


def _dev(
    task: Pretraining,
    settings: PretrainSettings,
    feeding: Feeding,
    held_out: NDArray[np.int64],
    tokenizer: PreTrainedTokenizerFast,
    training: TrainingSettings,
) -> tuple[Callable[[], dict[str, float]] | None, set[str]]:
    """(what measures the task on held-out passages, None if there are none; names of what can be chosen by)."""
    from simlm.objectives.probe import Probe
    from simlm.objectives.steps import held_out_measures
    from simlm.training.precision import autocast, resolve_bf16, training_device

    device = training_device(bool((training.model_extra or {}).get("use_cpu", False)))
    bf16 = resolve_bf16(training.bf16, device.type)
    losses = held_out_measures(task, feeding, held_out, lambda: autocast(device.type, bf16), device)
    probe = Probe.build(
        feeding.table,
        held_out,
        settings.probe,
        seed=feeding.seed,
        batch_tokens=settings.micro_batch_tokens,
        tokenizer=tokenizer,
        token_types=feeding.token_types,
    )
    if losses is None:
        return None, set()
    if probe is None:
        return losses, {"loss"}

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return task.pooled({name: tensor.to(device) for name, tensor in batch.items()}, settings.model.pooling)

    def measure() -> dict[str, float]:
        import torch

        with torch.no_grad(), autocast(device.type, bf16):
            return losses() | probe.measures(encode)

    return measure, {"loss", "probe_RR@10"}


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
    from simlm.models.model_folder import read_json
    from simlm.objectives.bottleneck import DECODER_FILE

    if start.start == "scratch":
        return None
    folder = Path(resolve_model(start.start))
    if not folder.is_dir():
        return None
    if not (folder / DECODER_FILE).is_file() and (read_json(str(folder), "simlm.json") or {}).get("role") != "pretrained":
        return None
    if (folder / "manifest.json").is_file():
        return open_artifact(folder, "model").path
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: a decoder without an encoder beside it; give the whole folder of the pre-trained model")
    return folder
