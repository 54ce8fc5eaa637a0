"""Pairs a second of simlm's re-ranker against CrossEncoder.predict of sentence-transformers, in one run, on the same pairs and weights.

python benchmarks/rerank.py [BEIR_FOLDER] [--pairs 1024] [--device cpu|cuda]

Without a folder the pairs are summaries and texts of Python's own documentation and numpy's. Both start from the texts. The re-ranker is
all-MiniLM-L6-v2 with a fresh head: how fast it is does not depend on what it has learned. Each contestant is a process of its own, because
the allocator is set once a process; they take turns, in an order that turns round, and the best round of each counts, because machines are
noisy. Prints a table and, last, one line of JSON: speedup (to the peer as installed), speedup_same_allocator (to the peer with simlm's
allocator setting), largest_difference (of two logits of one pair) and logits_deviation (standard deviation over the pairs).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSTALLED, TUNED, OURS, AUTO = "sentence-transformers, as installed", "sentence-transformers, our allocator", "simlm, fp32", "simlm, auto"
HEAD_SCALE = 50.0
"""A fresh head's logits lie within hundredths of each other, a trained one's within several units."""
CONTESTANTS = (INSTALLED, TUNED, OURS, AUTO)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a BEIR folder; default: python-docs")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contend(options)
        return
    with tempfile.TemporaryDirectory() as work:
        compare(options, Path(work))


def compare(options: argparse.Namespace, work: Path) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    pairs = read_pairs(options.folder, options.pairs)
    (work / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    save_reranker(work / "model", options.max_tokens)
    arguments = [sys.executable, __file__, "--work", str(work), "--device", options.device]
    processes = {
        name: subprocess.Popen([*arguments, "--contestant", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in CONTESTANTS
    }
    seconds = dict.fromkeys(CONTESTANTS, float("inf"))
    for process in processes.values():
        ask(process, "warm up")
    for number in range(options.rounds):
        for name in CONTESTANTS[:: 1 if number % 2 == 0 else -1]:
            seconds[name] = min(seconds[name], ask(process=processes[name], word="score")["seconds"])
    told = {name: ask(process, "end") for name, process in processes.items()}
    scores = {name: np.load(work / f"{name}.npy") for name in CONTESTANTS}
    differences = {name: float(np.abs(scores[name] - scores[INSTALLED]).max()) for name in CONTESTANTS}
    table = Table(
        title=f"{len(pairs)} pairs, at most {options.max_tokens} tokens, {told[OURS]['device']}, best of {options.rounds} rounds",
        title_justify="left",
    )
    for column in ("", "precision", "pairs/s", "times the peer", "largest difference of a logit"):
        table.add_column(column, justify="left" if not column else "right")
    for name in CONTESTANTS:
        speed, gain = len(pairs) / seconds[name], seconds[INSTALLED] / seconds[name]
        table.add_row(name, told[name]["precision"], f"{speed:.0f}", f"{gain:.2f}", f"{differences[name]:.1e}")
    Console(width=120).print(table)
    figures = {
        "speedup": round(seconds[INSTALLED] / seconds[OURS], 3),
        "speedup_same_allocator": round(seconds[TUNED] / seconds[OURS], 3),
        "fastest_speedup": round(seconds[INSTALLED] / min(seconds[OURS], seconds[AUTO]), 3),
        "largest_difference": float(f"{differences[OURS]:.2e}"),
        "logits_deviation": round(float(scores[INSTALLED].std()), 3),
        "pairs_per_second": {name: round(len(pairs) / seconds[name], 1) for name in CONTESTANTS},
    }
    print(json.dumps(figures))


def ask(process: subprocess.Popen[str], word: str) -> dict[str, Any]:
    """Let a contestant do one thing while the others wait; what it answers."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{process.args!r}: ended without an answer to {word!r}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def contend(options: argparse.Namespace) -> None:
    """One contestant: scores all pairs whenever it is told to, and keeps the scores of the last time."""
    from simlm.runtime import tune_allocator

    if options.contestant != INSTALLED:
        tune_allocator()
    import numpy as np
    import torch

    pairs = [tuple(pair) for pair in json.loads((options.work / "pairs.json").read_text(encoding="utf-8"))]
    score, precision = scorer(options, pairs)
    scores = np.empty(0)
    for line in sys.stdin:
        answer: dict[str, Any] = {"precision": precision, "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU"}
        if line.strip() != "end":
            started = time.perf_counter()
            scores = score()
            answer["seconds"] = time.perf_counter() - started
        np.save(options.work / f"{options.contestant}.npy", scores)
        print(json.dumps(answer), flush=True)


def scorer(options: argparse.Namespace, pairs: list[tuple[str, str]]) -> tuple[Callable[[], Any], str]:
    model = str(options.work / "model")
    if options.contestant in (INSTALLED, TUNED):
        from sentence_transformers import CrossEncoder

        peer = CrossEncoder(model, device=options.device)
        return lambda: peer.predict(pairs), "fp32"
    from simlm.models.reranker import load_reranker

    ours = load_reranker(model, precision="fp32" if options.contestant == OURS else "auto", device=options.device)
    return lambda: ours.score_pairs(pairs), ours.precision


def save_reranker(folder: Path, max_tokens: int) -> None:
    import torch
    from torch import nn

    from simlm.models.backbone import load_tokenizer
    from simlm.models.crossencoder import CrossEncoder

    start = "packaged:all-MiniLM-L6-v2"
    model = CrossEncoder.from_encoder(start, seed=0)
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1][-1]
    with torch.no_grad():
        head.weight.mul_(HEAD_SCALE)
    model.save(folder, load_tokenizer(start), max_pair_tokens=max_tokens)


def read_pairs(folder: Path | None, number: int) -> list[tuple[str, str]]:
    """A fixed sample of passages, each with a query; natural lengths."""
    rng = random.Random(0)
    if folder is None:
        from simlm.data.python_docs import collect

        passages = [passage for passage in collect(["stdlib", "numpy"]).passages if passage.body]
        texts, queries = [passage.body for passage in passages], [passage.summary for passage in passages]
    else:
        from simlm.data.datasets import open_dataset
        from simlm.data.formats import BadRecords
        from simlm.recipe import DataSettings

        loader = open_dataset(DataSettings(dataset="beir", path=str(folder)))
        texts = [passage.text for _, passage in loader.passages(BadRecords("skip"))]
        queries = [query.text for _, query in loader.queries("test", BadRecords("skip"))]
    number = min(number, len(texts))
    return list(zip(rng.choices(queries, k=number), rng.sample(texts, number), strict=True))


if __name__ == "__main__":
    main()
