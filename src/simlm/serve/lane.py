"""A lane: a bounded queue and a thread, or several, that take what waits there together.

Requests that arrive within `wait_seconds` of the first, or while a batch is at work, go through the models in one batch. The queue never
grows past its bound: what does not fit is refused at once, so that what was accepted is answered in a time that can be told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

log = logging.getLogger("simlm.serve")


class LaneFullError(Exception):
    """The queue is at its bound. retry_seconds: when room may be there."""

    def __init__(self, retry_seconds: float) -> None:
        super().__init__(f"the queue is full; room is expected in {retry_seconds:.0f} s")
        self.retry_seconds = retry_seconds


class LaneClosedError(Exception):
    """The lane takes nothing any more."""


@dataclass(eq=False)
class Job(Generic[Task, Result]):
    """A task in the queue. future: its result; cancelled before its turn, the task is not done at all."""

    task: Task
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Result] = field(default_factory=Future)


class Lane(Generic[Task, Result]):
    """work: tasks -> their results, in order; called in a thread of the lane with 1 to `most_together` tasks.

    on_start: called first in each thread.
    niceness: added to the thread's, so that a lane of long work leaves the processor to others (Linux only).
    observe: told of each batch (number of tasks, seconds of work).
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Task]], list[Result]],
        *,
        most_waiting: int,
        most_together: int,
        wait_seconds: float = 0.0,
        threads: int = 1,
        niceness: int = 0,
        on_start: Callable[[], None] = lambda: None,
        observe: Callable[[int, float], None] = lambda _number, _seconds: None,
    ) -> None:
        self.name = name
        self.most_waiting = most_waiting
        self._work = work
        self._most_together = most_together
        self._wait_seconds = wait_seconds
        self._niceness = niceness
        self._on_start = on_start
        self._observe = observe
        self._waiting: deque[Job[Task, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_a_task = 0.05
        self._threads = [threading.Thread(target=self._run, name=f"simlm-{name}-{number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Tasks that wait, not those at work."""
        return len(self._waiting)

    def submit(self, task: Task) -> Future[Result]:
        """The future of the task's result; LaneFullError if too many wait, LaneClosedError after `close`."""
        job: Job[Task, Result] = Job(task)
        with self._changed:
            if self._closed:
                raise LaneClosedError
            if len(self._waiting) >= self.most_waiting:
                raise LaneFullError(max(len(self._waiting) * self._seconds_a_task, 1.0))
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take nothing more, finish what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        self._be_nice()
        self._on_start()
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Wait for a batch and do it; False when the lane is closed and empty. Nothing of a batch is held afterwards."""
        jobs = self._next_batch()
        if jobs is None:
            return False
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if jobs:
            started = time.monotonic()
            self._do(jobs)
            seconds = time.monotonic() - started
            self._seconds_a_task += 0.1 * (seconds / len(jobs) - self._seconds_a_task)
            self._observe(len(jobs), seconds)
        return True

    def _next_batch(self) -> list[Job[Task, Result]] | None:
        """The next tasks, at least one; None when the lane is closed and empty."""
        with self._changed:
            while True:
                if self._waiting:
                    # Counted from its arrival: what waited for the batch before it does not wait again.
                    left = self._waiting[0].arrived + self._wait_seconds - time.monotonic()
                    if left <= 0 or len(self._waiting) >= self._most_together or self._closed:
                        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._most_together))]
                        # Word of what is left may have come to this thread alone.
                        self._changed.notify()
                        return batch
                    self._changed.wait(left)
                elif self._closed:
                    return None
                else:
                    self._changed.wait()

    def _do(self, jobs: list[Job[Task, Result]]) -> None:
        """Settle every job. If a batch fails, each of its tasks is tried alone: one bad request must not take others with it."""
        try:
            results = self._work([job.task for job in jobs])
        except Exception as error:  # Whatever it is belongs to whoever asked; the thread must go on.
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            log.warning("a batch of %d failed (%r); trying each alone", len(jobs), error)
            for job in jobs:
                self._do([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)

    def _be_nice(self) -> None:
        if self._niceness and sys.platform.startswith("linux"):
            with contextlib.suppress(OSError):
                # On Linux a niceness belongs to the thread, not to the process.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + self._niceness)


__all__ = ["Lane", "LaneClosedError", "LaneFullError"]
