"""Export to ONNX: `retriever/` and `reranker/`, each as fp32 (model.onnx) and int8 (model_int8.onnx), with the tokenizer and a card.

The retriever's graph goes from token ids to the vector of unit length, pooling and normalisation included; the re-ranker's to the raw
score. Both are compared with the torch model on texts of the run before they count: an fp32 graph that computes something else is refused,
and what int8 costs is written down. int8 is ONNX Runtime's dynamic quantisation: weights in 7 bits, so that no processor's sums overflow.
Shapes: B rows, T tokens, D embedding dim.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simlm.artifacts import write_json
from simlm.errors import ModelError, require_extra
from simlm.export.finished_run import FinishedRun
from simlm.export.model_card import Role, model_card
from simlm.export.model_folders import CARD, copy_model, save_retriever
from simlm.models.backbone import load_tokenizer
from simlm.models.inference import without_full_mask
from simlm.models.reranker import load_reranker, one_string
from simlm.models.retriever import passage_texts, with_prompt
from simlm.models.text_batches import Text, TextTokenizer, batches
from simlm.progress import Progress

FP32, INT8 = "model.onnx", "model_int8.onnx"
COMPARISON = "comparison.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS: dict[Role, str] = {"retriever": "sentence_embedding", "reranker": "logits"}
PROTOBUF_BYTES = 1_900_000_000
"""From here on weights lie beside the graph: one protobuf file ends at 2 GiB."""
COMPARED_PASSAGES, COMPARED_QUERIES = 192, 64
"""Texts of the run that both sides compute."""
BATCH_TOKENS = 2048
TOLERANCE = 1e-3
"""How far fp32 may be from torch, relative to the largest output. Rounding alone is around 1e-6."""
KEPT = ("config.json", "simlm.json", "tokenizer.json", "tokenizer_config.json")
"""Files of a model folder that stay beside the ONNX files; the others describe the weights that these take the place of."""


@dataclass(frozen=True)
class Comparison:
    """An ONNX file against the torch model in fp32 over `num_texts` texts of the run.

    min_cosine, mean_cosine: of vectors with vectors; of a re-ranker's scores with scores there is one correlation in their place.
    """

    file: str
    bytes: int
    num_texts: int
    max_abs_difference: float
    min_cosine: float | None
    mean_cosine: float | None
    correlation: float | None


def write(run: FinishedRun, folder: Path, progress: Progress) -> dict[str, Any]:
    """Facts: retriever, and for each of `retriever` and `reranker` (where there is one) the comparisons with torch."""
    for library in ("onnx", "onnxruntime", "onnxscript"):
        require_extra(library, "onnx", "exporting to ONNX")
    facts: dict[str, Any] = {"retriever": run.chosen.name, "comparisons": {}}
    facts["comparisons"]["retriever"] = _write_retriever(run, folder / "retriever", progress)
    if run.reranker is not None:
        facts["comparisons"]["reranker"] = _write_reranker(run, folder / "reranker", progress)
    return facts


def _write_retriever(run: FinishedRun, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    save_retriever(run, folder)
    retriever = run.load_retriever()
    tokenizer = TextTokenizer(load_tokenizer(str(folder)))
    texts = with_prompt(retriever.passage_prompt, passage_texts(_passages(run)))
    samples = [*_batches(tokenizer, texts, retriever.max_passage_tokens)]
    samples += _batches(tokenizer, with_prompt(retriever.query_prompt, _queries(run)), retriever.max_query_tokens)
    return _write_model(run, "retriever", retriever.inference.model, samples, folder, progress)


def _write_reranker(run: FinishedRun, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    assert run.reranker is not None
    copy_model(run.reranker, folder)
    reranker = load_reranker(folder, precision="fp32", device="cpu")
    tokenizer = TextTokenizer(load_tokenizer(str(folder)))
    queries, passages = _queries(run), one_string(_passages(run))
    pairs: list[Text] = [(queries[place % len(queries)], passage) for place, passage in enumerate(passages)]
    return _write_model(
        run, "reranker", reranker.inference.model, [*_batches(tokenizer, pairs, reranker.max_pair_tokens)], folder, progress
    )


def _passages(run: FinishedRun) -> list[tuple[str, str]]:
    table = run.store.passages
    rows = np.unique(np.linspace(0, len(table) - 1, COMPARED_PASSAGES).astype(np.int64))
    return [(table.title(int(row)), table.text(int(row))) for row in rows]


def _queries(run: FinishedRun) -> list[str]:
    """Queries of the run, those for testing first; the first words of passages where it has none."""
    tables = [run.store.queries(split) for split in reversed(run.store.splits)]
    found = [table.text(row) for table in tables for row in range(min(len(table), COMPARED_QUERIES))][:COMPARED_QUERIES]
    return found or [" ".join(text.split()[:8]) for _, text in _passages(run)[:COMPARED_QUERIES]]


def _batches(tokenizer: TextTokenizer, texts: list[Text], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Model inputs with an attention mask, batches of near-equal length."""
    sequences = tokenizer.encode(texts, max_tokens)
    for positions in batches(sequences.lengths(), BATCH_TOKENS):
        tensors = sequences.tensors(positions)
        tensors.setdefault("attention_mask", torch.ones_like(tensors["input_ids"]))
        yield {name: tensors[name] for name in INPUTS if name in tensors}


def _write_model(
    run: FinishedRun, role: Role, model: nn.Module, samples: list[dict[str, Tensor]], folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    export_graph(model, samples, folder / FP32, output=OUTPUTS[role])
    quantise(folder / FP32, folder / INT8)
    with torch.inference_mode():
        expected = [model(**without_full_mask(sample)).numpy() for sample in samples]
    found = [compare(folder / name, samples, expected) for name in (FP32, INT8)]
    largest = max(float(np.abs(batch).max()) for batch in expected)
    if not found[0].max_abs_difference <= TOLERANCE * max(largest, 1.0):
        raise ModelError(
            f"the ONNX graph of the {role} differs from the model by {found[0].max_abs_difference:.2g} on texts of the run, more than "
            "rounding explains, so it was not exported; please report the architecture"
        )
    _keep_only(folder, (*KEPT, *(f"{name}{part}" for name in (FP32, INT8) for part in ("", ".data"))))
    for comparison in found:
        progress.say(f"onnx: {role}: {describe(comparison)}")
    rows = [{key: value for key, value in asdict(comparison).items() if value is not None} for comparison in found]
    write_json(folder / COMPARISON, rows)
    (folder / CARD).write_text(model_card(run, role, _usage(role, samples[0], found)), encoding="utf-8")
    return rows


def _keep_only(folder: Path, names: tuple[str, ...]) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in names:
            entry.unlink()


def export_graph(model: nn.Module, samples: list[dict[str, Tensor]], file: Path, *, output: str) -> None:
    """Write a model as one graph of any number of rows and tokens, without a word on the machine that made it."""
    import onnx

    sample = _example(samples)
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with _quiet():
        program = torch.onnx.export(
            model,
            kwargs=dict(sample),
            input_names=list(sample),
            output_names=[output],
            dynamic_shapes={name: {0: rows, 1: tokens} for name in sample},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    # The exporter notes the Python lines, with their paths, that each operation came from.
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in graph.functions:
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""
    large = weights > PROTOBUF_BYTES
    onnx.save_model(graph, str(file), save_as_external_data=large, location=f"{file.name}.data" if large else None)


def _example(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Two rows of at least three tokens, one padded: sizes 0 and 1 would be taken for constants."""
    widest = max(samples, key=lambda sample: sample["input_ids"].shape[1])
    example = {name: torch.cat([tensor[:1], tensor[:1]]) for name, tensor in widest.items()}
    if example["input_ids"].shape[1] < 3:
        example = {name: torch.cat([tensor, tensor], dim=1) for name, tensor in example.items()}
    example["attention_mask"] = torch.ones_like(example["input_ids"])
    example["attention_mask"][1, -1] = 0
    return example


def quantise(source: Path, target: Path) -> None:
    """Write the int8 form of an ONNX file."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    external = source.with_name(f"{source.name}.data").exists()
    with _quiet():
        quantize_dynamic(
            str(source), str(target), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True, use_external_data_format=external
        )


def compare(file: Path, samples: list[dict[str, Tensor]], expected: list[NDArray[np.float32]]) -> Comparison:
    """What the ONNX file makes of the samples, against what the torch model made of them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    made = [session.run(None, {name: tensor.numpy() for name, tensor in sample.items()})[0] for sample in samples]
    left, right = np.concatenate(expected).astype(np.float64), np.concatenate(made).astype(np.float64)
    size = sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}.data")) if part.exists())
    difference = float(np.abs(left - right).max())
    if left.ndim == 1:
        varied = len(left) > 1 and left.std() > 0 and right.std() > 0
        return Comparison(file.name, size, len(left), difference, None, None, float(np.corrcoef(left, right)[0, 1]) if varied else None)
    cosines = (left * right).sum(axis=1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    return Comparison(file.name, size, len(left), difference, float(cosines.min()), float(cosines.mean()), None)


def describe(comparison: Comparison) -> str:
    """One line on a comparison."""
    agreement = f"correlation {comparison.correlation:.6f}" if comparison.correlation is not None else "one score only"
    if comparison.min_cosine is not None:
        agreement = f"cosine at least {comparison.min_cosine:.6f}, {comparison.mean_cosine:.6f} on average"
    return (
        f"{comparison.file} ({comparison.bytes / 2**20:.1f} MiB) against torch in fp32 on {comparison.num_texts} texts of the run: "
        f"largest difference {comparison.max_abs_difference:.2g}, {agreement}"
    )


def _usage(role: Role, sample: dict[str, Tensor], found: list[Comparison]) -> str:
    output = OUTPUTS[role]
    limits = json.dumps("max_passage_tokens" if role == "retriever" else "max_pair_tokens")
    texts = '["title of a passage"], ["text of a passage"]' if role == "retriever" else '["your question"], ["title text of a passage"]'
    prompts = " Put its query_prompt before a query and its passage_prompt before a passage." if role == "retriever" else ""
    shape = "[rows, D], unit length" if role == "retriever" else "[rows], raw scores"
    lines = "\n".join(f"- {describe(comparison)}" for comparison in found)
    return f"""
## Use

```python
import json, onnxruntime
from transformers import AutoTokenizer

folder = "PATH_OF_THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/{FP32}")  # or {INT8}
limit = json.load(open(f"{{folder}}/simlm.json"))[{limits}]
tokens = tokenizer({texts}, truncation=True, max_length=limit, padding=True, return_tensors="np")
(outputs,) = session.run(["{output}"], {{name: tokens[name] for name in {list(sample)}}})
```

Inputs {", ".join(sample)}: int64 [rows, tokens]. Output {output}: float32 {shape}.
simlm.json has the lengths that the model was trained with.{prompts}

## Compared with the model

{lines}
"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporter and quantiser say of their own workings."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
