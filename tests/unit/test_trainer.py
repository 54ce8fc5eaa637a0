"""The training loop on a tiny regression: curves, resuming after kills, checkpoints, losses that are not finite."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import math
import os
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
from simlm.training.trainer import newest_checkpoint, num_training_steps, step_seed, train

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

    def load(self, step: int, rank: int, num_ranks: int) -> list[dict[str, Any]]:
        if step == self.break_step:
            self.break_with()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
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


def plain_loop(num_steps: int = NUM_STEPS) -> tuple[Tiny, list[float]]:
    """The same training written out: AdamW, linear decay after 10% of warm-up, clipped gradients."""
    task, batches = Tiny(), Batches()
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


def test_load_best_without_a_dev_measure_is_refused(context: FakeContext) -> None:
    with pytest.raises(RecipeError, match="no dev measure"):
        run(Tiny(), context, settings=settings(load_best_model_at_end=True))


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


def test_a_log_cut_short_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "seconds": float(step), "kind": "train", "measures": {"loss": 1.0}} for step in (5, 10, 15)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "sec', encoding="utf-8")
    log = TrainingLog(path, resumed_step=10, write=True)
    assert [record["step"] for record in read_log(path)] == [5, 10]
    assert 10.0 <= log.seconds() < 11.0
    log.append(12, "dev", {"RR@10": 0.5})
    assert read_log(path)[-1]["measures"] == {"RR@10": 0.5}
