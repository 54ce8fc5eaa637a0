"""Recipes: TOML files checked by pydantic models. An unknown key, a wrong type or a value out of range is an error naming the key.

Each class below is one section of a recipe and the `settings` of the stage that reads it. Defaults are the paper's
(SimLM, arXiv 2207.02578, tables 9 and 10; its code where the paper is silent) unless a comment says otherwise.
"""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

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

SAMPLING_OBJECTIVES = frozenset({"replaced_lm", "enc_dec_rtd"})
"""Those that read samples of a generator (a test compares them with the classes)."""


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
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loader itself (python-docs: packages, max_passages ...; hub: name, revision ...)."""
    max_passages: PositiveInt | None = None
    """Keep a seeded sample of this many passages, judged ones first; none = all."""
    max_queries: dict[Split, PositiveInt] = Field(default_factory=dict)
    """Keep a seeded sample of at most this many judged queries of a split."""
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
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None


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


class RetrieverSettings(Section):
    """Contrastive training of the bi-encoder."""

    initial: str = "pretrained"
    """ "pretrained" = encoder of the pretrain step; "start" = model of [model]; or a path or hub id."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    temperature: Annotated[float, Field(gt=0)] = 0.02
    contrast: Literal["query_to_passages", "all_pairs"] = "query_to_passages"
    """ "query_to_passages" is the paper's InfoNCE, "all_pairs" its code's default (method.md section 2)."""
    queries_per_step: Annotated[int, Field(ge=2)] = 64
    """Over all processes together."""
    group_size: Annotated[int, Field(ge=1)] = 16
    """Passages a query: 1 positive + negatives."""
    max_passage_tokens: Annotated[int, Field(ge=8)] | None = None
    max_query_tokens: Annotated[int, Field(ge=4)] | None = None
    """None = as long as the store has them."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens encoded at once; above it the step is encoded in pieces (gradient caching): same loss, bounded memory."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    dev: DevSettings = Field(default_factory=DevSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)


class DistillSettings(RetrieverSettings):
    """Training on the re-ranker's scores: KL(teacher, student) + contrastive_weight x InfoNCE."""

    group_size: Annotated[int, Field(ge=2)] = 24
    contrastive_weight: Annotated[float, Field(ge=0)] = 0.2
    student_temperature: Annotated[float, Field(gt=0)] = 0.02
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0


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
    micro_batch_tokens: PositiveInt = 16384
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    dev: DevSettings = Field(default_factory=lambda: DevSettings(num_queries=100, pool_passages=2000))
    """Dev: the first-stage run's top passages re-ranked; `pool_passages` is not used beyond that run."""
    dev_depth: PositiveInt = 20
    training: TrainingSettings = Field(default_factory=TrainingSettings)


class EncodeSettings(Section):
    """Passages -> vectors."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    """Used where the input is not a model artifact (the `start` row)."""
    batch_tokens: PositiveInt = 16384
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the computation; "auto" = bf16 where the processor has it."""
    storage: Literal["fp32", "fp16"] = "fp32"
    shard_passages: PositiveInt = 8192
    """Passages between two points that survive a kill."""


class IndexSettings(Section):
    """What is searched."""

    type: Literal["flat", "hnsw", "ivf", "pq", "bm25"] = "flat"
    k1: Annotated[float, Field(ge=0)] = 0.9
    b: Fraction = 0.4
    """BM25 as Lucene scores it, Anserini's defaults."""
    language: str = "auto"
    """Of BM25's stemmer and stop words: a Snowball language, "none", or "auto" (told from a sample of the corpus)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the faiss index: hnsw_neighbours, num_lists, num_probes, code_bytes ..."""


class SearchSettings(Section):
    """Queries of `splits` against an index, `depth` passages each."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    splits: list[Split] = Field(default_factory=lambda: list[Split](["test"]))
    depth: PositiveInt = 1000
    batch_queries: PositiveInt = 256
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class FuseSettings(Section):
    """Hybrid search: reciprocal rank fusion of two runs, sum of weight / (constant + rank)."""

    depth: PositiveInt = 1000
    constant: Annotated[float, Field(gt=0)] = 60.0
    """Cormack, Clarke and Buettcher 2009."""
    dense_weight: Fraction | Literal["dev"] = "dev"
    """Share of the dense run, the rest is BM25's; "dev" = the best on the dev queries (0.5 where there are none)."""


class MiningSettings(Section):
    """Hard negatives from a run over the training queries."""

    depth: PositiveInt = 200
    skip_top: Annotated[int, Field(ge=0)] = 0
    """Leave out this many of the best-ranked candidates, likely unlabelled positives."""
    num_negatives: PositiveInt = 200
    """Kept at most for a query."""
    below_positive: Annotated[float, Field(gt=0)] | None = None
    """Drop a candidate scoring above this share of the positive's score (NV-Retriever: 0.95); none = keep."""


class RerankSettings(Section):
    """Cross-encoder scores (raw logits) for the top of a run, or for training groups."""

    splits: list[Split] = Field(default_factory=lambda: list[Split](["test"]))
    depth: PositiveInt = 200
    max_pair_tokens: Annotated[int, Field(ge=16)] = 192
    batch_tokens: PositiveInt = 16384
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard_pairs: PositiveInt = 20_000


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
    bm25: IndexSettings = Field(default_factory=lambda: IndexSettings(type="bm25"))
    retriever1: RetrieverSettings = Field(default_factory=RetrieverSettings)
    retriever2: RetrieverSettings = Field(default_factory=RetrieverSettings)
    reranker: RerankerSettings = Field(default_factory=RerankerSettings)
    teacher: RerankSettings = Field(default_factory=lambda: RerankSettings(splits=["train"], depth=64))
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

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or name.strip(".") == "" or any(character in name for character in "/\\\0"):
            raise ValueError("a name is a plain folder name")
        return name


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
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


__all__ = ["SPLITS", "Recipe", "expand_path", "load_recipe", "parse_recipe"]
