"""Sections that the trained models share: the starting checkpoint, adapters, and the options of the training loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from simlm.errors import nearest
from simlm.recipe.section import PositiveInt, Section


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
