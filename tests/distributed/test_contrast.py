"""A contrast over 2 and 3 processes, whose shares of the step differ, has the loss and the gradient of one pass over everything."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from simlm.data.store import Store
from tests.unit.test_contrast import gradients, one_pass, relative_difference, seeded, task_of, two_passes

if TYPE_CHECKING:
    from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "cropping": {"objective": "cropping", "dropout": 0.2},
    "ict": {"objective": "ict", "dropout": 0.0},
    "cocondenser": {"objective": "cocondenser", "dropout": 0.0},
    "context": {"objective": "context", "dropout": 0.0},
}
NUM_PASSAGES, MICRO_BATCH_TOKENS = 5, 70  # one passage a micro-batch or two


def step(task: DistributedDataParallel, micro_batches: list[dict[str, Any]], rank: int, num_ranks: int) -> dict[str, float]:
    """As the trainer runs it."""
    task.zero_grad()
    with torch.no_grad():
        prepared = task.module.before_step(micro_batches, rank=rank, num_ranks=num_ranks, seed=0)
    sums: dict[str, float] = {}
    for place, micro_batch in enumerate(prepared):
        torch.manual_seed(micro_batch["dropout_seed"])
        with nullcontext() if place == len(prepared) - 1 else task.no_sync():
            outputs = task(**micro_batch)
            (outputs["loss"] * num_ranks).backward()
        for name, value in outputs.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums


def work(rank: int, num_ranks: int, store_path: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks)
    for name, case in CASES.items():
        run_case(name, case, Store.open(store_path), Path(folder), rank, num_ranks)
    # Before the group goes: a DDP module that outlives it ends the group's threads while it holds the GIL, which they may wait for.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_case(name: str, case: dict[str, Any], store: Store, folder: Path, rank: int, num_ranks: int) -> None:
    task = task_of(store, **case)
    task.train()
    parallel = DistributedDataParallel(task)
    micro_batches = seeded(task, store, NUM_PASSAGES, MICRO_BATCH_TOKENS, rank, num_ranks)
    # The second step fails under DDP if the first left out a parameter that requires a gradient.
    for _ in range(2):
        sums = step(parallel, micro_batches, rank, num_ranks)
    totals = {}
    for key in sorted(sums):
        total = torch.tensor(sums[key], dtype=torch.float64)
        torch.distributed.all_reduce(total)
        totals[key] = total.item()
    if rank == 0:
        torch.save({"sums": totals, "gradients": gradients(task)}, folder / f"{name}.pt")


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_make_the_loss_and_gradient_of_one(tiny_store: Store, tmp_path: Path, num_ranks: int, monkeypatch: Any) -> None:
    for variable, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setitem(os.environ, variable, value)
    spawn(work, args=(num_ranks, str(tiny_store.path), str(tmp_path)), nprocs=num_ranks)
    for name, case in CASES.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        task = task_of(tiny_store, **case)
        expected: dict[str, Tensor]
        if task.contrast is not None and not any(own.uses_head for _, own in task._all()):
            # One pass over the micro-batches of all processes, each with its own dropout.
            every = [seeded(task, tiny_store, NUM_PASSAGES, MICRO_BATCH_TOKENS, rank, num_ranks) for rank in range(num_ranks)]
            assert [sum(len(micro_batch["input_ids"]) for micro_batch in own) for own in every] == [
                2 * len(range(rank, NUM_PASSAGES, num_ranks)) for rank in range(num_ranks)
            ]
            losses = {"contrast_loss": one_pass(task, [micro_batch for own in every for micro_batch in own])}
            losses["loss"] = losses["contrast_loss"]
        else:
            losses = two_passes(task, seeded(task, tiny_store, NUM_PASSAGES, 10_000))
        assert found["sums"] == pytest.approx(losses, rel=1e-5), name
        expected = gradients(task)
        assert found["gradients"].keys() == expected.keys()
        # Sums in another order: the one-pass fp32 gradient is itself about 1e-6 from the one in fp64.
        assert relative_difference(found["gradients"], expected) < 5e-6, name
