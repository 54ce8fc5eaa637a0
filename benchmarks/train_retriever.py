"""Speed and memory of training a retriever against the sentence-transformers trainer, in one run.

python benchmarks/train_retriever.py [--queries 64] [--group-size 8] [--pooling cls|mean] [--rounds 2]
python benchmarks/train_retriever.py --device cuda --bf16 --only plain,cached,ours,ours_dropout    # on a GPU, both sides in bf16

All train the same checkpoint (packaged MiniLM) on the same groups of squad ($SIMLM_DATA/squad, else ../shared/data/squad): a question, its
paragraph and random paragraphs, at their natural lengths up to --max-tokens, fp32 (or --bf16), AdamW, gradients clipped. Theirs is
SentenceTransformerTrainer with MultipleNegativesRankingLoss, and with its cached variant (default mini-batches of 32); ours is what
`simlm train-retriever` runs. Each contestant is a process of its own and they take turns, each round in another order, because machines
are noisy; a step is timed from the reading of its texts (theirs tokenises, ours reads its store) to the next one's.
Prints a table and, last, one line of JSON:

speedup                  ours / the faster of theirs as installed, in queries a second (medians over the rounds)
speedup_same_allocator   the same with their allocator set as ours is
speedup_same_dropout     as speedup, ours with the checkpoint's dropout, as theirs has it (--dropout changes that of ours alone)
memory_ratio             ours / their plain loss, of the highest resident set above that before the first step, default allocator
memory_ratio_total       the same of the whole resident set
out_of_memory            contestants that the system has killed, or that found too little memory on the GPU
queries_per_second       of each contestant
On a GPU memory is what torch has allocated there, in place of the resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START = "packaged:all-MiniLM-L6-v2"
SEED = 7
LEARNING_RATE = 2e-5
TEMPERATURE = 0.05
"""The default of their loss: scale 20."""


@dataclass(frozen=True)
class Contestant:
    """loss: "plain", "cached" (theirs) or "ours". tuned: allocator as simlm sets it. dropout: None = the checkpoint's own."""

    name: str
    loss: str
    tuned: bool
    dropout: float | None = None


CONTESTANTS = {
    "plain": Contestant("sentence-transformers, plain, as installed", "plain", tuned=False),
    "cached": Contestant("sentence-transformers, cached, as installed", "cached", tuned=False),
    "plain_tuned": Contestant("sentence-transformers, plain, allocator set", "plain", tuned=True),
    "cached_tuned": Contestant("sentence-transformers, cached, allocator set", "cached", tuned=True),
    "ours": Contestant("simlm", "ours", tuned=True),
    "ours_dropout": Contestant("simlm, the checkpoint's dropout", "ours", tuned=True),
}


@dataclass(frozen=True)
class Job:
    """What a worker is told at its start."""

    folder: str
    loss: str
    tuned: bool
    dropout: float | None
    queries: int
    group_size: int
    max_tokens: int
    max_query_tokens: int
    pooling: str
    micro_batch_tokens: int
    threads: int
    device: str
    bf16: bool


OUT_OF_MEMORY = 77
"""Exit status of a worker that found too little memory on the GPU."""


def main() -> None:
    options = parse_options()
    if options.worker:
        work(Job(**json.loads(options.worker)))
        return
    entered = {key: contestant for key, contestant in CONTESTANTS.items() if not options.only or key in options.only.split(",")}
    with tempfile.TemporaryDirectory(prefix="simlm-benchmark-") as folder:
        prepare(Path(folder), options)
        results = compete(entered, Path(folder), options)
    report(entered, results, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--queries", type=int, default=64, help="of a step")
    parser.add_argument("--group-size", type=int, default=8, help="passages of a query")
    parser.add_argument("--max-tokens", type=int, default=144)
    parser.add_argument("--max-query-tokens", type=int, default=32)
    parser.add_argument("--pooling", choices=["cls", "mean"], default="cls", help="of all contestants")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="of ours: tokens whose activations are kept")
    parser.add_argument("--dropout", type=float, default=0.0, help="of ours; theirs has the checkpoint's own")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all contestants")
    parser.add_argument("--bf16", action="store_true", help="mixed precision for all contestants; default: fp32")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--only", help="comma-separated keys of contestants, for example ours,plain")
    parser.add_argument("--data", type=Path, help="a BEIR folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- what all contestants share: the groups


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write the store, and the groups as ours reads them and as texts, into `folder`."""
    import numpy as np

    from simlm.data.datasets import open_dataset
    from simlm.data.formats import BadRecords
    from simlm.data.store_writer import Row, StoreWriter
    from simlm.models.backbone import load_tokenizer
    from simlm.rankings import Groups, offsets_of
    from simlm.recipe import DataSettings

    data = options.data or Path(os.environ.get("SIMLM_DATA", "../shared/data")) / "squad"
    loader = open_dataset(DataSettings(dataset="beir", path=str(data)))
    rng = random.Random(SEED)
    passages = {str(passage.passage_id): passage.text for _, passage in loader.passages(BadRecords("skip"))}
    questions = {str(query.query_id): query.text for _, query in loader.queries("train", BadRecords("skip"))}
    judged = [
        (str(qrel.query_id), str(qrel.passage_id))
        for _, qrel in loader.qrels("train", BadRecords("skip"))
        if str(qrel.query_id) in questions and str(qrel.passage_id) in passages and qrel.grade > 0
    ]
    number = min(options.queries * (options.rounds + 3), len(judged))
    pairs = rng.sample(judged, number)
    others = list(passages)
    groups = [[positive, *(other for other in rng.sample(others, options.group_size) if other != positive)] for _, positive in pairs]
    groups = [group[: options.group_size] for group in groups]
    kept = list(dict.fromkeys(passage for group in groups for passage in group))
    row_of = {passage: row for row, passage in enumerate(kept)}
    writer = StoreWriter(
        folder / "store", load_tokenizer(START), max_passage_tokens=options.max_tokens, max_query_tokens=options.max_query_tokens
    )
    writer.write_passages(Row(passage, passages[passage], "") for passage in kept)
    writer.write_queries("train", [Row(str(position), questions[query], "") for position, (query, _) in enumerate(pairs)])
    writer.finish()
    negatives = np.array([[row_of[passage] for passage in group[1:]] for group in groups], dtype=np.int64)
    Groups(
        "train",
        np.arange(number, dtype=np.int64),
        offsets_of([1] * number),
        np.array([row_of[group[0]] for group in groups], dtype=np.int64),
        np.zeros(number, dtype=np.float32),
        offsets_of([options.group_size - 1] * number),
        negatives.reshape(-1),
        np.zeros(negatives.size, dtype=np.float32),
    ).save(folder / "groups")
    texts = [[questions[query], *(passages[passage] for passage in group)] for (query, _), group in zip(pairs, groups, strict=True)]
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


# --- a contestant: a process whose trainer stops before each step until it is told to go on


class Turns:
    """Takes turns with the other processes: `next_step` answers with the last step's time and waits for the order to go on."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._started: float | None = None
        self._before_bytes = 0

    def next_step(self) -> None:
        synchronize(self._device)
        if self._started is None:
            self._before_bytes = start_memory(self._device)
            answer: dict[str, Any] = {"ready": True}
        else:
            seconds = time.perf_counter() - self._started
            answer = {"seconds": seconds, "peak_bytes": peak_memory(self._device), "before_bytes": self._before_bytes}
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
        if not sys.stdin.readline():
            os._exit(0)  # the competition is over, with the trainer in the middle of its steps
        self._started = time.perf_counter()


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def start_memory(device: str) -> int:
    """Bytes in use now; `peak_memory` counts from here on."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to the present
    return memory("VmRSS")


def peak_memory(device: str) -> int:
    """Bytes: highest resident set of the process, or most that torch had allocated on the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return memory("VmHWM")


def memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def work(job: Job) -> None:
    """Train until the input ends."""
    if job.tuned:
        from simlm.runtime import tune_allocator

        tune_allocator()
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # where memory ends, end this process and not another
    sys.stdout = sys.stderr  # trainers print; the answers alone go to standard output
    try:
        (train_ours if job.loss == "ours" else train_theirs)(job)
    except torch.cuda.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)


def train_ours(job: Job) -> None:
    from simlm.data.groups import TrainingGroups
    from simlm.data.store import Store
    from simlm.models.backbone import load_encoder
    from simlm.models.biencoder import BiEncoder
    from simlm.progress import Progress
    from simlm.rankings import Groups
    from simlm.recipe import DevSettings, ModelSettings, RetrieverSettings, TrainingSettings
    from simlm.training.contrastive import ContrastiveBatches, train_biencoder

    folder = Path(job.folder)
    settings = RetrieverSettings(
        model=ModelSettings(start=START),
        temperature=TEMPERATURE,
        queries_per_step=job.queries,
        group_size=job.group_size,
        micro_batch_tokens=job.micro_batch_tokens,
        dropout=job.dropout,
        dev=DevSettings(num_queries=0),
        training=TrainingSettings.model_validate(
            {"learning_rate": LEARNING_RATE, "max_steps": 10_000, "bf16": job.bf16, "use_cpu": job.device == "cpu"}
        ),
    )
    groups = TrainingGroups(
        Groups.load(folder / "groups"),
        num_passages=len(Store(folder / "store").passages),
        group_size=job.group_size,
        queries_per_step=job.queries,
        seed=SEED,
    )
    turns = Turns(job.device)
    load = ContrastiveBatches.load

    def load_in_turn(batches: ContrastiveBatches, step: int, rank: int, num_ranks: int) -> Any:
        turns.next_step()
        return load(batches, step, rank, num_ranks)

    setattr(ContrastiveBatches, "load", load_in_turn)  # noqa: B010
    model = BiEncoder(load_encoder(settings.model, dropout=job.dropout), job.pooling)  # type: ignore[arg-type]
    work_folder = folder / f"ours-{os.getpid()}"
    work_folder.mkdir()
    context = TrainerContext(work_folder, work_folder, SEED, Progress(quiet=True))
    train_biencoder(model, Store(folder / "store"), groups, settings, context, description="train")


@dataclass(frozen=True)
class TrainerContext:
    """What training wants to know of its stage."""

    work: Path
    resume: Path
    seed: int
    progress: Any
    rank: int = 0
    num_ranks: int = 1


def train_theirs(job: Job) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import TrainerCallback

    from simlm.models.backbone import resolve_model

    folder = Path(job.folder)
    transformer = Transformer(
        resolve_model(START), query_length=job.max_query_tokens, document_length=job.max_tokens, max_seq_length=job.max_tokens
    )
    model = SentenceTransformer(modules=[transformer, Pooling(384, job.pooling), Normalize()], device=job.device)
    rows = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    columns = ["anchor", "positive", *(f"negative_{number}" for number in range(1, job.group_size))]
    dataset = Dataset.from_dict({name: [row[place] for row in rows] for place, name in enumerate(columns)})
    loss = (CachedMultipleNegativesRankingLoss if job.loss == "cached" else MultipleNegativesRankingLoss)(model)

    class TakesTurns(TrainerCallback):
        def __init__(self) -> None:
            self.turns = Turns(job.device)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.turns.next_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.turns.next_step()

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / f"theirs-{os.getpid()}"),
        per_device_train_batch_size=job.queries,
        learning_rate=LEARNING_RATE,
        max_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
        use_cpu=job.device == "cpu",
        bf16=job.bf16,
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[TakesTurns()]).train()


# --- the competition


class OutOfMemoryError(Exception):
    """The system has killed a contestant, or the GPU had too little memory for it."""


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, folder: Path, options: argparse.Namespace) -> None:
        job = Job(
            folder=str(folder),
            loss=contestant.loss,
            tuned=contestant.tuned,
            dropout=contestant.dropout,
            queries=options.queries,
            group_size=options.group_size,
            max_tokens=options.max_tokens,
            max_query_tokens=options.max_query_tokens,
            pooling=options.pooling,
            micro_batch_tokens=options.micro_batch_tokens,
            threads=options.threads,
            device=options.device,
            bf16=options.bf16,
        )
        self._name = contestant.name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(asdict(job))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `read` finds out why it is gone
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if code in (-signal.SIGKILL, OUT_OF_MEMORY):
                raise OutOfMemoryError
            raise SystemExit(f"{self._name}: its process ended with code {code}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compete(entered: dict[str, Contestant], folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """key -> seconds of each round, memory; the first step of each warms up and does not count."""
    from dataclasses import replace

    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for key, contestant in list(entered.items()):
            dropout = options.dropout if key == "ours" else contestant.dropout
            try:
                worker = Worker(replace(contestant, dropout=dropout), folder, options)
                worker.step()
            except OutOfMemoryError:
                print(f"{contestant.name}: out of memory; it is left out", file=sys.stderr)
                continue
            workers[key], results[key] = worker, {"seconds": []}
        for number in range(options.rounds):
            keys = list(workers)
            for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
                try:
                    answer = workers[key].step()
                except OutOfMemoryError:
                    raise SystemExit(
                        f"{entered[key].name}: out of memory: the contestants together need more than there is; "
                        "lower --queries, or leave some out with --only"
                    ) from None
                results[key]["seconds"].append(answer["seconds"])
                results[key] |= {name: answer[name] for name in ("peak_bytes", "before_bytes")}
    finally:
        for worker in workers.values():
            worker.close()
    for result in results.values():
        result["queries_per_second"] = options.queries / statistics.median(result["seconds"])
    return results


def report(entered: dict[str, Contestant], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The table, and the line of JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{options.queries} queries x {options.group_size} passages of up to {options.max_tokens} tokens, {options.pooling} pooling, "
        f"{options.rounds} rounds, {options.device}{', bf16' if options.bf16 else ''}",
        title_justify="left",
    )
    for column in ("", "queries/s", "seconds a step", "times theirs", "peak MB", "above start"):
        table.add_column(column, justify="right" if column else "left")
    peer = max((result["queries_per_second"] for key, result in results.items() if key in ("plain", "cached")), default=None)
    for key, result in results.items():
        times = "" if peer is None else f"{result['queries_per_second'] / peer:.2f}"
        table.add_row(
            entered[key].name,
            f"{result['queries_per_second']:.2f}",
            f"{min(result['seconds']):.3g}..{max(result['seconds']):.3g}",
            times,
            f"{result['peak_bytes'] / 1e6:.0f}",
            f"{(result['peak_bytes'] - result['before_bytes']) / 1e6:.0f}",
        )
    Console(width=140).print(table)
    print(json.dumps(summary(entered, results, options)))


def summary(entered: dict[str, Contestant], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the last line; None where a contestant was left out."""

    def speedup(ours: str, theirs: tuple[str, ...]) -> float | None:
        rates = [results[key]["queries_per_second"] for key in theirs if key in results]
        if ours not in results or not rates:
            return None
        return float(round(results[ours]["queries_per_second"] / max(rates), 3))

    def memory_ratio(above_start: bool) -> float | None:
        if "ours" not in results or "plain" not in results:
            return None
        used = [results[key]["peak_bytes"] - above_start * results[key]["before_bytes"] for key in ("ours", "plain")]
        return float(round(used[0] / used[1], 3))

    return {
        "speedup": speedup("ours", ("plain", "cached")),
        "speedup_same_allocator": speedup("ours", ("plain_tuned", "cached_tuned")),
        "speedup_same_dropout": speedup("ours_dropout", ("plain", "cached")),
        "speedup_same_dropout_and_allocator": speedup("ours_dropout", ("plain_tuned", "cached_tuned")),
        "memory_ratio": memory_ratio(True),
        "memory_ratio_total": memory_ratio(False),
        "out_of_memory": [key for key in entered if key not in results],
        "pooling": options.pooling,
        "micro_batch_tokens": options.micro_batch_tokens,
        "dropout": options.dropout,
        "device": options.device,
        "bf16": options.bf16,
        "queries_per_second": {key: round(result["queries_per_second"], 3) for key, result in results.items()},
    }


if __name__ == "__main__":
    main()
