"""encode and search by 1, 2 and 3 processes, also killed at 2 and resumed at 3: the same bytes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simlm.artifacts import ArtifactBuilder, Kind, build_artifact
from simlm.index.flat import FlatIndex
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.inference import Inference
from simlm.progress import Progress
from simlm.recipe import EncodeSettings, IndexSettings, ModelSettings, SearchSettings
from simlm.runtime import Ranks
from simlm.stages import Context, build_index, encode, search
from tests.unit.test_stage_encode import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

ENCODE = EncodeSettings(precision="fp32", shard_passages=7, batch_tokens=200)
SEARCH = SearchSettings(splits=["train", "dev"], depth=9, precision="fp32", batch_queries=2)


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def step(stage: ModuleType, kind: Kind, path: Path, settings: Any, inputs: dict[str, Path], ranks: Ranks) -> dict[str, Any]:
    """Do one step as the pipeline does; its facts (on the first process)."""
    builder = ArtifactBuilder(path, kind=kind, stage=stage.__name__, code_version=1, fingerprint="f")
    ranks.from_first(builder.begin)
    stage.run(settings, inputs, Context(builder, 0, Progress(quiet=True), ranks.rank, ranks.num_ranks))
    ranks.barrier()
    if ranks.rank == 0:
        builder.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=0)
    ranks.barrier()
    return builder.facts


def dying(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function, which this process does not survive after so many calls."""
    seen: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise Killed
        return function(*args, **kwargs)

    return wrapped


def steps(folder: Path, ranks: Ranks) -> None:
    """Encode and search in `folder/NUM_RANKS`; by two processes also in `folder/killed`, not to the end, by three from there."""
    torch.set_num_threads(1)
    search.SHARD_QUERIES = 4  # type: ignore[misc]
    inputs = {name: folder / name for name in ("store", "model")}
    own = folder / str(ranks.num_ranks)
    facts = step(encode, "embeddings", own / "embeddings", ENCODE, inputs, ranks)
    if ranks.rank == 0:
        assert (facts["num_passages"], facts["num_cached"]) == (60, 0)
        assert facts["padding"] < 1 and facts["passages_per_second"] > 0
    indexed = inputs | {"index": folder / "index"}
    step(search, "run", own / "run", SEARCH, indexed, ranks)
    if ranks.num_ranks == 2:
        real: Any = Inference.run
        Inference.run = dying(real, 1)  # type: ignore[method-assign]
        survived = attempt(lambda: step(encode, "embeddings", folder / "killed" / "embeddings", ENCODE, inputs, ranks))
        Inference.run = real  # type: ignore[method-assign]
        looked_up: Any = FlatIndex.search
        FlatIndex.search = dying(looked_up, 1)  # type: ignore[method-assign]
        survived |= attempt(lambda: step(search, "run", folder / "killed" / "run", SEARCH, indexed, ranks))
        FlatIndex.search = looked_up  # type: ignore[method-assign]
        assert not survived
    if ranks.num_ranks == 3:
        done = folder / "killed" / ".embeddings.work" / "resume" / "passages_done"
        assert len(list(done.iterdir())) == 2 and len(list((folder / "killed" / ".run.work" / "resume").glob("*.npz"))) == 2
        ranks.barrier()
        step(encode, "embeddings", folder / "killed" / "embeddings", ENCODE, inputs, ranks)
        step(search, "run", folder / "killed" / "run", SEARCH, indexed, ranks)
        # Every vector is in the cache now, whichever process made it.
        facts = step(encode, "embeddings", folder / "3" / "embeddings", ENCODE.model_copy(update={"batch_tokens": 99}), inputs, ranks)
        if ranks.rank == 0:
            assert facts["num_cached"] == 60


def attempt(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Killed:
        return False
    return True


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from simlm.runtime import join_processes, leave_processes
from tests.distributed.test_inference_ranks import steps
steps(Path(sys.argv[1]), join_processes())
leave_processes()
"""


def launch(folder: Path, num_ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), str(Path(__file__).parents[2])]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output


def files_of(folder: Path) -> dict[str, bytes]:
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def test_the_number_of_processes_changes_no_byte(tmp_path: Path, tiny_store: Store, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    (tmp_path / "store").symlink_to(tiny_store.path)
    encoder = load_encoder(ModelSettings(start="scratch", config=CONFIG), tokenizer=tiny_wordpiece, seed=3)
    with build_artifact(tmp_path / "model", kind="model") as builder:
        BiEncoder(encoder, "mean").save(builder.work, tiny_wordpiece, max_query_tokens=24, max_passage_tokens=40, query_prompt="the ")
    with build_artifact(tmp_path / "given", kind="embeddings") as builder:
        vectors = np.random.default_rng(0).standard_normal((60, 32)).astype(np.float32)
        np.save(builder.work / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    alone = Ranks()
    step(build_index, "index", tmp_path / "index", IndexSettings(), {"store": tmp_path / "store", "embeddings": tmp_path / "given"}, alone)
    before = search.SHARD_QUERIES
    steps(tmp_path, alone)
    search.SHARD_QUERIES = before  # type: ignore[misc]
    expected = files_of(tmp_path / "1" / "embeddings"), files_of(tmp_path / "1" / "run")
    assert sorted(expected[0]) == ["embeddings.json", "vectors.npy"]
    assert "dev/scores.npy" in expected[1]
    launch(tmp_path, 2)
    assert (files_of(tmp_path / "2" / "embeddings"), files_of(tmp_path / "2" / "run")) == expected
    launch(tmp_path, 3)
    for folder in ("3", "killed"):
        assert (files_of(tmp_path / folder / "embeddings"), files_of(tmp_path / folder / "run")) == expected, folder
