"""Sections of retrieval: passages to vectors, the index, the search, the fusion of two runs, and the measures of the report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from simlm.recipe.model import ModelSettings
from simlm.recipe.section import Fraction, PositiveInt, Section
from simlm.types import Split


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

    method: Literal["score", "rank"] = "score"
    """ "score" = weighted sum of the scores, standardised within the query; "rank" = sum of weight / (constant + rank). arXiv 2210.11934
    finds sums of scores better than ranks, and so do we on every corpus tried (docs/results.md)."""
    depth: PositiveInt = 1000
    constant: Annotated[float, Field(gt=0)] = 60.0
    """Of "rank"; Cormack, Clarke and Buettcher 2009."""
    dense_weight: Fraction | Literal["dev"] = "dev"
    """Share of the dense run, the rest is BM25's; "dev" = the best on the dev queries (0.5 where there are none)."""

    @model_validator(mode="after")
    def _constant_of_ranks(self) -> FuseSettings:
        if "constant" in self.model_fields_set and self.method != "rank" and self.constant != 60.0:
            raise ValueError('constant is for method = "rank", and the method is "score"; set method = "rank", or leave constant out')
        return self


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
