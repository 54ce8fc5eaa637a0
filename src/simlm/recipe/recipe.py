"""A whole recipe: all its sections, and whether they fit together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from simlm.errors import nearest
from simlm.recipe.comparison import CompareSettings
from simlm.recipe.data import DataSettings, PrepareSettings
from simlm.recipe.finetuning import (
    MINING_PARTS,
    MIX_SOURCES,
    DistillSettings,
    MiningPart,
    MiningSettings,
    RerankerSection,
    RetrieverSettings,
)
from simlm.recipe.model import ModelSettings
from simlm.recipe.pretraining import GeneratorSettings, PretrainSettings
from simlm.recipe.pseudo_queries import ConsistencySettings, PseudoQuerySettings
from simlm.recipe.retrieval import EncodeSettings, EvaluateSettings, FuseSettings, IndexSettings, SearchSettings
from simlm.recipe.section import PositiveInt, Section
from simlm.recipe.teachers import HybridTeacherSettings, RerankSettings, TeacherSettings


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
