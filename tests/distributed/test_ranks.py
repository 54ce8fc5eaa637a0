"""N processes with B/N queries each make the loss, the gradient and the trained weights of one process with B queries."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from simlm.data.store import Store
from simlm.recipe import DistillSettings, RerankerSettings, RetrieverSettings, TrainingSettings
from simlm.training.contrastive import ContrastiveBatches, ContrastiveTask
from simlm.training.reranking import ListBatches, ListwiseTask
from simlm.training.trainer import train
from tests.golden.test_finetuning_steps import ToyEncoder, make_groups
from tests.unit.test_trainer import FakeContext

KINDS = ("query_to_passages", "all_pairs", "learned", "distill", "listwise")
SHARDED = ("learned",)
"""Kinds that several processes train with training.fsdp."""


def make_task(kind: Any, store: Store, rank: int, num_ranks: int) -> tuple[nn.Module, nn.Module, Any]:
    """Model, task and four steps of four queries; memory is bounded so that every step has pieces."""
    shared: dict[str, Any] = {"queries_per_step": 4, "group_size": 3, "micro_batch_tokens": 100}
    groups = make_groups(store, 3, num_ranks=num_ranks)
    if kind == "listwise":
        settings = RerankerSettings(train_hardest=2, rdrop_weight=0.0, **shared)
        model = ToyEncoder(1)
        return model, ListwiseTask(model, settings), ListBatches(store, groups, settings, 4)
    if kind == "learned":
        chosen = RetrieverSettings(temperature_mode="learned", temperature_learning_rate=0.05, **shared)
    else:
        chosen = DistillSettings(**shared) if kind == "distill" else RetrieverSettings(contrast=kind, **shared)
    model = ToyEncoder(6)
    return model, ContrastiveTask(model, chosen, rank=rank, num_ranks=num_ranks), ContrastiveBatches(store, groups, chosen, 4)


def train_all(store: Store, folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Train each kind; {kind: log lines}, weights in files."""
    torch.set_num_threads(1)
    # SGD: its steps are proportional to the gradient, which AdamW would hide.
    options: dict[str, Any] = {"learning_rate": 0.5, "max_grad_norm": 1e9, "warmup_steps": 0.0, "bf16": False, "use_cpu": True}
    options |= {"logging_steps": 1, "optim": "sgd"}
    logs = {}
    for kind in KINDS:
        work = folder / kind
        (work / "resume").mkdir(parents=True, exist_ok=True)
        model, task, batches = make_task(kind, store, rank, num_ranks)
        context = FakeContext(work, rank=rank, num_ranks=num_ranks)
        settings = TrainingSettings(**options, fsdp=kind in SHARDED and num_ranks > 1)
        result = train(task, batches, settings=settings, context=context, dev=lambda model=model: {"sum": float(model.layer.weight.sum())})
        logs[kind] = {"loss": result.loss, "accuracy": result.measures["accuracy"], "dev": result.dev}
        if kind == "learned":
            assert task.facts()["temperature"] != pytest.approx(0.02, rel=0.01)
            logs[kind]["temperature"] = task.facts()["temperature"]
        if rank == 0:
            safetensors.torch.save_file(model.state_dict(), work / "model.safetensors")
    (folder / f"logs-{rank}.json").write_text(json.dumps(logs), encoding="utf-8")
    return logs


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from simlm.data.store import Store
from simlm.runtime import join_processes
from tests.distributed.test_ranks import train_all
ranks = join_processes()
train_all(Store.open(sys.argv[1]), Path(sys.argv[2]), ranks.rank, ranks.num_ranks)
"""


def launch(store: Store, folder: Path, num_ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-c", SCRIPT, str(store.path), str(folder), str(Path(__file__).parents[2])]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


@pytest.mark.parametrize("num_ranks", [2])
def test_the_number_of_processes_changes_nothing(tiny_store: Store, tmp_path: Path, num_ranks: int) -> None:
    alone = train_all(tiny_store, tmp_path / "one", 0, 1)
    (tmp_path / "many").mkdir()
    launch(tiny_store, tmp_path / "many", num_ranks)
    for rank in range(num_ranks):
        together = json.loads((tmp_path / "many" / f"logs-{rank}.json").read_text(encoding="utf-8"))
        for kind in KINDS:
            assert together[kind]["loss"] == pytest.approx(alone[kind]["loss"], rel=1e-5), kind
            assert together[kind]["accuracy"] == pytest.approx(alone[kind]["accuracy"], abs=1e-6), kind
            assert together[kind]["dev"]["sum"] == pytest.approx(alone[kind]["dev"]["sum"], abs=1e-4), kind
        assert together["learned"]["temperature"] == pytest.approx(alone["learned"]["temperature"], rel=1e-6)
    for kind in KINDS:
        start = make_task(kind, tiny_store, 0, 1)[0].state_dict()
        one, many = (safetensors.torch.load_file(tmp_path / folder / kind / "model.safetensors") for folder in ("one", "many"))
        for name, weight in one.items():
            moved = (weight - start[name]).norm()
            # The bias of a listwise model moves nothing: a softmax does not see what it adds to every score.
            assert moved > 0 or (kind, name) == ("listwise", "layer.bias"), (kind, name)
            assert (weight - many[name]).norm() <= 1e-5 * moved + 1e-6, (kind, name)
