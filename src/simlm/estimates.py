"""What a step will take: time, memory and disk, from the sizes of corpus and model and this machine's matrix-multiply rate.

Rough on purpose (a factor of two either way): the arithmetic of the transformer is counted, everything else is a share of it. Once a
step of a recipe has run, its manifest holds the real figures.
"""

from __future__ import annotations

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlm.errors import SimlmError
from simlm.recipe import (
    ENDPOINT_QUERY_KINDS,
    EncodeSettings,
    GeneratorSettings,
    HybridTeacherSettings,
    IndexSettings,
    ModelSettings,
    OutsideRerankSettings,
    PretrainSettings,
    PseudoQuerySettings,
    RerankerSettings,
    RerankSettings,
    RetrieverSettings,
    SampledRerankSettings,
    SearchSettings,
    TrainingSettings,
    expand_path,
)

if TYPE_CHECKING:
    from simlm.pipeline import Plan, Step

# Whole training and encoding steps at 6 x 384 on two cores, against numpy's fp32 matrix products in the same hour: 0.9 to 1.2 times their
# rate in fp32, 2.5 to 3.8 times in bf16.
EFFICIENCY = 0.8
BF16_GAIN, INT8_GAIN = 2.5, 1.5
PROCESS_BYTES = 900 * 2**20
"""Resident set of a process with torch, transformers and a small model loaded (measured)."""


@dataclass(frozen=True)
class Estimate:
    seconds: float
    memory_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Sizes:
    """What an estimate rests on. Tokens are means over passages or queries; exact once the store is there."""

    num_passages: int
    passage_tokens: float
    query_tokens: float
    num_queries: dict[str, int]
    exact: bool


@dataclass(frozen=True)
class Shape:
    """Of a transformer: L layers, H hidden, I intermediate, V vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    def forward_flops(self, tokens: float, length: float) -> float:
        """Multiply-adds count two; attention over `length` tokens included."""
        a_token = 2 * self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate) + 4 * self.layers * length * self.hidden
        return tokens * a_token

    def head_flops(self, tokens: float) -> float:
        return 2 * tokens * self.hidden * self.vocabulary


def estimate_step(plan: Plan, step: Step) -> Estimate:
    """Time, memory and disk of one step."""
    sizes = _sizes(plan)
    shape = model_shape(_model_of(step, plan), plan)
    settings = step.settings
    weights = 4.0 * shape.parameters
    rate = matmul_flops_per_second() * EFFICIENCY
    if step.stage == "prepare":
        tokens = sizes.num_passages * sizes.passage_tokens
        return Estimate(3 + tokens / 400_000, PROCESS_BYTES, tokens * 12)
    if isinstance(settings, PseudoQuerySettings):
        # About a millisecond a query on one core, and half a second for an answer of a language model.
        asked = sum(settings.kinds.get(kind, 0.0) for kind in ENDPOINT_QUERY_KINDS) / sum(settings.kinds.values())
        seconds = settings.num_queries * (1e-3 + 0.5 * asked / (settings.endpoint.max_parallel if settings.endpoint else 1))
        return Estimate(5 + seconds + sizes.num_passages / 200_000, PROCESS_BYTES, settings.num_queries * 400)
    if isinstance(settings, HybridTeacherSettings):
        taught = sizes.num_queries.get("train", 0)
        flops = shape.forward_flops(taught * sizes.query_tokens, sizes.query_tokens)
        return Estimate(3 + taught / 600 + flops / rate, PROCESS_BYTES + weights, taught * settings.depth * 13)
    if step.stage == "filter_queries":
        return Estimate(2 + sizes.num_queries.get("train", 0) / 10_000, PROCESS_BYTES, sizes.num_queries.get("train", 0) * 400)
    if step.stage in ("select_run", "fuse", "mine_negatives", "check_teacher", "evaluate"):
        queries = max(sizes.num_queries.values(), default=0)
        return Estimate(2 + queries * 2e-3, PROCESS_BYTES + queries * 50_000, queries * 12_000)
    if isinstance(settings, IndexSettings):
        if settings.type == "bm25":
            return Estimate(2 + sizes.num_passages / 4_000, PROCESS_BYTES / 2, sizes.num_passages * sizes.passage_tokens * 8)
        return Estimate(2 + sizes.num_passages / 50_000, PROCESS_BYTES, sizes.num_passages * 4.2 * shape.hidden)
    if isinstance(settings, SearchSettings):
        queries = sum(sizes.num_queries.get(split, 0) for split in settings.splits)
        flops = shape.forward_flops(queries * sizes.query_tokens, sizes.query_tokens) + 2.0 * queries * sizes.num_passages * shape.hidden
        seconds = 3 + queries / 600 if step.inputs["index"] == "bm25" else 3 + flops / rate
        depth = min(settings.depth, sizes.num_passages)
        resident = PROCESS_BYTES + settings.memory_budget * 2**20 + sizes.num_passages * 4 * shape.hidden
        return Estimate(seconds, resident, queries * depth * 13)
    if isinstance(settings, EncodeSettings):
        tokens = sizes.num_passages * sizes.passage_tokens
        width = 2 if settings.storage == "fp16" else 4
        activations = settings.batch_tokens * shape.hidden * 60
        return Estimate(
            3 + shape.forward_flops(tokens, sizes.passage_tokens) / (rate * _gain(settings.precision)),
            PROCESS_BYTES + weights + activations,
            # With the cache the vectors of the model before stay on the disk, and a passage's key takes 24 bytes.
            sizes.num_passages * (shape.hidden * width * (2.1 if settings.cache else 1.1) + (24 if settings.cache else 0)),
        )
    if isinstance(settings, RerankSettings):
        queries = (
            sizes.num_queries.get("train", 0) if "groups" in step.inputs else sum(sizes.num_queries.get(s, 0) for s in settings.splits)
        )
        if isinstance(settings, SampledRerankSettings):
            queries = min(queries, settings.num_queries or queries)
        length = min(settings.max_pair_tokens, sizes.passage_tokens + sizes.query_tokens)
        pair_tokens = queries * min(settings.depth, sizes.num_passages) * length
        flops = shape.forward_flops(pair_tokens, length)
        memory = PROCESS_BYTES + weights + settings.batch_tokens * shape.hidden * 60
        # A pair takes 12 bytes in the run and 12 in pair_scores/.
        return Estimate(3 + flops / (rate * _gain(settings.precision)), memory, queries * settings.depth * 25)
    return _estimate_training(step, sizes, shape, rate)


def _model_of(step: Step, plan: Plan) -> ModelSettings:
    """What the step trains or computes with, as far as its settings say; else the recipe's model."""
    if isinstance(step.settings, OutsideRerankSettings):
        return ModelSettings(start=step.settings.checkpoint)
    model: ModelSettings = getattr(step.settings, "model", plan.recipe.model)
    return model


def _estimate_training(step: Step, sizes: Sizes, shape: Shape, rate: float) -> Estimate:
    settings: Any = step.settings
    training: TrainingSettings = settings.training
    rate *= _gain("bf16" if training.bf16 is True else "auto" if training.bf16 == "auto" else "fp32")
    length = sizes.passage_tokens
    head = 0.0
    if isinstance(settings, GeneratorSettings):
        if settings.source != "train":  # "random", or a copy
            return Estimate(5, PROCESS_BYTES, 8.0 * shape.parameters)
        shape = Shape(settings.num_hidden_layers, settings.hidden_size, settings.intermediate_size, shape.vocabulary)
        examples, per_step = sizes.num_passages, settings.passages_per_step
        tokens = per_step * length
        head = shape.head_flops(tokens * settings.mask_rate)
        layers = 1.0
    elif isinstance(settings, PretrainSettings):
        examples, per_step = sizes.num_passages, settings.passages_per_step
        tokens = per_step * length
        if "none" in settings.objective_weights:
            return Estimate(5, PROCESS_BYTES + 4.0 * shape.parameters, 6.0 * shape.parameters)
        costs = objective_costs(settings)
        tokens *= costs.tokens_share
        head = costs.head_rows * shape.head_flops(tokens)
        layers = costs.passes + costs.decoder_layers / max(shape.layers, 1)
    elif isinstance(settings, RetrieverSettings):
        examples, per_step = sizes.num_queries.get("train", 0), settings.queries_per_step
        tokens = per_step * (sizes.query_tokens + settings.group_size * length)
        layers = 1.33 if tokens > settings.micro_batch_tokens else 1.0
    else:
        assert isinstance(settings, RerankerSettings)
        examples, per_step = sizes.num_queries.get("train", 0), settings.queries_per_step
        length = min(settings.max_pair_tokens, length + sizes.query_tokens)
        trained = min(settings.train_hardest or settings.group_size, settings.group_size) * (2 if settings.rdrop_weight else 1)
        tokens = per_step * (trained + (settings.group_size / 3 if settings.train_hardest else 0)) * length
        layers = 1.0
    per_step = min(per_step, max(examples, 1))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(examples * training.num_train_epochs / per_step)
    flops = 3 * steps * (layers * shape.forward_flops(tokens, length) + head)
    weights = 4.0 * shape.parameters
    activations = min(settings.micro_batch_tokens, tokens) * shape.hidden * 40 * shape.layers
    return Estimate(
        5 + flops / rate + steps * weights / 4e9, PROCESS_BYTES + 4 * weights + activations, weights * (1 + 3 * training.save_total_limit)
    )


@dataclass(frozen=True)
class ObjectiveCosts:
    """What a training step costs. head_rows: of the vocabulary-wide head, a token; decoder_layers: in all; passes: of the encoder.

    tokens_share: of the tokens of its passages that the encoder reads.
    """

    head_rows: float
    decoder_layers: int
    passes: float
    tokens_share: float


# Two runs of 5% to 50% of a passage's tokens each, drawn evenly (simlm.objectives.spans); other cuts read every token about once.
_CROPS_TOKENS_SHARE = 0.55


def objective_costs(settings: PretrainSettings) -> ObjectiveCosts:
    """Costs of a recipe's objectives together: they share the pass of the encoder and add their decoders."""
    encoder, decoder, depth = settings.encoder_mask_rate, settings.decoder_mask_rate, settings.decoder_layers
    costs: dict[str, tuple[float, int, float]] = {
        "replaced_lm": (2.0, depth, 1.0),
        "enc_dec_mlm": (encoder + decoder, depth, 1.0),
        "enc_dec_rtd": (0.0, depth, 1.0),
        "condenser": (2 * encoder, depth, 1.0),
        "cocondenser": (2 * encoder, depth, 1.33),
        "autoencoder": (encoder + 1, depth, 1.0),
        "retromae": (encoder + 1, 1, 1.0),
        "dupmae": (encoder + 2, 1, 1.0),
        "context": (encoder + decoder, depth, 1.0),
        "ict": (0.0, 0, 1.33),
        "cropping": (0.0, 0, 1.33),
        "bow": (encoder, 0, 1.0),
        "masked_lm": (encoder, 0, 1.0),
    }
    found = [costs[name] for name in settings.objective_weights]
    return ObjectiveCosts(
        max(head for head, _, _ in found),
        sum(layers for _, layers, _ in found),
        max(passes for _, _, passes in found),
        _CROPS_TOKENS_SHARE if "cropping" in settings.objective_weights else 1.0,
    )


@functools.cache
def matmul_flops_per_second() -> float:
    """This machine's fp32 matrix-multiply rate in numpy on all cores (one accelerator is taken as 500 times a core's)."""
    import numpy as np

    left = np.ones((1024, 384), np.float32)
    right = np.ones((384, 1536), np.float32)
    left @ right
    quickest = math.inf
    for _ in range(24):
        started = time.perf_counter()
        left @ right
        quickest = min(quickest, time.perf_counter() - started)
    return 2.0 * left.shape[0] * left.shape[1] * right.shape[1] / quickest


@functools.cache
def has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices natively."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _gain(precision: str) -> float:
    if precision == "bf16" or (precision in ("auto", "fast") and has_bf16()):
        return BF16_GAIN
    return INT8_GAIN if precision in ("int8", "fast") else 1.0


def _sizes(plan: Plan) -> Sizes:
    store_step = plan.step("store")
    if plan.state(store_step)[0] == "done":
        return _store_sizes(plan.path("store"), store_step.fingerprint)
    from simlm.data.datasets import guess_sizes

    num_passages, num_queries = guess_sizes(plan.recipe.data)
    if (pseudo := plan.recipe.pseudo_queries) is not None:
        made = min(pseudo.num_queries, num_passages * pseudo.queries_per_passage * len(pseudo.kinds))
        dev = round(made * pseudo.dev_fraction)
        num_queries = {"train": made - dev, "dev": dev, **{split: count for split, count in num_queries.items() if split == "test"}}
    tokens = min(plan.recipe.prepare.max_passage_tokens, 110.0)
    return Sizes(
        num_passages,
        tokens,
        min(plan.recipe.prepare.max_query_tokens, 14.0),
        {str(split): number for split, number in num_queries.items()},
        exact=False,
    )


@functools.lru_cache(maxsize=4)
def _store_sizes(path: Path, fingerprint: str) -> Sizes:
    from simlm.data.store import Store

    store = Store.open(path)
    queries: dict[str, int] = {split: len(store.queries(split)) for split in store.splits}
    lengths = [float(store.queries(split).lengths.mean()) for split in store.splits if len(store.queries(split))]
    return Sizes(len(store.passages), float(store.passages.lengths.mean()), max(lengths, default=14.0), queries, exact=True)


@functools.cache
def _folder(reference: str) -> Path:
    if not reference.startswith("packaged:"):
        return expand_path(reference)
    from simlm.models.backbone import resolve_model

    return Path(resolve_model(reference))


def model_shape(settings: ModelSettings, plan: Plan) -> Shape:
    """Of the encoder that a recipe starts from; BERT base where its configuration is not on this machine."""
    config: dict[str, Any] = {}
    if settings.start == "scratch":
        config = settings.config
    else:
        try:
            config = json.loads((_folder(settings.start) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SimlmError):
            config = {}
    hidden = int(config.get("hidden_size") or config.get("dim") or 768)
    vocabulary = int(config.get("vocab_size") or plan.recipe.prepare.train_vocabulary or 30_522)
    layers = int(config.get("num_hidden_layers") or config.get("n_layers") or 12)
    return Shape(layers, hidden, int(config.get("intermediate_size") or config.get("hidden_dim") or 4 * hidden), vocabulary)
