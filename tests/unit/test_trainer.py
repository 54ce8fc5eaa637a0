"""The training loop on a tiny regression: curves, resuming after kills, checkpoints, losses that are not finite or leap, continuing."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from simlm.errors import DiskError, RecipeError, TrainingError
from simlm.progress import Progress
from simlm.recipe import TrainingSettings
from simlm.training.callbacks import TrainingLog, read_log
from simlm.training.optimizer_state import OPTIMIZER_FILE
from simlm.training.spikes import FIRST_STEPS, HALF_LIFE_STEPS, SpikeGuard, SpikeWatch
from simlm.training.trainer import micro_batch_seed, newest_checkpoint, num_training_steps, step_seed, train

NUM_STEPS = 23


class Tiny(nn.Module):
    """Two layers with dropout, a tied weight, and a mean squared error over 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)
        self.tied = nn.Linear(4, 8)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x)) + self.tied(x)
        loss = ((self.last(self.dropout(hidden)) - y) ** 2).sum() / 8 * scale
        return {"loss": loss, "double": 2 * loss.detach()}


@dataclass
class Batches:
    """8 rows a step in two micro-batches; `break_at` is called at the given step."""

    num_steps: int = NUM_STEPS
    break_step: int = -1
    break_with: Callable[[], None] = lambda: None
    scales: dict[int, float] | None = None
    first_step: int = 0
    """Data of this step come first."""

    def load(self, step: int, rank: int, num_ranks: int) -> list[dict[str, Any]]:
        if step == self.break_step:
            self.break_with()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.first_step + step))
        y = x.sum(dim=1, keepdim=True)
        scale = (self.scales or {}).get(step, 1.0)
        return [{"x": x[part], "y": y[part], "scale": scale} for part in (slice(0, 5), slice(5, 8))]


@dataclass
class FakeContext:
    work: Path
    seed: int = 3
    rank: int = 0
    num_ranks: int = 1
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))

    @property
    def resume(self) -> Path:
        return self.work / "resume"


def settings(**options: Any) -> TrainingSettings:
    return TrainingSettings(**({"learning_rate": 0.02, "logging_steps": 4, "save_steps": 5, "bf16": False, "use_cpu": True} | options))


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """accelerate collects garbage at each start; what the imports have left is not looked through again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def context(tmp_path: Path) -> FakeContext:
    torch.set_num_threads(1)
    (tmp_path / "work" / "resume").mkdir(parents=True)
    return FakeContext(tmp_path / "work")


def run(task: Tiny, context: FakeContext, batches: Batches | None = None, **options: Any) -> Any:
    chosen = options.pop("settings", settings())
    return train(task, batches or Batches(), settings=chosen, context=context, **options)


def losses(context: FakeContext) -> list[tuple[int, float]]:
    return [(line["step"], line["measures"]["loss"]) for line in read_log(context.work / "log.jsonl") if line["kind"] == "train"]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def plain_loop(num_steps: int = NUM_STEPS, skip: tuple[int, ...] = ()) -> tuple[Tiny, list[float]]:
    """The same training written out: AdamW, linear decay after 10% of warm-up, clipped gradients; steps in `skip` are not made."""
    task, batches = Tiny(), Batches(num_steps)
    decayed = [value for name, value in task.named_parameters() if not name.endswith("bias")]
    others = [value for name, value in task.named_parameters() if name.endswith("bias")]
    optimiser = torch.optim.AdamW([{"params": decayed}, {"params": others}], lr=0.02, weight_decay=0.0, fused=True)
    warmup = math.ceil(0.1 * num_steps)
    curve = []
    for step in range(num_steps):
        share = step / warmup if step < warmup else (num_steps - step) / (num_steps - warmup)
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * share
        torch.manual_seed(step_seed(3, step, 0))
        parts = [task(**batch)["loss"] for batch in batches.load(step, 0, 1)]
        for part in parts:
            part.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        if step not in skip:
            optimiser.step()
        optimiser.zero_grad()
        curve.append(sum(part.item() for part in parts))
    return task, curve


def test_training_is_the_loop_one_would_write(context: FakeContext) -> None:
    task = Tiny()
    result = run(task, context)
    expected, curve = plain_loop()
    for (name, left), right in zip(task.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=name)
    # Logged at the first step, every fourth and the last: means over the steps since the log before.
    bounds = [0, 1, 4, 8, 12, 16, 20, 23]
    means = [sum(curve[start:stop]) / (stop - start) for start, stop in itertools.pairwise(bounds)]
    assert [step for step, _ in losses(context)] == bounds[1:]
    assert [loss for _, loss in losses(context)] == pytest.approx(means, rel=1e-5)
    assert (result.num_steps, result.resumed_step, result.bf16) == (23, 0, False)
    assert result.loss == pytest.approx(means[-1], rel=1e-5)
    assert result.measures["double"] == pytest.approx(2 * result.loss, rel=1e-6)
    assert {"loss", "double", "learning_rate", "grad_norm"} <= result.measures.keys()


def test_the_task_is_left_as_it_came(context: FakeContext) -> None:
    task = Tiny()
    run(task, context, Batches(3), settings=settings(bf16=True))
    assert "forward" not in vars(task) and task.tied.weight is task.first.weight
    with torch.no_grad():
        assert task(torch.zeros(1, 4), torch.zeros(1, 1))["loss"].dtype == torch.float32


class StopError(Exception):
    pass


def stop() -> None:
    raise StopError


@pytest.mark.parametrize("step", [3, 6, 22])
def test_resuming_gives_the_same_weights_and_the_same_log(context: FakeContext, tmp_path: Path, step: int) -> None:
    with pytest.raises(StopError):
        run(Tiny(), context, Batches(break_step=step, break_with=stop), dev=lambda: {"RR@10": 0.5})
    task = Tiny()
    result = run(task, context, dev=lambda: {"RR@10": 0.5})
    assert result.resumed_step == step // 5 * 5
    other = FakeContext(tmp_path / "other")
    other.resume.mkdir(parents=True)
    whole = Tiny()
    expected = run(whole, other, dev=lambda: {"RR@10": 0.5})
    assert_same_weights(task, whole)
    kept = [{**line, "seconds": 0} for line in read_log(context.work / "log.jsonl")]
    assert kept == [{**line, "seconds": 0} for line in read_log(other.work / "log.jsonl")]
    assert (result.loss, result.dev_start, result.dev, result.best_step) == (
        expected.loss,
        expected.dev_start,
        expected.dev,
        expected.best_step,
    )


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.unit.test_trainer import Batches, FakeContext, Tiny, run
    run(Tiny(), FakeContext(Path({work!r})), Batches(break_step=12, break_with=lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_resuming_after_sigkill(context: FakeContext, tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT).format(root=str(Path(__file__).parents[2]), work=str(context.work))
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    task = Tiny()
    assert run(task, context).resumed_step == 10
    whole = FakeContext(tmp_path / "other")
    whole.resume.mkdir(parents=True)
    expected = Tiny()
    run(expected, whole)
    assert_same_weights(task, expected)
    assert losses(context) == losses(whole)


def test_a_finished_run_only_loads_its_weights(context: FakeContext) -> None:
    task, again = Tiny(), Tiny()
    first = run(task, context, dev=lambda: {"RR@10": 0.25}, main_dev_measure="RR@10")
    second = run(
        again, context, Batches(break_step=0, break_with=stop), dev=lambda: pytest.fail("measured again"), main_dev_measure="RR@10"
    )
    assert_same_weights(task, again)
    assert second.resumed_step == NUM_STEPS
    assert (second.loss, second.dev, second.best_step) == (first.loss, first.dev, first.best_step)


def test_partial_checkpoints_do_not_count(context: FakeContext) -> None:
    with pytest.raises(StopError):
        run(Tiny(), context, Batches(break_step=17, break_with=stop))
    folder = context.resume / "checkpoints"
    assert sorted(entry.name for entry in folder.iterdir()) == ["checkpoint-10", "checkpoint-15"]
    (folder / "checkpoint-15" / "complete").unlink()
    half = folder / "checkpoint-20"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(folder) == folder / "checkpoint-10"
    assert run(Tiny(), context, Batches(break_step=-1)).resumed_step == 10


def test_a_truncated_file_makes_a_checkpoint_partial(context: FakeContext) -> None:
    with pytest.raises(StopError):
        run(Tiny(), context, Batches(break_step=12, break_with=stop))
    newest = context.resume / "checkpoints" / "checkpoint-10"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1])
    assert newest_checkpoint(newest.parent) == newest.parent / "checkpoint-5"


def test_checkpoints_hold_no_pickled_settings(context: FakeContext) -> None:
    run(Tiny(), context, Batches(5))
    names = {file.name for file in (context.resume / "checkpoints" / "checkpoint-5").iterdir()}
    assert names == {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "complete"}


@pytest.mark.parametrize("step", [0, 7])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(context: FakeContext, step: int) -> None:
    with pytest.raises(TrainingError, match=rf"the loss of step {step + 1} is not a finite number") as raised:
        run(Tiny(), context, Batches(scales={step: math.nan}))
    good = newest_checkpoint(context.resume / "checkpoints")
    assert (good is None) == (step < 5)
    assert ("no checkpoint" if good is None else "checkpoint-5") in str(raised.value)
    if good is not None:
        assert all(weight.isfinite().all() for weight in safetensors.torch.load_file(good / "model.safetensors").values())


def test_a_gradient_that_is_not_finite_stops(context: FakeContext) -> None:
    class Sharp(Tiny):
        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            # Finite value, infinite slope: sqrt at 0.
            return {"loss": super().forward(x, y)["loss"] + (self.last.bias * 0.0).abs().sqrt().sum()}

    with pytest.raises(TrainingError, match="the gradient of step 1 is not"):
        run(Sharp(), context)


def test_a_full_disk_leaves_the_last_checkpoint(context: FakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save
    calls = []

    def save_until_full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(DiskError, match="the disk is full"):
        run(Tiny(), context)
    assert [folder.name for folder in (context.resume / "checkpoints").iterdir()] == ["checkpoint-5"]
    monkeypatch.undo()
    assert run(Tiny(), context).resumed_step == 5


def test_dev_measures_are_taken_before_while_and_after(context: FakeContext) -> None:
    task = Tiny()
    seen: list[bool] = []

    def dev() -> dict[str, float]:
        seen.append(task.training or torch.is_grad_enabled())
        return {"RR@10": len(seen) / 10}

    result = run(task, context, dev=dev, main_dev_measure="RR@10", settings=settings(eval_steps=10))
    lines = [line for line in read_log(context.work / "log.jsonl") if line["kind"] == "dev"]
    assert [(line["step"], line["measures"]) for line in lines] == [
        (0, {"RR@10": 0.1}),
        (10, {"RR@10": 0.2}),
        (20, {"RR@10": 0.3}),
        (23, {"RR@10": 0.4}),
    ]
    assert (result.dev_start, result.dev, result.best_step) == ({"RR@10": 0.1}, {"RR@10": 0.4}, 23)
    assert seen == [False] * 4  # in eval mode, without gradient


@pytest.mark.parametrize("break_step", [-1, 17])
def test_load_best_model_at_end(context: FakeContext, tmp_path: Path, break_step: int) -> None:
    task = Tiny()
    current = {"task": task}
    weights: dict[float, Tensor] = {}
    scores = iter([0.1, 0.7, 0.3, 0.2]) if break_step < 0 else None

    def dev() -> dict[str, float]:
        # Best at step 10, whatever was killed: a function of the weights seen.
        weight = current["task"].first.weight.detach().clone()
        value = next(scores) if scores is not None else table.setdefault(round(float(weight.sum()), 5), 0.0)
        weights[value] = weight
        return {"RR@10": value}

    table: dict[float, float] = {}
    chosen = settings(eval_steps=10, load_best_model_at_end=True, save_total_limit=1)
    if break_step >= 0:
        probe = FakeContext(tmp_path / "probe")
        probe.resume.mkdir(parents=True)
        sums: list[float] = []
        run(
            current["task"],
            probe,
            dev=lambda: sums.append(round(float(current["task"].first.weight.sum()), 5)) or {"RR@10": 0.0},
            settings=settings(eval_steps=10),
        )
        table.update(zip(sums, [0.1, 0.7, 0.3, 0.2], strict=True))
        current["task"] = Tiny()
        with pytest.raises(StopError):
            run(
                current["task"],
                context,
                Batches(break_step=break_step, break_with=stop),
                dev=dev,
                main_dev_measure="RR@10",
                settings=chosen,
            )
        current["task"] = Tiny()
    result = run(current["task"], context, dev=dev, main_dev_measure="RR@10", settings=chosen)
    assert result.best_step == 10
    assert torch.equal(current["task"].first.weight, weights[0.7])
    assert result.dev == {"RR@10": 0.2}
    assert [file.name for file in (context.resume / "checkpoints").glob("best-*")] == ["best-10.safetensors"]


def test_keep_best_is_the_same_without_the_option(context: FakeContext) -> None:
    task = Tiny()
    weights: list[Tensor] = []

    def dev() -> dict[str, float]:
        weights.append(task.first.weight.detach().clone())
        return {"RR@10": {1: 0.1, 2: 0.7, 3: 0.3, 4: 0.2}[len(weights)]}

    result = run(task, context, dev=dev, main_dev_measure="RR@10", settings=settings(eval_steps=10), keep_best=True)
    assert result.best_step == 10
    assert torch.equal(task.first.weight, weights[1]) and not torch.equal(weights[1], weights[3])


@pytest.mark.parametrize("options", [{"settings": settings(load_best_model_at_end=True)}, {"keep_best": True}])
def test_load_best_without_a_dev_measure_is_refused(context: FakeContext, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no dev measure"):
        run(Tiny(), context, **options)


@pytest.mark.parametrize("options", [{"lr_scheduler_type": "crooked"}, {"optim": "nothing"}, {"bf16": True, "fp16": True}])
def test_options_that_transformers_refuses(context: FakeContext, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="training options"):
        run(Tiny(), context, settings=settings(**options))


def test_other_options_reach_transformers(context: FakeContext) -> None:
    result = run(Tiny(), context, Batches(4), settings=settings(lr_scheduler_type="constant", optim="sgd", dataloader_num_workers=0))
    assert result.measures["learning_rate"] == 0.02


def test_num_training_steps() -> None:
    assert num_training_steps(settings(num_train_epochs=3.0), 64, 64) == 3
    assert num_training_steps(settings(num_train_epochs=3), 65, 64) == 4
    assert num_training_steps(settings(num_train_epochs=0.1), 30, 10) == 1
    assert num_training_steps(settings(num_train_epochs=0.1, max_steps=9), 10_000, 2) == 9


def test_seeds_differ_by_step_and_rank() -> None:
    assert len({step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}) == 27
    assert 0 <= step_seed(1, 2, 3) < 2**63


def test_seeds_of_micro_batches_differ_from_each_other_and_from_those_of_steps() -> None:
    seeds = {micro_batch_seed(1, step, rank, position) for step in range(3) for rank in range(3) for position in range(3)}
    assert len(seeds | {step_seed(1, step, rank) for step in range(3) for rank in range(3)}) == 36


# Losses that need the embeddings of a whole step


class Whole(Tiny):
    """The loss (sum over the step's rows of (hidden mean - mean over the step)^2) needs all rows; with gradient caching or without."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = []

    def vectors(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.first(x)) + self.tied(x))

    def loss(self, vectors: Tensor) -> Tensor:
        return ((vectors - vectors.mean(dim=0)) ** 2).sum() + (self.last.weight.detach() * vectors).sum()

    def before_step(self, micro_batches: list[dict[str, Any]], *, rank: int, num_ranks: int, seed: int) -> list[dict[str, Any]]:
        assert (rank, num_ranks, seed) == (0, 1, 3)
        assert self.training and not torch.is_grad_enabled()
        parts = []
        for micro_batch in micro_batches:
            torch.manual_seed(micro_batch["dropout_seed"])
            parts.append(self.vectors(micro_batch["x"]))
        with torch.enable_grad():
            leaf = torch.cat(parts).float().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(leaf), leaf)
        self.seen.append(parts)
        pieces = torch.split(gradient, [len(part) for part in parts])
        return [micro_batch | {"gradient": piece} for micro_batch, piece in zip(micro_batches, pieces, strict=True)]

    def forward(self, x: Tensor, y: Tensor, gradient: Tensor, dropout_seed: int, scale: float = 1.0) -> dict[str, Tensor]:
        vectors = self.vectors(x)
        self.seen[-1].append(vectors.detach())
        return {"loss": (vectors * gradient).sum() + 0 * self.last(vectors).sum()}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_task_may_see_the_whole_step_first_with_the_same_dropout(context: FakeContext, bf16: bool) -> None:
    task = Whole()
    run(
        task,
        context,
        Batches(3),
        settings=settings(optim="sgd", learning_rate=0.5, warmup_steps=0.0, lr_scheduler_type="constant", bf16=bf16),
    )
    assert len(task.seen) == 3
    for first_a, first_b, second_a, second_b in task.seen:
        assert torch.equal(first_a, second_a) and torch.equal(first_b, second_b)
        assert first_a.dtype == (torch.bfloat16 if bf16 else torch.float32)
    if bf16:
        return
    # The gradient is that of the whole step in one piece.
    expected, batches = Whole(), Batches(3)
    optimiser = torch.optim.SGD(expected.parameters(), lr=0.5)
    for step in range(3):
        parts = []
        for position, batch in enumerate(batches.load(step, 0, 1)):
            torch.manual_seed(micro_batch_seed(3, step, 0, position))
            parts.append(expected.vectors(batch["x"]))
        expected.loss(torch.cat(parts)).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert not torch.equal(expected.first.weight, Whole().first.weight)
    torch.testing.assert_close(task.first.weight, expected.first.weight)


# Loss spikes


@dataclass
class Speaking(Progress):
    """Keeps what is said."""

    said: list[str] = field(default_factory=list)
    quiet: bool = True

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_small_loss_may_double() -> None:
    for least, expected in ((0.0, 1.0), (1.0, 0.0)):
        watch = SpikeWatch(SpikeGuard(2.0, 3, least), torch.device("cpu"))
        for step in range(FIRST_STEPS):
            watch.judge(step + 1, torch.tensor(0.05))
        assert watch.judge(21, torch.tensor(0.2)).item() == expected
        assert watch.judge(22, torch.tensor(1.2)).item() == 1.0


def test_the_running_mean_of_the_guard() -> None:
    watch = SpikeWatch(SpikeGuard(2.0, 3), torch.device("cpu"))
    losses = [4.0 + 0.1 * step for step in range(FIRST_STEPS)]
    losses[5] = 100.0  # a leap among the first steps counts
    assert [watch.judge(step, torch.tensor(loss)).item() for step, loss in enumerate(losses, start=1)] == [0.0] * FIRST_STEPS
    decay = 0.5 ** (1 / HALF_LIFE_STEPS)
    weights = [decay ** (FIRST_STEPS - 1 - place) for place in range(FIRST_STEPS)]
    mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    later = [2.001 * mean, math.nan, -math.inf, 1.999 * mean, math.inf]
    assert [watch.judge(21 + place, torch.tensor(loss)).item() for place, loss in enumerate(later)] == [1.0, 1.0, 1.0, 0.0, 1.0]
    skipped = watch.report()
    assert [(one.step, one.in_a_row) for one in skipped] == [(21, 1), (22, 2), (23, 3), (25, 1)]
    assert [one.mean for one in skipped[:3]] == pytest.approx([mean] * 3, rel=1e-5)
    assert skipped[3].mean > mean
    assert watch.report() == []


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_spike_moves_nothing_and_training_goes_on(context: FakeContext, optim: str) -> None:
    context.progress = Speaking()
    spikes = {3: math.nan, 27: 1e4, 28: math.inf, 33: 1e4}
    task = Tiny()
    chosen = settings(optim=optim, weight_decay=0.0, logging_steps=1)
    result = run(task, context, Batches(40, scales=spikes), settings=chosen, spikes=SpikeGuard(20.0, 3))
    expected, curve = plain_loop(40, skip=tuple(spikes))
    for (name, left), right in zip(task.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=name)
    lines = {line["step"]: line["measures"] for line in read_log(context.work / "log.jsonl")}
    assert {step - 1 for step, measures in lines.items() if measures["skipped_steps"]} == set(spikes)
    assert [measures["loss"] for measures in lines.values() if "loss" in measures] == pytest.approx(
        [loss for step, loss in enumerate(curve) if step not in spikes], rel=1e-4
    )
    assert all(math.isfinite(value) for measures in lines.values() for value in measures.values())
    assert [message.partition(",")[0] for message in context.progress.said] == [f"step {step + 1}: skipped" for step in spikes]
    assert "not a finite number" in context.progress.said[0] and "more than 20 times the running mean" in context.progress.said[1]
    assert result.measures["skipped_steps"] == 0


def test_losses_are_means_over_the_steps_that_were_made(context: FakeContext) -> None:
    run(Tiny(), context, Batches(40, scales={28: math.nan, 29: 1e4}), spikes=SpikeGuard(20.0, 3))
    _, curve = plain_loop(40, skip=(28, 29))
    line = next(line for line in read_log(context.work / "log.jsonl") if line["step"] == 32)
    assert line["measures"]["skipped_steps"] == 2
    assert line["measures"]["loss"] == pytest.approx((curve[30] + curve[31]) / 2, rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_several_spikes_in_a_row_stop(context: FakeContext, optim: str) -> None:
    scales = dict.fromkeys((23, 24, 25), 1e9)
    with pytest.raises(TrainingError, match=r"step 26 was the last of 3 skipped in a row: its loss .* more than 20 times") as raised:
        run(Tiny(), context, Batches(30, scales=scales), settings=settings(optim=optim, learning_rate=0.002), spikes=SpikeGuard(20.0, 3))
    assert "checkpoint-25" in str(raised.value)
    again = FakeContext(context.work)
    with pytest.raises(TrainingError, match="step 26 was the last of 3"):  # the count goes on from the checkpoint
        run(Tiny(), again, Batches(30, scales=scales), settings=settings(optim=optim, learning_rate=0.002), spikes=SpikeGuard(20.0, 3))


def test_a_guarded_run_resumes_bit_for_bit(context: FakeContext, tmp_path: Path) -> None:
    guard, scales = SpikeGuard(1.5, 30), {2: math.nan, 24: 1e4, 25: 1e4, 35: 1e4}
    with pytest.raises(StopError):
        run(Tiny(), context, Batches(40, break_step=27, break_with=stop, scales=scales), spikes=guard)
    task = Tiny()
    assert run(task, context, Batches(40, scales=scales), spikes=guard).resumed_step == 25
    other = FakeContext(tmp_path / "other")
    other.resume.mkdir(parents=True)
    whole = Tiny()
    run(whole, other, Batches(40, scales=scales), spikes=guard)
    assert_same_weights(task, whole)
    lines = [{**line, "seconds": 0} for line in read_log(other.work / "log.jsonl")]
    assert [{**line, "seconds": 0} for line in read_log(context.work / "log.jsonl")] == lines
    # A guard that had forgotten its mean would not judge before 20 more steps.
    assert sum(line["measures"]["skipped_steps"] for line in lines if line["step"] > 28) > 0
    markers = [
        json.loads((one.resume / "checkpoints" / "checkpoint-40" / "complete").read_text(encoding="utf-8")) for one in (context, other)
    ]
    assert markers[0]["spikes"] == markers[1]["spikes"]


# Continuing with the optimiser


CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0.0}


class NoDropout(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.unused = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_continuing_takes_the_steps_that_an_uninterrupted_run_takes(context: FakeContext, tmp_path: Path, optim: str) -> None:
    chosen = settings(optim=optim, weight_decay=0.1, **CONSTANT)
    contexts = [FakeContext(tmp_path / name) for name in ("whole", "second", "fresh")]
    for other in contexts:
        other.resume.mkdir(parents=True)
    whole, task, fresh = NoDropout(), NoDropout(), NoDropout()
    run(whole, contexts[0], Batches(12), settings=chosen)
    run(task, context, Batches(7), settings=chosen, keep_optimizer_in=context.work)
    fresh.load_state_dict(task.state_dict())
    run(task, contexts[1], Batches(5, first_step=7), settings=chosen, optimizer_from=context.work)
    assert_same_weights(task, whole)
    run(fresh, contexts[2], Batches(5, first_step=7), settings=chosen)
    assert not torch.allclose(fresh.first.weight, whole.first.weight, atol=1e-4)


def test_the_state_is_kept_by_name_without_pickle_and_also_by_a_finished_run(context: FakeContext, tmp_path: Path) -> None:
    run(NoDropout(), context, Batches(4), settings=settings(**CONSTANT), keep_optimizer_in=context.work)
    path = context.work / OPTIMIZER_FILE
    kept = safetensors.torch.load_file(path)
    names = {name for name, _ in NoDropout().named_parameters()}
    assert set(kept) == {f"{part}.{name}" for part in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert kept["step.first.weight"] == 4 and kept["step.unused"] == 0 and kept["exp_avg.first.weight"].abs().sum() > 0
    path.unlink()
    run(NoDropout(), context, Batches(4), settings=settings(**CONSTANT), keep_optimizer_in=context.work)
    again = safetensors.torch.load_file(path)
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_a_resumed_run_goes_on_from_its_checkpoint_not_from_the_earlier_optimizer(context: FakeContext, tmp_path: Path) -> None:
    first, whole = FakeContext(tmp_path / "first"), FakeContext(tmp_path / "whole")
    for other in (first, whole):
        other.resume.mkdir(parents=True)
    run(NoDropout(), first, Batches(4), keep_optimizer_in=first.work)
    with pytest.raises(StopError):
        run(NoDropout(), context, Batches(break_step=7, break_with=stop), optimizer_from=first.work)
    task, expected = NoDropout(), NoDropout()
    assert run(task, context, optimizer_from=first.work).resumed_step == 5
    run(expected, whole, optimizer_from=first.work)
    assert_same_weights(task, expected)


def test_an_optimiser_state_of_other_parameters_is_refused(context: FakeContext, tmp_path: Path) -> None:
    class Joint(NoDropout):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Linear(2, 2)

    joint = FakeContext(tmp_path / "joint")
    joint.resume.mkdir(parents=True)
    run(NoDropout(), context, Batches(2), keep_optimizer_in=context.work)
    run(Joint(), joint, Batches(2), keep_optimizer_in=joint.work)
    shutil.rmtree(context.resume)
    context.resume.mkdir()
    with pytest.raises(RecipeError, match=r"no state for the parameter 'generator.weight'.*joint generator cannot go on"):
        run(Joint(), context, optimizer_from=context.work)
    with pytest.raises(RecipeError, match=r"holds the state of the parameter 'generator.bias', which this run does not train"):
        run(NoDropout(), context, optimizer_from=joint.work)
    wider = NoDropout()
    wider.unused = nn.Parameter(torch.ones(4))
    with pytest.raises(RecipeError, match=r"'unused' has shape \(3,\), \(4,\) was expected"):
        run(wider, context, optimizer_from=context.work)
    (tmp_path / OPTIMIZER_FILE).write_bytes(b"no safetensors")
    with pytest.raises(RecipeError, match="not readable"):
        run(wider, context, optimizer_from=tmp_path)


def test_without_a_kept_state_the_optimiser_starts_fresh_and_says_so(context: FakeContext, tmp_path: Path) -> None:
    context.progress = Speaking()
    task, other = NoDropout(), FakeContext(tmp_path / "other")
    other.resume.mkdir(parents=True)
    run(task, context, Batches(2), settings=settings(optim="sgd"), optimizer_from=tmp_path)
    assert context.progress.said == [f"train: {tmp_path} keeps no optimizer.safetensors, the optimiser starts fresh"]
    expected = NoDropout()
    run(expected, other, Batches(2), settings=settings(optim="sgd"))
    assert_same_weights(task, expected)


def test_another_optimiser_cannot_be_kept(context: FakeContext) -> None:
    with pytest.raises(RecipeError, match=r"training\.optim is 'sgd', but keeping the optimiser's state works with AdamW only"):
        run(Tiny(), context, Batches(break_step=0, break_with=stop), settings=settings(optim="sgd"), keep_optimizer_in=context.work)


def test_a_log_cut_short_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "seconds": float(step), "kind": "train", "measures": {"loss": 1.0}} for step in (5, 10, 15)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "sec', encoding="utf-8")
    log = TrainingLog(path, resumed_step=10, write=True)
    assert [record["step"] for record in read_log(path)] == [5, 10]
    assert 10.0 <= log.seconds() < 11.0
    log.append(12, "dev", {"RR@10": 0.5})
    assert read_log(path)[-1]["measures"] == {"RR@10": 0.5}
