"""Passages a second of simlm's encoding against SentenceTransformer.encode, in one run, on the same texts and weights.

python benchmarks/encode.py [BEIR_FOLDER] [--passages 512]

Without a folder the texts are Python's own documentation. The order of the contestants turns round, and the best round of each
counts, because machines are noisy. Prints a table and, last, one line of JSON with fp32_speedup, fastest_speedup, min_cosine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from simlm.runtime import tune_allocator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a BEIR folder; default: python-docs")
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=144)
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's allocator as it is, for both")
    options = parser.parse_args()
    if not options.default_allocator:
        tune_allocator()

    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from sentence_transformers import SentenceTransformer

    from simlm.models.backbone import resolve_model
    from simlm.models.retriever import load_retriever

    texts = read_texts(options.folder, options.passages)
    start = "packaged:all-MiniLM-L6-v2"
    peer = SentenceTransformer(resolve_model(start), device="cpu")
    peer.max_seq_length = options.max_tokens
    fp32 = load_retriever(start, max_passage_tokens=options.max_tokens)
    auto = load_retriever(start, precision="auto", max_passage_tokens=options.max_tokens)
    contestants: dict[str, Callable[[], np.ndarray]] = {
        "sentence-transformers, default": lambda: peer.encode(texts, normalize_embeddings=True),
        "simlm, fp32": lambda: fp32.encode_passages(texts),
        "simlm, auto": lambda: auto.encode_passages(texts),
    }
    seconds = dict.fromkeys(contestants, float("inf"))
    vectors = {}
    for contestant in contestants.values():
        contestant()
    for number in range(options.rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            started = time.perf_counter()
            vectors[name] = contestants[name]()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    names = list(contestants)
    reference = vectors[names[0]]
    cosines = {name: float((vectors[name] * reference).sum(axis=1).min()) for name in names}
    table = Table(
        title=f"{len(texts)} passages, at most {options.max_tokens} tokens, best of {options.rounds} rounds", title_justify="left"
    )
    for column in ("", "passages/s", "times the peer", "lowest cosine to the peer"):
        table.add_column(column, justify="left" if not column else "right")
    for name in names:
        table.add_row(name, f"{len(texts) / seconds[name]:.0f}", f"{seconds[names[0]] / seconds[name]:.2f}", f"{cosines[name]:.6f}")
    Console(width=100).print(table)
    figures = {
        "fp32_speedup": round(seconds[names[0]] / seconds["simlm, fp32"], 3),
        "fastest_speedup": round(seconds[names[0]] / seconds["simlm, auto"], 3),
        "min_cosine": round(min(cosines.values()), 6),
        "passages_per_second": {name: round(len(texts) / seconds[name], 1) for name in names},
    }
    print(json.dumps(figures))


def read_texts(folder: Path | None, number: int) -> list[str]:
    """A fixed sample of passages."""
    import random

    if folder is None:
        from simlm.data.python_docs import collect

        texts = [passage.body for passage in collect(["stdlib", "numpy"]).passages]
    else:
        from simlm.data.datasets import open_dataset
        from simlm.data.formats import BadRecords
        from simlm.recipe import DataSettings

        loader = open_dataset(DataSettings(dataset="beir", path=str(folder)))
        texts = [passage.text for _, passage in loader.passages(BadRecords("skip"))]
    return random.Random(0).sample(texts, min(number, len(texts)))


if __name__ == "__main__":
    main()
