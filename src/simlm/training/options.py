"""From a recipe's training options to transformers' arguments, with what the pipeline decides itself."""

from __future__ import annotations

import math
from pathlib import Path

import transformers

from simlm.errors import RecipeError
from simlm.recipe import TrainingSettings
from simlm.training.precision import resolve_bf16, training_device


def num_training_steps(settings: TrainingSettings, num_examples: int, examples_per_step: int) -> int:
    """max_steps if it is set, else enough full steps for num_train_epochs passes over the examples (rounded up)."""
    if settings.max_steps > 0:
        return settings.max_steps
    # The product of a float number of epochs is not exact: 3 epochs of 64 queries are 3 steps of 64, not 4.
    return max(1, math.ceil(round(settings.num_train_epochs * num_examples / examples_per_step, 9)))


def mixed_precision(settings: TrainingSettings) -> tuple[str, bool]:
    """(device type that training uses, whether it computes in bf16)."""
    options = settings.model_extra or {}
    device = training_device(bool(options.get("use_cpu", False)))
    wanted = False if settings.bf16 == "auto" and options.get("fp16") else settings.bf16
    return device.type, resolve_bf16(wanted, device.type)


def trainer_arguments(
    settings: TrainingSettings,
    *,
    num_steps: int,
    folder: Path,
    seed: int,
    has_dev: bool,
    main_dev_measure: str | None,
    greater_is_better: bool,
) -> transformers.TrainingArguments:
    """TrainingArguments from a recipe's options and what the pipeline decides itself."""
    options = {**settings.model_dump(), **(settings.model_extra or {})}
    for ours in ("load_best_model_at_end", "fsdp", "fsdp_config"):
        options.pop(ours, None)
    device_type, bf16 = mixed_precision(settings)
    options.update(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        seed=seed % 2**32,
        bf16=bf16,
        use_cpu=device_type == "cpu",
        eval_strategy="steps" if has_dev else "no",
        eval_steps=(settings.eval_steps or num_steps) if has_dev else None,
        metric_for_best_model=main_dev_measure if has_dev else None,
        greater_is_better=greater_is_better,
        save_strategy="steps",
        save_total_limit=None,  # ours deletes after the marker is written, transformers before
        logging_strategy="steps",
        logging_first_step=options.get("logging_first_step", True),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        ignore_data_skip=True,
        average_tokens_across_devices=False,
        label_names=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    try:
        arguments = transformers.TrainingArguments(**options)
        _ = arguments.device
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training options: {error}") from error
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # one process, one device: a step is a list of micro-batches, which DataParallel cannot split
    return arguments


def shards(settings: TrainingSettings, num_ranks: int) -> bool:
    """Whether training.fsdp is on and there is more than one process to share among; RecipeError for what it cannot do."""
    options = settings.model_extra or {}
    if options.get("fsdp_config"):
        raise RecipeError("training.fsdp_config: the trainer shards the whole task as one unit; leave it out, training.fsdp = true is all")
    wanted = options.get("fsdp", False)
    if not isinstance(wanted, bool):
        raise RecipeError(f"training.fsdp is {wanted!r}, true or false was expected")
    for other in ("torch_compile", "fp16"):
        if wanted and options.get(other):
            raise RecipeError(f"training.fsdp does not go together with training.{other}; leave one of them out")
    return wanted and num_ranks > 1


def load_best(settings: TrainingSettings, *, keep_best: bool, has_measure: bool) -> bool:
    """Whether the best weights are kept; RecipeError if there is nothing to choose them by."""
    option = bool((settings.model_extra or {}).get("load_best_model_at_end", False))
    if (option or keep_best) and not has_measure:
        asked = "training.load_best_model_at_end" if option else "the best weights are to be kept"
        raise RecipeError(f"{asked}: there is no dev measure to choose by; give the data a dev split or leave it out")
    return option or keep_best
