"""SIGKILL at several random moments of a recipe, then the same command again: the same results as without the kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.toy.corpus import TINY, write_beir

RECIPES = Path(__file__).parents[2] / "recipes"
NUM_KILLS = 4


def command(folder: Path, output: str) -> list[str]:
    changes = [*TINY, f"data.path={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / output / 'run'))}"]
    # Checkpoints at every step, so that a kill in training is followed by a resumed training, not by a new one.
    changes += [
        f"{section}.training.save_steps=1" for section in ("generator", "pretrain", "retriever1", "retriever2", "reranker", "distilled")
    ]
    changes += ["pretrain.training.max_steps=8", "distilled.training.max_steps=8"]
    options = [part for change in changes for part in ("--set", change)]
    return [sys.executable, "-m", "simlm", "run", str(RECIPES / "medquad_cpu.toml"), *options]


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    rows = [{key: value for key, value in row.items() if key != "milliseconds_per_query"} for row in metrics["rows"]]
    return {key: rows if key == "rows" else value for key, value in metrics.items() if "seconds" not in key and key != "created"}


def results(folder: Path) -> dict[str, Any]:
    return without_times(json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8")))


def test_killed_runs_end_like_an_undisturbed_one(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    subprocess.run(command(tmp_path, "undisturbed"), check=True, env=environment, capture_output=True)
    whole = time.monotonic() - started

    rng = random.Random(int(os.environ.get("SIMLM_KILL_SEED", "1")))
    moments = []
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(
            command(tmp_path, "killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        moments.append(rng.uniform(0.25, 0.7) * whole)
        try:
            process.communicate(timeout=moments[-1])
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    final = subprocess.run(command(tmp_path, "killed"), check=False, env=environment, capture_output=True, text=True)
    assert final.returncode == 0, f"after kills at {moments} s: {final.stderr[-3000:]}"
    assert results(tmp_path / "killed" / "run") == results(tmp_path / "undisturbed" / "run"), f"kills at {moments} s"
    leftovers = [
        entry.name
        for entry in (tmp_path / "killed" / "run").iterdir()
        if entry.name.startswith(".") and entry.name not in (".digests.json", ".lock")
    ]
    assert leftovers == []
