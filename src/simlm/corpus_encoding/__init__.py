"""Encoding of a corpus that is not in a run: files on a disk or in an object store -> files of vectors, piece by piece.

A corpus is cut into pieces (`pieces.py`), each of which becomes one file of vectors. A file that is there is finished, so a job that was
stopped does the rest, and what a lost worker had begun is done again, alone. Which pieces there are follows from the corpus and the
settings alone; so engines and numbers of workers all make the same files. `_embeddings.json`, written last, says that the whole is there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from simlm.corpus_encoding.output import Output
from simlm.corpus_encoding.pieces import Corpus, Piece
from simlm.corpus_encoding.worker import Encoder, Job
from simlm.errors import ArtifactError, DataError, nearest
from simlm.export.finished_run import FinishedRun
from simlm.models.precision import checked_precision
from simlm.progress import Progress
from simlm.recipe import ModelSettings

ENGINES: dict[str, str] = {
    "local": "simlm.corpus_encoding.local_engine:run",
    "ray": "simlm.corpus_encoding.ray_engine:run",
}
"""Name -> function(job, corpus, pieces, **settings) that yields a report of each piece when it is done."""

Engine = Callable[..., Iterator[dict[str, Any]]]


def encode_corpus(
    source: str,
    job: Job,
    *,
    engine: str = "local",
    shard_passages: int = 50_000,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Encode the passages of `source` into files of vectors at `job.output`; what `_embeddings.json` says of them.

    source: a file or folder, or an address (s3://, gs://, hdfs://, file://), of Parquet or JSONL.
    shard_passages: about how many passages a file of vectors has. settings: of the engine.
    Raises DataError for a corpus that cannot be used, ArtifactError if the output is of another corpus, model or setting.
    """
    progress = progress or Progress()
    start = _engine(engine)
    corpus = Corpus.find(source)
    pieces = corpus.pieces(shard_passages)
    output = Output.at(job.output)
    output.begin({"corpus": corpus.describe(), "shard_passages": shard_passages, "job": job.identity()}, len(pieces))
    done = output.finished()
    left = [piece for piece in pieces if piece.number not in done]
    if done:
        progress.say(f"encode: {len(done):,} of {len(pieces):,} files of vectors are there already")
    if left:
        reports = start(job, corpus, left, **settings)
        for report in progress.track(reports, "encode", total=len(left), unit="piece"):
            if "error" in report:
                raise DataError(report["error"])
    counts = output.counts(len(pieces))
    if corpus.num_passages is not None and job.on_bad_record == "error" and sum(counts) != corpus.num_passages:
        raise ArtifactError(
            f"{job.output}: {sum(counts):,} vectors for {corpus.num_passages:,} passages; delete the folder and encode again"
        )
    return output.finish(counts)


def make_job(model: str, output: str, *, retriever: str | None = None, precision: str = "auto", **given: Any) -> Job:
    """The job of encoding with a retriever of a run (as an export of it would take), or a model folder or hub id.

    Raises DataError for an unknown precision, or a retriever named of what is no run.
    """
    checked_precision(precision, "precision")
    if (Path(model) / "store").is_dir():
        run = FinishedRun(Path(model), retriever)
        # A starting model reads as much of a passage as the run's store kept.
        limit = int(run.store.info["max_passage_tokens"]) if run.chosen.model is None else None
        return Job.of(run.chosen.source, output, precision=precision, max_passage_tokens=limit, **given)
    if retriever is not None:
        raise DataError(f"{model}: not the folder of a run, so it has no retriever {retriever!r}; leave --retriever out")
    return Job.of(ModelSettings(start=model), output, precision=precision, **given)


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise DataError(f"unknown engine {name!r}{nearest(name, ENGINES)} (known: {', '.join(ENGINES)})")
    module, _, attribute = ENGINES[name].partition(":")
    return cast("Engine", getattr(importlib.import_module(module), attribute))


__all__ = ["ENGINES", "Corpus", "Encoder", "Job", "Output", "Piece", "encode_corpus", "make_job"]
