"""training.fsdp at two processes: the weights, curve, dev measures, checkpoints and kept optimiser of one process without it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from simlm.errors import RecipeError
from simlm.training.callbacks import read_log
from simlm.training.optimizer_state import OPTIMIZER_FILE
from simlm.training.spikes import SpikeGuard
from simlm.training.trainer import train
from tests.unit.test_trainer import Batches, FakeContext, NoDropout, StopError, settings, stop

NUM_STEPS, BEST_STEP = 12, 4


class Task(NoDropout):
    """Has a tied weight, looks at the whole step first (with its parameters, to no end), and refreshes a frozen part from a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 1).requires_grad_(False)

    def forward(self, **micro_batch: Any) -> dict[str, torch.Tensor]:
        if self.training:
            with torch.no_grad():
                self.frozen.weight.copy_(self.first.weight[:1])
        return super().forward(**micro_batch)

    def before_step(self, micro_batches: list[dict[str, Any]], *, rank: int, num_ranks: int, seed: int) -> list[dict[str, Any]]:
        mean = sum(self.frozen(micro_batch["x"]).sum() * self.first.weight.sum() for micro_batch in micro_batches)
        assert not isinstance(mean, DTensor) and math.isfinite(mean)
        return [{name: value for name, value in micro_batch.items() if name != "dropout_seed"} for micro_batch in micro_batches]


@dataclass
class Shared(Batches):
    """Rank 0 has two micro-batches, the others one."""

    def load(self, step: int, rank: int, num_ranks: int) -> list[dict[str, Any]]:
        whole = super().load(step, 0, 1)
        if num_ranks == 1:
            return whole
        own = {name: torch.cat([batch[name] for batch in whole])[rank::num_ranks] for name in ("x", "y")} | {"scale": whole[0]["scale"]}
        cuts = (slice(0, 1), slice(1, None)) if rank == 0 else (slice(None),)
        return [own | {"x": own["x"][cut], "y": own["y"][cut]} for cut in cuts]


def run(work: Path, rank: int = 0, num_ranks: int = 1, break_step: int = -1) -> Task:
    """Twelve steps with everything the trainer has; one leap that is skipped."""
    (work / "resume").mkdir(parents=True, exist_ok=True)
    task = Task()
    seen: list[float] = []

    def dev() -> dict[str, float]:
        assert not any(isinstance(parameter, DTensor) for parameter in task.parameters())
        seen.append(float(task(x=torch.ones(2, 4), y=torch.zeros(2, 1))["loss"]))
        return {"value": seen[-1]}

    def best_at_four() -> dict[str, float]:
        value = dev()["value"]
        step = trained_steps(work)
        return {"value": value, "closeness": -abs(step - BEST_STEP)}

    train(
        task,
        Shared(NUM_STEPS, break_step, stop, scales={2: math.nan}),
        settings=settings(eval_steps=4, save_steps=5, logging_steps=1, fsdp=num_ranks > 1, weight_decay=0.1),
        context=FakeContext(work, rank=rank, num_ranks=num_ranks),
        dev=best_at_four,
        main_dev_measure="closeness",
        keep_best=True,
        spikes=SpikeGuard(1e6, 3),
        keep_optimizer_in=work,
    )
    return task


def trained_steps(work: Path) -> int:
    return max((line["step"] for line in read_log(work / "log.jsonl") if line["kind"] == "train"), default=0)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch, safetensors.torch
from simlm.runtime import join_processes
from tests.distributed.test_sharded import Task, run
from tests.unit.test_trainer import StopError
torch.set_num_threads(1)
ranks = join_processes()
folder = Path(sys.argv[1])
for name, break_step in (("whole", -1), ("resumed", -1), ("broken", 7)):
    try:
        task = run(folder / name, ranks.rank, ranks.num_ranks, break_step)
    except StopError:
        assert name == "broken"
        continue
    assert type(task) is Task and task.tied.weight is task.first.weight
    assert not task.frozen.weight.requires_grad and task.first.weight.requires_grad
    safetensors.torch.save_model(task, folder / f"{name}-{ranks.rank}.safetensors")
"""


def test_sharded_training_is_the_training_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    expected = run(tmp_path / "alone")
    with pytest.raises(StopError):
        run(tmp_path / "resumed", break_step=7)  # by one process; two shall go on
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(tmp_path), str(Path(__file__).parents[2])]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    again = run(tmp_path / "broken")  # by two sharded processes; one goes on

    logs = {name: read_log(tmp_path / name / "log.jsonl") for name in ("alone", "whole", "resumed", "broken")}
    assert [line["step"] for line in logs["alone"] if line["kind"] == "dev"] == [0, 4, 8, 12]
    for name in ("whole", "resumed", "broken"):
        for line, other in zip(logs[name], logs["alone"], strict=True):
            assert (line["step"], line["kind"]) == (other["step"], other["kind"]), name
            assert line["measures"] == pytest.approx(other["measures"], rel=1e-4), (name, line["step"])
    assert {line["step"] for line in logs["whole"] if line["measures"].get("skipped_steps")} == {3}

    assert not torch.equal(expected.first.weight, Task().first.weight)
    tasks = {"broken": again}
    for name in ("whole", "resumed"):
        for rank in (0, 1):
            safetensors.torch.load_model(tasks.setdefault(f"{name}-{rank}", Task()), tmp_path / f"{name}-{rank}.safetensors")
    optimizer = safetensors.torch.load_file(tmp_path / "alone" / OPTIMIZER_FILE)
    for name, task in tasks.items():
        for (parameter, value), other in zip(task.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=f"{name} {parameter}")
        kept = safetensors.torch.load_file(tmp_path / name.partition("-")[0] / OPTIMIZER_FILE)
        assert kept.keys() == optimizer.keys()
        for parameter, value in kept.items():
            torch.testing.assert_close(value, optimizer[parameter], rtol=1e-3, atol=1e-5, msg=f"{name} {parameter}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": "full_shard"}, "training.fsdp is 'full_shard', true or false was expected"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "training.fsdp_config: the trainer shards the whole task"),
        ({"fsdp": True, "fp16": True}, "training.fsdp does not go together with training.fp16"),
    ],
)
def test_what_sharding_cannot_do_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    context = FakeContext(tmp_path)
    context.resume.mkdir()
    with pytest.raises(RecipeError, match=message):
        train(Task(), Shared(2), settings=settings(**options), context=context)


def test_one_process_has_nothing_to_share(tmp_path: Path) -> None:
    context = FakeContext(tmp_path)
    context.resume.mkdir()
    assert train(Task(), Shared(2), settings=settings(fsdp=True), context=context).num_steps == 2
