"""A recipe under torchrun: two processes do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.toy.corpus import TINY, write_beir

RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"


def options(folder: Path, output: str) -> list[str]:
    # fp32: the order in which two processes add up must not be seen through bf16's three digits.
    precise = [f"{section}.training.bf16=false" for section in ("generator", "pretrain", "retriever1")]
    changes = [*TINY, *precise, f"data.path={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / output))}"]
    changes += ["retriever1.dropout=0.0", "retriever1.training.max_steps=2"]
    return [part for change in changes for part in ("--set", change)]


def test_two_processes_train_the_retriever_that_one_does(tmp_path: Path) -> None:
    write_beir(tmp_path / "data", num_passages=60)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = ["train-retriever", str(RECIPE), "--step", "retriever1"]
    subprocess.run([sys.executable, "-m", "simlm", *command, *options(tmp_path, "one")], check=True, env=environment, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "simlm"]
    done = subprocess.run([*torchrun, *command, *options(tmp_path, "two")], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    one, two = (load_file(tmp_path / output / "retriever1" / "model.safetensors") for output in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        np.testing.assert_allclose(two[name], weights, rtol=1e-3, atol=2e-4, err_msg=name)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())
