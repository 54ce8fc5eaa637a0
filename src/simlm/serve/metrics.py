"""What the server counts, in Prometheus' form. Paths are those of the routes, so that no request can make a new series."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from simlm.runtime import resident_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
TOGETHER = (1, 2, 4, 8, 16, 32)


class Metrics:
    """One set of counters; each server has its own, so that several can live in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("simlm_requests", "Requests answered.", ("method", "path", "status"), registry=self._registry)
        self.seconds = Histogram(
            "simlm_request_seconds", "From the first byte to the answer.", ("path",), buckets=SECONDS, registry=self._registry
        )
        self.in_flight = Gauge("simlm_requests_in_flight", "Requests that are being answered.", registry=self._registry)
        self.refused = Counter("simlm_refused", "Requests refused since the queue was full.", ("lane",), registry=self._registry)
        self.reloads = Counter("simlm_reloads", "Times that the run was opened again.", registry=self._registry)
        self.passages = Gauge("simlm_passages", "Passages that can be found.", registry=self._registry)
        self._batch_sizes = Histogram(
            "simlm_batch_requests", "Requests that went through the models together.", ("lane",), buckets=TOGETHER, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "simlm_batch_seconds", "Time of a batch in the models and indexes.", ("lane",), buckets=SECONDS, registry=self._registry
        )
        self._waiting = Gauge("simlm_waiting", "Requests in the queue.", ("lane",), registry=self._registry)
        memory = Gauge("simlm_resident_bytes", "Resident set of the process.", registry=self._registry)
        memory.set_function(resident_bytes)

    def watch_queue(self, lane: str, length: Callable[[], int]) -> None:
        """Report the length of a lane's queue whenever the metrics are read."""
        self._waiting.labels(lane).set_function(length)

    def batch_observer(self, lane: str) -> Callable[[int, float], None]:
        """What a lane tells of each batch: requests, seconds."""
        sizes, seconds = self._batch_sizes.labels(lane), self._batch_seconds.labels(lane)

        def observe(number: int, took: float) -> None:
            sizes.observe(number)
            seconds.observe(took)

        return observe

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


__all__ = ["CONTENT_TYPE", "Metrics"]
