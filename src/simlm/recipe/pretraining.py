"""Sections of pre-training: the objectives and their masks, the generator they sample from, and the probe."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from simlm.errors import nearest
from simlm.recipe.model import ModelSettings, TrainingSettings
from simlm.recipe.section import PositiveInt, Section

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
        check_objectives(objective)
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


def check_objectives(objective: str | dict[str, float]) -> None:
    """ValueError if an objective is not known, its weight is no weight, or the objectives do not go together."""
    names = {objective: 1.0} if isinstance(objective, str) else objective
    if not names:
        raise ValueError("an empty table; name an objective, for example { replaced_lm = 1.0, bow = 0.1 }")
    for name, weight in names.items():
        if name not in OBJECTIVE_NAMES:
            raise ValueError(f"unknown objective {name!r}{nearest(name, OBJECTIVE_NAMES)} (known: {', '.join(OBJECTIVE_NAMES)})")
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {name!r} is {weight}, a number above 0 was expected; leave the objective out instead")
    if "masked_lm" in list(names)[1:]:
        raise ValueError('"masked_lm" is the encoder\'s own loss and adds nothing behind another objective; name it first, or leave it out')
    if "none" in names and len(names) > 1:
        raise ValueError('"none" trains nothing and cannot be combined with other objectives')
