"""Compact indexes against exact search, usearch and voyager: quality, memory, time, in one run.

python benchmarks/search.py [--work FOLDER] [--folders squad,medquad]   passages of squad and medquad, encoded by the packaged MiniLM
python benchmarks/search.py --scale 8.8M [--work FOLDER]                made-up vectors of 768 numbers with the statistics of those

The first run encodes the passages, which takes an hour or two of one core, and keeps their vectors in the work folder; later runs do not.
An interrupted run goes on where it was. Everything else in the work folder of a scale (up to 25 GB at 8.8M) is deleted by --clean.

Contestants, each built in a process of its own and searched in a fresh one, on one core:

faiss flat         exact, fp32: what quality, recall and bytes are set against
simlm rabitq       one bit a number, 4 x 100 candidates scored again with int8 vectors on disk; 10x: 10 x 100 candidates
simlm flat int8    8 bits a number, exact for those
usearch f32 | i8   HNSW with its defaults over float32, or over 8-bit integers
voyager f32 | e4m3 HNSW with its defaults over float32, or over 8-bit floats

Bytes are those of what a search goes through: the whole file of the others; of simlm's all files but the vectors that a few candidates are
scored again with, which stay on disk. What that leaves out shows in the growth of the resident set from before the index is
opened to after the last single query; pages of a mapped file that are in memory count in it. "cpu" times are of the processor, blind to
what else the machine does.
Quality is RR@10 and R@100 of test queries as shares of exact search's, recall is of the exact best 100.

The last line is JSON; over the data sets the worst of each:

bytes_ratio        bytes of flat fp32 / bytes of simlm rabitq
quality_ratio      the lower share of RR@10 and of R@100 (at a scale, where nothing is judged: null)
recall             of the exact best 100
resident_bytes     growth of the resident set
p95_milliseconds   of one query, from its vector to its results

Vectors of a scale: a passage is a real one (MiniLM, 384 numbers) with the difference of two of its 64 nearest neighbours, NOISE times as
long, added to it, so the noise has the directions in which real passages differ there. NOISE is such that two passages made of the same one
are about as alike as a real one and its nearest neighbour. The sum goes through a fixed orthonormal map from 384 to 768 numbers, which
leaves all inner products as they are, and isotropic noise, ISOTROPIC times as long, makes it of full rank. Queries are real test queries,
through the same map. docs/performance.md has the statistics of real and made-up vectors side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simlm.types import Split

START = "packaged:all-MiniLM-L6-v2"
SEED = 0
CHUNK = 1024
QUERIES: dict[Split, int] = {"dev": 600, "test": 1800}
MAX_TOKENS = 64
DEPTH = 100
TIMED_QUERIES = 500
FLAT, OURS = "faiss flat", "simlm rabitq"
SIMLM: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("rabitq", {"rescore": 4}),
    "simlm rabitq 10x": ("rabitq", {"rescore": 10}),
    "simlm flat int8": ("flat", {"dtype": "int8"}),
}
CONTESTANTS = [FLAT, *SIMLM, "usearch f32", "usearch i8", "voyager f32", "voyager e4m3"]
BLOCK = 65_536
DIM = 768
NOISE, ISOTROPIC, NEIGHBOURS = 0.57, 0.15, 64
SCALE_QUERIES = 500
LISTS = 4096
"""At 8.8M; fewer in proportion to the root of the size."""
PROBES, QUERY_BITS = 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SIMLM_DATA", "../shared/data")), help="where the BEIR folders are"
    )
    parser.add_argument("--folders", default="squad,medquad", help="names of BEIR folders")
    parser.add_argument("--work", type=Path, default=Path("../search-benchmark"), help="for vectors and indexes; outside the repository")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--scale", help="made-up vectors, so many: 880k, 8.8M")
    parser.add_argument("--rescore", type=int, default=4, help="of a scale: candidates scored again, times the depth")
    parser.add_argument("--probes", type=int, default=PROBES, help="of a scale: clusters searched")
    parser.add_argument("--clean", action="store_true", help="delete what a scale has written, and stop")
    parser.add_argument("--worker", choices=["build", "search"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    figures = at_scale(options) if options.scale else on_real_ones(options)
    if figures:
        print(json.dumps(figures))


def on_real_ones(options: argparse.Namespace) -> dict[str, Any]:
    """Every contestant on every data set; prints a table each."""
    worst: list[dict[str, Any]] = []
    everything: dict[str, Any] = {}
    for name in options.folders.split(","):
        place = encoded(options.data / name, options.work)
        rows = {contestant: contest(contestant, place, options) for contestant in options.only.split(",")}
        rows = {contestant: row for contestant, row in rows.items() if row}
        for row in rows.values():
            row["bytes_ratio"] = rows[FLAT]["bytes"] / row["bytes"]
            row["quality_ratio"] = min(row["rr_10"] / rows[FLAT]["rr_10"], row["r_100"] / rows[FLAT]["r_100"])
        print_table(name, rows)
        worst.append(rows[OURS])
        everything[name] = {contestant: {key: round(value, 4) for key, value in row.items()} for contestant, row in rows.items()}
    return {
        "bytes_ratio": round(min(row["bytes_ratio"] for row in worst), 2),
        "quality_ratio": round(min(row["quality_ratio"] for row in worst), 4),
        "resident_bytes": max(row["resident_bytes"] for row in worst),
        "p95_milliseconds": round(max(row["p95"] for row in worst), 3),
        "recall": round(min(row["recall"] for row in worst), 4),
        "all": everything,
    }


def at_scale(options: argparse.Namespace) -> dict[str, Any]:
    """Vectors of a scale: made, indexed, searched; each part once, resumed."""
    count = parse_count(options.scale)
    place = options.work / f"scale-{count}"
    if options.clean:
        shutil.rmtree(place, ignore_errors=True)
        return {}
    place.mkdir(exist_ok=True)
    make_vectors(place, count, [options.work / name for name in options.folders.split(",")])
    if not (place / "built.json").exists():
        part("build", OURS, place, options)
    built = json.loads((place / "built.json").read_text(encoding="utf-8"))
    # Once with what the system happens to hold, once after it was told to drop the files.
    found = {"warm": part("search", OURS, place, options)}
    for file in [path for path in (place / "index" / OURS).rglob("*") if path.is_file()]:
        drop(file)
    found["cold"] = part("search", OURS, place, options)
    for state, row in found.items():
        print(f"{state}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    warm = found["warm"]
    return {
        "bytes_ratio": round(count * DIM * 4 / warm["bytes"], 2),
        "quality_ratio": None,
        "resident_bytes": max(row["resident_bytes"] for row in found.values()),
        "p95_milliseconds": round(warm["p95"], 3),
        "recall": round(warm["recall"], 4),
        "passages": count,
        "open_seconds": round(warm["open_seconds"], 3),
        "open_seconds_all_digests": round(warm["open_seconds_all_digests"], 3),
        "p95_milliseconds_of_processor": round(warm["cpu_p95"], 3),
        "p95_milliseconds_cold": round(found["cold"]["p95"], 3),
        "build_seconds": built["seconds"],
        "build_peak_bytes": built["peak_bytes"],
        "disk_bytes": warm["disk_bytes"],
    }


def parse_count(text: str) -> int:
    return int(float(text.rstrip("kM")) * {"k": 1000, "M": 1_000_000}.get(text[-1], 1))


def print_table(name: str, rows: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: {rows[FLAT]['passages']:,.0f} passages, one core", title_justify="left")
    columns = (
        "",
        "MB",
        "of flat",
        "on disk",
        "resident",
        "RR@10",
        "R@100",
        "recall",
        "build s",
        "open ms",
        "p50 ms",
        "p95 ms",
        "cpu p95",
        "queries/s",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for contestant, row in rows.items():
        sizes = [
            f"{row['bytes'] / 1e6:.2f}",
            f"1/{row['bytes_ratio']:.1f}",
            f"{row['disk_bytes'] / 1e6:.1f}",
            f"{row['resident_bytes'] / 1e6:.1f}",
        ]
        shares = [f"{row[key] / rows[FLAT][key]:.4f}" for key in ("rr_10", "r_100")]
        times = [f"{row['build_seconds']:.1f}", f"{row['open_seconds'] * 1000:.0f}", f"{row['p50']:.2f}", f"{row['p95']:.2f}"]
        times += [f"{row['cpu_p95']:.2f}"]
        table.add_row(contestant, *sizes, *shares, f"{row['recall']:.4f}", *times, f"{row['queries_per_second']:.0f}")
    Console(width=150).print(table)


# --- vectors --------------------------------------------------------------------------------------------------------------------------


def encoded(folder: Path, work: Path) -> Path:
    """Folder with passages.npy and, for each split, SPLIT.npy and SPLIT.json ([[relevant rows], ...]) of a BEIR folder.

    Encoded once and kept in `work`, chunk by chunk, so that an interrupted run goes on.
    """
    place = work / folder.name
    wanted = [place / name for split in QUERIES for name in (f"{split}.npy", f"{split}.json")]
    if all(file.exists() for file in [place / "passages.npy", *wanted]):
        return place
    from simlm.data.datasets import open_dataset
    from simlm.data.formats import BadRecords
    from simlm.models.retriever import load_retriever
    from simlm.recipe import DataSettings

    place.mkdir(parents=True, exist_ok=True)
    loader = open_dataset(DataSettings(dataset="beir", path=str(folder)))
    passages = [passage for _, passage in loader.passages(BadRecords("skip"))]
    rows = {passage.passage_id: row for row, passage in enumerate(passages)}
    retriever = load_retriever(START, precision="fast", device="cpu", max_passage_tokens=MAX_TOKENS)
    for split, most in QUERIES.items():
        if (place / f"{split}.json").exists():
            continue
        relevant: dict[str, list[int]] = {}
        for _, qrel in loader.qrels(split, BadRecords("skip")):
            if qrel.grade > 0 and qrel.passage_id in rows:
                relevant.setdefault(qrel.query_id, []).append(rows[qrel.passage_id])
        texts = {query.query_id: query.text for _, query in loader.queries(split, BadRecords("skip")) if query.query_id in relevant}
        chosen = random.Random(SEED).sample(sorted(texts), min(most, len(texts)))
        np.save(place / f"{split}.npy", retriever.encode_queries([texts[name] for name in chosen]))
        (place / f"{split}.json").write_text(json.dumps([relevant[name] for name in chosen]), encoding="utf-8")
    parts = []
    for start in range(0, len(passages), CHUNK):
        chunk = place / f"part-{start:07d}.npy"
        if not chunk.exists():
            vectors = retriever.encode_passages(passages[start : start + CHUNK])
            save(chunk, vectors)
            print(f"{folder.name}: {start + len(vectors):,} of {len(passages):,} passages encoded", file=sys.stderr, flush=True)
        parts.append(np.load(chunk))
    save(place / "passages.npy", np.concatenate(parts))
    for chunk in place.glob("part-*.npy"):
        chunk.unlink()
    return place


def make_vectors(place: Path, count: int, sources: list[Path]) -> None:
    """passages.npy (float16), test.npy and the exact best rows of each query, best.npy; goes on after the last block that is there."""
    file, done = place / "passages.npy", place / "made.npz"
    if (place / "best.npy").exists():
        return
    real_ND = np.concatenate([np.load(source / "passages.npy") for source in sources])
    queries_QE = np.concatenate([np.load(source / "test.npy") for source in sources])
    rng = np.random.default_rng([SEED, 0])
    lift_ED = np.linalg.qr(rng.standard_normal((DIM, real_ND.shape[1])))[0].T.astype(np.float32)
    queries_QD = unit(queries_QE[rng.choice(len(queries_QE), SCALE_QUERIES, replace=False)] @ lift_ED)
    if not file.exists():
        save(place / "test.npy", queries_QD)
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(count, DIM)).flush()
    vectors_ND = np.lib.format.open_memmap(file, mode="r+")
    header = vectors_ND.offset
    del vectors_ND
    start, scores_QK, rows_QK = 0, np.empty((SCALE_QUERIES, 0), np.float32), np.empty((SCALE_QUERIES, 0), np.int64)
    if done.exists():
        with np.load(done) as state:
            start, scores_QK, rows_QK = int(state["start"]), state["scores"], state["rows"]
    neighbours_NK = nearest(real_ND, place / "neighbours.npy")
    while start < count:
        block_PD = made_block(real_ND, neighbours_NK, lift_ED, start, min(BLOCK, count - start)).astype(np.float16)
        # Written, not mapped: mapped pages would count as this process's memory.
        with open(file, "r+b") as output:
            output.seek(header + start * DIM * 2)
            output.write(block_PD.tobytes())
        scores_QP = queries_QD @ block_PD.astype(np.float32).T
        scores_QK, rows_QK = merged(scores_QK, rows_QK, scores_QP, start)
        start += len(block_PD)
        np.savez(place / ".made.npz", start=start, scores=scores_QK, rows=rows_QK)
        os.replace(place / ".made.npz", done)
        print(f"{start:,} of {count:,} vectors made", file=sys.stderr, flush=True)
    save(place / "best.npy", rows_QK)


def made_block(real_ND: Any, neighbours_NK: Any, lift_ED: Any, start: int, size: int) -> Any:
    """float32 [size, DIM], unit length; depends on `start` alone."""
    rng = np.random.default_rng([SEED, 1, start])
    seeds_P = rng.integers(0, len(real_ND), size)
    left, right = (real_ND[neighbours_NK[seeds_P, rng.integers(0, NEIGHBOURS, size)]] for _ in range(2))
    mixed_PE = unit(real_ND[seeds_P] + NOISE * unit(left - right))
    noise_PD = unit(rng.standard_normal((size, DIM), dtype=np.float32))
    return unit(mixed_PE @ lift_ED + ISOTROPIC * noise_PD)


def nearest(real_ND: Any, file: Path) -> Any:
    """int64 [N, NEIGHBOURS]: the nearest other passages of each; kept in a file."""
    if not file.exists():
        found = []
        for start in range(0, len(real_ND), CHUNK):
            scores_PN = real_ND[start : start + CHUNK] @ real_ND.T
            scores_PN[np.arange(len(scores_PN)), np.arange(start, start + len(scores_PN))] = -np.inf
            found.append(np.argpartition(-scores_PN, NEIGHBOURS, axis=1)[:, :NEIGHBOURS].copy())
        save(file, np.concatenate(found))
    return np.load(file)


def merged(scores_QK: Any, rows_QK: Any, scores_QP: Any, start: int) -> tuple[Any, Any]:
    """The best DEPTH of those so far and of a block that begins at row `start`."""
    near_QK = np.argpartition(-scores_QP, DEPTH, axis=1)[:, :DEPTH]
    scores = np.concatenate([scores_QK, np.take_along_axis(scores_QP, near_QK, axis=1)], axis=1)
    rows = np.concatenate([rows_QK, near_QK + start], axis=1)
    order = np.lexsort((rows, -scores), axis=-1)[:, :DEPTH]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def unit(vectors: Any) -> Any:
    """At unit length; zeros stay."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def save(file: Path, array: Any) -> None:
    temporary = file.with_name(f".{file.name}")
    np.save(temporary, array)
    os.replace(temporary, file)


def drop(file: Path) -> None:
    """Ask the system to keep no pages of a file in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# --- contestants: a process to build and a process to search --------------------------------------------------------------------------


def contest(name: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a contestant is like on one data set; empty if its library is not installed."""
    built = part("build", name, place, options)
    if "skipped" in built:
        print(f"{name}: left out: {built['skipped']}", file=sys.stderr)
        return {}
    return {"build_seconds": built["seconds"]} | part("search", name, place, options)


def part(which: str, name: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", which, "--only", name, "--work", str(place)]
    command += ["--rescore", str(options.rescore), "--probes", str(options.probes)]
    command += ["--scale", options.scale] if options.scale else []
    # The build of a scale has all cores, everything else has one.
    threads = {} if options.scale and which == "build" else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def worker(options: argparse.Namespace) -> None:
    place: Path = options.work
    name: str = options.only
    try:
        answer = build(name, place, options) if options.worker == "build" else search(name, place, options)
    except ImportError as error:
        answer = {"skipped": str(error)}
    print(json.dumps(answer))


def build(name: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder = place / "index" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if name in SIMLM:
        build_simlm(name, place, folder, options)
    else:
        folder.mkdir()
        BUILDERS[name](np.load(place / "passages.npy"), folder / "index")
    answer = {"seconds": round(time.perf_counter() - started, 2), "peak_bytes": memory("VmHWM")}
    (place / "built.json").write_text(json.dumps(answer), encoding="utf-8")
    return answer


def build_simlm(name: str, place: Path, folder: Path, options: argparse.Namespace) -> None:
    from simlm.artifacts import build_artifact, write_json
    from simlm.index import INFO, build_vectors

    kind, chosen = SIMLM[name]
    if options.scale:
        lists = max(int(LISTS * (parse_count(options.scale) / 8_800_000) ** 0.5), 16)
        chosen = chosen | {"num_lists": lists, "num_probes": min(options.probes, lists), "query_bits": QUERY_BITS}
    with build_artifact(folder, kind="index") as builder:
        info = build_vectors(kind, place / "passages.npy", builder.work, options=chosen, seed=SEED)
        write_json(builder.work / INFO, info | {"type": kind, "store_fingerprint": ""})


def build_faiss(vectors_ND: Any, file: Path) -> None:
    import faiss

    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    index.add(vectors_ND)
    faiss.write_index(index, str(file))


def build_usearch(dtype: str) -> Callable[[Any, Path], None]:
    def build(vectors_ND: Any, file: Path) -> None:
        from usearch.index import Index

        index = Index(ndim=vectors_ND.shape[1], metric="ip" if dtype == "f32" else "cos", dtype=dtype)
        index.add(np.arange(len(vectors_ND)), vectors_ND, threads=1)
        index.save(str(file))

    return build


def build_voyager(dtype: str) -> Callable[[Any, Path], None]:
    def build(vectors_ND: Any, file: Path) -> None:
        import voyager

        kinds = {"f32": voyager.StorageDataType.Float32, "e4m3": voyager.StorageDataType.E4M3}
        index = voyager.Index(voyager.Space.Cosine, num_dimensions=vectors_ND.shape[1], storage_data_type=kinds[dtype])
        index.add_items(vectors_ND, num_threads=1)
        index.save(str(file))

    return build


BUILDERS: dict[str, Callable[[Any, Path], None]] = {
    FLAT: build_faiss,
    "usearch f32": build_usearch("f32"),
    "usearch i8": build_usearch("i8"),
    "voyager f32": build_voyager("f32"),
    "voyager e4m3": build_voyager("e4m3"),
}

Search = Callable[[Any, int], Any]
"""(queries [Q, D], depth) -> rows [Q, depth]"""


def open_simlm(name: str, folder: Path, options: argparse.Namespace) -> Search:
    from simlm.index import open_index

    index: Any = open_index(folder, verify="parsed")
    if options.scale:
        index.info |= {"rescore": options.rescore, "num_probes": options.probes}
        index.candidates.info |= {"num_probes": options.probes}
    return lambda queries_QD, depth: index.search(queries_QD, depth)[1]


def open_other(name: str, file: Path) -> Search:
    if name == FLAT:
        import faiss

        flat = faiss.read_index(str(file))
        return lambda queries_QD, depth: flat.search(queries_QD, depth)[1]
    if name.startswith("usearch"):
        from usearch.index import Index

        index: Any = Index.restore(str(file))
        return lambda queries_QD, depth: np.asarray(index.search(queries_QD, depth, threads=1).keys).reshape(len(queries_QD), -1)
    import voyager

    graph = voyager.Index.load(str(file))
    return lambda queries_QD, depth: graph.query(queries_QD, depth, num_threads=1, query_ef=max(depth, 10))[0]


def search(name: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder = place / "index" / name
    queries_QD = np.load(place / "test.npy")
    if name not in SIMLM:
        import_library(name)
    else:
        import_library("torch" if "flat" in name else "faiss")
    before, started = memory("VmRSS"), time.perf_counter()
    find = open_simlm(name, folder, options) if name in SIMLM else open_other(name, folder / "index")
    opened = time.perf_counter() - started
    find(queries_QD[:1], DEPTH)
    milliseconds, of_processor = [], []
    for place_of_query in range(min(TIMED_QUERIES, len(queries_QD))):
        started, cpu_started = time.perf_counter(), time.process_time()
        find(queries_QD[place_of_query : place_of_query + 1], DEPTH)
        milliseconds.append((time.perf_counter() - started) * 1000)
        of_processor.append((time.process_time() - cpu_started) * 1000)
    resident = memory("VmRSS") - before
    started = time.perf_counter()
    rows_QK = np.asarray(find(queries_QD, DEPTH)).astype(np.int64)
    seconds = time.perf_counter() - started
    p50, p95 = (float(value) for value in np.percentile(milliseconds, [50, 95]))
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    answer = {
        "bytes": sum(size for file, size in sizes.items() if not file.startswith("rescoring/")),
        "disk_bytes": sum(sizes.values()),
        "resident_bytes": resident,
        "open_seconds": opened,
        "p50": p50,
        "p95": p95,
        "cpu_p95": float(np.percentile(of_processor, 95)),
        "queries_per_second": len(queries_QD) / seconds,
        "recall": recall_of(rows_QK, place, queries_QD),
        "passages": len(np.load(place / "passages.npy", mmap_mode="r")),
    }
    return answer | (all_digests(folder) if options.scale else judged(rows_QK, place))


def import_library(name: str) -> None:
    """So that the library itself does not count as the index's memory."""
    import simlm.index  # noqa: F401

    __import__({"usearch": "usearch.index"}.get(name.split(maxsplit=1)[0], name.split(maxsplit=1)[0]))


def all_digests(folder: Path) -> dict[str, float]:
    """Opening with every file compared with its digest, vectors for rescoring too."""
    from simlm.index import open_index

    started = time.perf_counter()
    open_index(folder, verify="full")
    return {"open_seconds_all_digests": time.perf_counter() - started}


def recall_of(rows_QK: Any, place: Path, queries_QD: Any) -> float:
    if (place / "best.npy").exists():
        best_QK = np.load(place / "best.npy")
    else:
        best_QK = np.argsort(-(queries_QD @ np.load(place / "passages.npy").T), axis=1, kind="stable")[:, :DEPTH]
        save(place / "best.npy", best_QK)
    return float(np.mean([np.isin(best, rows).mean() for best, rows in zip(best_QK, rows_QK, strict=True)]))


def judged(rows_QK: Any, place: Path) -> dict[str, float]:
    relevant = [set(rows) for rows in json.loads((place / "test.json").read_text(encoding="utf-8"))]
    ranks = [
        next((rank for rank, row in enumerate(found[:10], start=1) if row in wanted), 0)
        for found, wanted in zip(rows_QK.tolist(), relevant, strict=True)
    ]
    recalls = [len(wanted.intersection(found)) / len(wanted) for found, wanted in zip(rows_QK.tolist(), relevant, strict=True)]
    return {"rr_10": float(np.mean([1 / rank if rank else 0.0 for rank in ranks])), "r_100": float(np.mean(recalls))}


def memory(field: str) -> int:
    """Bytes of a line of the process's status (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
