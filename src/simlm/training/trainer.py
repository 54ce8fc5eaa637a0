"""The training loop of every stage: one thin subclass of transformers.Trainer, and `train`, which runs or resumes it.

What is ours, and why:
- A step's data is a function of the step (`StepBatches`), so resuming skips nothing and the number of processes changes nothing.
- A step is a list of micro-batches whose losses sum to the step's loss; gradients meet once a step.
- Before each step torch is seeded from (seed, step, rank): dropout depends neither on dev measures nor on a resumed run's past.
- A checkpoint counts only with its `complete` marker, written and synced last; older ones are deleted after that, never before.
- Whether losses and gradients are finite is accumulated on the device and read only where the loop stops anyway (log, dev, save).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_callback import PrinterCallback

from simlm.artifacts import disk_error, write_json
from simlm.errors import DiskError, RecipeError, TrainingError
from simlm.progress import Progress
from simlm.recipe import TrainingSettings
from simlm.runtime import MemoryBound
from simlm.training.callbacks import LastStep, ProgressBar, TrainingLog
from simlm.training.precision import resolve_bf16, training_device

MicroBatch = dict[str, Any]
WEIGHTS = "model.safetensors"
COMPLETE = "complete"
_NEVER = torch.iinfo(torch.int64).max


class StepBatches(Protocol):
    """What a stage feeds the trainer. Everything is a function of the step; rank and num_ranks only say which part to return."""

    @property
    def num_steps(self) -> int: ...

    def load(self, step: int, rank: int, num_ranks: int) -> list[MicroBatch]:
        """Micro-batches of this rank for `step` (0..num_steps-1), at least one; may run in a loader's worker process.

        Tensors are moved to the device, other values are passed to the task as they are. The losses of all micro-batches of all
        ranks sum to the step's loss, so whatever normalises them must count the whole step.
        """
        ...


class TrainingContext(Protocol):
    """What `train` needs of a stage's context (simlm.stages.Context has it)."""

    @property
    def work(self) -> Path: ...
    @property
    def resume(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_ranks(self) -> int: ...


@dataclass(frozen=True)
class TrainingResult:
    """What a training run ended with.

    resumed_step: where this try went on from (0 = from the start). loss: mean over the steps since the log before the last.
    measures: the last train line of log.jsonl. dev_start, dev: dev measures before training and at its end; empty without dev.
    best_step: step with the best main dev measure, None without one. seconds: over all tries.
    """

    num_steps: int
    resumed_step: int
    loss: float
    measures: dict[str, float]
    dev_start: dict[str, float]
    dev: dict[str, float]
    best_step: int | None
    seconds: float
    bf16: bool

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "num_steps": self.num_steps,
            "loss": self.loss,
            "dev_start": self.dev_start,
            "dev": self.dev,
            "best_step": self.best_step,
            "training_seconds": round(self.seconds, 3),
            "bf16": self.bf16,
        }


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


def train(
    task: nn.Module,
    batches: StepBatches,
    *,
    settings: TrainingSettings,
    context: TrainingContext,
    dev: Callable[[], dict[str, float]] | None = None,
    main_dev_measure: str | None = None,
    greater_is_better: bool = True,
    description: str = "train",
) -> TrainingResult:
    """Train `task` to the end, going on from the newest whole checkpoint in `context.resume` if there is one.

    `task(**micro_batch)` returns {"loss": scalar, name: detached scalar ...}; all of them are summed over the micro-batches and ranks of
    a step, and logged as means over steps. The trained weights are left in `task` (the best ones by `main_dev_measure` with
    load_best_model_at_end). `context.work / "log.jsonl"` gets the curve. Parts of the task that must stay in eval mode (a frozen
    generator) have to override `train()`.
    dev: measures of the model as it is (called in eval mode without gradient, on rank 0 only), before, while and after training.
    Raises TrainingError for a loss or gradient that is not finite, DiskError if a checkpoint cannot be written, RecipeError for
    training options that do not go together.
    """
    folder = context.resume / "checkpoints"
    arguments = _arguments(
        settings,
        num_steps=batches.num_steps,
        folder=folder,
        seed=context.seed,
        has_dev=dev is not None,
        main_dev_measure=main_dev_measure,
        greater_is_better=greater_is_better,
    )
    checkpoint = newest_checkpoint(folder)
    resumed_step = checkpoint_step(checkpoint) if checkpoint else 0
    if context.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        _delete_leftovers(folder)
    log = TrainingLog(context.work / "log.jsonl", resumed_step=resumed_step if checkpoint else None, write=context.rank == 0)
    bar = ProgressBar(context.progress, description)
    trainer = SimlmTrainer(
        task,
        arguments,
        batches=batches,
        context=context,
        log=log,
        dev=dev,
        load_best=_load_best(settings, dev, main_dev_measure),
        num_kept=settings.save_total_limit,
        callbacks=[bar, LastStep()],
    )
    try:
        if resumed_step < batches.num_steps:
            if checkpoint:
                context.progress.say(f"{description}: going on from step {resumed_step:,} of {batches.num_steps:,}")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        elif checkpoint:
            trainer.load_finished(checkpoint)
    finally:
        bar.close()
        trainer.release()
    train_line, dev_line = log.last("train"), log.last("dev")
    dev_start: dict[str, float] = next(
        (record["measures"] for record in log.records if record["kind"] == "dev" and record["step"] == 0), {}
    )
    return TrainingResult(
        num_steps=batches.num_steps,
        resumed_step=resumed_step,
        loss=train_line["measures"]["loss"] if train_line else math.nan,
        measures=train_line["measures"] if train_line else {},
        dev_start=dev_start,
        dev=dev_line["measures"] if dev_line else {},
        best_step=trainer.state.best_global_step,
        seconds=log.seconds(),
        bf16=arguments.bf16,
    )


class SimlmTrainer(transformers.Trainer):  # type: ignore[misc, unused-ignore]
    """transformers.Trainer fed with whole steps; see the module's docstring for what differs."""

    def __init__(
        self,
        task: nn.Module,
        arguments: transformers.TrainingArguments,
        *,
        batches: StepBatches,
        context: TrainingContext,
        log: TrainingLog,
        dev: Callable[[], dict[str, float]] | None,
        load_best: bool,
        num_kept: int,
        callbacks: list[transformers.TrainerCallback],
    ) -> None:
        self._batches = batches
        self._context = context
        self._training_log = log
        self._dev = dev
        self._load_best = load_best
        self._task = task
        self._root = Path(str(arguments.output_dir))
        self._num_kept = num_kept
        # _validate_args wants an eval_dataset where there are dev measures; ours are a function.
        super().__init__(model=task, args=arguments, eval_dataset=[] if dev is not None else None, callbacks=[*callbacks, _Restore(self)])
        self.remove_callback(PrinterCallback)
        assert self.args.process_index == context.rank and self.args.world_size == context.num_ranks, (
            "rank of torchrun and of context differ"
        )
        self._sums: dict[str, Tensor] = {}
        self._bound_memory = MemoryBound()
        self._first_bad_step = torch.full((2,), _NEVER, dtype=torch.int64, device=self.args.device)  # of the loss, of the gradient
        self._resumed_sums: dict[str, Any] = {}

    # Data and the step

    def get_train_dataloader(self) -> DataLoader[list[MicroBatch]]:
        """A loader of steps, starting at the step to be done next."""
        args = self.args
        steps: _Steps = _Steps(self._batches, self._context.rank, self._context.num_ranks)
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers > 0:
            workers = {
                "prefetch_factor": args.dataloader_prefetch_factor,
                "persistent_workers": args.dataloader_persistent_workers,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
            }
        return DataLoader(
            steps,
            batch_size=None,
            sampler=range(self._next_step, self._batches.num_steps),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            **workers,
        )

    _next_step = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; the loader starts at the checkpoint's step."""
        self._next_step = checkpoint_step(Path(resume_from_checkpoint)) if isinstance(resume_from_checkpoint, str) else 0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[int, int, int, int, int, int, int]:
        """One "epoch" of `max_steps` steps, whatever the loader still has to give."""
        steps = args.max_steps
        return 1, steps, steps, steps, 1, steps, steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all micro-batches of one step; the step's loss, detached."""
        step = self.state.global_step
        torch.manual_seed(step_seed(self._context.seed, step, self._context.rank))
        model.train()
        total = torch.zeros((), device=self.args.device)
        for position, micro_batch in enumerate(inputs):
            last = position == len(inputs) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                outputs = model(**self._prepare_inputs(micro_batch))
                # DDP averages gradients over the ranks, the loss is a sum over them.
                loss = outputs["loss"] * self._context.num_ranks
                self.accelerator.backward(loss)
            total += loss.detach()
            for name, value in outputs.items():
                self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()
        self._note_finite(0, total, step)
        self._bound_memory()
        return total

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        from accelerate.utils import AutocastKwargs

        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        # See precision.autocast: gradients of several pieces must not add up in bf16.
        arguments["kwargs_handlers"] = [*arguments["kwargs_handlers"], AutocastKwargs(cache_enabled=False)]
        return arguments

    # Losses that are not finite

    def _note_finite(self, which: int, value: Tensor, step: int) -> None:
        bad = torch.where(torch.isfinite(value), _NEVER, step + 1)
        self._first_bad_step[which] = torch.minimum(self._first_bad_step[which], bad)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if self.accelerator.scaler is None:  # with fp16 the scaler skips steps whose gradients overflow
            self._note_finite(1, torch.as_tensor(norm, device=self.args.device), self.state.global_step)
        return norm

    def _stop_if_not_finite(self) -> None:
        loss_step, gradient_step = self._first_bad_step.tolist()
        if min(loss_step, gradient_step) == _NEVER:
            return
        what, step = ("loss", loss_step) if loss_step <= gradient_step else ("gradient", gradient_step)
        good = newest_checkpoint(self._root)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
        raise TrainingError(
            f"the {what} of step {step:,} is not a finite number "
            f"(learning rate {self._get_learning_rate():.3g}); training stopped, {kept}. "
            "Try a lower learning_rate, a longer warmup_steps, or bf16 = false"
        )

    # Log, dev measures, checkpoints

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            self._stop_if_not_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the task's own measures, write a line of log.jsonl, tell the loggers."""
        if "loss" in logs:
            num_steps = self.state.global_step - self._sums_since
            # Ours, not transformers' own loss: it also holds what came before a kill.
            logs.update({name: value / num_steps for name, value in self._total_sums().items()})
            self._sums, self._sums_since = {}, self.state.global_step
            self._training_log.append(self.state.global_step, "train", dict(logs))
        super().log(logs, start_time)

    _sums_since = 0

    def _total_sums(self) -> dict[str, float]:
        """The loss and the task's own measures since the last log, over all ranks."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names])
        if self._context.num_ranks > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Dev measures, taken on rank 0 and told to all."""
        assert self._dev is not None
        box: list[dict[str, float]] = [{}]
        if self._context.rank == 0:
            self._task.eval()
            with torch.no_grad():
                box[0] = self._dev()
        if self._context.num_ranks > 1:
            torch.distributed.broadcast_object_list(box, src=0, device=self.args.device)
        measures = box[0]
        self._training_log.append(self.state.global_step, "dev", measures)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
        self._context.progress.say(f"step {self.state.global_step:,}: dev {shown}")
        metrics = {f"eval_{name}": value for name, value in measures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        if best and self._load_best and self.args.should_save:
            with _disk_errors(self._root):
                target = _best_file(self._root, self.state.global_step)
                safetensors.torch.save_model(self._task, str(target))
                _sync(target)
        return best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers has it, then the marker that makes it count, then room is made."""
        root = self._root
        folder = root / f"checkpoint-{self.state.global_step}"
        sums = {"since": self._sums_since, "measures": self._total_sums()}
        with _disk_errors(root, partial=folder):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                _complete(folder, {"step": self.state.global_step, "best_step": self.state.best_global_step, "sums": sums})
        if self.args.should_save:
            _delete_leftovers(root, keep=self._num_kept)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights as safetensors, tied ones once."""
        assert output_dir is not None
        if self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(self._task, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        safetensors.torch.load_model(self._task, str(Path(resume_from_checkpoint) / WEIGHTS), device=str(self.args.device))
        self._resumed_sums = json.loads((Path(resume_from_checkpoint) / COMPLETE).read_text(encoding="utf-8"))["sums"]

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: every step seeds its own."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds its own."""

    def begin(self) -> None:
        """What comes before the first step of this try: the sums of a resumed run, or the dev measures of an untrained model."""
        self._sums_since = self.state.global_step
        if self._resumed_sums:
            sums, self._resumed_sums = self._resumed_sums, {}
            self._sums_since = sums["since"]
            if self._context.rank == 0:  # they are sums over all ranks
                self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in sums["measures"].items()}
            else:
                self._sums = {name: torch.zeros((), device=self.args.device) for name in sums["measures"]}
        elif self._dev is not None and self.state.global_step == 0:
            metrics = self.evaluate()
            self._determine_best_metric(metrics=metrics, trial=None)

    def load_finished(self, checkpoint: Path) -> None:
        """The weights of a checkpoint of the last step, instead of training."""
        self.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        self._load_best_weights()

    def _load_best_weights(self) -> None:
        best = self.state.best_global_step
        if self._load_best and best is not None and best != self.args.max_steps:
            safetensors.torch.load_model(self._task, str(_best_file(self._root, best)), device=str(self.args.device))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._load_best_weights()
        return output

    def release(self) -> None:
        """Take autocast and DDP off the task again, and let go of the optimiser."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        for left_behind in ("forward", "_is_accelerate_prepared"):  # on the instance; the class has its own forward
            vars(self._task).pop(left_behind, None)
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self._task


class _Restore(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls SimlmTrainer.begin once the loop has set up its state."""

    def __init__(self, trainer: SimlmTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin()


class _Steps(Dataset[list[MicroBatch]]):
    """Steps as a data set, for torch's loader."""

    def __init__(self, batches: StepBatches, rank: int, num_ranks: int) -> None:
        self._batches, self._rank, self._num_ranks = batches, rank, num_ranks

    def __getitem__(self, step: int) -> list[MicroBatch]:
        return self._batches.load(step, self._rank, self._num_ranks)


def step_seed(seed: int, step: int, rank: int) -> int:
    """63 bits, for torch: independent for each (seed, step, rank)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


# Checkpoints on disk


def newest_checkpoint(root: Path) -> Path | None:
    """The whole checkpoint of the highest step; None if there is none."""
    whole = [folder for folder in root.glob("checkpoint-*") if _is_whole(folder)] if root.is_dir() else []
    return max(whole, key=checkpoint_step, default=None)


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(folder.name.removeprefix("checkpoint-"))


def _complete(folder: Path, facts: dict[str, Any]) -> None:
    """Sync a checkpoint's files, then write the marker."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    for name in files:
        _sync(folder / name)
    write_json(folder / COMPLETE, {**facts, "files": files})
    _sync(folder)
    _sync(folder.parent)


def _is_whole(folder: Path) -> bool:
    try:
        marker = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, json.JSONDecodeError):
        return False


def _best_file(root: Path, step: int | None) -> Path:
    return root / f"best-{step}.safetensors"


def _delete_leftovers(root: Path, keep: int | None = None) -> None:
    """Delete partial checkpoints, all but the `keep` newest whole ones, and best weights that no remaining checkpoint names."""
    whole = sorted((folder for folder in root.glob("checkpoint-*") if _is_whole(folder)), key=checkpoint_step)
    kept = whole if keep is None else whole[-keep:]
    for folder in root.glob("checkpoint-*"):
        if folder not in kept:
            with contextlib.suppress(FileNotFoundError):
                (folder / COMPLETE).unlink()  # first, so that a kill here leaves nothing that looks whole
            shutil.rmtree(folder, ignore_errors=True)
    named = {_best_file(root, json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["best_step"]) for folder in kept}
    for file in root.glob("best-*.safetensors"):
        if file not in named:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(root: Path, partial: Path | None = None) -> Iterator[None]:
    """DiskError for whatever a full disk looks like from inside torch and safetensors; the partial checkpoint is deleted."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = "No space left" in str(error) or "file write failed" in str(error) or _disk_is_full(root)
        if not isinstance(error, OSError | SafetensorError) and not full:
            raise
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        found = error if isinstance(error, OSError) and not full else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else None
        raise (disk_error(found, root) if found else DiskError(f"{root}: {error}; earlier checkpoints are intact")) from error


def _disk_is_full(root: Path) -> bool:
    return shutil.disk_usage(root).free < 1 << 20


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Options


def _arguments(
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
    options.pop("load_best_model_at_end", None)
    if options.get("fsdp"):
        raise RecipeError(
            "training.fsdp: sharded training is not supported yet; run with DDP (torchrun alone), which fits encoders of this size"
        )
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


def _load_best(settings: TrainingSettings, dev: object, main_dev_measure: str | None) -> bool:
    wanted = bool((settings.model_extra or {}).get("load_best_model_at_end", False))
    if wanted and (dev is None or main_dev_measure is None):
        raise RecipeError(
            "training.load_best_model_at_end: there is no dev measure to choose by; give the data a dev split or leave it out"
        )
    return wanted
