"""What encodes one piece after another: the same code in this process and in a worker far away."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from simlm.corpus_encoding.output import Output
from simlm.corpus_encoding.pieces import Corpus, Piece
from simlm.data.formats import BadRecords
from simlm.embedding_files import EmbeddingWriter
from simlm.errors import SimlmError
from simlm.recipe import ModelSettings
from simlm.types import Passage

if TYPE_CHECKING:
    from simlm.models.precision import Computed
    from simlm.models.retriever import Retriever

CHUNK = 8192
"""Passages in memory at once, sorted by length among themselves."""


@dataclass(frozen=True)
class Job:
    """What is to be made of every piece.

    model: what `load_retriever` takes; every worker must find it. digest: of its weights and configuration. max_passage_tokens: None =
    what it was trained with. dtype: of the vectors in the files.
    """

    model: ModelSettings
    output: str
    digest: str
    dim: int
    precision: Computed = "fp32"
    dtype: Literal["float32", "float16"] = "float32"
    max_passage_tokens: int | None = None
    on_bad_record: Literal["error", "skip"] = "error"

    @classmethod
    def of(cls, model: ModelSettings, output: str, *, precision: Any = "auto", **given: Any) -> Job:
        """The job for a model that lies here; what "auto" and "fast" come to is decided here, for all workers alike."""
        from simlm.models.retriever import load_retriever

        retriever = load_retriever(model, precision=precision, max_passage_tokens=given.get("max_passage_tokens"), digest=True)
        return cls(model, output, retriever.digest, retriever.dim, retriever.inference.precision, **given)

    def identity(self) -> dict[str, Any]:
        """What the vectors depend on; places are not among it."""
        return {
            "model": self.digest,
            "dim": self.dim,
            "precision": self.precision,
            "dtype": self.dtype,
            "max_passage_tokens": self.max_passage_tokens,
            "passage_prompt": self.model.passage_prompt,
            "on_bad_record": self.on_bad_record,
        }


class Encoder:
    """Holds the model. Called with a piece, it writes the piece's file of vectors and reports on it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._output = Output.at(job.output)
        self._retriever: Retriever | None = None

    def __call__(self, piece: Piece, corpus: Corpus) -> dict[str, Any]:
        """{"piece", "passages", "skipped", "seconds"}, or {"piece", "error"} for a fault of the input, which no other try would mend."""
        started = time.perf_counter()
        try:
            count, skipped = self._encode(piece, corpus)
        except SimlmError as error:
            return {"piece": piece.number, "error": str(error)}
        return {"piece": piece.number, "passages": count, "skipped": skipped, "seconds": time.perf_counter() - started}

    def _encode(self, piece: Piece, corpus: Corpus) -> tuple[int, int]:
        from simlm.models.retriever import load_retriever

        if self._retriever is None:
            self._retriever = load_retriever(self.job.model, precision=self.job.precision, max_passage_tokens=self.job.max_passage_tokens)
        bad = BadRecords(self.job.on_bad_record)
        count = 0
        with self._output.part(piece.number) as stream, EmbeddingWriter(stream, self.job.dim, np.dtype(self.job.dtype)) as writer:
            for chunk in _chunks(corpus.passages(piece, bad)):
                writer.write([passage.passage_id for passage in chunk], self._retriever.encode_passages(chunk))
                count += len(chunk)
        return count, sum(bad.counts.values())


def _chunks(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    while chunk := list(itertools.islice(passages, CHUNK)):
        yield chunk
