"""`simlm serve` under load: hybrid search over 100,000 passages with the packaged MiniLM, against a plain handler, in one run.

python benchmarks/serve.py --work FOLDER [--seconds 30] [--rate 20] [--index hnsw] [--soak-minutes 0] [--skip-plain]

FOLDER (outside the repository) keeps the run that is served: texts of squad, medquad and corpus-enwiki-part ($SIMLM_DATA, else
../shared/data), BM25 over all of them as they are. The vectors of --encoded passages are the model's (of 32 tokens at most, quicker to
make and as quick to search); those of the others are these with seeded noise, since encoding 100,000 passages takes half an hour and
what is measured here is time. --index: of the vectors, with its default options. Queries are real.

Load comes from a process of its own, which shares the cores with the server. At --rate it is open: requests leave when a Poisson
process says so, whatever the server does, and latency counts from that moment. Phases, after a warm-up:
rate       --rate requests a second for --seconds: p50, p95, p99
capacity   8 clients that ask again as soon as they are answered: requests a second
overload   twice the capacity, open, for --seconds: what is not 200 must be 429, every request must be answered, memory must stay
soak       --rate for --soak-minutes: resident memory of every minute

The plain handler is what one writes in an afternoon: FastAPI, SentenceTransformer.encode for the query, a matrix product over all
vectors, bm25s, reciprocal ranks fused; the same model, texts, queries and number of passages, in its own process, settings as they come.

Prints the figures of each phase as they come and, last, one line of JSON: p95_milliseconds (rate), requests_per_second (capacity), speedup
(capacity against the plain handler's), p95_speedup, cpu_milliseconds (processor time of the server for a request at --rate: blind to
what else the machine does), lost and errors (all phases together; 429 is no error), resident_bytes, growth_bytes (over the overload, or
the soak).
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(os.environ.get("SIMLM_DATA", "../shared/data"))
SETS = ("squad", "medquad", "corpus-enwiki-part")
START = "packaged:all-MiniLM-L6-v2"
NUM_PASSAGES = 100_000
CLIENTS = 8
SEED = 0
NOISE = 0.5
"""Length of the noise that is added to a vector of length 1."""
K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder outside the repository; kept for the next time")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--index", default="hnsw")
    parser.add_argument("--index-options", default="{}", help="as JSON")
    parser.add_argument("--encoded", type=int, default=20_000)
    parser.add_argument("--soak-minutes", type=float, default=0.0)
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument("--plain-server", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_server is not None:
        serve_plainly(options.work, options.plain_server)
    elif options.load is not None:
        print(json.dumps(asyncio.run(load(**json.loads(options.load)))))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    folder = prepare(options.work, options.encoded, options.index, json.loads(options.index_options))
    queries = options.work / "queries.json"
    with Server(
        [sys.executable, "-c", "from simlm.cli import main; main()", "serve", str(folder), "--port", "0", "--log-level", "warning"]
    ) as ours:
        phases = run_phases("simlm serve", ours, queries, options)
    rows = {"simlm serve": phases}
    if not options.skip_plain:
        with Server([sys.executable, __file__, "--work", str(options.work), "--plain-server", "0"]) as plain:
            rows["plain handler"] = run_phases("plain handler", plain, queries, options, overload=False)
    print(json.dumps(summary(rows)))


def summary(rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    ours, plain = rows["simlm serve"], rows.get("plain handler")
    last = ours.get("soak", ours["overload"])
    return {
        "p95_milliseconds": ours["rate"]["p95"],
        "requests_per_second": ours["capacity"]["per_second"],
        "speedup": plain and round(ours["capacity"]["per_second"] / plain["capacity"]["per_second"], 2),
        "p95_speedup": plain and round(plain["rate"]["p95"] / ours["rate"]["p95"], 2),
        "cpu_milliseconds": {name: found["rate"]["cpu_milliseconds"] for name, found in rows.items()},
        "lost": sum(values["lost"] for values in ours.values()),
        "errors": sum(values["errors"] for values in ours.values()),
        "resident_bytes": last["resident_bytes"],
        "growth_bytes": last["growth_bytes"],
    }


def run_phases(
    title: str, server: Server, queries: Path, options: argparse.Namespace, *, overload: bool = True
) -> dict[str, dict[str, Any]]:
    """The figures of each phase, printed as they come."""

    def phase(name: str, **wanted: Any) -> dict[str, Any]:
        before, busy = server.resident_bytes(), server.cpu_seconds()
        command = [sys.executable, __file__, "--work", str(options.work), "--load"]
        asked = json.dumps({"port": server.port, "queries": str(queries), **wanted})
        done = subprocess.run([*command, asked], stdout=subprocess.PIPE, text=True, check=True)
        found, after = json.loads(done.stdout), server.resident_bytes()
        milliseconds = round(1000 * (server.cpu_seconds() - busy) / max(found["answered"], 1), 1)
        found |= {"cpu_milliseconds": milliseconds, "resident_bytes": after, "growth_bytes": after - before}
        print(f"{title:14} {name:9} " + "  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
        return dict(found)

    phase("warm-up", seconds=5.0, clients=CLIENTS)
    found = {
        "rate": phase("rate", seconds=options.seconds, rate=options.rate),
        "capacity": phase("capacity", seconds=options.seconds / 2, clients=CLIENTS),
    }
    if overload:
        found["overload"] = phase("overload", seconds=options.seconds, rate=2 * found["capacity"]["per_second"])
        if options.soak_minutes:
            found["soak"] = phase("soak", seconds=60 * options.soak_minutes, rate=options.rate, watch=server.process.pid)
    return found


class Server:
    """A server process that says "http://127.0.0.1:PORT" when it listens, ready when /ready answers 200."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = 0

    def __enter__(self) -> Server:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "http://" in line:
                self.port = int(line.split("http://")[1].split()[0].rsplit(":", 1)[1])
                break
        else:
            raise SystemExit("the server did not start")
        while asyncio.run(ask_once(self.port)) != 200:
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


# --- load


@dataclass
class Seen:
    """Answers of a phase. milliseconds: of the accepted ones."""

    milliseconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    lost: int = 0


async def load(
    port: int, queries: str, seconds: float, rate: float | None = None, clients: int | None = None, watch: int | None = None
) -> dict[str, Any]:
    """Ask for some seconds, by a rate (open) or by a number of clients (closed), and say what came back."""
    texts = itertools.cycle(json.loads(Path(queries).read_text(encoding="utf-8")))
    seen, pool, memory = Seen(), Connections(port), list[int]()
    began = time.perf_counter()
    watching = asyncio.create_task(watch_memory(watch, memory)) if watch else None
    if clients is not None:
        await asyncio.gather(*(keep_asking(pool, texts, seen, began + seconds) for _ in range(clients)))
    else:
        await ask_by_rate(pool, texts, seen, began, seconds, rate or 1.0)
    took = time.perf_counter() - began
    if watching is not None:
        watching.cancel()
    return figures(seen, took) | ({"memory_mib": [round(number / 2**20) for number in memory]} if watch else {})


def figures(seen: Seen, took: float) -> dict[str, Any]:
    times = np.array(seen.milliseconds or [float("nan")])
    accepted, refused = seen.statuses[200], seen.statuses[429]
    return {
        "p50": round(float(np.percentile(times, 50)), 1),
        "p95": round(float(np.percentile(times, 95)), 1),
        "p99": round(float(np.percentile(times, 99)), 1),
        "answered": accepted,
        "refused": refused,
        "errors": seen.statuses.total() - accepted - refused,
        "lost": seen.lost,
        "per_second": round(accepted / took, 1),
    }


async def keep_asking(pool: Connections, texts: Iterator[str], seen: Seen, until: float) -> None:
    while time.perf_counter() < until:
        await ask(pool, next(texts), seen, time.perf_counter())


async def ask_by_rate(pool: Connections, texts: Iterator[str], seen: Seen, began: float, seconds: float, rate: float) -> None:
    rng, due, tasks = random.Random(SEED), began, []
    while True:
        due += rng.expovariate(rate)
        if due > began + seconds:
            break
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        tasks.append(asyncio.create_task(ask(pool, next(texts), seen, due)))
    await asyncio.gather(*tasks)


async def ask(pool: Connections, text: str, seen: Seen, due: float) -> None:
    try:
        status = await asyncio.wait_for(pool.post("/search", {"query": text, "k": K, "mode": "hybrid"}), 60)
    except (OSError, EOFError, TimeoutError):
        seen.lost += 1
        return
    seen.statuses[status] += 1
    if status == 200:
        seen.milliseconds.append((time.perf_counter() - due) * 1000)


async def watch_memory(pid: int, memory: list[int]) -> None:
    while True:
        memory.append(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(60)


class Connections:
    """Kept-alive connections; little more than the bytes of HTTP, so that the load costs the server's cores little."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection that the server has not closed for being idle; as every HTTP client does, others are dropped."""
        while self.idle:
            reader, writer = self.idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    async def post(self, path: str, body: dict[str, Any]) -> int:
        """Status of the answer, which is read to its end."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        reader, writer = self._open() or await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + content)
        headers = await reader.readuntil(b"\r\n\r\n")
        length = int(headers.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        self.idle.append((reader, writer))
        return int(headers.split(b" ", 2)[1])


async def ask_once(port: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1])


# --- the run that is served


def prepare(work: Path, encoded: int, index: Any, index_options: dict[str, Any]) -> Path:
    """The run's folder; what is there already is kept."""
    from simlm.artifacts import read_manifest
    from simlm.recipe import IndexSettings
    from simlm.stages import build_index

    folder = work / "run"
    folder.mkdir(parents=True, exist_ok=True)
    texts, queries = read_texts(), read_queries()
    (work / "queries.json").write_text(json.dumps(queries), encoding="utf-8")
    if not (folder / "store").is_dir():
        make_store(folder / "store", texts)
    if not (folder / "bm25").is_dir():
        make_step(folder / "bm25", build_index, IndexSettings(type="bm25"), {"store": folder / "store"})
    if not (folder / "start_embeddings").is_dir():
        make_embeddings(folder, texts, encoded)
    settings = IndexSettings(type=index, options=index_options)
    if not (folder / "start_index").is_dir() or read_manifest(folder / "start_index").settings != settings.model_dump():
        inputs = {"store": folder / "store", "embeddings": folder / "start_embeddings"}
        make_step(folder / "start_index", build_index, settings, inputs)
    return folder


def read_texts() -> list[dict[str, str]]:
    """The first 100,000 passages of the sets; ids carry the set's name."""
    found: list[dict[str, str]] = []
    for name in SETS:
        with gzip.open(DATA / name / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in itertools.islice(file, NUM_PASSAGES - len(found)):
                row = json.loads(line)
                found.append({"_id": f"{name}/{row['_id']}", "title": row.get("title", ""), "text": row["text"]})
    return found


def read_queries() -> list[str]:
    texts: list[str] = []
    for name in SETS[:2]:
        with gzip.open(DATA / name / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return random.Random(SEED).sample(texts, 5000)


def make_store(path: Path, texts: list[dict[str, str]]) -> None:
    from simlm.artifacts import build_artifact
    from simlm.data.store_writer import Row, StoreWriter
    from simlm.models.backbone import load_tokenizer

    with build_artifact(path, kind="store", stage="prepare") as builder:
        writer = StoreWriter(builder.work, load_tokenizer(START), max_passage_tokens=128, max_query_tokens=32)
        writer.write_passages(Row(row["_id"], row["text"], row["title"]) for row in texts)
        writer.finish()


def make_step(path: Path, stage: Any, settings: Any, inputs: dict[str, Path]) -> None:
    from simlm.artifacts import ArtifactBuilder, json_digest, read_manifest
    from simlm.progress import Progress
    from simlm.stages import Context

    fingerprints = {role: read_manifest(place).fingerprint for role, place in inputs.items()}
    fingerprint = json_digest([path.name, settings.model_dump(), fingerprints])
    builder = ArtifactBuilder(path, kind="index", stage=path.name, code_version=1, fingerprint=fingerprint)
    builder.begin()
    stage.run(settings, inputs, Context(builder, SEED, Progress()))
    builder.finish(settings=settings.model_dump(), inputs=fingerprints, seed=SEED, seconds=0.0, peak_memory_bytes=0)


def make_embeddings(folder: Path, texts: list[dict[str, str]], encoded: int) -> None:
    """Vectors of the model for every fifth passage or so, and those with noise for the rest."""
    from simlm.artifacts import ArtifactBuilder, json_digest, read_manifest
    from simlm.models.retriever import load_retriever
    from simlm.recipe import EncodeSettings, ModelSettings

    chosen = np.sort(np.random.default_rng(SEED).permutation(len(texts))[:encoded])
    retriever = load_retriever(START, precision="fast", max_passage_tokens=32)
    real = retriever.encode_passages([(texts[row]["title"], texts[row]["text"]) for row in chosen], progress=True)
    rng = np.random.default_rng(SEED + 1)
    vectors = real[rng.integers(0, encoded, len(texts))]
    noise = rng.standard_normal(vectors.shape, dtype=np.float32)
    vectors += NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[chosen] = real
    settings = EncodeSettings(precision="fp32").model_dump() | {"model": ModelSettings(start=START).model_dump()}
    inputs = {"store": read_manifest(folder / "store").fingerprint}
    fingerprint = json_digest(["embeddings", encoded, inputs])
    builder = ArtifactBuilder(folder / "start_embeddings", kind="embeddings", stage="encode", code_version=1, fingerprint=fingerprint)
    builder.begin()
    np.save(builder.work / "vectors.npy", vectors, allow_pickle=False)
    builder.finish(settings=settings, inputs=inputs, seed=SEED, seconds=0.0, peak_memory_bytes=0)


# --- the plain handler


def serve_plainly(work: Path, port: int) -> None:
    """What the server is compared with: nothing of simlm in it but the texts, vectors and model."""
    import bm25s
    import fastapi
    import Stemmer
    import uvicorn
    from sentence_transformers import SentenceTransformer

    from simlm.models.backbone import resolve_model

    texts = read_texts()
    vectors = np.load(work / "run" / "start_embeddings" / "vectors.npy")
    model = SentenceTransformer(resolve_model(START), device="cpu")
    stemmer = Stemmer.Stemmer("english")
    words = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    words.index(
        bm25s.tokenize([f"{row['title']} {row['text']}" for row in texts], stemmer=stemmer, show_progress=False), show_progress=False
    )
    app = fastapi.FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/search")
    def search(request: dict[str, Any]) -> dict[str, Any]:
        query = request["query"]
        scores = vectors @ model.encode(query, normalize_embeddings=True, show_progress_bar=False)
        dense = np.argpartition(-scores, 200)[:200]
        dense = dense[np.argsort(-scores[dense])]
        tokens = bm25s.tokenize(query, stemmer=stemmer, show_progress=False, return_ids=False)
        lexical, _ = words.retrieve(tokens, k=200, show_progress=False)
        fused: Any = Counter()
        for rows in (dense.tolist(), lexical[0].tolist()):
            for rank, row in enumerate(rows, start=1):
                fused[row] += 1 / (60 + rank)
        return {"hits": [texts[row] | {"score": score} for row, score in fused.most_common(request["k"])]}

    import socket

    # As uvicorn itself opens it: with the protocol named, so that small packets leave at once.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", port))
    listening.listen(128)
    print(f"http://127.0.0.1:{listening.getsockname()[1]} ", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
