"""Mining search: our exact streamed search against brute force in numpy, on the same vectors, in one run.

python benchmarks/mining.py [--queries 80000] [--passages 20000] [--dim 384] [--depth 200] [--memory-budget 256]

Vectors are seeded random ones of unit length; the passages lie on disk and are memory-mapped, the queries are made block by block. Brute
force is one matrix product, argpartition and argsort for all queries, or for blocks of 4,096 where the whole matrix and its row numbers
would take more than half of the free memory (`--brute-block` sets the block). Each contestant runs in a process of its own, so that each
has its own peak of memory; `--rounds` are interleaved and the best time counts. Prints a table and, last, one line of JSON: seconds,
brute_seconds, peak_bytes, brute_peak_bytes, speedup, recall (share of our passages that brute force has too, or that score as its last).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlm.runtime import tune_allocator

if TYPE_CHECKING:
    import numpy as np

SHARD_QUERIES = 4096
"""As the search stage takes them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=80_000)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=200)
    parser.add_argument("--memory-budget", type=int, default=256, help="MiB, of ours")
    parser.add_argument("--brute-block", type=int, default=0, help="queries of one product of brute force; 0 = as many as fit")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contestant", choices=["ours", "brute"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(run_contestant(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        report(options, compare(options))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of both contestants; their results are left in the folder."""
    import numpy as np

    np.save(options.folder / "vectors.npy", unit_vectors(0, options.passages, options.dim))
    figures: dict[str, dict[str, Any]] = {}
    for number in range(options.rounds):
        for name in ("ours", "brute")[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name, "--folder", str(options.folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if name not in figures or found["seconds"] < figures[name]["seconds"]:
                figures[name] = found
    return {
        "seconds": round(figures["ours"]["seconds"], 2),
        "brute_seconds": round(figures["brute"]["seconds"], 2),
        "speedup": round(figures["brute"]["seconds"] / figures["ours"]["seconds"], 3),
        "peak_bytes": figures["ours"]["peak_bytes"],
        "brute_peak_bytes": figures["brute"]["peak_bytes"],
        "brute_block": figures["brute"]["block"],
        "recall": recall(options),
    }


def recall(options: argparse.Namespace) -> float:
    import numpy as np

    found = {
        (name, part): np.load(options.folder / f"{name}-{part}.npy", mmap_mode="r")
        for name in ("ours", "brute")
        for part in ("scores", "rows")
    }
    hits = 0
    for start in range(0, options.queries, SHARD_QUERIES):
        part = slice(start, start + SHARD_QUERIES)
        own, theirs = (
            found[name, "rows"][part] + np.arange(len(found[name, "rows"][part]))[:, None] * options.passages for name in ("ours", "brute")
        )
        # At the cut a passage may be replaced by one that scores the same to the last bit but one.
        even = np.abs(found["ours", "scores"][part] - found["brute", "scores"][part][:, -1:]) < 1e-6
        hits += int((np.isin(own, theirs) | even).sum())
    return hits / int(found["ours", "rows"].size)


def report(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.queries:,} queries x {options.passages:,} passages x {options.dim}, best {options.depth}; {os.cpu_count()} cores, "
        f"best of {options.rounds}",
        title_justify="left",
    )
    for column in ("", "seconds", "peak memory above the start, MiB", "recall"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        (f"simlm, budget {options.memory_budget} MiB", "seconds", "peak_bytes", f"{figures['recall']:.6f}"),
        (f"numpy, {figures['brute_block']:,} queries at once", "brute_seconds", "brute_peak_bytes", ""),
    )
    for name, seconds, peak, found in rows:
        table.add_row(name, f"{figures[seconds]:.2f}", f"{figures[peak] / 2**20:.0f}", found)
    Console(width=120).print(table)
    print(json.dumps(figures | {"queries": options.queries, "passages": options.passages, "dim": options.dim, "depth": options.depth}))


def run_contestant(options: argparse.Namespace) -> dict[str, Any]:
    """Search all queries; seconds, and bytes of memory above what the process had before, results included."""
    import numpy as np

    from simlm.artifacts import peak_memory_bytes, reset_peak_memory
    from simlm.index.flat import FlatIndex
    from simlm.runtime import release_memory, resident_bytes

    tune_allocator()
    index = FlatIndex(options.folder, {"dim": options.dim})
    block = SHARD_QUERIES if options.contestant == "ours" else brute_block(options)
    index.search(unit_vectors(1, 8, options.dim), options.depth)
    kept = {
        part: np.lib.format.open_memmap(
            options.folder / f"{options.contestant}-{part}.npy", mode="w+", dtype=dtype, shape=(options.queries, options.depth)
        )
        for part, dtype in (("scores", np.float32), ("rows", np.int64))
    }
    release_memory()
    reset_peak_memory()
    before = resident_bytes()
    seconds = 0.0
    for start in range(0, options.queries, block):
        queries_QD = unit_vectors(1, options.queries, options.dim, start, start + block)
        started = time.perf_counter()
        if options.contestant == "ours":
            scores, rows = index.search(queries_QD, options.depth, memory_bytes=options.memory_budget * 2**20)
        else:
            scores, rows = brute_force(queries_QD, index.vectors.block(0, options.passages), options.depth)
        seconds += time.perf_counter() - started
        kept["scores"][start : start + block], kept["rows"][start : start + block] = scores, rows
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes() - before, "block": min(block, options.queries)}


def brute_force(queries_QD: np.ndarray, passages_ND: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of the best, by one matrix of all scores."""
    import numpy as np

    scores_QN = queries_QD @ np.asarray(passages_ND).T
    rows = np.argpartition(scores_QN, -depth, axis=1)[:, -depth:]
    scores = np.take_along_axis(scores_QN, rows, axis=1)
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def brute_block(options: argparse.Namespace) -> int:
    """All queries where their matrix of scores, and of as many row numbers, fits in half of the free memory."""
    if options.brute_block:
        return int(options.brute_block)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    fits = options.queries * options.passages * (4 + 8) < free // 2
    return int(options.queries) if fits else SHARD_QUERIES


def unit_vectors(seed: int, count: int, dim: int, start: int = 0, stop: int | None = None, *, piece: int = 1024) -> np.ndarray:
    """float32 rows start..stop-1 of `count` random vectors of unit length; each piece of rows has its own seed."""
    import numpy as np

    stop = count if stop is None else min(stop, count)
    pieces = []
    for number in range(start // piece, -(-stop // piece)):
        vectors = np.random.default_rng([seed, number]).standard_normal((piece, dim), dtype=np.float32)
        pieces.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    first = start // piece * piece
    return np.concatenate(pieces)[start - first : stop - first]


if __name__ == "__main__":
    main()
