"""Choose an index for a budget: build candidates over a run's passages, measure them on its dev queries, keep the smallest that is good.

    RUN/NAME_chosen_index    the index that searches with the retriever NAME open from then on
    RUN/NAME_index_choice    what was measured: choice.json, choice.md, choice.svg

Quality is RR@10 and R@100 as shares of those of exact search in fp32 over the same vectors, on judged dev queries; the lower share counts.
Memory is what a search goes through (`resident_bytes`); vectors that candidates are scored again with stay on disk. Times are of one query
at a time, from its vector to its results, on one core.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.additions import Additions, refresh
from simlm.artifacts import ArtifactBuilder, json_digest, open_artifact, peak_memory_bytes, read_manifest
from simlm.errors import ArtifactError, DataError, SimlmError
from simlm.evaluation.measures import measure_run
from simlm.evaluation.report import index_choice as report
from simlm.index import Index, build_vectors, index_class, rescoring
from simlm.index.stored import store_vectors
from simlm.index.vectors import SourceVectors
from simlm.progress import Progress
from simlm.rankings import Floats, Run
from simlm.recipe import EncodeSettings, IndexSettings
from simlm.searcher import CHOSEN, find_retriever
from simlm.stages import Context, build_index

if TYPE_CHECKING:
    from simlm.data.store import Store

VERSION = 1
DEPTH = 100
MEASURES = ("RR@10", "R@100")
MOST_QUERIES = 1000
"""Dev queries that quality is measured on, a seeded sample where there are more."""
TIMED_QUERIES = 200
LISTS_FROM = 50_000
"""Passages from which clusters of codes are worth a try: below, all codes are compared in a few milliseconds."""
RESCORED = (4, 10)
"""Candidates scored again, times the depth."""
SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Candidate:
    """An index that may be chosen: a type and its options."""

    type: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def inner(self) -> Candidate:
        """Without scoring candidates again, so that those that differ in that alone are built once."""
        own = {name: value for name, value in self.options.items() if name not in ("rescore", "rescore_dtype")}
        return replace(self, options=own | ({"rescore": 0} if self.type == "rabitq" else {}))

    @property
    def label(self) -> str:
        options = self.options
        words = [self.type, str(options.get("dtype", ""))]
        words += [
            f"{options[name]} {unit}" for name, unit in (("bits", "bit"), ("code_bytes", "bytes"), ("dim", "numbers")) if options.get(name)
        ]
        words += ["in lists"] if options.get("num_lists") else []
        words += [f"+ {options['rescore']} x {options['rescore_dtype']}"] if options.get("rescore") else []
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Measured:
    """What a candidate is like. quality: the lower of the two shares of exact search; None and a reason where it was not built."""

    candidate: Candidate
    label: str
    resident_bytes: int
    disk_bytes: int = 0
    build_seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    quality: float | None = None
    p50_milliseconds: float = 0.0
    p95_milliseconds: float = 0.0
    left_out: str = ""


@dataclass(frozen=True)
class Choice:
    """folder: of the index, none if no candidate fits; content: what choice.json holds."""

    folder: Path | None
    report: Path
    content: dict[str, Any]


def choose_index(
    run: Path, *, budget: int, min_quality: float = 0.99, retriever: str | None = None, seed: int = 0, progress: Progress | None = None
) -> Choice:
    """Measure candidates and put the smallest that keeps `min_quality` within `budget` bytes of memory where searches open it.

    Raises ArtifactError or DataError if the run lacks what this needs: passages encoded by the retriever, judged dev queries.
    """
    from simlm.data.store import Store

    run, progress = Path(run), progress or Progress(quiet=True)
    if not 0 < min_quality <= 1:
        raise SimlmError(f"min_quality {min_quality:g}: a share of exact search above 0 and up to 1 was expected, for example 0.99")
    name, model = find_retriever(run, retriever)
    store = Store.open(run / "store")
    vectors = _vectors(run, name)
    queries = _Queries.of(store, name, run, model, seed)
    work = run / f".{name}_index_choice.candidates"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        bench = _Bench(work, vectors, queries, seed)
        found = list(bench.measure(candidates(bench.source, _sizes(bench.source.whole_dim, model)), budget, progress))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    fitting = [row for row in found if row.quality is not None and row.quality >= min_quality and row.resident_bytes <= budget]
    chosen = min(fitting, key=lambda row: (row.resident_bytes, row.p95_milliseconds), default=None)
    content = _content(run, name, found, chosen, queries, budget=budget, min_quality=min_quality)
    place = _write_report(run / f"{name}_index_choice", content)
    folder = None
    if chosen is not None:
        folder = _build(run, name, chosen.candidate, seed, progress)
        # What was added is compared by as many numbers from now on.
        if Additions.open(run):
            refresh(run, retriever=name, progress=progress)
    return Choice(folder, place, content)


def parse_bytes(text: str) -> int:
    """Bytes of a size as people write it: 800MB, 1GB (powers of 1000), 1.5GiB (of 1024), or a number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in SIZES or not float(match[1]):
        raise SimlmError(f"size {text!r}: a number above 0 with KB, MB, GB, KiB, MiB or GiB was expected, for example 800MB")
    return int(float(match[1]) * SIZES[match[2]])


def candidates(source: SourceVectors, sizes: list[int]) -> list[Candidate]:
    """What is tried. sizes: numbers of a vector that are kept, the whole first."""
    found = [Candidate("flat", {"dtype": "float32"})]
    for size in sizes:
        cut = {} if size == source.whole_dim else {"dim": size}
        found += [Candidate("flat", {"dtype": dtype} | cut) for dtype in ("float16", "int8")]
        # An index that was cut is scored again with the whole vectors.
        scored = [{"rescore": factor, "rescore_dtype": "int8"} for factor in RESCORED]
        found += [Candidate("rabitq", {"bits": 1} | cut | more) for more in scored]
        found += [Candidate("rabitq", {"bits": 4, "rescore": 0} | cut), Candidate("rabitq", {"bits": 4} | cut | scored[0])]
        if len(source) >= LISTS_FROM:
            lists = {"num_lists": int(2 * len(source) ** 0.5)}
            found += [Candidate("rabitq", {"bits": 1} | lists | cut | more) for more in scored]
        if size % 8 == 0:
            found += [Candidate("pq", {"code_bytes": size // 8} | cut | more) for more in scored]
    return [*found, Candidate("ivf"), Candidate("hnsw")]


def _sizes(dim: int, model: Path | None) -> list[int]:
    """All numbers, half, a quarter, and what the model was trained to be cut to."""
    trained: tuple[int, ...] = ()
    if model is not None:
        from simlm.models.model_folder import read_model_folder

        trained = read_model_folder(str(model)).matryoshka
    return sorted({dim, *(size for size in (dim // 2, dim // 4, *trained) if 0 < size < dim)}, reverse=True)


@dataclass(frozen=True)
class _Queries:
    """Judged dev queries. vectors_QD: float32; qrels: of their places 0..Q-1."""

    vectors_QD: Floats
    qrels: dict[int, dict[int, int]]

    @classmethod
    def of(cls, store: Store, name: str, run: Path, model: Path | None, seed: int) -> _Queries:
        from simlm.models.retriever import load_retriever

        if "dev" not in store.splits:
            raise DataError(f"{run}: has no dev queries to measure on; add judged dev queries to the data and run the recipe again")
        qrels = {query: grades for query, grades in store.qrels("dev").items() if any(grade > 0 for grade in grades.values())}
        if not qrels:
            raise DataError(f"{run}: none of its dev queries has a relevant passage, so nothing can be measured on them")
        rows = sorted(qrels)
        if len(rows) > MOST_QUERIES:
            rows = sorted(np.random.default_rng([seed, 21]).choice(rows, MOST_QUERIES, replace=False).tolist())
        settings = EncodeSettings.model_validate(read_manifest(run / f"{name}_embeddings", "embeddings").settings)
        start = settings.model
        if model is not None:
            start = start.model_copy(update={"start": str(open_artifact(model, "model").path), "revision": None})
        retriever = load_retriever(start, precision=settings.precision, max_query_tokens=_query_tokens(store, model))
        table = store.queries("dev")
        return cls(retriever.encode_queries([table.text(row) for row in rows]), {place: qrels[row] for place, row in enumerate(rows)})


def _query_tokens(store: Store, model: Path | None) -> int:
    from simlm.models.model_folder import read_model_folder

    most = int(store.info["max_query_tokens"])
    return most if model is None else min(most, read_model_folder(str(model)).max_query_tokens or most)


class _Bench:
    """Builds and measures candidates in a folder of its own, one at a time."""

    def __init__(self, work: Path, vectors: Path, queries: _Queries, seed: int) -> None:
        self.work = work
        self.vectors = vectors
        self.source = SourceVectors(vectors)
        self.queries = queries
        self.seed = seed
        self._exact: dict[str, float] = {}

    def measure(self, wanted: list[Candidate], budget: int, progress: Progress) -> Iterator[Measured]:
        """The first is exact search in fp32, which the others are shares of."""
        built: tuple[Candidate, dict[str, Any], float] | None = None
        for candidate in progress.track(wanted, "candidates", total=len(wanted), unit="index"):
            least = self._least_bytes(candidate)
            if self._exact and least > budget:
                yield Measured(candidate, candidate.label, least, left_out="more memory than the budget")
                continue
            if built is None or built[0] != candidate.inner:
                started = time.perf_counter()
                info = self._build(candidate.inner)
                built = candidate.inner, info, time.perf_counter() - started
            yield self._measured(candidate, built[1], built[2])

    def _least_bytes(self, candidate: Candidate) -> int:
        """What an index of this kind takes at the least: its codes."""
        numbers, options = candidate.options.get("dim", self.source.whole_dim), candidate.options
        bits = {"float16": 16, "int8": 8}.get(options.get("dtype", ""), 32) * numbers
        if candidate.type == "rabitq":
            bits = options["bits"] * numbers
        elif candidate.type == "pq":
            bits = 8 * options["code_bytes"]
        return int(len(self.source) * bits // 8)

    def _build(self, inner: Candidate) -> dict[str, Any]:
        folder = self.work / "index"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return build_vectors(inner.type, self.vectors, folder, options=inner.options, seed=self.seed) | {"type": inner.type}

    def _measured(self, candidate: Candidate, info: dict[str, Any], seconds: float) -> Measured:
        index: Index = index_class(candidate.type)(self.work / "index", info)
        disk = sum(file.stat().st_size for file in (self.work / "index").iterdir())
        if candidate.options.get("rescore"):
            extra = self._rescoring(candidate.options["rescore_dtype"])
            disk += sum(file.stat().st_size for file in (extra / rescoring.FOLDER).iterdir())
            index = rescoring.RescoredIndex(index, extra, info | {"rescore": candidate.options["rescore"]})
        with _one_core():
            measures = self._quality(index)
            times = self._times(index)
        self._exact = self._exact or measures
        p50, p95 = (round(float(value), 3) for value in np.percentile(times, [50, 95]))
        return Measured(
            candidate,
            candidate.label,
            int(info["resident_bytes"]),
            disk,
            round(seconds, 3),
            {name: round(value, 6) for name, value in measures.items()},
            round(min(value / self._exact[name] if self._exact[name] else 1.0 for name, value in measures.items()), 6),
            p50,
            p95,
        )

    def _rescoring(self, dtype: str) -> Path:
        """Folder that holds the whole vectors in this precision; written once."""
        folder = self.work / dtype
        if not folder.is_dir():
            folder.mkdir()
            store_vectors(self.source, folder / rescoring.FOLDER, dtype)
        return folder

    def _quality(self, index: Index) -> dict[str, float]:
        scores_QK, rows_QK = index.search(self.queries.vectors_QD, min(DEPTH, len(index)))
        found = Run.from_matrix("dev", np.arange(len(rows_QK), dtype=np.int64), rows_QK, scores_QK)
        return measure_run(found, self.queries.qrels, MEASURES)

    def _times(self, index: Index) -> list[float]:
        """Milliseconds of each timed query. The first is asked twice, the first time for what is loaded on first use."""
        milliseconds = []
        for query_D in (self.queries.vectors_QD[0], *self.queries.vectors_QD[:TIMED_QUERIES]):
            started = time.perf_counter()
            index.search(query_D[None], min(DEPTH, len(index)))
            milliseconds.append((time.perf_counter() - started) * 1000)
        return milliseconds[1:]


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """While it lasts, torch and faiss compute on one core."""
    import faiss
    import torch

    threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads[0])
        torch.set_num_threads(threads[1])


def _vectors(run: Path, name: str) -> Path:
    """The run's passage vectors, checked against the index that was made of them."""
    embeddings = open_artifact(run / f"{name}_embeddings", "embeddings")
    built = read_manifest(run / f"{name}_index", "index")
    if built.inputs.get("embeddings") != embeddings.manifest.fingerprint:
        raise ArtifactError(
            f"{run / f'{name}_index'}: was made from earlier embeddings than those that are there now; run the recipe again"
        )
    return embeddings.file(build_index.VECTORS)


def _content(
    run: Path, name: str, found: list[Measured], chosen: Measured | None, queries: _Queries, *, budget: int, min_quality: float
) -> dict[str, Any]:
    exact = found[0]
    return {
        "run": run.name,
        "retriever": name,
        "budget_bytes": budget,
        "min_quality": min_quality,
        "num_queries": len(queries.vectors_QD),
        "measures": list(MEASURES),
        "exact": exact.measures,
        "exact_bytes": exact.resident_bytes,
        "chosen": chosen.label if chosen else None,
        "candidates": [asdict(row) | {"bytes_ratio": round(row.resident_bytes / exact.resident_bytes, 6)} for row in found],
    }


def _write_report(place: Path, content: dict[str, Any]) -> Path:
    builder = ArtifactBuilder(
        place, kind="report", stage="choose_index", code_version=VERSION, fingerprint=json_digest(["choice", content])
    )
    builder.begin()
    report.write_choice(builder.work, content)
    builder.finish(settings={}, inputs={}, seed=0, seconds=0.0, peak_memory_bytes=peak_memory_bytes())
    return place


def _build(run: Path, name: str, chosen: Candidate, seed: int, progress: Progress) -> Path:
    """The index, as the build_index step makes it, where searches look for it first."""
    settings = IndexSettings.model_validate({"type": chosen.type, "options": chosen.options})
    inputs = {"store": run / "store", "embeddings": run / f"{name}_embeddings"}
    fingerprints = {role: read_manifest(path).fingerprint for role, path in inputs.items()}
    builder = ArtifactBuilder(
        run / f"{name}{CHOSEN}",
        kind="index",
        stage="choose_index",
        code_version=VERSION,
        fingerprint=json_digest(["chosen", VERSION, settings.model_dump(), fingerprints, seed]),
    )
    builder.begin()
    started = time.monotonic()
    build_index.run(settings, inputs, Context(builder, seed, progress))
    seconds = time.monotonic() - started
    builder.finish(settings=settings.model_dump(), inputs=fingerprints, seed=seed, seconds=seconds, peak_memory_bytes=peak_memory_bytes())
    return builder.path
