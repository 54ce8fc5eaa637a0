"""The data loader of pre-training alone: passages and tokens a second of one worker, with masks, and memory at 8.8 million passages.

python benchmarks/loader.py [--folder FOLDER] [--passages 8841823] [--steps 30] [--needed-tokens-per-second 550000]

Writes a store of made-up passages (MS MARCO's number of them and about its length; random tokens, words of 1 to 3 tokens) below
--folder, as arrays, so that it takes a minute and not a day, and takes steps of shuffled passages from it as training does: each step
reads rows from all over the files. What the loader needs in memory of its own are the order of an epoch and a few passages; the mapped
files are the system's to keep or to drop. Prints the resident set as it goes and, last, one line of JSON:

passages_per_second, tokens_per_second     of one worker; tokens are those of the passages, special ones not counted
times_needed                               tokens_per_second / --needed-tokens-per-second, what training takes at once
first_step_seconds                         with drawing the order of the epoch
own_megabytes_start, own_megabytes_end     resident memory without the mapped files, after the first step and at the end
mapped_megabytes_end                       resident pages of files, libraries among them, which the system can drop
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simlm.data.store import INFO, Store
from simlm.data.tokens import Template

MEAN_TOKENS, MAX_TOKENS = 75, 144
VOCABULARY = 30_522
BLOCK = 1 << 18
"""Passages written at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the store is written, about 170 bytes a passage; default: the temporary folder")
    parser.add_argument("--passages", type=int, default=8_841_823)
    parser.add_argument("--passages-per-step", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--needed-tokens-per-second",
        type=float,
        default=550_000,
        help="what training takes; default: BERT-base (0.9 GFLOP a token) at half of the 990 TFLOP/s of an H100 in bf16",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simlm-loader-", dir=options.folder) as folder:
        started = time.perf_counter()
        write_store(Path(folder), options.passages)
        print(f"{options.passages:,} passages written in {time.perf_counter() - started:.0f} s, {folder_bytes(Path(folder)) / 1e9:.2f} GB")
        figures = measure(Path(folder), options)
    print(json.dumps(figures))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Take the steps; the figures of the last line."""
    from simlm.objectives.masking import Masking
    from simlm.objectives.steps import Feeding, PassageSteps, split_passages
    from simlm.objectives.views import PretrainViews

    table = Store(folder).passages
    views = PretrainViews(0.3, 0.5, sampled=True, masking=Masking())
    feeding = Feeding(table, views, options.micro_batch_tokens, token_types=True, seed=1)
    rows, _ = split_passages(len(table), 4096, seed=1)
    steps = PassageSteps(feeding, rows, passages_per_step=min(options.passages_per_step, len(rows)), num_steps=options.steps)

    started = time.perf_counter()
    steps.load(0, 0, 1)
    first = time.perf_counter() - started
    own_start, _ = resident()
    tokens, started = 0.0, time.perf_counter()
    for step in range(1, options.steps + 1):
        micro_batches = steps.load(step, 0, 1)
        tokens += micro_batches[0]["step_tokens"]
        if step % max(1, options.steps // 5) == 0:
            own, mapped = resident()
            rate = tokens / (time.perf_counter() - started)
            print(f"step {step}: {rate:,.0f} tokens/s, {own / 1e6:.0f} MB of its own, {mapped / 1e6:.0f} MB of mapped files", flush=True)
    seconds = time.perf_counter() - started
    own, mapped = resident()
    return {
        "passages": options.passages,
        "passages_per_second": round(options.steps * steps.passages_per_step / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "times_needed": round(tokens / seconds / options.needed_tokens_per_second, 2),
        "first_step_seconds": round(first, 2),
        "own_megabytes_start": round(own_start / 1e6, 1),
        "own_megabytes_end": round(own / 1e6, 1),
        "mapped_megabytes_end": round(mapped / 1e6, 1),
    }


def write_store(folder: Path, num_passages: int) -> None:
    """The files that `simlm.data.store.Table` maps, in blocks; ids and texts are left empty, since training reads neither."""
    template = packaged_template()
    passages = folder / "passages"
    passages.mkdir()
    rng = np.random.default_rng(0)
    end = 0
    spare = np.zeros(0, dtype=bool)
    names = ("tokens", "word_starts", "token_offsets", "title_tokens", "lengths")
    files = {name: open(passages / f"{name}.bin", "wb") for name in names}  # noqa: SIM115
    np.zeros(1, dtype="<i8").tofile(files["token_offsets"])
    for start in range(0, num_passages, BLOCK):
        size = min(BLOCK, num_passages - start)
        texts = np.clip(rng.gamma(6.0, MEAN_TOKENS / 6.0, size).astype(np.int64), 8, MAX_TOKENS - 16)
        titles = rng.integers(0, 9, size)
        counts = texts + titles
        bits = np.concatenate([spare, word_starts(rng, int(counts.sum()))])
        whole = len(bits) - len(bits) % 8
        spare = bits[whole:]
        rng.integers(1000, VOCABULARY, int(counts.sum()), dtype=np.uint16).tofile(files["tokens"])
        np.packbits(bits[:whole], bitorder="little").tofile(files["word_starts"])
        offsets = end + np.cumsum(counts)
        end = int(offsets[-1])
        offsets.astype("<i8").tofile(files["token_offsets"])
        titles.astype("<u2").tofile(files["title_tokens"])
        special = np.where(titles > 0, template.num_pair, template.num_single)
        np.minimum(counts + special, MAX_TOKENS).astype("<i4").tofile(files["lengths"])
    np.packbits(spare, bitorder="little").tofile(files["word_starts"])
    for file in files.values():
        file.close()
    for name in ("ids", "id_offsets", "id_hashes", "id_rows", "text", "text_offsets", "title_bytes"):
        (passages / f"{name}.bin").touch()
    info = {
        "template": template.__dict__,
        "token_dtype": "<u2",
        "heads": False,
        "max_passage_tokens": MAX_TOKENS,
        "max_query_tokens": 32,
        "queries": {},
        "tables": {},
    }
    (folder / INFO).write_text(json.dumps(info), encoding="utf-8")


def word_starts(rng: np.random.Generator, count: int) -> NDArray[np.bool_]:
    """About three of four tokens begin a word, as in English text."""
    starts: NDArray[np.bool_] = rng.random(count, dtype=np.float32) < 0.75
    return starts


def packaged_template() -> Template:
    from simlm.models.backbone import load_tokenizer

    return Template.of(load_tokenizer("packaged:all-MiniLM-L6-v2"))


def resident() -> tuple[int, int]:
    """(anonymous memory, pages of files) of this process that are resident, in bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["RssFile"]


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
