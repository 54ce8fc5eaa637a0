"""Pieces dealt out by Ray Data to workers on any number of machines.

A worker is an actor that loads the model once. What travels are pieces, that is places, and short reports: passages and vectors go between
a worker and the files. Ray starts a worker again that was killed, or gives its piece to another; the files are named after pieces, so a
piece that is done twice is there once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from simlm.corpus_encoding.pieces import Corpus, Piece
from simlm.corpus_encoding.worker import Encoder, Job
from simlm.errors import SimlmError, require_extra

LOOPBACK = "127.0.0.1"


def run(
    job: Job,
    corpus: Corpus,
    pieces: Sequence[Piece],
    *,
    address: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[dict[str, Any]]:
    """A report of each piece when it is done, in the order in which they are.

    address: of a running cluster ("auto", "host:port", "ray://..."); none = RAY_ADDRESS, else workers on this machine alone.
    workers: none = as many as the cluster has room for. cpus, gpus: of each. Raises SimlmError if the cluster has no room for one.
    """
    require_extra("ray", "ray", "encoding with the engine ray")
    with _cluster(address) as ray:
        room = _room(ray, cpus, gpus)
        if room == 0:
            raise SimlmError(
                f"no machine of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for a worker; it has {ray.cluster_resources()}"
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        places = ray.data.from_items([{"place": place} for place in range(len(pieces))], override_num_blocks=len(pieces))
        reports = places.map_batches(
            _Worker,
            fn_constructor_args=(job, corpus, tuple(pieces)),
            batch_size=1,
            # One piece at a time for each: what a lost worker takes with it is the piece that it worked on.
            compute=ray.data.ActorPoolStrategy(size=min(workers or room, room, len(pieces)), max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for report in reports.iter_rows():
            yield {key: value for key, value in report.items() if key != "error" or value}


class _Worker:
    """An Encoder as Ray Data calls it: with columns of rows, for columns of reports."""

    def __init__(self, job: Job, corpus: Corpus, pieces: tuple[Piece, ...]) -> None:
        self._encoder = Encoder(job)
        self._corpus = corpus
        self._pieces = pieces

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        reports = [self._encoder(self._pieces[int(place)], self._corpus) for place in batch["place"]]
        numbers = {key: np.array([report.get(key, 0) for report in reports]) for key in ("piece", "passages", "skipped", "seconds")}
        return numbers | {"error": np.array([report.get("error", "") for report in reports], dtype=object)}


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected: as it is, or to a running cluster, or to one of this machine alone, on loopback and without a dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if ray.is_initialized():
        yield ray
        return
    wanted = address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": LOOPBACK}
    try:
        ray.init(address=wanted or "local", log_to_driver=False, logging_level=logging.WARNING, **({} if wanted else local))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SimlmError(f"Ray cluster {wanted or 'on this machine'}: cannot be reached ({error}); check the address") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _room(ray: Any, cpus: float, gpus: float) -> int:
    """How many workers fit on the machines that are there."""
    rooms = []
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        needs = {"CPU": cpus, "GPU": gpus}
        rooms.append(min((math.floor(has.get(name, 0) / need) for name, need in needs.items() if need), default=0))
    return sum(rooms)
