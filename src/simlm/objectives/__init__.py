"""Pre-training objectives: the protocol, and the table that names them.

An objective has two halves. `Views` runs in the data loader on numpy arrays: it decides masks and random numbers for a batch of
passages. The objective itself is the module that is trained: it turns a micro-batch into a loss. A new objective is one file and
one row in `OBJECTIVES`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from simlm.errors import RecipeError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from simlm.data.batches import TokenBatch
    from simlm.objectives.masking import Draws
    from simlm.recipe import PretrainSettings


class Views(Protocol):
    """The loader's half of an objective: pickles, uses no torch device, and depends on batch and draws alone."""

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, torch.Tensor]:
        """Extra entries of a micro-batch (masks, random numbers) for the passages of `batch`."""
        ...

    def step_counts(self, tokens_S: NDArray[np.int64]) -> dict[str, float]:
        """What the losses of a step are divided by, from the number of tokens (special ones not counted) of each of its passages.

        Every micro-batch carries them, so a step's loss is the same however it is cut and shared out.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """What an objective is built from. generator: folder of the generator, None if the recipe has none.

    continued: folder of an earlier pre-training whose other parts (a decoder) come along, None at the start.
    """

    masked_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    generator: Path | None
    continued: Path | None


class Objective(Protocol):
    """The trained half: a torch module (also a subclass of nn.Module).

    A micro-batch holds input_ids [B, T] (the original tokens), attention_mask [B, T] only if any passage is padded, token_type_ids
    only if the model has them, `scored` (int64, flat positions b * T + t of all tokens that are not special), `step_passages` (of the
    whole step, over all micro-batches and processes), and what `views` and its `step_counts` add.
    """

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> Objective:
        """Raises ModelError if the parts do not go together."""
        ...

    def views(self) -> Views: ...

    def forward(self, *args: Any, **micro_batch: Any) -> dict[str, Tensor]:
        """ "loss" (its share of the step's loss) and detached scalars to log, all summing over the micro-batches of a step."""
        ...

    def measure(self, *args: Any, **micro_batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Dev measures as (sum, count), to be added over micro-batches and divided."""
        ...

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write encoder, head and all that continuing needs; AutoModel loads the folder as the encoder."""
        ...


OBJECTIVES: dict[str, str] = {
    "replaced_lm": "simlm.objectives.replaced_lm:ReplacedLM",
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
