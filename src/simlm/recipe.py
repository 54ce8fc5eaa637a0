"""Recipes: TOML files checked by pydantic models. An unknown key, a wrong type or a value out of range is an error naming the key.

Each class below is one section of a recipe and the `settings` of the stage that reads it. Defaults are the paper's
(SimLM, arXiv 2207.02578, tables 9 and 10; its code where the paper is silent) unless a comment says otherwise.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from simlm.errors import RecipeError, nearest
from simlm.types import SPLITS, Split

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

OBJECTIVE_NAMES = (
    "replaced_lm",
    "enc_dec_mlm",
    "enc_dec_rtd",
    "condenser",
    "cocondenser",
    "autoencoder",
    "retromae",
    "dupmae",
    "bow",
    "context",
    "ict",
    "cropping",
    "masked_lm",
    "none",
)
"""The rows of simlm.objectives.OBJECTIVES (a test compares them); known here without importing torch."""

MiningPart = Literal["retriever1", "retriever2", "reranker", "distilled"]
MINING_PARTS: tuple[MiningPart, ...] = ("retriever1", "retriever2", "reranker", "distilled")
"""Parts of the pipeline that are trained on mined negatives."""
MIX_SOURCES = ("bm25", "start", "dense")
"""Runs that negatives are mined from."""

SAMPLING_OBJECTIVES = frozenset({"replaced_lm", "enc_dec_rtd"})
"""Those that read samples of a generator (a test compares them with the classes)."""


PSEUDO_QUERY_KINDS = ("title", "title_keywords", "first_sentence", "crop", "keywords", "cloze")
"""The kinds of simlm.data.pseudo_queries (a test compares them)."""

ENDPOINT_QUERY_KINDS = ("ask_question", "ask_keywords", "ask_claim")
"""The prompts of simlm.data.query_endpoint (a test compares them)."""


class Section(BaseModel):
    """A section: no unknown keys, no silent conversions of type, never changed after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TrainingSettings(BaseModel):
    """Options of transformers.TrainingArguments, by their own names (learning_rate, num_train_epochs, max_steps, report_to ...).

    What the pipeline decides itself (batch size, output folder, seed, resuming) is refused with the name of the key to use.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: int = -1
    warmup_steps: Annotated[float, Field(ge=0)] = 0.1
    """Steps if 1 or more, else a fraction of all steps (as transformers has it)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_scheduler_type: str = "linear"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    bf16: bool | Literal["auto"] = "auto"
    """Mixed precision; "auto" = on where the processor has bf16 matrix products."""
    logging_steps: Annotated[float, Field(gt=0)] = 10
    eval_steps: Annotated[float, Field(gt=0)] | None = None
    """Steps between dev measures; none = at the end only."""
    save_steps: Annotated[float, Field(gt=0)] = 100
    save_total_limit: PositiveInt = 2
    report_to: str | list[str] = "none"

    @field_validator("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "max_grad_norm", mode="before")
    @classmethod
    def _integers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _known_options(self) -> TrainingSettings:
        from simlm.training_options import OPTIONS, RESERVED

        for key in self.model_extra or {}:
            if key in RESERVED:
                raise ValueError(f"{key!r} cannot be set here: {RESERVED[key]}")
            if key not in OPTIONS:
                raise ValueError(f"unknown training option {key!r}{nearest(key, [*OPTIONS, *type(self).model_fields])}")
        return self

    def with_defaults(self, **defaults: Any) -> TrainingSettings:
        """The same settings with other defaults for the keys that the recipe does not give."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return TrainingSettings.model_validate({**defaults, **given, **(self.model_extra or {})})


class DataSettings(Section):
    """Where passages, queries and judgements come from."""

    dataset: str = "beir"
    """Loader: a name of simlm.data.datasets.DATASETS (beir, msmarco, jsonl, csv, parquet, text, ir_datasets, hub, python-docs)."""
    path: str | None = None
    """Folder or id; `$VARIABLES` and `~` are expanded. `$SIMLM_DATA` falls back to `../shared/data`."""
    corpus: str | None = None
    queries: dict[Split, str] | str | None = None
    qrels: dict[Split, str] | str | None = None
    """Files inside `path` (or absolute), where the loader's own names do not fit."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Field names of JSONL, CSV and Parquet where they differ: passage_id, title, text, query_id, query, grade, answers ..."""
    metadata_fields: list[str] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Columns kept as metadata of the passages, for filters; none = the fields of a record's object "metadata" (JSONL)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loader itself (python-docs: packages, max_passages ...; hub: name, revision ...)."""
    max_passages: PositiveInt | None = None
    """Keep a seeded sample of this many passages, judged ones first; none = all."""
    max_queries: dict[Split, PositiveInt] = Field(default_factory=dict)
    """Keep a seeded sample of at most this many judged queries of a split."""
    splits: list[Split] | None = None
    """Splits whose queries and judgements are read, the files of others are not opened; none = all, ["test"] with [pseudo_queries]."""
    dev_fraction: Fraction = 0.1
    """Share of the training queries set apart as dev where the data set has no dev queries."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A broken line, missing field, empty passage, duplicate id or unknown id: stop, or leave it out and count it."""


class PrepareSettings(Section):
    """Tokenisation of corpus and queries into the store."""

    data: DataSettings = Field(default_factory=DataSettings)
    tokenizer: str = "packaged:all-MiniLM-L6-v2"
    """Model reference whose tokenizer is used; filled in from [model] by the pipeline."""
    max_passage_tokens: Annotated[int, Field(ge=8)] = 144
    """Longest passage kept, title and special tokens included."""
    max_query_tokens: Annotated[int, Field(ge=4)] = 32
    train_vocabulary: Annotated[int, Field(ge=100)] | None = None
    """Train a new WordPiece vocabulary of this size on the corpus instead of using `tokenizer`'s (only for a fresh model)."""
    lowercase: bool = True
    """Of the new vocabulary."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Tokenising processes; 0 = one a core."""


class ModelSettings(Section):
    """The starting checkpoint of every stage that does not name its own."""

    start: str = "packaged:all-MiniLM-L6-v2"
    """A path, a hub id, "packaged:all-MiniLM-L6-v2", or "scratch" for fresh weights of `config`."""
    revision: str | None = None
    """Hub revision (commit, tag) of `start`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """For "scratch": a transformers configuration, model_type and its fields."""
    pooling: Literal["cls", "mean"] = "cls"
    query_prompt: str | None = None
    passage_prompt: str | None = None
    """Put before each query and each passage that the checkpoint encodes ("query: "); none = what the checkpoint itself names."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None


class LoraSettings(Section):
    """Low-rank adapters (arXiv 2106.09685): the encoder's own weights stay as they are; needs the extra simlm[lora]."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    """An adapter's product is multiplied by alpha / rank; twice the rank is peft's usual choice."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter: all of the encoder's, or those whose names end like one of the list ("query", "value")."""

    @field_validator("target_modules")
    @classmethod
    def _some_modules(cls, names: str | list[str]) -> str | list[str]:
        if not names or any(not name for name in names):
            raise ValueError('names of linear layers were expected, for example ["query", "value"], or "all-linear"')
        return names


class GeneratorSettings(Section):
    """The masked-LM generator that replaced LM samples from (method.md section 1)."""

    source: str = "train"
    """ "train" = train a small one on the corpus; "random" = the same shape with fresh weights, never trained; otherwise a path or hub
    id of a masked LM with the same vocabulary."""
    hidden_size: PositiveInt = 128
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 512
    """Shape of the generator to train: about a quarter of the encoder's width, as ELECTRA has it (arXiv 2003.10555, section 3.2)."""
    mask_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    passages_per_step: PositiveInt = 256
    micro_batch_tokens: PositiveInt = 8192
    held_out_passages: Annotated[int, Field(ge=0)] = 512
    training: TrainingSettings = Field(default_factory=TrainingSettings)


class ProbeSettings(Section):
    """The retrieval probe of pre-training: does `[CLS]` find a held-out passage by its title or its first sentence, without labels?"""

    num_passages: Annotated[int, Field(ge=0)] = 512
    """Held-out passages searched; passages with the same title are found by one query. 0 turns the probe off."""
    query: Literal["auto", "title", "first_sentence"] = "auto"
    """What asks for a passage: its title, or its first sentence (the rest is then searched); "auto" = titles where most passages have
    one of their own."""


class PretrainSettings(Section):
    """Pre-training with the representation bottleneck."""

    initial: str = "start"
    """ "start" = the model of [model]; or a path or hub id; or a pre-trained artifact to continue from (decoder and head come along)."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    objective: str | dict[str, float] = "replaced_lm"
    """A name of simlm.objectives.OBJECTIVES, or a table of names and weights: { replaced_lm = 1.0, bow = 0.1 }. The first decides what
    the encoder reads and its own loss, the others add theirs on the same encoder pass."""
    encoder_mask_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    decoder_mask_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    masking: Literal["whole_word", "token", "span", "idf"] = "whole_word"
    """What is masked together: words (the paper), single tokens, spans of words (arXiv 1907.10529), or words drawn by their rarity."""
    decoder_layers: PositiveInt = 2
    skip_layer: PositiveInt | None = None
    """condenser, cocondenser: the early layer whose states enter the head; none = half of the layers (arXiv 2104.08253)."""
    ordinary_weight: Annotated[float, Field(gt=0)] = 0.1
    """dupmae: of the bag of words from the ordinary tokens (method.md section 3)."""
    contrast_temperature: Annotated[float, Field(gt=0)] = 0.05
    """cocondenser, ict, cropping: divides the cosines of the spans' contrast (arXiv 2112.09118, table 6)."""
    generator: Literal["frozen", "joint", "self"] = "frozen"
    """ "frozen" as the generator step left it; "joint" = trained along by its own masked-LM loss; "self" = a copy of the encoder and its
    head, taken anew every `self_refresh_steps`."""
    generator_weight: Annotated[float, Field(ge=0)] = 0.2
    """Of the joint generator's loss (method.md section 1)."""
    self_refresh_steps: PositiveInt = 100
    generator_temperature: Annotated[float, Field(gt=0)] = 1.0
    softmax: Literal["vocabulary", "corpus"] = "vocabulary"
    """ "corpus" = the losses' softmax runs over the token ids that occur in the corpus only: another loss, cheaper by what never occurs."""
    passages_per_step: PositiveInt = 2048
    micro_batch_tokens: PositiveInt = 16384
    """Tokens (padding included) that go through the model at once; memory depends on this, the result does not."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Dropout of encoder and decoder; none = the checkpoint's own."""
    held_out_passages: Annotated[int, Field(ge=0)] = 4096
    """Passages kept out of training for the dev loss (the reference code's number; at most a tenth of the corpus)."""
    probe: ProbeSettings = Field(default_factory=ProbeSettings)
    spike_ratio: Annotated[float, Field(gt=1.0)] | None = 2.0
    """A step whose loss is more than this many times the running mean (and a nat above it) is skipped and logged; none = never."""
    max_spikes: PositiveInt = 10
    """Skipped steps in a row after which training stops."""
    keep_optimizer: bool = False
    """Keep the optimiser's state beside the weights (twice their size), for continuing later; continuing uses it where it is there."""
    best_by: Literal["last", "loss", "probe"] = "last"
    """Which weights are kept: those of the last step, or of the dev measure that was best by held-out loss or by the probe's RR@10."""
    training: TrainingSettings = Field(default_factory=TrainingSettings)

    @field_validator("objective", mode="before")
    @classmethod
    def _name_or_table(cls, objective: Any) -> Any:
        if isinstance(objective, str):
            return objective
        if isinstance(objective, dict) and all(
            isinstance(weight, int | float) and not isinstance(weight, bool) for weight in objective.values()
        ):
            return {name: float(weight) for name, weight in objective.items()}
        raise ValueError(
            'a name, or a table of names and weights, was expected, for example "replaced_lm" or { replaced_lm = 1.0, bow = 0.1 }'
        )

    @field_validator("objective")
    @classmethod
    def _known_objectives(cls, objective: str | dict[str, float]) -> str | dict[str, float]:
        names = {objective: 1.0} if isinstance(objective, str) else objective
        if not names:
            raise ValueError("an empty table; name an objective, for example { replaced_lm = 1.0, bow = 0.1 }")
        for name, weight in names.items():
            if name not in OBJECTIVE_NAMES:
                raise ValueError(f"unknown objective {name!r}{nearest(name, OBJECTIVE_NAMES)} (known: {', '.join(OBJECTIVE_NAMES)})")
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name!r} is {weight}, a number above 0 was expected; leave the objective out instead")
        if "masked_lm" in list(names)[1:]:
            raise ValueError(
                '"masked_lm" is the encoder\'s own loss and adds nothing behind another objective; name it first, or leave it out'
            )
        if "none" in names and len(names) > 1:
            raise ValueError('"none" trains nothing and cannot be combined with other objectives')
        return objective

    @property
    def objective_weights(self) -> dict[str, float]:
        """name -> weight, in the recipe's order."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else dict(self.objective)

    @property
    def needs_generator(self) -> bool:
        """Whether any objective reads samples of the generator step's model."""
        return self.generator != "self" and not SAMPLING_OBJECTIVES.isdisjoint(self.objective_weights)

    @model_validator(mode="after")
    def _one_step_is_kept(self) -> PretrainSettings:
        if self.keep_optimizer and self.best_by != "last":
            raise ValueError(
                f'keep_optimizer keeps the state of the last step, best_by = "{self.best_by}" the weights of another; set best_by = "last"'
            )
        return self

    @model_validator(mode="after")
    def _nested_masks(self) -> PretrainSettings:
        if self.decoder_mask_rate < self.encoder_mask_rate:
            raise ValueError(
                f"decoder_mask_rate {self.decoder_mask_rate} is below encoder_mask_rate {self.encoder_mask_rate}; "
                "the decoder's mask is a superset of the encoder's"
            )
        return self


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


class EncodeSettings(Section):
    """Passages -> vectors."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    """Used where the input is not a model artifact (the `start` row)."""
    batch_tokens: PositiveInt = 16384
    """Padded tokens encoded at once; on a CPU 2,048 at most, which is faster there."""
    precision: Literal["auto", "fp32", "bf16", "int8", "fast"] = "auto"
    """Of the computation; "auto" = bf16 where the processor has it, else fp32. "int8" = 8-bit products (x86 processors, near fp32);
    "fast" = bf16 where the processor has it, else int8 where it has that. Set search.precision alike."""
    storage: Literal["fp32", "fp16"] = "fp32"
    shard_passages: PositiveInt = 8192
    """Passages between two points that survive a kill, and what one process takes at a time."""
    cache: bool = True
    """Take vectors of passages that the same model has encoded before, with the same settings, from the run's embedding cache."""


class IndexSettings(Section):
    """What is searched."""

    type: Literal["flat", "hnsw", "ivf", "pq", "rabitq", "milvus", "bm25"] = "flat"
    k1: Annotated[float, Field(ge=0)] = 0.9
    b: Fraction = 0.4
    """BM25 as Lucene scores it, Anserini's defaults."""
    language: str = "auto"
    """Of BM25's stemmer and stop words: a Snowball language, "none", or "auto" (told from a sample of the corpus)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of an index of vectors (docs/index.md has all): dim, rescore, rescore_dtype, and its type's own: dtype, num_lists, bits ..."""


class SearchSettings(Section):
    """Queries of `splits` against an index, `depth` passages each."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    splits: list[Split] = Field(default_factory=lambda: list[Split](["test"]))
    depth: PositiveInt = 1000
    batch_queries: PositiveInt = 256
    memory_budget: Annotated[int, Field(ge=128)] = 256
    """MiB of each process for scores and candidates of an exact search (index type "flat"); changes nothing in the result."""
    precision: Literal["auto", "fp32", "bf16", "int8", "fast"] = "auto"
    """Of encoding the queries, as in encode.precision."""


class FuseSettings(Section):
    """Hybrid search: two runs fused by rank or by score."""

    method: Literal["rank", "score"] = "rank"
    """ "rank" = sum of weight / (constant + rank); "score" = weighted sum of the scores, standardised within the query (arXiv 2210.11934
    finds such sums better than ranks, and their weight easier to carry over to other queries)."""
    depth: PositiveInt = 1000
    constant: Annotated[float, Field(gt=0)] = 60.0
    """Cormack, Clarke and Buettcher 2009."""
    dense_weight: Fraction | Literal["dev"] = "dev"
    """Share of the dense run, the rest is BM25's; "dev" = the best on the dev queries (0.5 where there are none)."""


class HybridTeacherSettings(Section):
    """BM25 and a dense retriever together as a teacher that needs no labels: their scores for each training group, standardised and summed.

    The sum has the spread of the dense scores / temperature: with dense_weight = 1 and dense = "start" it is what the starting model says
    itself, so that distilling it moves nothing, and BM25's share is all that is new.
    """

    model: ModelSettings = Field(default_factory=ModelSettings)
    alone: bool = True
    """Whether nobody else teaches: the recipe's re-ranker then only re-ranks. False = averaged with it and with teacher.extra."""
    dense: Literal["start", "best"] = "start"
    """The dense part: the starting model, or the best retriever trained so far."""
    dense_weight: Fraction = 0.6
    """Share of the dense scores, the rest is BM25's; what did well on both of two unlike corpora (docs/no-labels.md)."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Divides the dense scores, as in training: logits of the dense model, to be distilled at teacher_temperature = 1."""
    depth: PositiveInt = 64
    """Negatives of a group that are scored, at most."""


class EndpointSettings(Section):
    """A language model behind an OpenAI-compatible HTTP endpoint (vLLM, llama.cpp, Ollama, a provider), asked for queries."""

    url: str
    """Up to and with the version: "http://127.0.0.1:8000/v1"; `/chat/completions` is added."""
    model: str
    """Name by which the endpoint knows the model."""
    api_key_env: str | None = None
    """Environment variable that holds the key; none = no key is sent. The key itself is never written anywhere."""
    max_parallel: PositiveInt = 8
    """Requests under way at the same time."""
    max_tries: PositiveInt = 6
    """Of one request; between them 1, 2, 4 ... seconds pass, or what the answer's Retry-After says."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of the language model's sampling; Promptagator's (arXiv 2209.11755)."""
    max_tokens: PositiveInt = 64
    """Of an answer."""
    passage_words: PositiveInt = 300
    """Words of a passage that are sent."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not re.match(r"https?://[^/\s]+", url):
            raise ValueError('an address like "http://127.0.0.1:8000/v1" was expected')
        return url.rstrip("/")


Between = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class PseudoQuerySettings(Section):
    """Queries made from the passages themselves, for a corpus without labels; real training and dev queries are then not read."""

    kinds: dict[str, float] = Field(
        default_factory=lambda: {"title_keywords": 1.0, "keywords": 1.0, "first_sentence": 1.0, "crop": 1.0, "cloze": 1.0, "title": 0.5}
    )
    """Kind -> share of the queries (only the ratio counts); a kind that the corpus has too little of leaves its share to the others. Kinds:
    title, title_keywords, first_sentence, crop, keywords, cloze; from the endpoint: ask_question, ask_keywords, ask_claim."""
    num_queries: PositiveInt = 20_000
    """At most, of all kinds together, before the consistency filter."""
    queries_per_passage: PositiveInt = 2
    """Of one kind, at most, where a passage can give several; the second ones are taken when every passage has given its first."""
    dev_fraction: Fraction = 0.05
    """Share of the passages whose queries become the dev split."""
    words: Between = Field(default_factory=lambda: [5, 14])
    """Shortest and longest crop, sentence and cloze."""
    keywords: Between = Field(default_factory=lambda: [3, 7])
    title_keywords: Between = Field(default_factory=lambda: [1, 3])
    """Fewest and most words of a keyword query, and beside a title."""
    drop_words: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the words of crops and first sentences left out at random, so that no query is a verbatim part of its passage."""
    max_positives: PositiveInt = 3
    """A query that more passages than this give (a title of many sections) says too little and is left out."""
    endpoint: EndpointSettings | None = None
    """Where the ask_ kinds come from."""

    @field_validator("kinds", mode="before")
    @classmethod
    def _shares_are_numbers(cls, kinds: Any) -> Any:
        return {name: float(share) if type(share) is int else share for name, share in kinds.items()} if isinstance(kinds, dict) else kinds

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: dict[str, float]) -> dict[str, float]:
        known = (*PSEUDO_QUERY_KINDS, *ENDPOINT_QUERY_KINDS)
        if not kinds:
            raise ValueError("no kind of query; name one, for example { keywords = 1, crop = 1 }")
        for name, share in kinds.items():
            if name not in known:
                raise ValueError(f"unknown kind {name!r}{nearest(name, known)} (known: {', '.join(known)})")
            if not 0 < share < math.inf:
                raise ValueError(f"the share of {name!r} is {share}, a number above 0 was expected; leave the kind out instead")
        return kinds

    @model_validator(mode="after")
    def _limits_fit(self) -> PseudoQuerySettings:
        for name in ("words", "keywords", "title_keywords"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"{name} = [{least}, {most}]: fewest first, then most")
        asked = [kind for kind in self.kinds if kind in ENDPOINT_QUERY_KINDS]
        if asked and self.endpoint is None:
            raise ValueError(f"kinds {', '.join(asked)} come from an endpoint; set endpoint, or leave them out")
        if self.endpoint is not None and not asked:
            raise ValueError(f"the endpoint is not asked for anything; name kinds of {', '.join(ENDPOINT_QUERY_KINDS)}, or leave it out")
        if self.dev_fraction == 1:
            raise ValueError("dev_fraction = 1 leaves no training queries")
        return self


class ConsistencySettings(Section):
    """Round trip: a pseudo query stays if its passage is among the first `within` it finds (arXiv 2209.11755, InPars 2301.01820)."""

    by: Literal["bm25", "start", "hybrid", "reranker", "none"] = "hybrid"
    """Who searches: BM25, the starting model, both fused by score with equal weights, a cross-encoder over BM25's first `depth`, nobody."""
    within: PositiveInt = 10
    depth: PositiveInt = 100
    """Searched; of "reranker", pairs scored a query."""
    reranker: str | None = None
    """Path or hub id of the cross-encoder for by = "reranker", such as `runs/NAME/reranker` of an earlier run."""
    trivial_share: Fraction = 1.0
    """At most this share of the queries kept may be found by words alone: BM25 has their passage first, with `trivial_margin` to spare."""
    trivial_margin: Annotated[float, Field(ge=0)] = 0.5
    """How far BM25's score of the second is below that of the first, as a share of the first."""

    @model_validator(mode="after")
    def _reranker_fits(self) -> ConsistencySettings:
        if (self.by == "reranker") != (self.reranker is not None):
            raise ValueError('`reranker` names the cross-encoder of by = "reranker"; set both or neither')
        if self.by != "none" and self.within > self.depth:
            raise ValueError(f"within = {self.within} is more than depth = {self.depth}, so it would keep what was not found")
        return self


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


class RerankSettings(Section):
    """Cross-encoder scores (raw logits) for the top of a run, or for training groups."""

    splits: list[Split] = Field(default_factory=lambda: list[Split](["test"]))
    depth: PositiveInt = 200
    max_pair_tokens: Annotated[int, Field(ge=16)] = 192
    batch_tokens: PositiveInt = 16384
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard_pairs: PositiveInt = 20_000
    """Pairs between two points that survive a kill."""


class SampledRerankSettings(RerankSettings):
    """Settings of a rerank step that may score a sample of the queries."""

    num_queries: PositiveInt | None = Field(default=None, exclude_if=lambda value: value is None)
    """A seeded sample of this many: of a run's judged queries of each split, or of groups; none = all, as before there was a choice."""


class OutsideRerankSettings(SampledRerankSettings):
    """Settings of a rerank step whose cross-encoder no step of the recipe makes."""

    checkpoint: str
    """Any cross-encoder or sequence classifier with one label: a path or hub id."""


class TeacherSettings(RerankSettings):
    """The re-ranker's scores for the training groups, and those of further teachers."""

    splits: list[Split] = Field(default_factory=lambda: list[Split](["train"]))
    depth: PositiveInt = 64
    num_queries: PositiveInt | None = None
    """Score a seeded sample of this many training queries, and distil from these alone; none = all."""
    extra: list[str] = Field(default_factory=list)
    """Paths or hub ids of further cross-encoders with one label; all are averaged (simlm.data.teachers.combine_teachers). They teach alone
    where `skip` names the re-ranker."""
    check_queries: Annotated[int, Field(ge=0)] = 200
    """Dev queries whose first passages the teacher re-ranks, to be compared with the retriever that it is to teach; 0 = compare on the
    training groups, which both were trained on."""
    check_depth: PositiveInt = 20
    """Passages re-ranked of each of them."""
    interpolate: bool = False
    """Always teach w x teacher + (1 - w) x retriever, w by RR@10 of the compared queries; w = 1 where the teacher alone does best."""
    if_worse: Literal["mix", "skip", "go_on"] = "mix"
    """Where the teacher is worse than the retriever (p < 0.05): "mix" = as `interpolate`, and no distillation where the teacher adds
    nothing; "skip" = no distillation, the last retriever is kept; "go_on" = distil from it all the same (the paper checks nothing)."""

    @field_validator("extra")
    @classmethod
    def _different_teachers(cls, extra: list[str]) -> list[str]:
        for reference in extra:
            if not reference.strip() or reference in ("scratch", "start", "pretrained", "reranker"):
                raise ValueError(f"{reference!r} names no finished cross-encoder; give a path or hub id (the recipe's own is always one)")
        names = [initialisation_name(reference) for reference in extra]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two teachers are called {name!r}; each needs a name of its own, and one teacher counts once")
        return extra

    @field_validator("splits")
    @classmethod
    def _training_queries(cls, splits: list[Split]) -> list[Split]:
        if splits != ["train"]:
            raise ValueError('a teacher scores training groups, so only ["train"] fits; leave it out')
        return splits


class CheckTeacherSettings(Section):
    """Teacher against student, and what is taught after it: what [teacher] and [distilled] say of it."""

    depth: PositiveInt = 20
    interpolate: bool = False
    if_worse: Literal["mix", "skip", "go_on"] = "mix"
    student_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    """Divides the student's cosines, as in the loss."""
    student: str = "retriever2"
    """What the student is called."""


class EvaluateSettings(Section):
    """Measures and the report."""

    split: Split = "test"
    measures: list[str] = Field(default_factory=lambda: ["RR@10", "nDCG@10", "R@50", "R@100", "R@1000"])
    """As ir_measures writes them; graded judgements: R(rel=2)@50."""
    answers: list[PositiveInt] = Field(default_factory=list)
    """Cut-offs of answer-string recall (Natural Questions: 20 and 100), shown as Answer@k; needs queries with answers."""
    main: str = "RR@10"
    """The measure of the significance test, of wins and losses, and of choosing between runs on dev."""
    significance: Literal["randomization", "t-test"] = "randomization"
    num_samples: PositiveInt = 10_000
    """Sign flips of the paired randomization test."""
    examples: Annotated[int, Field(ge=0)] = 25
    """Queries shown among wins and among losses."""


class CompareSettings(Section):
    """The grid of `simlm compare-objectives`: pre-training and retriever 1 for each row of the paper's ablation tables."""

    objectives: list[str | dict[str, float]] = Field(default_factory=lambda: list[str | dict[str, float]](OBJECTIVE_NAMES))
    """Rows of the first table; each is what `pretrain.objective` takes. An empty list leaves a table out."""
    main: str = "replaced_lm"
    """The row that the others are compared with. It gets all seeds, and so do the rows of the other tables that stand for it."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(default_factory=lambda: [42, 43, 44])
    """Of pre-training and of the retriever; all else keeps the recipe's seed."""
    seeds_of_others: PositiveInt = 1
    """How many of the seeds the other rows get."""
    replace_rates: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(
        default_factory=lambda: [[0.15, 0.3], [0.3, 0.3], [0.3, 0.5], [0.4, 0.6], [0.3, 1.0]]
    )
    """[encoder, decoder] mask rates of replaced_lm (method.md section 1)."""
    generators: list[Literal["frozen", "joint", "random", "self"]] = Field(
        default_factory=lambda: list[Literal["frozen", "joint", "random", "self"]](["frozen", "joint", "random"])
    )
    """Generators of replaced_lm: the recipe's own, frozen or trained along; one of random weights; the encoder's own head."""
    variants: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """Rows of replaced_lm with other settings of [pretrain], for example { softmax = "corpus" }; the recipe's own stands beside them.
    An empty list leaves the table out."""
    mismatched: DataSettings | None = None
    """Another corpus to pre-train on (its queries are not used), with the same tokenizer; none leaves the table out."""
    budget: Literal["data", "tokens", "time"] = "data"
    """What is equal for all rows: passages and steps; tokens through encoder and decoder layers; or seconds of training steps."""
    calibration_steps: Annotated[int, Field(ge=2)] = 8
    """budget = "time": steps that are timed for each row, once."""
    keep_models: bool = True
    """Keep the models of measured rows; vectors, indexes and runs are dropped in any case."""

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, objectives: list[str | dict[str, float]]) -> list[str | dict[str, float]]:
        return [PretrainSettings._known_objectives(objective) for objective in objectives]

    @field_validator("replace_rates")
    @classmethod
    def _nested_rates(cls, rates: list[list[float]]) -> list[list[float]]:
        for encoder, decoder in rates:
            if not 0 < encoder < 1 or not encoder <= decoder <= 1:
                raise ValueError(f"[{encoder}, {decoder}]: expected 0 < encoder < 1 and encoder <= decoder <= 1, for example [0.3, 0.5]")
        return rates

    @field_validator("variants")
    @classmethod
    def _known_settings(cls, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for variant in variants:
            if not variant:
                raise ValueError('an empty table; name a setting of [pretrain], for example { softmax = "corpus" }')
            for key in variant:
                if key in ("objective", "initial", "model"):
                    raise ValueError(f"{key!r} cannot vary here; compare.objectives compares objectives, another recipe another start")
                if key not in PretrainSettings.model_fields:
                    raise ValueError(f"unknown setting of [pretrain] {key!r}{nearest(key, PretrainSettings.model_fields)}")
            try:
                PretrainSettings.model_validate(variant)
            except ValidationError as error:
                # What does not fit together (no place is named) may fit with the recipe's own [pretrain]; the grid checks that.
                if any(one["loc"] for one in error.errors()):
                    raise
        return variants

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice; equal seeds give equal results")
        return seeds


class Recipe(Section):
    """A whole recipe."""

    name: str
    output: str | None = None
    """Folder of the run; none = runs/NAME."""
    seed: Annotated[int, Field(ge=0)] = 42
    data: DataSettings = Field(default_factory=DataSettings)
    prepare: PrepareSettings = Field(default_factory=PrepareSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    generator: GeneratorSettings = Field(default_factory=GeneratorSettings)
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings)
    mining: MiningSettings = Field(default_factory=MiningSettings)
    """Of all stages, as far as a section of their own does not say otherwise."""
    retriever1_mining: MiningSettings = Field(default_factory=MiningSettings)
    """Negatives that retriever 1 is trained on; what is not given is as in [mining]."""
    retriever2_mining: MiningSettings = Field(default_factory=MiningSettings)
    """Of retriever 2, in every round."""
    reranker_mining: MiningSettings = Field(default_factory=MiningSettings)
    """Of the re-ranker, and of the distilled retriever where [distilled_mining] says nothing."""
    distilled_mining: MiningSettings = Field(default_factory=MiningSettings)
    """Of the distilled retriever, among those that the re-ranker has scored; what is not given is as for the re-ranker."""
    rounds: PositiveInt = 1
    """Trainings of retriever 2: each on negatives mined with the one before, from the same start (ANCE's idea, arXiv 2007.00808)."""
    bm25: IndexSettings = Field(default_factory=lambda: IndexSettings(type="bm25"))
    pseudo_queries: PseudoQuerySettings | None = None
    """With this section the training and dev queries are made from the passages, and the data set's own are not read."""
    consistency: ConsistencySettings = Field(default_factory=ConsistencySettings)
    """Which of the pseudo queries are kept."""
    hybrid_teacher: HybridTeacherSettings | None = None
    """With this section BM25 and a dense retriever together teach the distilled retriever, without the re-ranker or beside it."""
    retriever1: RetrieverSettings = Field(default_factory=RetrieverSettings)
    retriever2: RetrieverSettings = Field(default_factory=RetrieverSettings)
    reranker: RerankerSection = Field(default_factory=RerankerSection)
    teacher: TeacherSettings = Field(default_factory=TeacherSettings)
    """The re-ranker's scores for the training groups."""
    distilled: DistillSettings = Field(default_factory=DistillSettings)
    encode: EncodeSettings = Field(default_factory=EncodeSettings)
    index: IndexSettings = Field(default_factory=IndexSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    rerank: RerankSettings = Field(default_factory=RerankSettings)
    hybrid: FuseSettings = Field(default_factory=FuseSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    compare: CompareSettings = Field(default_factory=CompareSettings)
    skip: list[Literal["pretrain", "retriever2", "reranker", "distilled", "start", "hybrid"]] = Field(default_factory=list)
    """Parts of the pipeline left out; what depends on a part left out goes with it or falls back on the part before."""

    def mining_of(self, part: MiningPart) -> MiningSettings:
        """Settings of the mining for a part of the pipeline: its own section's, else [mining]'s."""
        sections = [self.mining, *([self.reranker_mining] if part == "distilled" else []), getattr(self, f"{part}_mining")]
        given = {name: getattr(section, name) for section in sections for name in section.model_fields_set}
        if part == "distilled":  # what the re-ranker has not scored cannot be distilled
            given["teacher_unscored"] = "drop"
        return MiningSettings.model_validate(given)

    @model_validator(mode="after")
    def _minings_fit(self) -> Recipe:
        for part in MINING_PARTS:
            own: MiningSettings = getattr(self, f"{part}_mining")
            # Without a section of its own the distilled retriever is trained on the re-ranker's negatives.
            if part != "distilled" or own.model_fields_set:
                _check_mix(self, part)
                _check_teacher(self, part)
        if self.rounds > 1 and "retriever2" in self.skip:
            raise ValueError(f"rounds = {self.rounds} repeats retriever 2, which `skip` leaves out; drop one of the two")
        return self

    @model_validator(mode="after")
    def _pseudo_queries_fit(self) -> Recipe:
        if self.pseudo_queries is None:
            if self.consistency.model_fields_set:
                raise ValueError("[consistency] filters pseudo queries; add a section [pseudo_queries], or leave it out")
        else:
            labelled = [split for split in self.data.splits or [] if split != "test"]
            if labelled:
                raise ValueError(f'data.splits names {labelled}, which [pseudo_queries] replaces; ["test"] or nothing fits')
            if self.data.max_queries.keys() - {"test"}:
                raise ValueError("data.max_queries limits training or dev queries, which [pseudo_queries] replaces; set num_queries there")
            if self.consistency.by in ("start", "hybrid") and self.model.start == "scratch":
                raise ValueError(f'consistency.by = "{self.consistency.by}" searches with model.start, which is "scratch"; use by = "bm25"')
        if self.hybrid_teacher is not None:
            if "distilled" in self.skip:
                raise ValueError("[hybrid_teacher] teaches the distilled retriever, which `skip` leaves out; drop one of the two")
            if self.hybrid_teacher.alone and (self.teacher.extra or self.distilled_mining.model_fields_set):
                raise ValueError(
                    "hybrid_teacher.alone keeps other teachers out, but teacher.extra or [distilled_mining] asks for them; "
                    "set hybrid_teacher.alone = false, or leave them out"
                )
            if self.hybrid_teacher.dense == "start" and self.model.start == "scratch":
                raise ValueError('hybrid_teacher.dense = "start" is model.start, which is "scratch"; use dense = "best"')
        return self

    @model_validator(mode="after")
    def _rerankers_fit(self) -> Recipe:
        if self.reranker.compare and "reranker" in self.skip:
            raise ValueError("reranker.compare trains re-rankers, which `skip` leaves out; drop one of the two")
        if self.teacher.extra and "distilled" in self.skip:
            raise ValueError("teacher.extra scores for the distilled retriever, which `skip` leaves out; drop one of the two")
        if self.distilled_mining.model_fields_set and "reranker" in self.skip:
            raise ValueError("[distilled_mining] reads the scores of the recipe's re-ranker, which `skip` leaves out; drop one of the two")
        return self

    @model_validator(mode="after")
    def _teachers_fit(self) -> Recipe:
        about_teaching = ("interpolate", "if_worse", "check_queries", "check_depth", "num_queries")
        given = [key for key in about_teaching if key in self.teacher.model_fields_set]
        scored = "distilled" not in self.skip and ("reranker" not in self.skip or self.teacher.extra)
        if given and not (scored and not (self.hybrid_teacher and self.hybrid_teacher.alone)):
            raise ValueError(
                f"teacher.{given[0]} is about a cross-encoder that teaches the distilled retriever, and this recipe has none; leave it out"
            )
        if self.teacher.interpolate and self.teacher.if_worse != "mix":
            raise ValueError(
                f'teacher.if_worse = "{self.teacher.if_worse}" changes nothing with teacher.interpolate, which mixes in any case; drop one'
            )
        if self.teacher.check_queries == 0 and "check_depth" in self.teacher.model_fields_set:
            raise ValueError("teacher.check_depth changes nothing with teacher.check_queries = 0; drop one of the two")
        for name in ("retriever1", "retriever2", "reranker"):
            if getattr(self, name).initial == "retriever2":
                raise ValueError(f'{name}.initial = "retriever2": only [distilled] can start from it; use "pretrained" or "start"')
        return self

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or name.strip(".") == "" or any(character in name for character in "/\\\0"):
            raise ValueError("a name is a plain folder name")
        return name


def _mining_key(recipe: Recipe, part: MiningPart, key: str) -> str:
    """The key that a part's mining setting was given by."""
    own: MiningSettings = getattr(recipe, f"{part}_mining")
    inherited = recipe.reranker_mining if part == "distilled" else recipe.mining
    if key in own.model_fields_set:
        return f"{part}_mining.{key}"
    return f"reranker_mining.{key}" if part == "distilled" and key in inherited.model_fields_set else f"mining.{key}"


def _check_mix(recipe: Recipe, part: MiningPart) -> None:
    """ValueError if the runs that a part's negatives are to be taken from are not there when it is their turn."""
    mix, key = recipe.mining_of(part).mix, _mining_key(recipe, part, "mix")
    for source in mix:
        if source not in MIX_SOURCES:
            raise ValueError(f"{key}: unknown run {source!r}{nearest(source, MIX_SOURCES)} (known: {', '.join(MIX_SOURCES)})")
    if part == "retriever1" and "dense" in mix:
        raise ValueError(
            f'{key}: before retriever 1 no dense retriever is trained; take "start" for it, '
            "or put the mix into [retriever2_mining] and [reranker_mining]"
        )
    if "start" in mix and recipe.model.start == "scratch":
        raise ValueError(f'{key}: "start" needs a starting model that retrieves, model.start is "scratch"')


def _check_teacher(recipe: Recipe, part: MiningPart) -> None:
    """ValueError if the settings of a part's teacher filter do not fit together."""
    settings = recipe.mining_of(part)
    teacher, margin = _mining_key(recipe, part, "teacher"), _mining_key(recipe, part, "teacher_margin")
    if part == "distilled":
        if settings.teacher != "reranker" or settings.teacher_margin is None:
            raise ValueError(
                "distilled_mining mines among what the re-ranker of the recipe has scored: set "
                'distilled_mining.teacher = "reranker" and distilled_mining.teacher_margin, or leave the section out'
            )
        own = recipe.distilled_mining
        if "teacher_unscored" in own.model_fields_set and own.teacher_unscored == "keep":
            raise ValueError('distilled_mining.teacher_unscored: distillation needs a score for every pair, so only "drop" fits')
    elif settings.teacher == "reranker":
        raise ValueError(
            f"{teacher}: the recipe's re-ranker is trained on these negatives, so it cannot filter them; "
            "name a finished cross-encoder, or put it into [distilled_mining]"
        )
    elif settings.teacher is None and settings.teacher_margin is not None:
        raise ValueError(f"{margin} compares a teacher's scores: name a cross-encoder in {teacher}")
    elif settings.teacher is not None and settings.teacher_margin is None:
        raise ValueError(f"{teacher} has no effect without {margin}; give that too, for example 1.0")
    elif settings.teacher is None and settings.teacher_unscored == "drop":
        raise ValueError(f"{_mining_key(recipe, part, 'teacher_unscored')} has no effect without {teacher}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe. overrides: `section.key=value`, values as TOML writes them (bare words are strings).

    Raises RecipeError naming file and key; for an unknown key it suggests the nearest known one.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `simlm init FOLDER` writes one for your data") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder, a recipe (a .toml file) was expected; `simlm init {path}` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    for override in overrides or []:
        _apply(raw, override)
    raw.setdefault("name", path.stem)
    return parse_recipe(raw, where=str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as a dictionary (as TOML reads it)."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


def expand_path(text: str) -> Path:
    """A path with `~` and environment variables expanded; SIMLM_DATA falls back to ../shared/data where it is not set."""
    if "SIMLM_DATA" in text and "SIMLM_DATA" not in os.environ:
        text = text.replace("${SIMLM_DATA}", "../shared/data").replace("$SIMLM_DATA", "../shared/data")
    return Path(os.path.expandvars(os.path.expanduser(text)))


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override}: expected section.key=value, for example --set retriever1.temperature=0.05")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {section!r} is a value, not a section")
    table[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            lines.append(f"unknown key {place!r}{nearest(str(item['loc'][-1]), known)} (known here: {', '.join(sorted(known))})")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(item.get("input"), dict) else f" (found {item.get('input')!r})"
            lines.append(f"{place or 'recipe'}: {message}{shown}")
    return f"{where}: " + f"\n{where}: ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        # Of `Section | None` the section.
        kinds = [one for one in get_args(field.annotation) if isinstance(one, type) and issubclass(one, Section)]
        model = kinds[0] if kinds else field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


__all__ = ["SPLITS", "Recipe", "expand_path", "load_recipe", "parse_recipe"]
