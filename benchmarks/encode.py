"""Passages a second of simlm's encoding against SentenceTransformer.encode, in one run, on the same texts and weights.

python benchmarks/encode.py [BEIR_FOLDER] [--passages 512] [--rounds 3] [--threads 2] [--quality 500x5000] [--only NAME,NAME]
python benchmarks/encode.py --device cuda --passages 20000 --peak-tflops 989    # both sides on the GPU, with model-FLOP utilisation

Texts are passages of squad ($SIMLM_DATA/squad, else ../shared/data/squad) with their natural lengths up to 144 tokens, the model is the
packaged MiniLM; everybody starts from strings. Each contestant is a process of its own; they take turns, each round in another order,
and the best round of each counts, because machines are noisy.

sentence-transformers            as it is installed, with glibc's allocator as it comes
sentence-transformers, allocator the same with the allocator set as simlm sets it
..., onnx | onnx int8 | openvino | openvino int8
                                 its backends' engines, where onnxruntime (with onnx, onnxscript) and openvino (with nncf) are installed.
                                 The network is exported and quantised here and put into SentenceTransformer.encode, because the
                                 packages that its own loader needs (optimum-onnx 0.1, optimum-intel 2.2) refuse transformers 5.23
simlm, fp32 | auto | int8        precisions of simlm's; "auto" where that is bf16
sentence-transformers, batches of 512 | bf16
                                 on a GPU alone, where its default batches of 32 texts are small: larger ones in fp32, and the same with the
                                 whole model in bf16. Allocator and the engines above are a CPU's and left out there

Prints a table and, last, one line of JSON:

fp32_speedup                 simlm in fp32 / sentence-transformers as installed
fp32_speedup_same_allocator  the same with its allocator set
fp32_difference              largest difference of any number of those vectors, which have unit length
fastest_mode                 simlm's quickest precision; fastest_speedup: against sentence-transformers as installed
fastest_speedup_any_backend  the same against the quickest of sentence-transformers' contestants
fastest_quality_ratio        RR@10 of fastest_mode / of simlm in fp32: dev queries of the folder over its passages; null without --quality
fastest_cosine               lowest and mean cosine of its vectors to those of sentence-transformers
cpu_seconds                  of each contestant's round with the least: blind to what else the machine does, and to idle cores
peak_megabytes               on a GPU: highest memory that torch has allocated in any round, the weights included
model_flop_utilisation       with --peak-tflops: operations that the model needs for the texts' tokens, a second, of the peak
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSTALLED, TUNED = "sentence-transformers", "sentence-transformers, allocator"
BACKENDS = [f"sentence-transformers, {engine}" for engine in ("onnx", "onnx int8", "openvino", "openvino int8")]
LARGE_BATCHES, HALF = "sentence-transformers, batches of 512", "sentence-transformers, bf16"
EXACT = "simlm, fp32"
CONTESTANTS = {
    "cpu": [INSTALLED, TUNED, *BACKENDS, EXACT, "simlm, auto", "simlm, int8"],
    "cuda": [INSTALLED, LARGE_BATCHES, HALF, EXACT, "simlm, auto"],
}
LARGE_BATCH = 512
START = "packaged:all-MiniLM-L6-v2"
SEED = 0
CALIBRATION_TEXTS = 128
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = Path(os.environ.get("SIMLM_DATA", "../shared/data")) / "squad"
    parser.add_argument("folder", nargs="?", type=Path, default=data, help="a BEIR folder; default: squad")
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-tokens", type=int, default=144)
    parser.add_argument("--quality", default="", help="queries x passages to measure RR@10 with, as 500x5000; default: not measured")
    parser.add_argument("--device", choices=list(CONTESTANTS), default="cpu", help="of all contestants")
    parser.add_argument("--peak-tflops", type=float, help="of the device; prints the model-FLOP utilisation")
    parser.add_argument("--only", help='names with "/" for ", ", as sentence-transformers,simlm/int8; default: all of the device')
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.work, options.threads, options.max_tokens, options.device)
        return
    known = CONTESTANTS[options.device]
    names = [name.strip().replace("/", ", ") for name in options.only.split(",")] if options.only else known
    unknown = [name for name in names if name not in known]
    if unknown or INSTALLED not in names or EXACT not in names:
        parser.error(f"--only: {', '.join(unknown) or 'a contestant is missing'}; {INSTALLED} and simlm/fp32 among {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        compete(names, Path(folder), options)


def compete(names: list[str], work: Path, options: argparse.Namespace) -> None:
    """Let the contestants take turns, then print what came of it."""
    import numpy as np

    corpus = read_corpus(options.folder)
    texts = random.Random(SEED).sample(sorted(corpus.values()), min(options.passages, len(corpus)))
    (work / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    processes = {name: start(name, work, options) for name in names}
    processes = {name: process for name, process in processes.items() if is_ready(name, process)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    order = list(processes)
    for _ in range(options.rounds):
        for name in order:
            rounds[name].append(ask(processes[name], "texts"))
        order = [*order[1:], order[0]] if len(order) % 2 else order[::-1]
    seconds = {name: min(answer["seconds"] for answer in answers) for name, answers in rounds.items()}
    cpu_seconds = {name: round(min(answer["cpu_seconds"] for answer in answers), 3) for name, answers in rounds.items()}
    vectors = {name: np.load(work / f"{name}.npy") for name in processes}
    cosines = {name: (vectors[name] * vectors[INSTALLED]).sum(axis=1) for name in processes}
    fastest = min((name for name in processes if name.startswith("simlm")), key=lambda name: seconds[name])
    quality = {}
    if options.quality:
        quality = {name: reciprocal_rank(name, processes, work, corpus, options) for name in dict.fromkeys((EXACT, fastest))}
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    on_gpu = options.device == "cuda"
    memory = {name: round(max(answer["peak_bytes"] for answer in answers) / 1e6) for name, answers in rounds.items()} if on_gpu else {}
    print_table(len(texts), seconds, cosines, quality, memory, options)
    peers = [name for name in processes if not name.startswith("simlm")]
    figures = {
        "fp32_speedup": round(seconds[INSTALLED] / seconds[EXACT], 3),
        "fp32_speedup_same_allocator": round(seconds[TUNED] / seconds[EXACT], 3) if TUNED in seconds else None,
        "fp32_difference": float(f"{np.abs(vectors[EXACT] - vectors[INSTALLED]).max():.2e}"),
        "fastest_mode": fastest.removeprefix("simlm, "),
        "fastest_speedup": round(seconds[INSTALLED] / seconds[fastest], 3),
        "fastest_speedup_any_backend": round(min(seconds[name] for name in peers) / seconds[fastest], 3),
        "fastest_quality_ratio": round(quality[fastest] / quality[EXACT], 4) if quality else None,
        "fastest_cosine": [round(float(cosines[fastest].min()), 5), round(float(cosines[fastest].mean()), 5)],
        "rr_10": {name: round(value, 4) for name, value in quality.items()},
        "passages_per_second": {name: round(len(texts) / value, 1) for name, value in seconds.items()},
        "cpu_seconds": cpu_seconds,
        "threads": options.threads,
    }
    if on_gpu:
        figures |= {"device": options.device, "peak_megabytes": memory}
    if options.peak_tflops:
        needed = model_flops(texts, options.max_tokens)
        used = {name: needed / value / (options.peak_tflops * 1e12) for name, value in seconds.items()}
        for name, share in used.items():
            print(f"{name}: model-FLOP utilisation {share:.1%} of {options.peak_tflops:g} TFLOP/s")
        figures["model_flop_utilisation"] = {name: round(share, 5) for name, share in used.items()}
    print(json.dumps(figures))


def model_flops(texts: list[str], max_tokens: int) -> float:
    """Floating-point operations that encoding the texts needs, with nothing for padding: products alone, 2 a multiply-add."""
    from transformers import AutoConfig

    from simlm.models.backbone import load_tokenizer, resolve_model
    from simlm.models.text_batches import TextTokenizer

    config = AutoConfig.from_pretrained(resolve_model(START))
    lengths = TextTokenizer(load_tokenizer(START)).encode(texts, max_tokens).lengths().astype(float)
    weights = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return float(config.num_hidden_layers * (2 * weights * lengths.sum() + 4 * config.hidden_size * (lengths**2).sum()))


def print_table(
    count: int,
    seconds: dict[str, float],
    cosines: dict[str, Any],
    quality: dict[str, float],
    memory: dict[str, int],
    options: argparse.Namespace,
) -> None:
    """memory: peak MB of each contestant; empty where it is not measured."""
    from rich.console import Console
    from rich.table import Table

    title = f"{count} passages, at most {options.max_tokens} tokens, {options.threads} threads, best of {options.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("", "passages/s", "times as installed", "cosine to it: lowest", "mean", "RR@10", *(["peak MB"] if memory else [])):
        table.add_column(column, justify="left" if not column else "right")
    for name, value in seconds.items():
        table.add_row(
            name,
            f"{count / value:.1f}",
            f"{seconds[INSTALLED] / value:.2f}",
            f"{cosines[name].min():.5f}",
            f"{cosines[name].mean():.5f}",
            f"{quality[name]:.4f}" if name in quality else "",
            *([f"{memory[name]:,}"] if memory else []),
        )
    Console(width=120).print(table)


def read_corpus(folder: Path) -> dict[str, str]:
    """Passage id -> text."""
    from simlm.data.formats import BadRecords

    return {passage.passage_id: passage.text for _, passage in loader_of(folder).passages(BadRecords("skip"))}


def loader_of(folder: Path) -> Any:
    from simlm.data.datasets import open_dataset
    from simlm.recipe import DataSettings

    return open_dataset(DataSettings(dataset="beir", path=str(folder)))


def reciprocal_rank(name: str, processes: dict[str, Any], work: Path, corpus: dict[str, str], options: argparse.Namespace) -> float:
    """RR@10 of dev queries over a sample of passages with theirs among them, encoded by one contestant."""
    import numpy as np

    from simlm.data.formats import BadRecords

    num_queries, num_passages = (int(number) for number in options.quality.split("x"))
    loader, rng = loader_of(options.folder), random.Random(SEED)
    positives: dict[str, set[str]] = {}
    for _, qrel in loader.qrels("dev", BadRecords("skip")):
        if qrel.grade > 0:
            positives.setdefault(qrel.query_id, set()).add(qrel.passage_id)
    asked = {query.query_id: query.text for _, query in loader.queries("dev", BadRecords("skip")) if query.query_id in positives}
    queries = rng.sample(sorted(asked), min(num_queries, len(asked)))
    wanted = sorted(set().union(*(positives[query] for query in queries)))
    others = sorted(set(corpus) - set(wanted))
    passages = wanted + rng.sample(others, min(max(num_passages - len(wanted), 0), len(others)))
    parts = {}
    for part, texts in (("queries", [asked[query] for query in queries]), ("passages", [corpus[passage] for passage in passages])):
        (work / "quality.json").write_text(json.dumps(texts), encoding="utf-8")
        ask(processes[name], "quality")
        parts[part] = np.load(work / f"{name}.npy")
    best_QK = np.argsort(-(parts["queries"] @ parts["passages"].T), axis=1, kind="stable")[:, :10]
    ranks = [[passages[row] in positives[query] for row in best] for query, best in zip(queries, best_QK, strict=True)]
    return float(np.mean([1 / (found.index(True) + 1) if True in found else 0.0 for found in ranks]))


# --- contestants: one process each ------------------------------------------------------------------------------------------------------


def start(name: str, work: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", name, "--work", str(work)]
    command += ["--threads", str(options.threads), "--max-tokens", str(options.max_tokens), "--device", options.device]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def is_ready(name: str, process: subprocess.Popen[str]) -> bool:
    """Wait until a contestant has loaded; False, with a line that says why, if it cannot take part here."""
    answer = answer_of(process, name)
    if "skipped" in answer:
        print(f"{name}: left out: {answer['skipped']}", flush=True)
    return "skipped" not in answer


def ask(process: subprocess.Popen[str], word: str) -> dict[str, float]:
    """Let a contestant encode WORD.json while the others wait; its vectors lie in NAME.npy."""
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return answer_of(process, word)


def answer_of(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{process.args!r}: ended with code {process.wait()} without an answer to {what!r}; its error is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def worker(name: str, work: Path, num_threads: int, max_tokens: int, device: str) -> None:
    """Answer each line of the standard input, the name of a file of texts, with the seconds that encoding them took."""
    from simlm.runtime import tune_allocator

    if name != INSTALLED:
        tune_allocator()
    # What libraries print goes to the error stream: the standard output is the protocol's.
    told, sys.stdout = sys.stdout, sys.stderr
    import numpy as np
    import torch

    torch.set_num_threads(num_threads)
    texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    try:
        if name.startswith("simlm"):
            encode = simlm_encoder(name, max_tokens, device)
        else:
            encode = peer_encoder(name, work, max_tokens, num_threads, texts, device)
    except (ImportError, NotImplementedError) as error:
        print(json.dumps({"skipped": str(error).splitlines()[0]}), file=told, flush=True)
        return
    encode(texts[:64])
    print(json.dumps({}), file=told, flush=True)
    for line in sys.stdin:
        texts = json.loads((work / f"{line.strip()}.json").read_text(encoding="utf-8"))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        vectors = encode(texts)
        if device == "cuda":
            torch.cuda.synchronize()
        answer = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        if device == "cuda":
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        np.save(work / f"{name}.npy", vectors)
        print(json.dumps(answer), file=told, flush=True)


def simlm_encoder(name: str, max_tokens: int, device: str) -> Callable[[list[str]], Any]:
    from simlm.models.precision import has_int8, resolve_precision
    from simlm.models.retriever import load_retriever

    precision: Any = name.removeprefix("simlm, ")
    if precision == "auto" and resolve_precision("auto", device) == "fp32":
        raise NotImplementedError("this processor has no bf16, so it is fp32")
    if precision == "int8" and not has_int8(device):
        raise NotImplementedError("no int8 on this processor")
    return load_retriever(START, precision=precision, device=device, max_passage_tokens=max_tokens).encode_passages


def peer_encoder(name: str, work: Path, max_tokens: int, num_threads: int, texts: list[str], device: str) -> Callable[[list[str]], Any]:
    from sentence_transformers import SentenceTransformer

    from simlm.models.backbone import resolve_model

    peer = SentenceTransformer(resolve_model(START), device=device)
    peer.max_seq_length = max_tokens
    if name in BACKENDS:
        engine = name.removeprefix("sentence-transformers, ").removesuffix(" int8")
        example = peer.preprocess(texts[:CALIBRATION_TEXTS])
        make = onnx_session if engine == "onnx" else openvino_session
        session = make(peer[0].model, example, work / name, num_threads, int8=name.endswith("int8"))
        replace_forward(peer[0].model, session)
    if name == HALF:
        peer.bfloat16()
    if name in (LARGE_BATCHES, HALF):
        return lambda wanted: unit_vectors(peer.encode(wanted, batch_size=LARGE_BATCH, convert_to_tensor=True))
    return lambda wanted: peer.encode(wanted, normalize_embeddings=True)


def unit_vectors(vectors_ND: Any) -> Any:
    """A tensor of vectors as a float32 array, brought to unit length in fp32: in bf16 it is known to three digits only."""
    import torch

    return torch.nn.functional.normalize(vectors_ND.float(), dim=1).cpu().numpy()


Session = Callable[[dict[str, Any]], Any]


def replace_forward(encoder: Any, session: Session) -> None:
    """Let another engine compute what SentenceTransformer.encode asks its encoder for."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    def forward(input_ids: Any, attention_mask: Any, token_type_ids: Any, **_: Any) -> Any:
        arrays = [tensor.numpy() for tensor in (input_ids, attention_mask, token_type_ids)]
        return BaseModelOutput(torch.from_numpy(session(dict(zip(INPUTS, arrays, strict=True)))))

    encoder.forward = forward


def export(encoder: Any, example: dict[str, Any], file: Path) -> None:
    """The encoder's network in ONNX, batch and length free."""
    import onnxscript  # noqa: F401  # torch.onnx needs it, and fails late without
    import torch

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = tuple(example[name][:4] for name in INPUTS)
    torch.onnx.export(
        Hidden().eval(), inputs, str(file), dynamo=True, input_names=INPUTS, dynamic_shapes=(free, free, free), external_data=False
    )


def onnx_session(encoder: Any, example: dict[str, Any], folder: Path, num_threads: int, *, int8: bool) -> Session:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir()
    file = folder / "model.onnx"
    export(encoder, example, file)
    if int8:
        # As optimum's "avx2" configuration does it.
        quantize_dynamic(file, folder / "int8.onnx", weight_type=QuantType.QUInt8, per_channel=True)
        file = folder / "int8.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]


def openvino_session(encoder: Any, example: dict[str, Any], folder: Path, num_threads: int, *, int8: bool) -> Session:
    import openvino

    folder.mkdir()
    export(encoder, example, folder / "model.onnx")
    model: Any = openvino.Core().read_model(str(folder / "model.onnx"))
    if int8:
        import nncf

        calibration = [{name: example[name][row : row + 1].numpy() for name in INPUTS} for row in range(len(example["input_ids"]))]
        model = nncf.quantize(model, nncf.Dataset(calibration), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY"})
    return lambda arrays: compiled(arrays)[0]


if __name__ == "__main__":
    main()
