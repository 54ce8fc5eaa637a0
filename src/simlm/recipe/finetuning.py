"""Sections of fine-tuning: the hard negatives, and the retrievers and the re-ranker that are trained on them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from simlm.recipe.model import LoraSettings, ModelSettings, TrainingSettings
from simlm.recipe.section import PositiveInt, Section

MiningPart = Literal["retriever1", "retriever2", "reranker", "distilled"]
MINING_PARTS: tuple[MiningPart, ...] = ("retriever1", "retriever2", "reranker", "distilled")
"""Parts of the pipeline that are trained on mined negatives."""
MIX_SOURCES = ("bm25", "start", "dense")
"""Runs that negatives are mined from."""


class MiningSettings(Section):
    """Hard negatives from runs over the training queries. All filters read stored scores: changing one encodes and searches nothing."""

    depth: PositiveInt = 200
    skip_top: Annotated[int, Field(ge=0)] = 0
    """Leave out this many of the best-ranked candidates, likely unlabelled positives."""
    num_negatives: PositiveInt = 200
    """Kept at most for a query."""
    below_positive: Annotated[float, Field(gt=0)] | None = None
    """Drop a candidate scoring above this share of the positive's score (NV-Retriever: 0.95); none = keep."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Runs to take negatives from, with their shares (only the ratio counts): "bm25", "start" (the starting model) and "dense" (the
    retriever trained before), as in { bm25 = 0.25, dense = 0.75 }; empty = that retriever alone, BM25 where there is none yet."""
    teacher: str | None = None
    """Cross-encoder whose raw logits for the candidates `teacher_margin` compares: a path or hub id, or "reranker", the recipe's own
    (only for [distilled_mining]: it is trained after the others)."""
    teacher_margin: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Drop a candidate whose teacher score is above the lowest positive's minus this many logits (RocketQA, arXiv 2010.08191, drops what
    the teacher holds relevant); none = keep."""
    teacher_unscored: Literal["keep", "drop"] = "keep"
    """Candidates without a teacher score."""

    @field_validator("mix")
    @classmethod
    def _positive_shares(cls, mix: dict[str, float]) -> dict[str, float]:
        for name, share in mix.items():
            if not 0 < share < math.inf:
                raise ValueError(f"the share of {name!r} is {share}, a number above 0 was expected; leave the run out instead")
        return mix


class DevSettings(Section):
    """The measure shown while a stage trains: dev queries against a pool, not the whole corpus, so that it is cheap."""

    num_queries: Annotated[int, Field(ge=0)] = 200
    """0 turns it off."""
    pool_passages: PositiveInt = 2000
    """The dev queries' positives, filled up with a seeded sample of the corpus."""


LOWEST_TEMPERATURE = 0.01
"""Below it a learned temperature does not go: scores of at most 100 (CLIP, arXiv 2103.00020, section 2.5)."""


class RetrieverSettings(Section):
    """Contrastive training of the bi-encoder."""

    initial: str = "pretrained"
    """ "pretrained" = encoder of the pretrain step; "start" = model of [model]; or a path or hub id."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    """Of InfoNCE; the one to end with ("warmup") or to start from ("learned", where it stays at 0.01 or above)."""
    temperature_mode: Literal["fixed", "warmup", "learned"] = "fixed"
    """ "warmup" = linear from `temperature_start` over `temperature_warmup_steps`; "learned" = trained with the weights (CLIP)."""
    temperature_start: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    temperature_warmup_steps: PositiveInt | None = None
    temperature_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-4
    """Of the logarithm of a learned temperature, on the schedule of `learning_rate`; CLIP's (arXiv 2103.00020, table 20)."""
    contrast: Literal["query_to_passages", "all_pairs"] = "query_to_passages"
    """ "query_to_passages" is the paper's InfoNCE, "all_pairs" its code's default (method.md section 2)."""
    teacher_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """A passage that the teacher scores above the query's positive minus this many logits is no negative in InfoNCE; none = ids and texts
    alone decide. Where a stage has no teacher of its own it takes a "teacher" run of the training queries."""
    matryoshka: list[PositiveInt] = Field(default_factory=list)
    """The loss is the mean over the whole embedding and its first so many numbers (arXiv 2205.13147), for example [256, 128]."""
    quantisation: Literal["none", "int8", "binary"] = "none"
    """Passages go through this rounding in the loss (gradient as if not), so that vectors stored that way lose less; queries do not."""
    queries_per_step: Annotated[int, Field(ge=2)] = 64
    """Over all processes together."""
    group_size: Annotated[int, Field(ge=1)] = 16
    """Passages a query: 1 positive + negatives."""
    negatives: Literal["walk", "ambiguous"] = "walk"
    """How a query's negatives are chosen each epoch: going on through its list, none again before all have been seen (the paper's code);
    or drawn by exp(-a (z - b)^2), z their stored score less the positive's in standard deviations (SimANS, arXiv 2210.11773)."""
    ambiguous_a: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """How narrow: 0.5 is a bell of one standard deviation; 0 draws all alike."""
    ambiguous_b: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Where the bell's top lies, in standard deviations above the positive's score."""
    max_passage_tokens: Annotated[int, Field(ge=8)] | None = None
    max_query_tokens: Annotated[int, Field(ge=4)] | None = None
    """None = as long as the store has them."""
    query_prompt: str | None = None
    passage_prompt: str | None = None
    """Put before each query and each passage, saved with the model ("query: "); none = those of the starting checkpoint, "" = none."""
    lora: LoraSettings | None = None
    """Train low-rank adapters only; the saved model is merged. None = train all weights (the paper)."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens encoded at once; above it the step is encoded in pieces (gradient caching): same loss, bounded memory."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    dev: DevSettings = Field(default_factory=DevSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)

    @field_validator("matryoshka")
    @classmethod
    def _different_sizes(cls, sizes: list[int]) -> list[int]:
        if len(set(sizes)) < len(sizes):
            raise ValueError("a size is there twice; each counts once in the mean")
        return sizes

    @model_validator(mode="after")
    def _temperature_options_are_used(self) -> RetrieverSettings:
        options = {"temperature_start": "warmup", "temperature_warmup_steps": "warmup", "temperature_learning_rate": "learned"}
        for key, mode in options.items():
            if self.temperature_mode != mode and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} changes nothing with temperature_mode = "{self.temperature_mode}"; set it to "{mode}"')
            if self.temperature_mode == "warmup" == mode and getattr(self, key) is None:
                raise ValueError(f'temperature_mode = "warmup" needs {key}; for example a start of 0.1, and 100 steps')
        if self.temperature_mode == "learned" and self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature {self.temperature:g}: a learned one is kept at {LOWEST_TEMPERATURE} or above; start there")
        return self

    @model_validator(mode="after")
    def _ambiguity_is_used(self) -> RetrieverSettings:
        given = [name for name in ("ambiguous_a", "ambiguous_b") if getattr(self, name) != type(self).model_fields[name].default]
        if given and self.negatives == "walk":
            raise ValueError(f'{" and ".join(given)}: no effect with negatives = "walk"; set negatives = "ambiguous"')
        return self


class DistillSettings(RetrieverSettings):
    """Training on the re-ranker's scores: distill_loss(student, teacher) + contrastive_weight x InfoNCE."""

    initial: str = "pretrained"
    """ "pretrained", "start", or a path or hub id, as of any retriever; or "retriever2" = the last retriever before, that of the last
    round (retriever 1 where `skip` leaves retriever 2 out)."""
    group_size: Annotated[int, Field(ge=2)] = 24
    distill_loss: Literal["kl", "margin_mse", "listwise"] = "kl"
    """ "kl" of the two softmaxes (the paper); "margin_mse" = squared differences of the margins to the positive (arXiv 2010.02666);
    "listwise" = likelihood of the teacher's order, whatever its scores (ListMLE, Xia et al. 2008)."""
    contrastive_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    student_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    teacher_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _has_an_effect(self) -> DistillSettings:
        if self.distill_loss == "listwise" and self.teacher_temperature != 1.0:
            raise ValueError(
                f'teacher_temperature {self.teacher_temperature:g} changes nothing with distill_loss = "listwise", which reads the order '
                "of the teacher's scores; leave it out"
            )
        if self.contrastive_weight == 0:
            for key, off in (("temperature_mode", "fixed"), ("teacher_margin", None)):
                if getattr(self, key) != off:
                    raise ValueError(f"{key} is of InfoNCE, which contrastive_weight = 0 turns off; leave {key} out, or give it a weight")
        return self


class RerankerSettings(Section):
    """Listwise training of the cross-encoder."""

    initial: str = "start"
    """ "start", "pretrained", or a path or hub id (the paper: ELECTRA-base)."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    queries_per_step: PositiveInt = 64
    group_size: Annotated[int, Field(ge=2)] = 64
    max_pair_tokens: Annotated[int, Field(ge=16)] = 192
    train_hardest: Annotated[int, Field(ge=2)] | None = 16
    """Score the whole group without gradient, train on the positive and the hardest; none = train on the whole group."""
    rdrop_weight: Annotated[float, Field(ge=0)] = 1.0
    lora: LoraSettings | None = None
    """Train low-rank adapters and the head only; the saved model is merged. None = train all weights (the paper)."""
    micro_batch_tokens: PositiveInt = 16384
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    dev: DevSettings = Field(default_factory=lambda: DevSettings(num_queries=100, pool_passages=2000))
    """Dev: the first-stage run's top passages re-ranked; `pool_passages` is not used beyond that run."""
    dev_depth: PositiveInt = 20
    training: TrainingSettings = Field(default_factory=TrainingSettings)


class RerankerSection(RerankerSettings):
    """Training of the re-ranker, and of others from other checkpoints to compare it with."""

    compare: list[str] = Field(default_factory=list)
    """Further initialisations ("start", "pretrained", paths or hub ids with the store's vocabulary): each is trained and measured as the
    re-ranker is, and is a row of the report. The teacher stays the one from `initial`."""

    @model_validator(mode="after")
    def _different_initialisations(self) -> RerankerSection:
        names = [initialisation_name(initial) for initial in (self.initial, *self.compare)]
        for name, initial in zip(names[1:], self.compare, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"compare: {initial!r} would be the second row named {name!r}; each needs a name of its own")
        return self


def initialisation_name(initial: str) -> str:
    """What a step and a row of the report are called after: the last part of a path or hub id, without what a file name cannot hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", initial.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
