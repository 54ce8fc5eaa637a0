"""The section of `simlm compare-objectives`: which rows its tables have, on which seeds, with what budget."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from simlm.errors import nearest
from simlm.recipe.data import DataSettings
from simlm.recipe.pretraining import OBJECTIVE_NAMES, PretrainSettings, check_objectives
from simlm.recipe.section import PositiveInt, Section


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
        for objective in objectives:
            check_objectives(objective)
        return objectives

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
