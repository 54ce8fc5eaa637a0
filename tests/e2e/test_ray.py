"""Encoding with Ray Data on a cluster of three nodes, all of them on loopback of this machine."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from simlm.corpus_encoding import encode_corpus, make_job, ray_engine
from simlm.errors import DataError, MissingExtraError, SimlmError
from simlm.progress import Progress
from tests.unit.test_corpus_encoding import passages_of, save_model, vectors_at, write_lines, write_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)

# Ray's own code is not free of them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUIET = Progress(quiet=True)
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": ray_engine.LOOPBACK}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of a head and two more nodes, one worker each; this process is connected to it."""
    settings = {
        # Addresses of loopback stay what they are. It is read when ray is imported, which nothing before has done.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    for _ in range(2):
        made.add_node(**NODE)
    ray.init(address=made.address, log_to_driver=False)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m", tiny_wordpiece)


def encode(source: Path, model: Path, output: Path, engine: str, **settings: Any) -> dict[str, Any]:
    job = make_job(str(model), str(output), precision="fp32")
    return encode_corpus(str(source), job, engine=engine, progress=QUIET, **settings)


def assert_same_vectors(left: Path, right: Path, count: int) -> None:
    ids, vectors = vectors_at(left)
    assert ids == [f"p{row}" for row in range(count)], "complete, in order, none twice"
    other_ids, other = vectors_at(right)
    assert other_ids == ids
    np.testing.assert_allclose(vectors, other, atol=1e-6)


def when_begun(output: Path, disturb: Callable[[], None]) -> threading.Thread:
    """Do something when the first files of vectors are there; a thread to join."""

    def watch() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if len(list(output.glob("part-*"))) >= 2:
                disturb()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def workers() -> list[psutil.Process]:
    """Ray's workers that hold an encoder, whatever node they belong to."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::") and "_Worker" in command:
            found.append(process)
    return found


def test_the_same_as_local_from_parquet_and_lines(tmp_path: Path, model: Path, cluster: Any) -> None:
    passages = passages_of(300)
    write_parquet(tmp_path / "c" / "1.parquet", passages[:100], group=30)
    write_lines(tmp_path / "c" / "2.jsonl", passages[100:200])
    write_lines(tmp_path / "c" / "3.jsonl.gz", passages[200:])
    local = encode(tmp_path / "c", model, tmp_path / "local", "local", shard_passages=40)
    spread = encode(tmp_path / "c", model, tmp_path / "ray", "ray", shard_passages=40)
    assert spread == local
    assert_same_vectors(tmp_path / "ray", tmp_path / "local", 300)


def test_a_killed_worker_costs_its_piece(tmp_path: Path, model: Path, cluster: Any) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(6000))
    local = encode(tmp_path / "c.jsonl", model, tmp_path / "local", "local", shard_passages=250)
    killed: list[int] = []

    def kill() -> None:
        process = workers()[0]
        killed.append(process.pid)
        process.kill()

    thread = when_begun(tmp_path / "ray", kill)
    spread = encode(tmp_path / "c.jsonl", model, tmp_path / "ray", "ray", shard_passages=250)
    thread.join()
    assert killed, "a worker was there to be killed"
    assert spread == local
    assert_same_vectors(tmp_path / "ray", tmp_path / "local", 6000)


def test_finished_files_are_left_as_they_are(tmp_path: Path, model: Path, cluster: Any) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(200))
    encode(tmp_path / "c.jsonl", model, tmp_path / "out", "ray", shard_passages=20)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("part-*")}
    for number in (1, 4):
        (tmp_path / "out" / f"part-{number:06d}.parquet").unlink()
    encode(tmp_path / "c.jsonl", model, tmp_path / "out", "ray", shard_passages=20)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("part-*")}
    assert {name for name in before if before[name] != after[name]} == {"part-000001.parquet", "part-000004.parquet"}
    assert vectors_at(tmp_path / "out")[0] == [f"p{row}" for row in range(200)]


def test_a_bad_record_is_named_as_it_is_here(tmp_path: Path, model: Path, cluster: Any) -> None:
    file = write_lines(tmp_path / "c.jsonl", passages_of(50))
    with open(file, "a", encoding="utf-8") as lines:
        lines.write("{not JSON\n")
    with pytest.raises(DataError, match=r"c\.jsonl:byte \d+: not readable as JSON"):
        encode(file, model, tmp_path / "out", "ray", shard_passages=20)


def test_no_room_for_a_worker(tmp_path: Path, model: Path, cluster: Any) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(5))
    with pytest.raises(SimlmError, match="no machine of the Ray cluster has 1 CPUs and 1 GPUs"):
        encode(tmp_path / "c.jsonl", model, tmp_path / "out", "ray", gpus=1)


def test_a_lost_node_costs_its_piece(tmp_path: Path, model: Path, cluster: Any) -> None:
    # The last test on this cluster: it has one node less afterwards.
    write_lines(tmp_path / "c.jsonl", passages_of(6000))
    local = encode(tmp_path / "c.jsonl", model, tmp_path / "local", "local", shard_passages=250)
    node = sorted(cluster.worker_nodes, key=lambda node: str(node.node_id))[0]
    thread = when_begun(tmp_path / "ray", lambda: cluster.remove_node(node, allow_graceful=False))
    spread = encode(tmp_path / "c.jsonl", model, tmp_path / "ray", "ray", shard_passages=250)
    thread.join()
    assert len(cluster.worker_nodes) == 1
    assert spread == local
    assert_same_vectors(tmp_path / "ray", tmp_path / "local", 6000)


def test_without_the_extra(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(5))
    job = make_job(str(model), str(tmp_path / "out"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"the engine ray needs the library 'ray'.*simlm\[ray\]"):
        encode_corpus(str(tmp_path / "c.jsonl"), job, engine="ray", progress=QUIET)
