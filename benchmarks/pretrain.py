"""Speed and memory of SimLM pre-training against the plain algorithm as the reference code computes it, in one run.

python benchmarks/pretrain.py [--shape minilm|small|bert-base] [--passages-per-step 32] [--steps 2] [--rounds 3]

Both train the same model from the same weights on the same passages of squad ($SIMLM_DATA/squad, else ../shared/data/squad), with the
same masks, the same number of passages a step and one AdamW step at its end; see plain_simlm.py for the plain side. Each contestant is
a process of its own and they take turns, each round in another order, because machines are noisy; its time is the median over the
rounds. Prints a table and, last, one line of JSON:

speedup                        ours in fp32 / plain in fp32 with the allocator as it is by default, in useful tokens a second
speedup_same_allocator         the same with the plain one's allocator set as ours is
speedup_same_dropout           as speedup, ours with the plain one's dropout (--dropout changes that of ours alone)
speedup_cpu_seconds            as speedup, by processor time in place of wall time: steadier on a busy machine, blind to idle cores
speedup_bf16                   ours in bf16 / plain in fp32, default allocator; speedup_bf16_same_allocator as above
plain_bf16_speedup             plain under bf16 autocast / plain in fp32, both with the allocator set
speedup_both_bf16              ours in bf16 / plain under bf16 autocast, both with the allocator set
memory_ratio                   ours / plain of the highest resident set above that before the first step (fp32, default allocator)
memory_ratio_total             the same of the whole resident set, with interpreter, libraries and weights
matmul_share                   share of our fp32 step spent in matrix products (torch.profiler; attention's kernel not counted)
matmul_rate_fraction           floating-point operations that the algorithm needs a second / rate of matrix products of these shapes
tokens_per_second              useful tokens (neither padding nor special) a second of each contestant
null                           where the processor has no bf16 (--bf16 always emulates it), or a contestant was left out
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSAGES = 8192
"""A sample of the corpus; more make no difference to the speed."""

SEED = 7


@dataclass(frozen=True)
class Shape:
    """Layers, width, heads and inner width of the encoder; vocabulary: None = the packaged MiniLM tokenizer's 30,522."""

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int | None = None


SHAPES = {
    "minilm": Shape(6, 384, 12, 1536),
    "small": Shape(4, 256, 4, 1024, 8000),
    "bert-base": Shape(12, 768, 12, 3072),
}

# GeneratorSettings' defaults; ELECTRA-base's generator (arXiv 2003.10555, table 6) beside BERT-base.
GENERATORS = {"minilm": Shape(2, 128, 4, 512), "small": Shape(2, 128, 4, 512), "bert-base": Shape(12, 256, 4, 1024)}
DECODER_LAYERS = 2
ENCODER_RATE, DECODER_RATE = 0.3, 0.5


@dataclass(frozen=True)
class Contestant:
    """tuned: allocator as simlm sets it. dropout: None = the configuration's own (BERT: 0.1)."""

    name: str
    ours: bool
    tuned: bool
    bf16: bool = False
    dropout: float | None = None


def contestants(*, bf16: bool, dropout: float | None) -> dict[str, Contestant]:
    """The contestants by a short key, ours with `dropout`."""
    found = {
        "plain": Contestant("plain, fp32, default allocator", ours=False, tuned=False),
        "plain_tuned": Contestant("plain, fp32, allocator set", ours=False, tuned=True),
        "ours": Contestant("simlm, fp32", ours=True, tuned=True, dropout=dropout),
    }
    if dropout is not None:
        found["ours_dropout"] = Contestant("simlm, fp32, BERT's own dropout", ours=True, tuned=True)
    if bf16:
        found["plain_bf16"] = Contestant("plain, bf16 autocast, allocator set", ours=False, tuned=True, bf16=True)
        found["ours_bf16"] = Contestant("simlm, bf16", ours=True, tuned=True, bf16=True, dropout=dropout)
    return found


def main() -> None:
    options = parse_options()
    if options.worker:
        work(Job(**json.loads(options.worker)))
        return
    from simlm.models.precision import resolve_bf16

    bf16 = {"always": True, "never": False, "auto": resolve_bf16("auto", options.device)}[options.bf16]
    entered = contestants(bf16=bf16, dropout=options.dropout)
    if options.only:
        entered = {key: entered[key] for key in options.only.split(",") if key in entered}
    with tempfile.TemporaryDirectory(prefix="simlm-benchmark-") as folder:
        prepare(Path(folder), options)
        results = compete(entered, Path(folder), options)
    report(entered, results, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="minilm")
    parser.add_argument("--passages-per-step", type=int, default=32)
    parser.add_argument("--plain-passages", type=int, help="passages that the plain one computes at once; default: all of a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of ours")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--bf16", choices=["auto", "always", "never"], default="auto", help="auto: where the processor multiplies bf16")
    parser.add_argument("--dropout", type=float, help="of ours; default: BERT's own 0.1, as the plain one has it")
    parser.add_argument("--only", help="comma-separated keys of contestants, for example ours,plain")
    parser.add_argument("--peak-tflops", type=float, help="of the device; prints the model-FLOP utilisation")
    parser.add_argument("--profile", action="store_true", help="print the operators that take longest")
    parser.add_argument("--max-tokens", type=int, default=144)
    parser.add_argument("--data", type=Path, help="a BEIR folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- what all contestants share: passages, weights


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write store, encoder and generator into `folder`."""
    import random

    import torch
    from transformers import BertConfig, BertForMaskedLM

    from simlm.data.datasets import open_dataset
    from simlm.data.formats import BadRecords
    from simlm.data.store import Store
    from simlm.data.store_writer import Row, StoreWriter
    from simlm.data.vocabulary import train_wordpiece
    from simlm.models.backbone import load_tokenizer, quiet, set_output_bias
    from simlm.objectives.start import log_frequencies
    from simlm.recipe import DataSettings

    data = options.data or default_data()
    loader = open_dataset(DataSettings(dataset="beir", path=str(data)))
    rows = [Row(str(passage.passage_id), passage.text, passage.title or "") for _, passage in loader.passages(BadRecords("skip"))]
    rows = random.Random(SEED).sample(rows, min(PASSAGES, len(rows)))
    shape = SHAPES[options.shape]
    tokenizer = load_tokenizer("packaged:all-MiniLM-L6-v2")
    if shape.vocabulary is not None:
        tokenizer = train_wordpiece(lambda: (row.text for row in rows), shape.vocabulary, lowercase=True, strip_accents=True)
    writer = StoreWriter(folder / "store", tokenizer, max_passage_tokens=options.max_tokens, max_query_tokens=32)
    writer.write_passages(rows)
    writer.finish()
    store = Store(folder / "store")
    torch.manual_seed(SEED)
    for name, part in (("encoder", shape), ("generator", GENERATORS[options.shape])):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=part.hidden,
            num_hidden_layers=part.layers,
            num_attention_heads=part.heads,
            intermediate_size=part.inner,
            pad_token_id=tokenizer.pad_token_id,
        )
        with quiet():
            model = BertForMaskedLM(config)
            # An untrained generator would sample evenly from the vocabulary; this one samples words as often as they occur.
            set_output_bias(model, log_frequencies(store, len(tokenizer)))
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)


def default_data() -> Path:
    """squad below $SIMLM_DATA, or where a neighbour of the working folder keeps the shared data."""
    return Path(os.environ.get("SIMLM_DATA", "../shared/data")) / "squad"


# --- a contestant: a process that takes steps when it is told to


@dataclass(frozen=True)
class Job:
    """What a worker process is told at its start. plain_passages: passages of the plain one at once, 0 = all of a step."""

    folder: str
    ours: bool
    tuned: bool
    bf16: bool
    dropout: float | None
    passages_per_step: int
    plain_passages: int
    micro_batch_tokens: int
    device: str
    threads: int


StepFunction = Callable[[int], float]
"""step -> its loss."""


def work(job: Job) -> None:
    """Build the contestant, then answer each line of standard input with a line of JSON until it ends."""
    if job.tuned:
        from simlm.runtime import tune_allocator

        tune_allocator()
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    take_step, useful_tokens = (build_ours if job.ours else build_plain)(job)
    memory = Memory(job.device)
    print(json.dumps({"ready": True}), flush=True)
    step = 0
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "rate" in order:
            answer["flops_per_second"] = matmul_rate(order["rate"], job)
        elif "profile" in order:
            answer["profile"] = profiled(take_step, step, job.device)
            step += 1
        else:
            tokens = sum(useful_tokens(number) for number in range(step, step + order["steps"]))
            synchronize(job.device)
            started, cpu_started = time.perf_counter(), time.process_time()
            losses = [take_step(number) for number in range(step, step + order["steps"])]
            synchronize(job.device)
            spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
            answer = {**spent, "tokens": tokens, "loss": losses[-1], **memory.read()}
            step += order["steps"]
        print(json.dumps(answer), flush=True)


def build_ours(job: Job) -> tuple[StepFunction, Callable[[int], int]]:
    """The step as simlm's trainer takes it, and the number of useful tokens of a step."""
    import torch

    from simlm.models.backbone import load_masked_lm, load_tokenizer, takes_token_types
    from simlm.objectives import Parts
    from simlm.objectives.pretraining import Pretraining
    from simlm.recipe import PretrainSettings
    from simlm.runtime import MemoryBound
    from simlm.training.precision import autocast

    folder = Path(job.folder)
    settings = PretrainSettings(encoder_mask_rate=ENCODER_RATE, decoder_mask_rate=DECODER_RATE, decoder_layers=DECODER_LAYERS)
    masked_lm = load_masked_lm(str(folder / "encoder"), dropout=job.dropout)
    parts = Parts(masked_lm, load_tokenizer(str(folder / "encoder")), generator=folder / "generator", continued=None)
    task = Pretraining.build(settings, parts).to(job.device)
    steps, useful_tokens = open_steps(job, task.views(), takes_token_types(masked_lm))
    optimizer = torch.optim.AdamW(trained_parameters(task), lr=1e-4, weight_decay=0.0, fused=True)
    bound_memory = MemoryBound()
    task.train()

    def take_step(step: int) -> float:
        total = torch.zeros((), device=job.device)
        for micro_batch in steps.load(step, 0, 1):
            with autocast(job.device, job.bf16):
                loss = task(**on_device(micro_batch, job.device))["loss"]
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        bound_memory()
        return float(total)

    return take_step, useful_tokens


def build_plain(job: Job) -> tuple[StepFunction, Callable[[int], int]]:
    """The step as the reference takes it, and the number of useful tokens of a step."""
    import torch
    from transformers import AutoModelForMaskedLM

    from plain_simlm import PlainSimLM, PlainSteps
    from simlm.models.backbone import load_tokenizer, quiet
    from simlm.objectives import Parts
    from simlm.objectives.pretraining import Pretraining
    from simlm.recipe import PretrainSettings

    folder = Path(job.folder)
    with quiet():
        models = [AutoModelForMaskedLM.from_pretrained(folder / name) for name in ("encoder", "generator")]
    tokenizer = load_tokenizer(str(folder / "encoder"))
    settings = PretrainSettings(encoder_mask_rate=ENCODER_RATE, decoder_mask_rate=DECODER_RATE, decoder_layers=DECODER_LAYERS)
    views = Pretraining.build(settings, Parts(models[0], tokenizer, generator=folder / "generator", continued=None)).views()
    task = PlainSimLM(*models, mask_token_id=tokenizer.mask_token_id, decoder_layers=DECODER_LAYERS).to(job.device)
    steps, useful_tokens = open_steps(job, views, token_types=True)
    batches = PlainSteps(steps.feeding.table, views, seed=SEED)
    optimizer = torch.optim.AdamW(trained_parameters(task), lr=1e-4, weight_decay=0.0)
    task.train()

    def take_step(step: int) -> float:
        total = 0.0
        rows_S, epochs_S = steps.passages(step)
        cut = batches.batches(rows_S, epochs_S, job.plain_passages or job.passages_per_step)
        for batch in cut:
            with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.bf16):
                loss = task(**on_device(batch, job.device)) / len(cut)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return take_step, useful_tokens


def open_steps(job: Job, views: Any, token_types: bool) -> tuple[Any, Callable[[int], int]]:
    """(simlm's steps over its passages, number of useful tokens of a step); one order of passages for all."""
    import numpy as np

    from simlm.data.store import Store
    from simlm.objectives.steps import Feeding, PassageSteps, token_counts

    table = Store(Path(job.folder) / "store").passages
    feeding = Feeding(table, views, job.micro_batch_tokens, token_types, SEED)
    steps = PassageSteps(feeding, np.arange(len(table)), passages_per_step=job.passages_per_step, num_steps=10**6)
    return steps, lambda step: int(token_counts(table, steps.passages(step)[0]).sum())


def trained_parameters(task: Any) -> list[Any]:
    return [parameter for parameter in task.parameters() if parameter.requires_grad]


def on_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class Memory:
    """Highest memory since it was made, and that at the time: resident set of the process, or memory of the CUDA device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to the present
            self.before = _status("VmRSS")

    def read(self) -> dict[str, int]:
        if self.cuda:
            import torch

            return {"peak_bytes": torch.cuda.max_memory_allocated(), "before_bytes": self.before}
        return {"peak_bytes": _status("VmHWM"), "before_bytes": self.before}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


# --- what the machine could do, and where the time goes


def model_flops(shape: Shape, generator: Shape, vocabulary: int, tokens: int, mean_tokens: float) -> float:
    """Floating-point operations that the algorithm needs for so many useful tokens, with nothing computed twice or for padding.

    Products alone, 2 a multiply-add, backward twice forward; generator's logits at masked positions only. mean_tokens: of a passage.
    """

    def layer(part: Shape) -> float:
        return 2 * (4 * part.hidden**2 + 2 * part.hidden * part.inner) + 4 * mean_tokens * part.hidden

    layers = 3 * layer(shape) * (shape.layers + DECODER_LAYERS)
    head = 3 * 2 * 2 * (shape.hidden**2 + shape.hidden * vocabulary)
    sampling = 2 * generator.layers * layer(generator)
    sampling += 2 * (ENCODER_RATE + DECODER_RATE) * (generator.hidden**2 + generator.hidden * vocabulary)
    return tokens * (layers + head + sampling)


def products(shape: Shape, vocabulary: int, rows: int) -> list[tuple[int, int, int, int]]:
    """(m, k, n, how many) of the forward matrix products of encoder, decoder and both heads over `rows` tokens."""
    layers = shape.layers + DECODER_LAYERS
    return [
        (rows, shape.hidden, shape.hidden, 4 * layers + 2),
        (rows, shape.hidden, shape.inner, layers),
        (rows, shape.inner, shape.hidden, layers),
        (rows, shape.hidden, vocabulary, 2),
    ]


def matmul_rate(order: dict[str, Any], job: Job) -> float:
    """Floating-point operations a second of the products of a step, forward and backward, each alone in a loop."""
    import torch

    dtype = torch.bfloat16 if job.bf16 else torch.float32
    total_flops = total_seconds = 0.0
    for m, k, n, count in products(Shape(**order["shape"]), order["vocabulary"], order["rows"]):
        left, right = (torch.randn(*size, device=job.device).to(dtype) for size in ((m, k), (n, k)))
        output = left @ right.T
        gradients = torch.empty_like(left), torch.empty_like(right)
        for factors, out in (((left, right.T), output), ((output, right), gradients[0]), ((output.T, left), gradients[1])):
            seconds = []
            for _ in range(4):
                synchronize(job.device)
                started = time.perf_counter()
                torch.mm(*factors, out=out)
                synchronize(job.device)
                seconds.append(time.perf_counter() - started)
            total_seconds += min(seconds) * count
            total_flops += 2.0 * m * k * n * count
    return total_flops / total_seconds


MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear", "mkldnn::_linear_pointwise")


def profiled(take_step: StepFunction, step: int, device: str) -> dict[str, Any]:
    """Share of matrix products, and (operator, share, calls) of those that take longest; own time without what they call."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        take_step(step)
        synchronize(device)
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # On a GPU an operator's own time is that of the kernels it started; the kernels are listed once more by themselves.
    events = [event for event in recorded.key_averages() if device == "cpu" or str(event.key).startswith(("aten::", "mkldnn::"))]
    total = sum(getattr(event, own) for event in events)
    events.sort(key=lambda event: -getattr(event, own))
    return {
        "matmul_share": sum(getattr(event, own) for event in events if event.key in MATMULS) / total,
        "operators": [(event.key, round(getattr(event, own) / total, 4), event.count) for event in events[:16]],
        "seconds": total / 1e6,
    }


# --- the competition


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, folder: Path, options: argparse.Namespace) -> None:
        job = Job(
            folder=str(folder),
            ours=contestant.ours,
            tuned=contestant.tuned,
            bf16=contestant.bf16,
            dropout=contestant.dropout,
            passages_per_step=options.passages_per_step,
            plain_passages=options.plain_passages or 0,
            micro_batch_tokens=options.micro_batch_tokens,
            device=options.device,
            threads=options.threads,
        )
        self._name = contestant.name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job.__dict__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name}: its process ended with code {self._process.wait()}; its error is above (out of memory if -9)")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compete(entered: dict[str, Contestant], folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """key -> seconds (of each round), tokens, first loss, memory, profile, matmul rate."""
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    rate = {"shape": SHAPES[options.shape].__dict__, "vocabulary": vocabulary_of(folder), "rows": options.micro_batch_tokens // 2}
    try:
        for key, contestant in entered.items():
            workers[key] = Worker(contestant, folder, options)
            first = workers[key].ask(steps=1)
            results[key] = {"first_loss": first["loss"], "seconds": [], "cpu_seconds": [], "tokens": [], "rates": []}
        for number in range(options.rounds):
            keys = list(entered)
            for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
                answer = workers[key].ask(steps=options.steps)
                for name in ("seconds", "cpu_seconds", "tokens"):
                    results[key][name].append(answer[name])
                results[key].update({name: answer[name] for name in ("loss", "peak_bytes", "before_bytes")})
                if entered[key].ours:
                    results[key]["rates"].append(workers[key].ask(rate=rate)["flops_per_second"])
        for key, contestant in entered.items():
            if contestant.ours or options.profile:
                results[key]["profile"] = workers[key].ask(profile=True)["profile"]
    finally:
        for worker in workers.values():
            worker.close()
    for result in results.values():
        result["vocabulary"] = rate["vocabulary"]
        for name, seconds in (("tokens_per_second", "seconds"), ("tokens_per_cpu_second", "cpu_seconds")):
            result[name] = statistics.median(tokens / spent for tokens, spent in zip(result["tokens"], result[seconds], strict=True))
    return results


def vocabulary_of(folder: Path) -> int:
    return int(json.loads((folder / "encoder" / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def report(entered: dict[str, Contestant], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The table, and the line of JSON."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    shape = SHAPES[options.shape]
    table = Table(
        title=f"{options.shape}: {options.passages_per_step} passages a step, {options.rounds} rounds of {options.steps} step(s)",
        title_justify="left",
    )
    columns = (
        "",
        "tokens/s",
        "lowest..highest",
        "times plain",
        "peak MB",
        "above start",
        "first loss",
        "products",
        "of the rate",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    figures: dict[str, Any] = {"shape": options.shape, "device": options.device, "passages_per_step": options.passages_per_step}
    for key, result in results.items():
        speeds = [tokens / seconds for tokens, seconds in zip(result["tokens"], result["seconds"], strict=True)]
        step_tokens = statistics.mean(result["tokens"]) / options.steps
        flops = model_flops(shape, GENERATORS[options.shape], result["vocabulary"], 1, step_tokens / options.passages_per_step)
        result["flops_per_second"] = flops * result["tokens_per_second"]
        if result["rates"]:
            result["rate_fraction"] = result["flops_per_second"] / statistics.median(result["rates"])
        share = result.get("profile", {}).get("matmul_share")
        base = results.get("plain", result)["tokens_per_second"]
        table.add_row(
            entered[key].name,
            f"{result['tokens_per_second']:.0f}",
            f"{min(speeds):.0f}..{max(speeds):.0f}",
            f"{result['tokens_per_second'] / base:.2f}" if "plain" in results else "",
            f"{result['peak_bytes'] / 1e6:.0f}",
            f"{(result['peak_bytes'] - result['before_bytes']) / 1e6:.0f}",
            f"{result['first_loss']:.3f}",
            "" if share is None else f"{share:.0%}",
            f"{result['rate_fraction']:.0%}" if "rate_fraction" in result else "",
        )
    console.print(table)
    if options.peak_tflops:
        for key, result in results.items():
            used = result["flops_per_second"] / (options.peak_tflops * 1e12)
            console.print(f"{entered[key].name}: model-FLOP utilisation {used:.1%} of {options.peak_tflops:g} TFLOP/s")
    if options.profile:
        for key, result in results.items():
            console.print(f"\n{entered[key].name}: one step, {result['profile']['seconds']:.2f} s")
            for name, part, calls in result["profile"]["operators"]:
                console.print(f"  {part:6.1%}  {calls:6d} x  {name}", highlight=False)
    print(
        json.dumps(
            figures | {"dropout": options.dropout} | summary(results, same_dropout="ours" if options.dropout is None else "ours_dropout")
        )
    )


def summary(results: dict[str, dict[str, Any]], *, same_dropout: str) -> dict[str, Any]:
    """The figures of the last line; see the module's docstring. same_dropout: key of ours with the plain one's dropout."""

    def ratio(above: str, below: str, value: Callable[[dict[str, Any]], float]) -> float | None:
        return round(value(results[above]) / value(results[below]), 3) if above in results and below in results else None

    def speed(result: dict[str, Any]) -> float:
        return float(result["tokens_per_second"])

    ours = results.get("ours", {})
    return {
        "speedup": ratio("ours", "plain", speed),
        "speedup_same_allocator": ratio("ours", "plain_tuned", speed),
        "speedup_same_dropout": ratio(same_dropout, "plain", speed),
        "speedup_cpu_seconds": ratio("ours", "plain", lambda result: float(result["tokens_per_cpu_second"])),
        "speedup_bf16": ratio("ours_bf16", "plain", speed),
        "speedup_bf16_same_allocator": ratio("ours_bf16", "plain_tuned", speed),
        "plain_bf16_speedup": ratio("plain_bf16", "plain_tuned", speed),
        "speedup_both_bf16": ratio("ours_bf16", "plain_bf16", speed),
        "memory_ratio": ratio("ours", "plain", lambda result: float(result["peak_bytes"] - result["before_bytes"])),
        "memory_ratio_total": ratio("ours", "plain", lambda result: float(result["peak_bytes"])),
        "matmul_share": round(ours["profile"]["matmul_share"], 3) if ours else None,
        "matmul_rate_fraction": round(ours["rate_fraction"], 3) if ours else None,
        "tokens_per_second": {key: round(speed(result), 1) for key, result in results.items()},
        "peak_megabytes": {key: round(result["peak_bytes"] / 1e6) for key, result in results.items()},
    }


if __name__ == "__main__":
    main()
