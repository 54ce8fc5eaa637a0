"""RetroMAE's enhanced decoding: every token is written from the [CLS] vector and a sampled few of the others.

Source: "RetroMAE: Pre-Training Retrieval-oriented Language Models Via Masked Auto-Encoder", arXiv 2205.12035, section 3.3. One layer
attends from queries ([CLS] + position embedding) to keys and values ([CLS], then the embeddings of the original tokens), each
position under a mask of its own that never shows the position itself; all tokens are reconstructed. The encoder has its
masked-LM loss.
Differs: each position sees each other token with probability 1 - `decoder_mask_rate`, token by token (the paper draws a set of fixed
size); separators can be seen, and are not reconstructed. The layer is a copy of the encoder's last one with its self-attention turned to
the second stream; where the architecture's layer has other parts (ModernBERT) it is a plain post-norm layer, normal with
initializer_range from a fixed seed, and as there are no position embeddings, rotary angles tell the queries apart.
Shapes: B sequences, T tokens, N scored positions, H hidden, A heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from simlm.data.batches import TokenBatch
from simlm.errors import ModelError
from simlm.models.backbone import encoder_of, layers_of, position_embeddings, post_norm_parts
from simlm.objectives import EncoderPass, ExtraViews, Objective, Parts, Term, Tokens, at
from simlm.objectives.masking import Draws
from simlm.recipe import PretrainSettings

VISIBLE_STREAM = 16
"""Of `Draws`."""

_LANES = 3
"""16-bit numbers taken from each random number; of its 53 bits the first 48 are used."""


@dataclass(frozen=True)
class VisibleViews:
    """ "visible", bool [B, T, T]: whether the decoder's row t sees the column; position 0 always, itself and padding never.

    rate: share of the other tokens that is hidden, to 1 in 65,536.
    """

    rate: float

    def __call__(self, batch: TokenBatch, draws: Draws) -> dict[str, Tensor]:
        size, width = batch.input_ids.shape
        numbers = draws.uniforms(VISIBLE_STREAM, -(-(width * width) // _LANES)) * 2.0**48
        drawn = numbers.astype("<u8").view("<u2").reshape(size, -1) < min(round((1.0 - self.rate) * 2**16), 2**16 - 1)
        visible_BTT = np.take(drawn, _places(width), axis=1)
        visible_BTT &= (batch.attention_mask != 0)[:, None]
        visible_BTT[:, np.arange(width), np.arange(width)] = False
        visible_BTT[:, :, 0] = True
        return {"visible": torch.from_numpy(visible_BTT)}


def _places(width: int) -> NDArray[np.int64]:
    """[T, T]: where the 16-bit number of each pair (i, j) stands, four to a random number, of which the last is not used.

    Pairs are numbered by max(i, j) first, so a batch that is padded further only adds numbers behind.
    """
    rows, columns = np.indices((width, width))
    outer = np.maximum(rows, columns)
    numbers = outer * outer + np.where(rows < outer, rows, outer + columns)
    places: NDArray[np.int64] = numbers // _LANES * 4 + numbers % _LANES
    return places


class RetroMAE(Objective):
    """Encoder: masked LM; a decoder of one layer: all tokens, each from another sample of the text."""

    def __init__(self, decoder: EnhancedDecoder, hidden_rate: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.hidden_rate = hidden_rate

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> RetroMAE:
        """ModelError if the recipe asks for another number of decoder layers, which no objective of it would have."""
        default = type(settings).model_fields["decoder_layers"].default
        enhanced_only = set(settings.objective_weights) <= {"retromae", "dupmae"}
        if enhanced_only and "decoder_layers" in settings.model_fields_set and settings.decoder_layers not in (1, default):
            raise ModelError(
                f"pretrain.decoder_layers: {settings.decoder_layers}, but enhanced decoding (retromae, dupmae) has one layer; "
                "set it to 1 or leave it out"
            )
        return cls(EnhancedDecoder(parts.masked_lm), settings.decoder_mask_rate)

    def extra_views(self) -> ExtraViews:
        return VisibleViews(self.hidden_rate)

    def terms(self, seen: EncoderPass) -> list[Term]:
        embedded_BTH = seen.decoder_embeddings(seen.original_BT)
        contents_BTH = torch.cat([seen.cls_BH[:, None], embedded_BTH[:, 1:]], 1)
        queries_BTH = seen.cls_BH[:, None] + position_embeddings(encoder_of(seen.masked_lm), contents_BTH)
        angles = next(iter(seen.inputs.angles.values()), None)
        hidden_BTH = self.decoder(queries_BTH, contents_BTH, seen.batch["visible"], angles)
        return [Tokens("decoder", at(hidden_BTH, seen.scored_N), seen.labels_N, seen.batch["step_tokens"])]


class EnhancedDecoder(nn.Module):
    """A transformer layer whose queries and whose keys and values are two streams; post-norm."""

    def __init__(self, masked_lm: PreTrainedModel) -> None:
        super().__init__()
        config = masked_lm.config
        last = layers_of(encoder_of(masked_lm))[-1]
        self.num_heads = int(config.num_attention_heads)
        parts = copy.deepcopy(post_norm_parts(masked_lm, last)) or _fresh_parts(config)
        self.query, self.key, self.value, self.attended = (parts[name] for name in ("query", "key", "value", "attended"))
        self.widen, self.narrow = parts["widen"], parts["narrow"]
        self.attention_norm, self.norm = parts["attention_norm"], parts["norm"]
        names = ("hidden_act", "activation", "hidden_activation")
        self.activation = ACT2FN[next(getattr(config, name) for name in names if hasattr(config, name))]
        # The rates that the encoder's layers have now: those of the recipe, or the checkpoint's own.
        rates = [module.p for module in last.modules() if isinstance(module, nn.Dropout)]
        self.attention_dropout = nn.Dropout(rates[0])
        self.dropout = nn.Dropout(rates[-1])

    def forward(
        self, queries_BTH: Tensor, contents_BTH: Tensor, visible_BTT: Tensor, angles: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Last states [B, T, H]. visible_BTT: bool, True where the row's query sees the column. angles: (cos, sin) of rotary positions."""
        query_BATd, key_BATd, value_BATd = (
            project(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, states in ((self.query, queries_BTH), (self.key, contents_BTH), (self.value, contents_BTH))
        )
        if angles is not None:
            query_BATd, key_BATd = _rotated(query_BATd, angles), _rotated(key_BATd, angles)
        rate = self.attention_dropout.p if self.training else 0.0
        mixed_BATd = F.scaled_dot_product_attention(query_BATd, key_BATd, value_BATd, attn_mask=visible_BTT[:, None], dropout_p=rate)
        mixed_BTH = self.dropout(self.attended(mixed_BATd.transpose(1, 2).flatten(2)))
        hidden_BTH = self.attention_norm(queries_BTH + mixed_BTH)
        inner_BTH = self.dropout(self.narrow(self.activation(self.widen(hidden_BTH))))
        last_BTH: Tensor = self.norm(hidden_BTH + inner_BTH)
        return last_BTH


def _rotated(states_BATd: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (arXiv 2104.09864) in the layout of transformers: the first half of a head is paired with the second."""
    cosine, sine = (angle[:, None].to(states_BATd.dtype) for angle in angles)
    first, second = states_BATd.chunk(2, dim=-1)
    return states_BATd * cosine + torch.cat([-second, first], -1) * sine


def _fresh_parts(config: Any) -> dict[str, nn.Module]:
    """Parts of a plain layer of the configuration's size, the same on every build."""
    width, inner, epsilon = config.hidden_size, config.intermediate_size, getattr(config, "norm_eps", 1e-5)
    shapes = dict.fromkeys(("query", "key", "value", "attended"), (width, width)) | {"widen": (width, inner), "narrow": (inner, width)}
    source = torch.Generator().manual_seed(0)
    parts: dict[str, nn.Module] = {name: nn.LayerNorm(width, eps=epsilon) for name in ("attention_norm", "norm")}
    with torch.random.fork_rng(devices=[]):
        linear = {name: nn.Linear(*shape) for name, shape in shapes.items()}
    for layer in linear.values():
        nn.init.normal_(layer.weight, std=config.initializer_range, generator=source)
        nn.init.zeros_(layer.bias)
    return parts | linear
