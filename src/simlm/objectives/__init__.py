"""Pre-training objectives: what one is, and the table that names them.

All objectives are sums of terms over one shared pass of the encoder (`simlm.objectives.pretraining.Pretraining`). An objective says what
the encoder is to read, which loss it has on the encoder's own states, and which terms it adds: a decoder's, a head's, a contrast's. The
first objective of a recipe decides what the encoder reads; any others add their own terms to the same pass. A new objective is one file
and one row in `OBJECTIVES`.

Shapes: B sequences, T tokens, N positions, M masked positions, H hidden, V vocabulary, S passages of a step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from simlm.errors import RecipeError, nearest
from simlm.models.backbone import LayerInputs, embed, encoder_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from simlm.data.batches import TokenBatch
    from simlm.data.tokens import Template
    from simlm.objectives.generator import Generator
    from simlm.objectives.masking import Draws
    from simlm.recipe import PretrainSettings

Reads = Literal["replaced", "masked", "clean"]
"""replaced: samples of a generator stand at the masked positions; masked: [MASK] stands there; clean: the text as it is."""

Sequences = Literal["passages", "neighbours", "crops", "sentence_and_rest"]
"""What a passage becomes before it is masked; all but the first give two sequences a passage (simlm.objectives.spans)."""


class Views(Protocol):
    """The loader's half of an objective: pickles, uses no torch device, and depends on batch and draws alone."""

    def sequences(self, batch: TokenBatch, draws: Draws, template: Template) -> tuple[TokenBatch, Draws]:
        """What goes through the model in place of the passages of `batch`, and the random numbers that belong to it."""
        ...

    def lengths(
        self, lengths_S: NDArray[np.integer[Any]], tokens_S: NDArray[np.int64], draws_S: Draws, template: Template
    ) -> tuple[NDArray[np.integer[Any]], int]:
        """(tokens of each passage's longest sequence, special ones included; sequences a passage): what micro-batches are cut by."""
        ...

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        """Extra entries of a micro-batch (masks, random numbers) for the sequences of `batch`."""
        ...

    def step_counts(self, tokens_S: NDArray[np.int64], draws_S: Draws) -> dict[str, float]:
        """What the losses of a step are divided by, from the number of tokens (special ones not counted) of each of its passages.

        Every micro-batch carries them, so a step's loss is the same however it is cut and shared out.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """What objectives are built from. generator: folder of the generator, None if the recipe has none.

    continued: folder of an earlier pre-training whose other parts (a decoder) come along, None at the start.
    idf_V: rarity of each token id, for masks drawn by it. corpus_ids: ascending ids that occur in the corpus, for a softmax over them.
    """

    masked_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    generator: Path | None
    continued: Path | None
    idf_V: NDArray[np.float32] | None = None
    corpus_ids: Tensor | None = None


@dataclass
class Tokens:
    """A loss term: cross-entropy of `labels_N` under the language-model head on `hidden_NH`; all of them take one pass over the vocabulary.

    divisor: a count of the whole step, so that shares of micro-batches and processes add up to the mean. weight: within the objective.
    focus: name -> bool [N], positions whose accuracy is a dev measure.
    """

    name: str
    hidden_NH: Tensor
    labels_N: Tensor
    divisor: float
    focus: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 1.0


@dataclass
class Summed:
    """A loss term that is a sum: total is its sum over this micro-batch, count the number of its cases here, divisor that of the step.

    measures: further dev measures, name -> (sum, count); the term's own name is put before theirs.
    """

    name: str
    total: Tensor
    count: Tensor
    divisor: float
    measures: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weight: float = 1.0


Term = Tokens | Summed


@dataclass
class EncoderPass:
    """One micro-batch after its pass through the encoder.

    original_BT: the text; encoder_BT: what the encoder read. hidden_BTH: its last states, early_BTH those of `Objective.early_layer`.
    scored_N: flat positions (b * T + t) of all tokens that are not special; encoder_positions_M and decoder_positions_M: masked ones,
    the second a superset of the first. batch: all entries of the micro-batch. inputs: what layers take besides states.
    head: states -> (features_NH, weight_VH, bias_V) of the language-model head; head_ids: token ids -> rows of that weight.
    """

    masked_lm: PreTrainedModel
    generator: Generator | None
    mask_token_id: int
    head: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    head_ids: Callable[[Tensor], Tensor]
    batch: dict[str, Any]
    encoder_BT: Tensor
    hidden_BTH: Tensor
    early_BTH: Tensor | None
    inputs: LayerInputs
    generator_loss: list[Tensor]

    @property
    def original_BT(self) -> Tensor:
        return cast("Tensor", self.batch["input_ids"])

    @property
    def attention_mask(self) -> Tensor | None:
        return self.batch.get("attention_mask")

    @property
    def token_type_ids(self) -> Tensor | None:
        return self.batch.get("token_type_ids")

    @property
    def scored_N(self) -> Tensor:
        return cast("Tensor", self.batch["scored"])

    @property
    def encoder_positions_M(self) -> Tensor:
        return cast("Tensor", self.batch["encoder_positions"])

    @property
    def decoder_positions_M(self) -> Tensor:
        return cast("Tensor", self.batch["decoder_positions"])

    @property
    def cls_BH(self) -> Tensor:
        """The bottleneck: all that a decoder sees of the encoder."""
        return self.hidden_BTH[:, 0]

    @cached_property
    def labels_N(self) -> Tensor:
        """Original tokens at the scored positions."""
        return at(self.original_BT, self.scored_N)

    @cached_property
    def replaced_BT(self) -> Tensor:
        """The decoder's text with samples of the generator, drawn in a pass of their own: independent of the encoder's."""
        assert self.generator is not None
        ids_BT, loss = self.generator.replace(
            self.original_BT, self.attention_mask, self.token_type_ids, self.decoder_positions_M, self.batch["decoder_uniforms"]
        )
        self.generator_loss.append(loss)
        return ids_BT

    @cached_property
    def decoder_masked_BT(self) -> Tensor:
        """The decoder's text with [MASK] at its masked positions."""
        return masked(self.original_BT, self.decoder_positions_M, self.mask_token_id)

    def decoder_embeddings(self, ids_BT: Tensor) -> Tensor:
        """What enters a decoder, [B, T, H]: the encoder's own embeddings of ids_BT."""
        return embed(encoder_of(self.masked_lm), ids_BT, self.token_type_ids)


def at(values: Tensor, positions: Tensor) -> Tensor:
    """Entries of [B, T] or [B, T, H] at flat positions b * T + t: [N] or [N, H]."""
    return values.flatten(0, 1).index_select(0, positions)


def masked(ids_BT: Tensor, positions_M: Tensor, mask_token_id: int) -> Tensor:
    """ids_BT with the mask token at flat positions."""
    return ids_BT.flatten().index_fill(0, positions_M, mask_token_id).view_as(ids_BT)


class Objective(nn.Module):
    """One objective. Class attributes say what it needs of the shared pass; parameters of its own are saved and trained along.

    reads: what the encoder reads where this objective is the first. sequences: what passages become. decodes: whether it has a decoder's
    view (masks at decoder_mask_rate). uses_head: whether any of its terms is `Tokens`. contrasts: whether the vectors of a whole
    step are contrasted (needs two sequences a passage). bottleneck: whether its loss passes through the [CLS] vector.
    """

    reads: ClassVar[Reads] = "masked"
    sequences: ClassVar[Sequences] = "passages"
    decodes: ClassVar[bool] = False
    uses_head: ClassVar[bool] = True
    contrasts: ClassVar[bool] = False
    bottleneck: ClassVar[bool] = True
    early_layer: int | None = None
    """Number of encoder layers after which states are wanted; None = none."""

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> Objective:
        """Raises ModelError if the parts do not go together. Takes no state from `parts.continued`: that is done for all alike."""
        return cls()

    def extra_views(self) -> ExtraViews | None:
        """The loader's work for this objective alone, or None."""
        return None

    def encoder_terms(self, seen: EncoderPass) -> list[Term]:
        """The encoder's own loss where this objective is the first: by default masked LM at what was masked."""
        return [masked_term(seen)]

    def terms(self, seen: EncoderPass) -> list[Term]:
        """What this objective adds, first or not."""
        return []


class ExtraViews(Protocol):
    """Entries that one objective adds to a micro-batch; pickles."""

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]: ...


def number(value: float, like: Tensor) -> Tensor:
    """A scalar on the device of `like`, without waiting for it (torch.tensor would copy)."""
    return torch.full((), float(value), device=like.device)


def masked_term(seen: EncoderPass) -> Tokens:
    """Masked language modelling at the encoder's masked positions, divided by the masks' budget over the step."""
    positions_M = seen.encoder_positions_M
    labels_M = at(seen.original_BT, positions_M)
    everywhere = {"masked": torch.ones_like(labels_M, dtype=torch.bool)}
    return Tokens("encoder", at(seen.hidden_BTH, positions_M), labels_M, seen.batch["step_encoder_masked"], everywhere)


OBJECTIVES: dict[str, str] = {
    "replaced_lm": "simlm.objectives.replaced_lm:ReplacedLM",
    "enc_dec_mlm": "simlm.objectives.enc_dec_mlm:EncDecMLM",
    "enc_dec_rtd": "simlm.objectives.enc_dec_rtd:EncDecRTD",
    "condenser": "simlm.objectives.condenser:Condenser",
    "cocondenser": "simlm.objectives.cocondenser:CoCondenser",
    "autoencoder": "simlm.objectives.autoencoder:AutoEncoder",
    "retromae": "simlm.objectives.retromae:RetroMAE",
    "dupmae": "simlm.objectives.dupmae:DupMAE",
    "bow": "simlm.objectives.bow:BagOfWords",
    "context": "simlm.objectives.context:ContextDecoding",
    "ict": "simlm.objectives.ict:InverseCloze",
    "cropping": "simlm.objectives.cropping:Cropping",
    "masked_lm": "simlm.objectives.masked_lm:MaskedLM",
    "none": "simlm.objectives.none:Untrained",
}
"""name -> "module:Class"."""


def find_objective(name: str) -> type[Objective]:
    """The class of an objective; RecipeError for an unknown name."""
    if name not in OBJECTIVES:
        raise RecipeError(
            f"pretrain.objective: unknown objective {name!r}{nearest(name, OBJECTIVES)} (known: {', '.join(sorted(OBJECTIVES))})"
        )
    module, _, attribute = OBJECTIVES[name].partition(":")
    return cast("type[Objective]", getattr(importlib.import_module(module), attribute))
