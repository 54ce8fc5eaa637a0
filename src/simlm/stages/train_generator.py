"""train_generator: the masked language model that replaced language modelling samples from (method.md section 1).

Inputs: "store". With source "train" a small one is trained on the corpus; with "random" one of that shape is written as it is born; with
a path or hub id it is loaded, its vocabulary is checked against the store's, and it is copied.
Output: a masked-LM folder with tokenizer and simlm.json; log.jsonl beside it if it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from simlm.recipe import GeneratorSettings
from simlm.stages import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from simlm.data.store import Store

LEARNING_RATE = 5e-4
"""Where the recipe gives none: that of ELECTRA-small (arXiv 2003.10555, table 6), the smallest published generator's."""


def run(settings: GeneratorSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train or copy the generator."""
    from simlm.data.store import Store

    store = Store.open(inputs["store"])
    if settings.source == "train":
        _train(settings, store, context)
    elif settings.source == "random":
        if context.rank == 0:
            _write_random(settings, store, context)
    elif context.rank == 0:
        _copy(settings.source, store, context)


def _fresh(settings: GeneratorSettings, store: Store, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A generator of the settings' shape that predicts token frequencies; ModelError if passages are longer than its positions."""
    from simlm.models.backbone import load_masked_lm, set_output_bias
    from simlm.objectives.start import check_length, log_frequencies
    from simlm.recipe import ModelSettings

    masked_lm = load_masked_lm(ModelSettings(start="scratch", config=_config(settings, store)), tokenizer=tokenizer, seed=seed)
    check_length(masked_lm, store, "the generator")
    set_output_bias(masked_lm, log_frequencies(store, masked_lm.config.vocab_size))
    return masked_lm


def _write_random(settings: GeneratorSettings, store: Store, context: Context) -> None:
    from simlm.objectives.bottleneck import save_masked_lm
    from simlm.objectives.generator import require_mask_token

    tokenizer = store.tokenizer()
    require_mask_token(tokenizer)
    context.record(source="random")
    save_masked_lm(_fresh(settings, store, tokenizer, context.seed), context.work, tokenizer, role="generator", source="random")


def _train(settings: GeneratorSettings, store: Store, context: Context) -> None:
    from simlm.models.backbone import takes_token_types
    from simlm.objectives.bottleneck import save_masked_lm
    from simlm.objectives.generator import require_mask_token
    from simlm.objectives.masked_lm import MaskedLM
    from simlm.objectives.pretraining import Pretraining
    from simlm.objectives.steps import Feeding, PassageSteps, held_out_measures, split_passages, step_size
    from simlm.objectives.views import PretrainViews
    from simlm.training.precision import autocast, resolve_bf16, training_device
    from simlm.training.trainer import num_training_steps, train

    tokenizer = store.tokenizer()
    mask_token_id = require_mask_token(tokenizer)
    training = settings.training.with_defaults(learning_rate=LEARNING_RATE)
    masked_lm = _fresh(settings, store, tokenizer, context.seed)
    task = Pretraining(
        masked_lm, {"masked_lm": MaskedLM()}, mask_token_id=mask_token_id, views=PretrainViews(encoder_rate=settings.mask_rate)
    )
    rows, held_out = split_passages(len(store.passages), settings.held_out_passages, context.seed)
    size = step_size(settings.passages_per_step, len(rows), context.num_ranks, context.progress)
    feeding = Feeding(store.passages, task.views(), settings.micro_batch_tokens, takes_token_types(masked_lm), context.seed)
    steps = PassageSteps(feeding, rows, passages_per_step=size, num_steps=num_training_steps(training, len(rows), size))
    device = training_device(bool((training.model_extra or {}).get("use_cpu", False)))
    bf16 = resolve_bf16(training.bf16, device.type)
    result = train(
        task,
        steps,
        settings=training,
        context=context,
        dev=held_out_measures(task, feeding, held_out, lambda: autocast(device.type, bf16), device),
        main_dev_measure="loss" if len(held_out) else None,
        greater_is_better=False,
        description="train generator",
    )
    context.record(**result.facts(), source="train", passages_per_step=size, train_passages=len(rows), held_out_passages=len(held_out))
    if context.rank == 0:
        save_masked_lm(masked_lm, context.work, tokenizer, role="generator", source="train", mask_rate=settings.mask_rate)


def _config(settings: GeneratorSettings, store: Store) -> dict[str, object]:
    """ELECTRA's generator, with embeddings as wide as its layers."""
    return {
        "model_type": "electra",
        "embedding_size": settings.hidden_size,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "intermediate_size": settings.intermediate_size,
        "max_position_embeddings": max(512, int(store.passages.max_tokens)),
    }


def _copy(source: str, store: Store, context: Context) -> None:
    from simlm.models.backbone import load_masked_lm
    from simlm.objectives.bottleneck import save_masked_lm
    from simlm.objectives.generator import check_same_vocabulary, require_mask_token
    from simlm.objectives.start import check_length

    tokenizer = store.tokenizer()
    require_mask_token(tokenizer)
    check_same_vocabulary(source, tokenizer)
    masked_lm = load_masked_lm(source, tokenizer=tokenizer)
    check_length(masked_lm, store, f"the generator {source}")
    context.record(source=source)
    save_masked_lm(masked_lm, context.work, tokenizer, role="generator", source=source)
