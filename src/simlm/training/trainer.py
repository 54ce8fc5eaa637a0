"""The training loop of every stage: one thin subclass of transformers.Trainer, and `train`, which runs or resumes it.

What is ours, and why:
- A step's data is a function of the step (`StepBatches`), so resuming skips nothing and the number of processes changes nothing.
- A step is a list of micro-batches whose losses sum to the step's loss; gradients meet once a step.
- Before each step torch is seeded from (seed, step, rank): dropout depends neither on dev measures nor on a resumed run's past.
- A checkpoint counts only with its `complete` marker (checkpoints.py), and any number of processes can go on from it.
- Whether losses and gradients are finite, and which steps a spike guard skips, is decided on the device and read only where the loop
  stops anyway (log, dev, save).
- A task may see all micro-batches of a step before the first of them is trained on (`before_step`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from simlm.artifacts import disk_error, sync
from simlm.errors import TrainingError
from simlm.progress import Progress
from simlm.recipe import TrainingSettings
from simlm.runtime import MemoryBound
from simlm.training.callbacks import LastStep, ProgressBar, TrainingLog
from simlm.training.checkpoints import (
    COMPLETE,
    WEIGHTS,
    best_file,
    checkpoint_step,
    complete,
    delete_leftovers,
    disk_errors,
    newest_checkpoint,
)
from simlm.training.optimizer_state import OPTIMIZER_FILE, check_optimizer, load_optimizer, require_adamw, save_optimizer
from simlm.training.options import load_best, mixed_precision, num_training_steps, shards, trainer_arguments
from simlm.training.sharding import Sharded, load_optimizer_state, optimizer_state, whole_tensor
from simlm.training.spikes import Skipped, SpikeGuard, SpikeWatch

MicroBatch = dict[str, Any]
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
    task_facts: dict[str, Any] = field(default_factory=dict)
    """What the task itself has to say for the manifest."""

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
            **self.task_facts,
        }


def train(
    task: nn.Module,
    batches: StepBatches,
    *,
    settings: TrainingSettings,
    context: TrainingContext,
    dev: Callable[[], dict[str, float]] | None = None,
    main_dev_measure: str | None = None,
    greater_is_better: bool = True,
    keep_best: bool = False,
    spikes: SpikeGuard | None = None,
    keep_optimizer_in: Path | None = None,
    optimizer_from: Path | None = None,
    description: str = "train",
) -> TrainingResult:
    """Train `task` to the end, going on from the newest whole checkpoint in `context.resume` if there is one.

    `task(**micro_batch)` returns {"loss": scalar, name: detached scalar ...}; all of them are summed over the micro-batches and ranks of
    a step, and logged as means over steps. The trained weights are left in `task`, those of the last step, or with `keep_best` or
    training.load_best_model_at_end the best ones by `main_dev_measure`. `context.work / "log.jsonl"` gets the curve. Parts of the task
    that must stay in eval mode (a frozen generator) have to override `train()`.
    A task with a method `before_step(micro_batches, *, rank, num_ranks, seed) -> micro_batches` is given all micro-batches of a step
    first (on the device, without gradient) and trained on what it returns, for losses that need the whole step's embeddings. Each
    micro-batch then has an entry "dropout_seed"; torch is seeded with it before its forward pass, so a first pass that does the same
    sees the same dropout.
    A task with a method `prepare_optimizer(optimizer)` is given the optimiser when it is made, to treat some parameters in its own way.
    dev: measures of the model as it is (called in eval mode without gradient, on rank 0 only), before, while and after training.
    spikes: skip steps whose loss leaps; without it a loss that is not finite stops training.
    keep_optimizer_in: folder that gets the optimiser's state of the last step (of AdamW; also where the best weights are kept).
    optimizer_from: such a folder; a fresh run (one without a checkpoint) starts with its moments, if it has any. The learning-rate
    schedule starts anew.
    Raises TrainingError for a loss or gradient that is not finite or too many spikes in a row, DiskError if a checkpoint cannot be
    written, RecipeError for training options that do not go together or an optimiser state of other parameters.
    """
    if keep_optimizer_in is not None:
        require_adamw(settings, "keeping the optimiser's state")
    folder = context.resume / "checkpoints"
    arguments = trainer_arguments(
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
    if optimizer_from is not None and not (optimizer_from / OPTIMIZER_FILE).is_file():
        context.progress.say(f"{description}: {optimizer_from} keeps no {OPTIMIZER_FILE}, the optimiser starts fresh")
        optimizer_from = None
    if optimizer_from is not None:
        require_adamw(settings, "going on with an optimiser's state")
        check_optimizer(task, optimizer_from)
    if context.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        delete_leftovers(folder)
    log = TrainingLog(context.work / "log.jsonl", resumed_step=resumed_step if checkpoint else None, write=context.rank == 0)
    bar = ProgressBar(context.progress, description)
    trainer = SimlmTrainer(
        task,
        arguments,
        batches=batches,
        context=context,
        log=log,
        dev=dev,
        load_best=load_best(settings, keep_best=keep_best, has_measure=dev is not None and main_dev_measure is not None),
        num_kept=settings.save_total_limit,
        spikes=spikes,
        optimizer_from=optimizer_from,
        shard=shards(settings, context.num_ranks),
        callbacks=[bar, LastStep()],
    )
    try:
        if resumed_step < batches.num_steps:
            if checkpoint:
                context.progress.say(f"{description}: going on from step {resumed_step:,} of {batches.num_steps:,}")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        elif checkpoint:
            trainer.load_finished(checkpoint, optimizer=keep_optimizer_in is not None)
        if keep_optimizer_in is not None:
            trainer.save_optimizer(keep_optimizer_in)
        trainer.restore()
    finally:
        bar.close()
        trainer.release()
    train_line, dev_line = log.last("train", having="loss"), log.last("dev")
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
        spikes: SpikeGuard | None,
        optimizer_from: Path | None,
        shard: bool,
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
        self._optimizer_from = optimizer_from
        self._shard = shard
        self._sharded: Sharded | None = None
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
        self._spikes = None if spikes is None else SpikeWatch(spikes, self.args.device)

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
        parts: dict[str, Tensor] = {}
        micro_batches = self._before_step(inputs, step)
        for position, micro_batch in enumerate(micro_batches):
            if "dropout_seed" in micro_batch:
                torch.manual_seed(micro_batch["dropout_seed"])
            last = position == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self._no_sync(model):
                outputs = model(**self._prepare_inputs(micro_batch))
                # DDP averages gradients over the ranks, the loss is a sum over them.
                loss = outputs["loss"] * self._context.num_ranks
                self.accelerator.backward(loss)
            total += loss.detach()
            for name, value in outputs.items():
                parts[name] = parts.get(name, torch.zeros((), device=value.device)) + value.detach().float()
        if self._spikes is None:
            self._note_finite(0, total, step)
        else:
            total, parts = self._judge(total, parts, step)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value
        self._bound_memory()
        return total

    def _before_step(self, inputs: list[MicroBatch], step: int) -> list[MicroBatch]:
        """What the task makes of a step's micro-batches, if it wants to see them all; see `train`."""
        before_step: Callable[..., list[MicroBatch]] | None = getattr(self._task, "before_step", None)
        if before_step is None or not getattr(self._task, "wants_whole_steps", True):
            return inputs
        context = self._context
        seeded = [
            {**self._prepare_inputs(micro_batch), "dropout_seed": micro_batch_seed(context.seed, step, context.rank, position)}
            for position, micro_batch in enumerate(inputs)
        ]
        with self._whole(), torch.no_grad(), self.accelerator.autocast():
            return before_step(seeded, rank=context.rank, num_ranks=context.num_ranks, seed=context.seed)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        from accelerate.utils import AutocastKwargs

        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        # See precision.autocast: gradients of several pieces must not add up in bf16.
        arguments["kwargs_handlers"] = [*arguments["kwargs_handlers"], AutocastKwargs(cache_enabled=False)]
        return arguments

    # Losses that are not finite, and spikes

    def _judge(self, total: Tensor, parts: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The step's loss and measures, all 0 if the guard skips it, with "skipped_steps" added."""
        assert self._spikes is not None
        everywhere = total.clone()
        if self._context.num_ranks > 1:
            torch.distributed.all_reduce(everywhere)
        skip = self._spikes.judge(step + 1, everywhere / self._context.num_ranks)
        kept = {name: torch.where(skip > 0, 0.0, value) for name, value in parts.items()}
        kept["skipped_steps"] = skip if self._context.rank == 0 else torch.zeros_like(skip)
        return torch.where(skip > 0, 0.0, total), kept

    def _skip_if_judged(self, model: nn.Module) -> None:
        """Keep the optimiser from stepping if the guard says so."""
        assert self._spikes is not None
        inner = self.inner_optimizer()
        if self.accelerator.scaler is None and self._sharded is None and all(group.get("fused") for group in inner.param_groups):
            # What torch's GradScaler tells a fused kernel, which then leaves weights, moments and steps as they are; nothing is read.
            inner.found_inf = self._spikes.skip  # type: ignore[attr-defined]
        elif self._spikes.skip.item():
            model.zero_grad()  # an optimiser leaves parameters without a gradient alone

    def _note_finite(self, which: int, value: Tensor, step: int) -> None:
        bad = torch.where(torch.isfinite(value), _NEVER, step + 1)
        self._first_bad_step[which] = torch.minimum(self._first_bad_step[which], bad)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        norm = whole_tensor(torch.as_tensor(norm, device=self.args.device))
        if self._spikes is not None:
            norm = torch.where(self._spikes.skip > 0, 0.0, norm)
            self._skip_if_judged(model)
        if self.accelerator.scaler is None:  # with fp16 the scaler skips steps whose gradients overflow
            self._note_finite(1, norm, self.state.global_step)
        return norm

    def _stop_if_bad(self) -> None:
        for skipped in self._spikes.report() if self._spikes is not None else []:
            self._tell_skipped(skipped)
        loss_step, gradient_step = self._first_bad_step.tolist()
        if min(loss_step, gradient_step) != _NEVER:
            what, step = ("loss", loss_step) if loss_step <= gradient_step else ("gradient", gradient_step)
            raise self._stopped(f"the {what} of step {step:,} is not a finite number")

    def _tell_skipped(self, skipped: Skipped) -> None:
        assert self._spikes is not None
        guard = self._spikes.guard
        found = f"its loss {skipped.loss:.4g} is " + (
            f"more than {guard.ratio:g} times the running mean {skipped.mean:.4g}" if math.isfinite(skipped.loss) else "not a finite number"
        )
        if skipped.in_a_row >= guard.max_in_a_row:
            raise self._stopped(f"step {skipped.step:,} was the last of {skipped.in_a_row:,} skipped in a row: {found}")
        self._context.progress.say(f"step {skipped.step:,}: skipped, {found}")

    def _stopped(self, what: str) -> TrainingError:
        good = newest_checkpoint(self._root)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
        return TrainingError(
            f"{what} (learning rate {self._get_learning_rate():.3g}); training stopped, {kept}. "
            "Try a lower learning_rate, a longer warmup_steps, or bf16 = false"
        )

    # Log, dev measures, checkpoints

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            self._stop_if_bad()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the task's own measures, write a line of log.jsonl, tell the loggers."""
        if "loss" in logs:
            sums = self._total_sums()
            skipped = sums.pop("skipped_steps", None)
            num_steps = self.state.global_step - self._sums_since - round(skipped or 0)
            # Ours, not transformers' own loss: it also holds what came before a kill.
            del logs["loss"]
            if num_steps:  # else all were skipped, and nothing is known
                logs.update({name: value / num_steps for name, value in sums.items()})
            if skipped is not None:
                logs["skipped_steps"] = skipped
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
        with self._whole():
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
        if best and self._load_best:
            with disk_errors(self._root):
                target = best_file(self._root, self.state.global_step)
                self._save_weights(target)
                if self.args.should_save:
                    sync(target)
        return best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers has it, then the marker that makes it count, then room is made."""
        root = self._root
        folder = root / f"checkpoint-{self.state.global_step}"
        sums = {"since": self._sums_since, "measures": self._total_sums()}
        with disk_errors(root, partial=folder):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                facts = {"step": self.state.global_step, "best_step": self.state.best_global_step, "sums": sums}
                if self._spikes is not None:
                    facts["spikes"] = self._spikes.state()
                complete(folder, facts)
        if self.args.should_save:
            delete_leftovers(root, keep=self._num_kept)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights as safetensors, tied ones once."""
        assert output_dir is not None
        folder = Path(output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        self._save_weights(folder / WEIGHTS)

    def _save_weights(self, path: Path) -> None:
        """On rank 0; with sharding all ranks help."""
        if self._sharded is not None:
            weights = self._sharded.weights()
            if self.args.should_save:
                safetensors.torch.save_file(weights, str(path))
        elif self.args.should_save:
            safetensors.torch.save_model(self._task, str(path))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(self.inner_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(cast("Any", self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._sharded is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_state(self.inner_optimizer(), torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
        cast("Any", self.lr_scheduler).load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint) / WEIGHTS)
        marker = json.loads((Path(resume_from_checkpoint) / COMPLETE).read_text(encoding="utf-8"))
        self._resumed_sums = marker["sums"]
        if self._spikes is not None and "spikes" in marker:
            self._spikes.load(marker["spikes"])

    def _load_weights(self, path: Path) -> None:
        # With several processes a CPU has a number ("cpu:1"), which safetensors does not know.
        device = "cpu" if self.args.device.type == "cpu" else str(self.args.device)
        safetensors.torch.load_model(self._task, str(path), device=device)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: every step seeds its own."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds its own."""

    def begin(self) -> None:
        """What comes before the first step of this try: the sums of a resumed run, or for a fresh one the optimiser's state to go on
        with and the dev measures of an untrained model."""
        self._sums_since = self.state.global_step
        if self._optimizer_from is not None and self.state.global_step == 0:
            load_optimizer(self.inner_optimizer(), self._task, self._optimizer_from)
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

    def load_finished(self, checkpoint: Path, *, optimizer: bool = False) -> None:
        """The weights (and the optimiser's state) of a checkpoint of the last step, instead of training."""
        self.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        if optimizer:
            state = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            super().create_optimizer().load_state_dict(state)
        self._load_best_weights()

    def _load_best_weights(self) -> None:
        best = self.state.best_global_step
        if self._load_best and best is not None and best != self.args.max_steps:
            self._load_weights(best_file(self._root, best))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self._sharded is None:
            self._load_best_weights()
        return output

    def save_optimizer(self, folder: Path) -> None:
        """Keep the optimiser's state by parameter name; with sharding all ranks help."""
        save_optimizer(self.inner_optimizer(), self._task, folder, write=self._context.rank == 0)

    # Sharding

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers has it, over this process's part of the parameters if they are sharded."""
        if self._shard and self._sharded is None:
            # Here, as a checkpoint's weights have been loaded by now and the optimiser does not exist yet.
            self._sharded = Sharded(self._task, self.args.device.type)
            self.model = self.model_wrapped = self._sharded
            self.is_distributed_loading_by_transformers = True  # neither DDP nor accelerate's own FSDP around it
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        prepare: Callable[[torch.optim.Optimizer], None] | None = getattr(self._task, "prepare_optimizer", None)
        if fresh and prepare is not None:
            prepare(optimizer)
        return optimizer

    def _no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self.accelerator.no_sync(model=model) if self._sharded is None else self._sharded.no_sync()

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """Around what uses the task outside a training step's forward pass."""
        return contextlib.nullcontext() if self._sharded is None else self._sharded.whole()

    def restore(self) -> None:
        """Put a sharded task together again, with the best weights if they are kept."""
        if self._sharded is not None:
            self._sharded.restore()
            self._sharded = None
            self._load_best_weights()

    def inner_optimizer(self) -> torch.optim.Optimizer:
        """torch's own optimiser, without accelerate's wrapper."""
        return cast("torch.optim.Optimizer", getattr(self.optimizer, "optimizer", self.optimizer))

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


def micro_batch_seed(seed: int, step: int, rank: int, position: int) -> int:
    """63 bits, for torch: independent for each micro-batch."""
    # One more, as numpy takes a last 0 for absent: position 0 would have the seed of the step.
    return int(np.random.SeedSequence([seed, step, rank, position + 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


__all__ = [
    "MicroBatch",
    "SimlmTrainer",
    "SpikeGuard",
    "StepBatches",
    "TrainingContext",
    "TrainingResult",
    "checkpoint_step",
    "micro_batch_seed",
    "mixed_precision",
    "newest_checkpoint",
    "num_training_steps",
    "save_optimizer",
    "step_seed",
    "train",
]
