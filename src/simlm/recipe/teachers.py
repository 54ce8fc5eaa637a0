"""Sections about scores that a cross-encoder gives, and about who teaches the distilled retriever with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from simlm.recipe.finetuning import initialisation_name
from simlm.recipe.model import ModelSettings
from simlm.recipe.section import Fraction, PositiveInt, Section
from simlm.types import Split


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
