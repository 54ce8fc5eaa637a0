"""Does a device compute what the CPU computes? Losses, gradients and vectors from the same weights and the same tokens.

python benchmarks/gpu/agreement.py [--device cuda] [--toy]

Needs no data and no network: texts are made-up words, weights are fresh, all from one seed; dropout is off, as its random numbers differ
from device to device. The reference is the CPU in fp32. The device computes in fp32 (TF32 off) and in bf16, through simlm's own classes:

pre-training   replaced_lm with a generator, one step of several micro-batches
retriever      contrastive loss; the reference encodes the step at once, the device in pieces with gradient caching
distillation   the same with KL to a teacher's scores
re-ranker      listwise loss of the positive and the hardest of each list, which are chosen without gradient
encoding       Retriever.encode_queries and encode_passages

Differences are relative: of the loss, and of each group of parameters (a layer, the embeddings, the head) the norm of the difference of
its gradients over the norm of the reference's, of which the largest counts; of vectors likewise. Samples of the generator and the hardest
passages are the reference's on both sides, as one near-tie would change all that follows; the share of them that the device would have
chosen otherwise is counted, and has a tolerance in fp32.

Prints a table and, last, one line of JSON. Exit status 1 if a tolerance is broken or a case cannot be computed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from simlm.data.groups import TrainingGroups
from simlm.data.store import Store
from simlm.data.store_writer import Row, StoreWriter
from simlm.errors import SimlmError
from simlm.models.backbone import load_encoder, load_masked_lm
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.retriever import Retriever
from simlm.objectives.bottleneck import Decoder
from simlm.objectives.generator import Generator
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.replaced_lm import ReplacedLM
from simlm.objectives.steps import Feeding, PassageSteps
from simlm.objectives.views import PretrainViews
from simlm.rankings import Groups, offsets_of
from simlm.recipe import DistillSettings, ModelSettings, RerankerSettings, RetrieverSettings
from simlm.training.cached_step import Piece
from simlm.training.contrastive import ContrastiveBatches, ContrastiveTask
from simlm.training.precision import autocast
from simlm.training.reranking import ListBatches, ListwiseTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 7
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WHOLE_STEP = 10**9
"""Tokens at once: no step has as many, so nothing is computed twice."""
SPREAD = 0.1
"""Deviation of fresh weights. With BERT's 0.02 the vectors of all texts nearly agree, and small differences of them decide the loss."""
HEAD_SCALE = 20.0
"""A fresh head's logits lie within hundredths of each other, a trained one's within several units."""

Computation = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Size:
    """micro_batch_tokens is a fraction of what a step holds, so that there are several micro-batches or pieces."""

    vocabulary: int
    layers: int
    hidden: int
    heads: int
    inner: int
    passages: int
    queries: int
    group_size: int
    passage_tokens: int
    query_tokens: int
    micro_batch_tokens: int

    @property
    def pair_tokens(self) -> int:
        return self.passage_tokens + self.query_tokens


FULL = Size(8192, 4, 256, 4, 1024, passages=64, queries=16, group_size=8, passage_tokens=128, query_tokens=24, micro_batch_tokens=2048)
TOY = Size(256, 2, 32, 2, 64, passages=16, queries=4, group_size=4, passage_tokens=24, query_tokens=8, micro_batch_tokens=128)


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference of a loss, of a group of gradients or of vectors, and largest share of other choices (None: any)."""

    loss: float
    parts: float
    choices: float | None


TOLERANCES: dict[Computation, Tolerance] = {
    "fp32": Tolerance(loss=1e-4, parts=1e-3, choices=0.02),
    "bf16": Tolerance(loss=2e-2, parts=1e-1, choices=None),
}
"""Seen on a CPU, 2 x 32 and 4 x 128: bf16 autocast up to 0.8% of a loss and 6.4% of a part; fp32 in pieces against fp32 at once 4e-6."""


# --- what is measured


@dataclass(frozen=True)
class Outcome:
    """parts: gradients of each group of parameters or vectors, float64 on the CPU. other_choices: share. loss: None for vectors."""

    loss: float | None
    parts: dict[str, Tensor]
    other_choices: float | None = None


class Choices:
    """What the reference chose (token ids, rows), in order; taken again by whoever comes after it, whose own choices are counted."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._place: int | None = None
        self._others = 0

    def begin(self, *, reference: bool) -> None:
        """Before a step: keep its choices, or take those that were kept."""
        self._others = 0
        self._place = None if reference else 0
        if reference:
            self._kept = []

    def settle(self, chosen: Tensor) -> Tensor:
        """The reference's choices in place of `chosen`, on its device."""
        if self._place is None:
            self._kept.append(chosen.cpu())
            return chosen
        kept = self._kept[self._place].to(chosen.device)
        self._place += 1
        self._others += int((kept != chosen).sum())
        return kept

    @property
    def other_share(self) -> float:
        """Share of the choices of this step that are not the reference's."""
        return self._others / sum(len(kept) for kept in self._kept)


class SettledGenerator(Generator):
    """A generator whose samples are the reference's."""

    choices: Choices

    def replace(
        self,
        input_ids_BT: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        positions_M: Tensor,
        uniforms_M: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As its class has it, with other samples."""
        sampled_BT, loss = super().replace(input_ids_BT, attention_mask, token_type_ids, positions_M, uniforms_M)
        samples_M = self.choices.settle(sampled_BT.flatten().index_select(0, positions_M))
        return input_ids_BT.flatten().index_copy(0, positions_M, samples_M).view_as(input_ids_BT), loss


class SettledListwiseTask(ListwiseTask):
    """A re-ranker's loss on the passages that the reference has found hardest."""

    choices: Choices

    def _hardest_rows(self, pairs: Piece, lengths: list[int], kept: int) -> Tensor:
        return self.choices.settle(super()._hardest_rows(pairs, lengths, kept))


@dataclass(frozen=True)
class Step:
    """One training step; measuring leaves the task as it is. choices: those that the task makes."""

    task: nn.Module
    micro_batches: Sequence[dict[str, Any]]
    choices: Choices | None = None

    def measure(self, device: str, computation: Computation, *, reference: bool = False) -> Outcome:
        """Loss and gradients of the step."""
        if self.choices is not None:
            self.choices.begin(reference=reference)
        # Choices are shared with the copy, all else is its own.
        task = copy.deepcopy(self.task, {id(self.choices): self.choices}).to(device).train()
        total = torch.zeros((), device=device)
        for micro_batch in self.micro_batches:
            with autocast(device, computation == "bf16"):
                loss = task(**on_device(micro_batch, device))["loss"]
            loss.backward()
            total += loss.detach()
        return Outcome(float(total), gradients(task), None if self.choices is None else self.choices.other_share)


@dataclass(frozen=True)
class Encoding:
    """Texts through a retriever as its users have it."""

    model: BiEncoder
    tokenizer: PreTrainedTokenizerFast
    queries: list[str]
    passages: list[str]
    size: Size

    def measure(self, device: str, computation: Computation, *, reference: bool = False) -> Outcome:
        """Vectors of queries and of passages; the reference's are encoded like all others."""
        retriever = Retriever(
            copy.deepcopy(self.model),
            self.tokenizer,
            max_query_tokens=self.size.query_tokens,
            max_passage_tokens=self.size.passage_tokens,
            precision=computation,
            device=device,
            batch_tokens=WHOLE_STEP if reference else self.size.micro_batch_tokens,
        )
        vectors = {"queries": retriever.encode_queries(self.queries), "passages": retriever.encode_passages(self.passages)}
        return Outcome(None, {name: torch.from_numpy(value).double() for name, value in vectors.items()})


def on_device(value: Any, device: str) -> Any:
    """Tensors in lists and dictionaries on the device, all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on_device(part, device) for name, part in value.items()}
    return [on_device(part, device) for part in value] if isinstance(value, list) else value


def gradients(task: nn.Module) -> dict[str, Tensor]:
    """Group of parameters -> its gradients end to end, float64 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            found.setdefault(group_of(name), []).append(parameter.grad.detach().double().cpu().flatten())
    return {group: torch.cat(parts) for group, parts in found.items()}


def group_of(name: str) -> str:
    """A parameter's name up to the number of its layer, else without its own name and that of the module that holds it.

    Biases of keys belong into one group with others: their gradient is zero but for rounding.
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-2])


# --- the cases


@dataclass(frozen=True)
class Case:
    """reference: measured on the CPU in fp32. checked: what has to agree with it on the device."""

    name: str
    reference: Step | Encoding
    checked: Step | Encoding


@dataclass(frozen=True)
class Texts:
    """What all cases read: a store of made-up passages and queries, and groups with a teacher's scores."""

    store: Store
    tokenizer: PreTrainedTokenizerFast
    queries: list[str]
    passages: list[str]
    groups: Groups


def make_texts(size: Size, folder: Path) -> Texts:
    """Texts of random words and lengths, and random groups over them; the store lies in `folder`."""
    rng = np.random.default_rng(SEED)
    tokenizer = make_tokenizer(size.vocabulary)
    words = np.array([word for word in tokenizer.get_vocab() if word not in SPECIAL])
    words.sort()

    def texts(number: int, most: int) -> list[str]:
        return [" ".join(rng.choice(words, rng.integers(most // 3, most - 1))) for _ in range(number)]

    passages, queries = texts(size.passages, size.passage_tokens), texts(size.queries, size.query_tokens)
    writer = StoreWriter(
        folder / "store", tokenizer, max_passage_tokens=size.passage_tokens, max_query_tokens=size.query_tokens, num_workers=1
    )
    writer.write_passages(Row(str(row), text) for row, text in enumerate(passages))
    writer.write_queries("train", [Row(str(row), text) for row, text in enumerate(queries)])
    writer.finish()
    rows = np.stack([rng.choice(size.passages, size.group_size, replace=False) for _ in queries])
    scores = rng.normal(0.0, 2.0, rows.shape).astype(np.float32)
    groups = Groups(
        "train",
        np.arange(size.queries, dtype=np.int64),
        offsets_of([1] * size.queries),
        np.ascontiguousarray(rows[:, 0]),
        np.ascontiguousarray(scores[:, 0]),
        offsets_of([size.group_size - 1] * size.queries),
        rows[:, 1:].reshape(-1),
        scores[:, 1:].reshape(-1),
    )
    return Texts(Store(folder / "store"), tokenizer, queries, passages, groups)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, `[CLS] a [SEP] b [SEP]` with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"word{number}" for number in range(vocabulary - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_cases(size: Size, folder: Path) -> list[Case]:
    """All cases, over one store in `folder`."""
    texts = make_texts(size, folder)
    return [
        pretraining(size, texts),
        contrastive("retriever", RetrieverSettings, size, texts),
        contrastive("distillation", DistillSettings, size, texts),
        reranker(size, texts),
        encoding(size, texts),
    ]


def pretraining(size: Size, texts: Texts) -> Case:
    masked_lm = load_masked_lm(fresh(size), tokenizer=texts.tokenizer, seed=SEED, dropout=0.0)
    smaller = replace(size, hidden=size.hidden // 2, inner=size.inner // 2, heads=size.heads // 2, layers=2)
    generator = SettledGenerator(load_masked_lm(fresh(smaller), tokenizer=texts.tokenizer, seed=SEED + 1, dropout=0.0), texts.tokenizer)
    generator.choices = choices = Choices()
    views = PretrainViews(0.3, 0.5, sampled=True)
    task = Pretraining(
        masked_lm,
        {"replaced_lm": ReplacedLM(Decoder(masked_lm, 2))},
        mask_token_id=generator.mask_token_id,
        views=views,
        generator=generator,
    )
    feeding = Feeding(texts.store.passages, views, size.micro_batch_tokens, True, SEED)
    steps = PassageSteps(feeding, np.arange(size.passages, dtype=np.int64), passages_per_step=size.passages, num_steps=1)
    step = Step(task, steps.load(0, 0, 1), choices)
    return Case("pre-training", step, step)


def contrastive(name: str, kind: type[RetrieverSettings], size: Size, texts: Texts) -> Case:
    """The reference keeps all activations, the checked step those of a part of its pieces."""
    encoder = load_encoder(fresh(size), tokenizer=texts.tokenizer, seed=SEED, dropout=0.0)
    groups = training_groups(size, texts)

    def step(micro_batch_tokens: int) -> Step:
        settings = kind(queries_per_step=size.queries, group_size=size.group_size, micro_batch_tokens=micro_batch_tokens, temperature=0.05)
        batches = ContrastiveBatches(texts.store, groups, settings, num_steps=1)
        return Step(ContrastiveTask(BiEncoder(encoder), settings), batches.load(0, 0, 1))

    return Case(name, step(WHOLE_STEP), step(size.micro_batch_tokens))


def reranker(size: Size, texts: Texts) -> Case:
    model = CrossEncoder.from_encoder(fresh(size), seed=SEED, dropout=0.0, tokenizer=texts.tokenizer)
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1][-1]
    with torch.no_grad():
        head.weight.mul_(HEAD_SCALE * 0.02 / SPREAD)
    settings = RerankerSettings(
        queries_per_step=size.queries,
        group_size=size.group_size,
        train_hardest=size.group_size // 2,
        max_pair_tokens=size.pair_tokens,
        micro_batch_tokens=size.micro_batch_tokens,
        rdrop_weight=0.0,
    )
    task = SettledListwiseTask(model, settings)
    task.choices = choices = Choices()
    step = Step(task, ListBatches(texts.store, training_groups(size, texts), settings, num_steps=1).load(0, 0, 1), choices)
    return Case("re-ranker", step, step)


def encoding(size: Size, texts: Texts) -> Case:
    model = BiEncoder(load_encoder(fresh(size), tokenizer=texts.tokenizer, seed=SEED, dropout=0.0))
    step = Encoding(model, texts.tokenizer, texts.queries, texts.passages, size)
    return Case("encoding", step, step)


def fresh(size: Size) -> ModelSettings:
    """A BERT of this size with fresh weights."""
    config = {
        "model_type": "bert",
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "max_position_embeddings": size.pair_tokens,
        "initializer_range": SPREAD,
    }
    return ModelSettings(start="scratch", config=config)


def training_groups(size: Size, texts: Texts) -> TrainingGroups:
    return TrainingGroups(texts.groups, num_passages=size.passages, group_size=size.group_size, queries_per_step=size.queries, seed=SEED)


# --- the comparison


@dataclass(frozen=True)
class Comparison:
    """Relative differences of a device's outcome; `part` is where the largest of the parts is. error: why there is no outcome."""

    case: str
    computation: Computation
    loss: float | None = None
    loss_difference: float | None = None
    part: str = ""
    part_difference: float = math.inf
    other_choices: float | None = None
    agrees: bool = False
    error: str = ""


def compare(name: str, computation: Computation, reference: Outcome, found: Outcome, tolerance: Tolerance) -> Comparison:
    """Whether an outcome agrees with the reference's. A part that only one of them has is infinitely far off; NaN never agrees."""
    differences = {
        part: relative(reference.parts[part], found.parts[part]) if part in reference.parts and part in found.parts else math.inf
        for part in sorted(reference.parts.keys() | found.parts.keys())
    }
    worst = max(differences, key=lambda part: math.inf if math.isnan(differences[part]) else differences[part])
    loss_difference = None
    if reference.loss is not None and found.loss is not None:
        loss_difference = abs(found.loss - reference.loss) / abs(reference.loss)
    agrees = (
        (reference.loss is None) == (found.loss is None)
        and (loss_difference is None or loss_difference <= tolerance.loss)
        and differences[worst] <= tolerance.parts
        and (tolerance.choices is None or found.other_choices is None or found.other_choices <= tolerance.choices)
    )
    return Comparison(name, computation, found.loss, loss_difference, worst, differences[worst], found.other_choices, agrees)


def relative(reference: Tensor, found: Tensor) -> float:
    """Norm of the difference over the reference's norm; 0 where both are zero."""
    difference, norm = float((found - reference).norm()), float(reference.norm())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def check(case: Case, device: str, tolerances: dict[Computation, Tolerance]) -> list[Comparison]:
    """One comparison a computation. What torch or simlm cannot compute is told on the error stream and does not agree."""
    attempt: Callable[..., Outcome] = partial(case.checked.measure, device)
    reference = case.reference.measure("cpu", "fp32", reference=True)
    found = []
    for computation, tolerance in tolerances.items():
        try:
            found.append(compare(case.name, computation, reference, attempt(computation), tolerance))
        except (RuntimeError, TypeError, ValueError, SimlmError) as error:
            traceback.print_exc()
            found.append(Comparison(case.name, computation, error=f"{type(error).__name__}: {error}".splitlines()[0]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all cases; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="a model and texts of a size that takes a second on a CPU")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; give --device cpu to try the comparison itself")
    torch.set_float32_matmul_precision("highest")
    size = TOY if options.toy else FULL
    with tempfile.TemporaryDirectory() as folder:
        found = [comparison for case in make_cases(size, Path(folder)) for comparison in check(case, options.device, TOLERANCES)]
    agrees = all(comparison.agrees for comparison in found)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print_table(found, device, size)
    print(json.dumps({"agrees": agrees, "device": device, "size": asdict(size), "comparisons": [figures(one) for one in found]}))
    return 0 if agrees else 1


def figures(comparison: Comparison) -> dict[str, Any]:
    """For the last line: differences of three digits, and no infinity, which JSON does not have."""
    kept = {name: value for name, value in asdict(comparison).items() if value not in (None, "", math.inf)}
    return {name: float(f"{value:.3g}") if name.endswith("difference") else value for name, value in kept.items()}


def print_table(found: list[Comparison], device: str, size: Size) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{device} against the CPU in fp32: {size.layers} x {size.hidden}, vocabulary {size.vocabulary:,}", title_justify="left"
    )
    for column in ("", "computed in", "loss", "its difference", "largest difference of a part", "part", "other choices", "agrees"):
        table.add_column(column, justify="right" if column in ("loss", "its difference", "other choices") else "left")
    for one in found:
        tolerance = TOLERANCES[one.computation]
        limit = "" if tolerance.choices is None else f" (up to {tolerance.choices:.0%})"
        table.add_row(
            one.case,
            one.computation,
            "" if one.loss is None else f"{one.loss:.5f}",
            "" if one.loss_difference is None else f"{one.loss_difference:.1e} (up to {tolerance.loss:.0e})",
            one.error or f"{one.part_difference:.1e} (up to {tolerance.parts:.0e})",
            one.part,
            "" if one.other_choices is None else f"{one.other_choices:.2%}{limit}",
            "yes" if one.agrees else "NO",
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    sys.exit(main())
