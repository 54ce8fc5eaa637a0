"""Pre-training under torchrun: 2 and 3 processes have the loss curve of one, and any number of them goes on where 2 were killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from simlm.cli import app
from simlm.pipeline import LOCK
from simlm.training.callbacks import read_log
from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"
NUM_STEPS, HALT_STEP, SAVE_STEPS = 8, 7, 4
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

HALTING = f"""
    import os, sys, time
    from pathlib import Path
    from simlm.cli import main
    from simlm.objectives.steps import PassageSteps

    Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
    load = PassageSteps.load

    def halting(self, step, rank, num_ranks):
        if step == {HALT_STEP}:
            time.sleep(600)
        return load(self, step, rank, num_ranks)

    PassageSteps.load = halting
    main()
"""
"""`simlm`, standing still before its last step, so that the kill falls between a checkpoint and the end."""


def arguments(data: Path, output: Path) -> list[str]:
    changes = [
        *TINY,
        f"data.path={json.dumps(str(data))}",
        f"output={json.dumps(str(output))}",
        # fp32 without dropout: what differs between numbers of processes is the order of sums, to be seen through no noise.
        "generator.training.bf16=false",
        "pretrain.training.bf16=false",
        "pretrain.dropout=0.0",
        "pretrain.passages_per_step=12",
        "pretrain.micro_batch_tokens=150",
        f"pretrain.training.max_steps={NUM_STEPS}",
        f"pretrain.training.save_steps={SAVE_STEPS}",
        "pretrain.training.logging_steps=1",
        "pretrain.training.eval_steps=4",
    ]
    return ["pretrain", str(RECIPE), *(part for change in changes for part in ("--set", change))]


def torchrun(num_ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def pretrain(data: Path, output: Path, num_ranks: int) -> str:
    """Run to the end (alone in this process, which has loaded everything already); what was said."""
    if num_ranks == 1:
        alone = CliRunner().invoke(app, arguments(data, output), catch_exceptions=False)
        assert alone.exit_code == 0, alone.output
        return alone.output
    command = [*torchrun(num_ranks), "-m", "simlm", *arguments(data, output)]
    done = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def kill_at_halt(data: Path, output: Path, num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    """SIGKILL torchrun and all its processes once they stand still; the log up to there."""
    folder.mkdir()
    script = folder / "halting.py"
    script.write_text(textwrap.dedent(HALTING), encoding="utf-8")
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*torchrun(num_ranks), str(script), *arguments(data, output)],
            env=ENVIRONMENT | {"PIDS": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    work = output / ".pretrained.work"
    limit = time.monotonic() + 300
    try:
        while not (lines := read_log(work / "log.jsonl")) or lines[-1]["step"] < HALT_STEP:
            assert process.poll() is None and time.monotonic() < limit, (folder / "stderr").read_text(encoding="utf-8")[-3000:]
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        # torchrun gives each of its processes a session of its own.
        for rank in range(num_ranks):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(int((folder / str(rank)).read_text(encoding="utf-8")), signal.SIGKILL)
        process.wait()
        wait_for_lock(output / LOCK, time.monotonic() + 60)
    assert [folder.name for folder in (work / "resume" / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{SAVE_STEPS}"]
    return lines


def wait_for_lock(file: Path, limit: float) -> None:
    """The killed processes are not ours to wait for; the system frees the run's lock when the last of them is gone."""
    with file.open("a") as lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            assert time.monotonic() < limit, f"{file} is still held"
            time.sleep(0.05)


def curve(output: Path) -> list[dict[str, Any]]:
    return read_log(output / "pretrained" / "log.jsonl")


def assert_same_curve(lines: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Every loss of every line of the log to 1e-5."""
    assert [(line["step"], line["kind"]) for line in lines] == [(line["step"], line["kind"]) for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        # What counts hits moves in steps of one token.
        for name in [name for name in other["measures"] if "loss" in name]:
            assert line["measures"][name] == pytest.approx(other["measures"][name], rel=1e-5), (line["step"], name)


def assert_same_training(output: Path, expected: Path) -> None:
    """The log, and the weights as far as AdamW lets rounding grow."""
    assert_same_curve(curve(output), curve(expected))
    weights, originals = (load_file(folder / "pretrained" / "model.safetensors") for folder in (output, expected))
    assert weights.keys() == originals.keys()
    for name, original in originals.items():
        np.testing.assert_allclose(weights[name], original, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_number_of_processes_changes_neither_the_curve_nor_what_can_be_resumed(tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data", num_passages=60)
    torch.set_num_threads(1)
    one = tmp_path / "one"
    pretrain(data, one, 1)
    train_lines = [line for line in curve(one) if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, NUM_STEPS + 1))
    assert train_lines[-1]["measures"]["loss"] < train_lines[0]["measures"]["loss"]

    others = {name: tmp_path / name for name in ("three", "killed")}
    for output in others.values():
        for step in ("store", "generator"):
            shutil.copytree(one / step, output / step)
    assert "generator: done" in pretrain(data, others["three"], 3)
    assert_same_training(others["three"], one)

    lines = kill_at_halt(data, others["killed"], 2, tmp_path / "pids")
    assert_same_curve(lines, [line for line in curve(one) if line["step"] <= HALT_STEP])
    assert not (others["killed"] / "pretrained").exists()
    shutil.copytree(others["killed"], tmp_path / "killed-too")
    for output, num_ranks in ((others["killed"], 1), (tmp_path / "killed-too", 3)):
        assert f"going on from step {SAVE_STEPS} of {NUM_STEPS}" in pretrain(data, output, num_ranks)
        assert_same_training(output, one)
