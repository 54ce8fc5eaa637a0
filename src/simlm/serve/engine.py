"""The engine behind the server: a run that is open, the lanes that ask it, and its replacement by a newer state.

Three lanes: searches, with a thread for each core, embeddings, and whatever re-ranks, with one each. The last two take long and leave the
processor to the first.
A request keeps the run that it was checked against, so that a reload loses none; the old run goes when its last request is answered.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from simlm.runtime import release_memory
from simlm.serve.faults import Fault
from simlm.serve.lane import Lane, LaneClosedError, LaneFullError
from simlm.serve.metrics import Metrics
from simlm.serve.schemas import SearchRequest
from simlm.serve.served_run import Asked, ServedRun

if TYPE_CHECKING:
    from simlm.models.precision import Precision
    from simlm.models.reranker import Reranker
    from simlm.models.retriever import Retriever

Floats = NDArray[np.float32]
Result = TypeVar("Result")
Status = Literal["ready", "loading", "stopping"]
Side = Literal["query", "passage"]

CHUNK = 32
"""Texts, or pairs, between two looks at whether anyone still waits for them."""
LONG_WORK_NICENESS = 10
MOST_THREADS = 8
"""Of searches; what is not arithmetic has one core in any case."""

log = logging.getLogger("simlm.serve")


@dataclass(frozen=True)
class EngineSettings:
    """max_waiting: requests that may wait in each lane; more are refused with 429. timeout_seconds: from a request's arrival to 504."""

    retriever: str | None = None
    block_list: Path | None = None
    max_waiting: int = 64
    timeout_seconds: float = 30.0
    batch_milliseconds: float | None = None
    """A search waits this long for others to go through the models with it; none = 2 with an accelerator, else 0: there every core has a
    search of its own, and those that come while all are busy go together."""
    max_batch: int = 16
    search_threads: int = 0
    """Searches at work at the same time; 0 = one a core, one alone where an accelerator computes."""
    precision: Precision | None = None
    """Of the model that encodes queries; none = weights of 16 bits on an x86 processor, else as the run's passages were encoded."""


@dataclass(frozen=True, eq=False)
class _Encoding:
    """Texts to encode. gone: nobody waits for them any more."""

    retriever: Retriever
    texts: Sequence[str]
    side: Side
    gone: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class _Reranking:
    """Documents to score. gone: nobody waits for them any more."""

    reranker: Reranker
    query: str
    documents: Sequence[str]
    gone: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Answers for the server. `open` before use, `close` at the end; the coroutines may be awaited in any event loop."""

    def __init__(self, folder: Path, settings: EngineSettings | None = None, metrics: Metrics | None = None) -> None:
        self.folder = folder
        self.settings = settings or EngineSettings()
        self.metrics = metrics or Metrics()
        self.stopping = False
        self._run: ServedRun | None = None
        self._reloading = threading.Lock()
        waiting = self.settings.max_waiting
        self._searches: Lane[Asked, dict[str, Any]] = Lane(
            "search",
            _answers,
            most_waiting=waiting,
            most_together=self.settings.max_batch,
            wait_seconds=_default_wait() if self.settings.batch_milliseconds is None else self.settings.batch_milliseconds / 1000,
            threads=self.settings.search_threads or _default_threads(),
            on_start=compute_on_few_threads,
            observe=self.metrics.batch_observer("search"),
        )
        self._encodings: Lane[_Encoding, Floats] = Lane(
            "embeddings",
            _encoded,
            most_waiting=waiting,
            most_together=self.settings.max_batch,
            niceness=LONG_WORK_NICENESS,
            on_start=compute_on_few_threads,
            observe=self.metrics.batch_observer("embeddings"),
        )
        self._rerankings: Lane[Asked | _Reranking, Any] = Lane(
            "rerank",
            _reranked,
            most_waiting=waiting,
            most_together=1,
            niceness=LONG_WORK_NICENESS,
            on_start=compute_on_few_threads,
            observe=self.metrics.batch_observer("rerank"),
        )
        for lane in (self._searches, self._encodings, self._rerankings):
            self.metrics.watch_queue(lane.name, lane.__len__)

    # --- its life

    @property
    def status(self) -> Status:
        return "stopping" if self.stopping else "loading" if self._run is None else "ready"

    @property
    def run(self) -> ServedRun:
        """The run as it is now; a 503 fault while there is none."""
        if self._run is None:
            raise Fault(503, "loading", "models and indexes are being loaded", retry_seconds=2)
        return self._run

    def open(self) -> None:
        """Load the run; ArtifactError if it is not whole or its parts do not fit together."""
        self._run = self._opened()
        _settle()

    def reload(self) -> float:
        """Open the run's folder again and answer from it; seconds that it took. If that fails, the run as it was goes on.

        Raises a 409 fault while another reload is under way, SimlmError if the folder cannot be opened.
        """
        if not self._reloading.acquire(blocking=False):
            raise Fault(409, "reload_in_progress", "a reload is under way; wait for it to finish")
        try:
            started = time.monotonic()
            self._run = self._opened()
            self.metrics.reloads.inc()
        finally:
            self._reloading.release()
        _settle()
        return time.monotonic() - started

    def close(self) -> None:
        """Finish what was accepted, take nothing more."""
        self.stopping = True
        for lane in (self._searches, self._encodings, self._rerankings):
            lane.close()
        gc.unfreeze()

    def _opened(self) -> ServedRun:
        run = ServedRun(
            self.folder,
            retriever=self.settings.retriever,
            block_list=self.settings.block_list,
            query_precision=self.settings.precision or _default_precision(),
        )
        _warm_up(run)
        if run.unknown_ids:
            log.warning(
                "block list: %d ids name no passage of this corpus, such as %s", len(run.unknown_ids), ", ".join(run.unknown_ids[:3])
            )
        self.metrics.passages.set(run.info["passages"])
        return run

    # --- what it is asked

    async def search(self, request: SearchRequest) -> dict[str, Any]:
        """What `POST /search` answers; faults: 422, 429, 503, 504."""
        asked = self.run.asked(request)
        lane = self._rerankings if "rerank" in asked.lists else self._searches
        return await self._result(lane, asked)

    async def encode(self, retriever: Retriever, texts: Sequence[str], side: Side) -> Floats:
        """float32 [number of texts, D], unit length; faults: 429, 503, 504."""
        task = _Encoding(retriever, texts, side)
        return await self._result(self._encodings, task, gone=task.gone)

    async def rerank(self, reranker: Reranker, query: str, documents: Sequence[str]) -> Floats:
        """Logits float32 [number of documents]; faults: 429, 503, 504."""
        task = _Reranking(reranker, query, documents)
        scores: Floats = await self._result(self._rerankings, task, gone=task.gone)
        return scores

    async def _result(self, lane: Lane[Any, Result], task: Any, *, gone: threading.Event | None = None) -> Result:
        try:
            future = lane.submit(task)
        except LaneFullError as full:
            self.metrics.refused.labels(lane.name).inc()
            raise Fault(
                429, "queue_full", f"{lane.most_waiting} requests are waiting already; try again later", retry_seconds=full.retry_seconds
            ) from None
        except LaneClosedError:
            raise Fault(503, "stopping", "the server is stopping; ask another one, or again", retry_seconds=5) from None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.settings.timeout_seconds)
        except TimeoutError:
            raise Fault(504, "timeout", f"no answer within {self.settings.timeout_seconds:g} s; ask for less at once") from None
        finally:
            # Done, this changes nothing; else (too late, or the client has gone) nobody wants the result.
            future.cancel()
            if gone is not None:
                gone.set()


def compute_on_few_threads() -> None:
    """One thread for each product: a query is too short to share out, and the lanes keep the cores busy with several at once.

    To be called in each thread that computes: OpenMP's number of threads is a thread's own.
    """
    import faiss
    import torch

    if not torch.accelerator.is_available():
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)


def _default_threads() -> int:
    """A query is too little work to be shared out among cores, so each core has a query of its own."""
    import torch

    return 1 if torch.accelerator.is_available() else min(os.cpu_count() or 1, MOST_THREADS)


def _default_precision() -> Precision | None:
    """Queries come one by one, so that reading the weights is what they wait for."""
    from simlm.models.precision import best_device, has_half_weights

    return "fp16" if has_half_weights(best_device().type) else None


def _default_wait() -> float:
    import torch

    return 0.002 if torch.accelerator.is_available() else 0.0


def _settle() -> None:
    """Collect garbage once, and leave what is there now out of the collections to come: they took 0.3 s, and there is nothing to find."""
    gc.unfreeze()
    release_memory()
    gc.freeze()


def _warm_up(run: ServedRun) -> None:
    """Have what is made on first use made before the first request waits for it."""
    run.answers([run.asked(SearchRequest(query=run.info["example_query"], k=1))])


# --- work of the lanes: tasks in, results out


def _answers(tasks: list[Asked]) -> list[dict[str, Any]]:
    """Answers of searches; those that were checked against the same run go through its models together."""
    answers: dict[int, dict[str, Any]] = {}
    of_run: dict[int, list[int]] = {}
    for place, task in enumerate(tasks):
        of_run.setdefault(id(task.run), []).append(place)
    for places in of_run.values():
        run = tasks[places[0]].run
        answers |= zip(places, run.answers([tasks[place] for place in places]), strict=True)
    return [answers[place] for place in range(len(tasks))]


def _encoded(tasks: list[_Encoding]) -> list[Floats]:
    """Vectors of each task's texts. Texts of several tasks go through together, as far as they want the same of the same model."""
    vectors = [np.zeros((len(task.texts), task.retriever.dim), dtype=np.float32) for task in tasks]
    alike: dict[tuple[int, Side], list[tuple[int, int]]] = {}
    for place, task in enumerate(tasks):
        alike.setdefault((id(task.retriever), task.side), []).extend((place, number) for number in range(len(task.texts)))
    for members in alike.values():
        for start in range(0, len(members), CHUNK):
            wanted = [(place, number) for place, number in members[start : start + CHUNK] if not tasks[place].gone.is_set()]
            if not wanted:
                continue
            first = tasks[wanted[0][0]]
            encode = first.retriever.encode_queries if first.side == "query" else first.retriever.encode_passages
            for (place, number), vector in zip(wanted, encode([tasks[place].texts[number] for place, number in wanted]), strict=True):
                vectors[place][number] = vector
    return vectors


def _reranked(tasks: list[Asked | _Reranking]) -> list[Any]:
    return [_answers([task])[0] if isinstance(task, Asked) else _scored(task) for task in tasks]


def _scored(task: _Reranking) -> Floats:
    scores = np.zeros(len(task.documents), dtype=np.float32)
    for start in range(0, len(task.documents), CHUNK):
        if task.gone.is_set():
            break
        part = slice(start, start + CHUNK)
        scores[part] = task.reranker.score(task.query, task.documents[part])
    return scores


__all__ = ["Engine", "EngineSettings", "Side", "Status"]
