"""BERT's layers as plain torch operations, and its last one for `[CLS]` alone where that is all that is read.

In evaluation all layers are computed here: for a query of a dozen tokens transformers' calls around the products cost a fifth of the time.
In training only the last one is, and only where the first position alone is read (`[CLS]` retrievers, re-rankers): it needs keys and values
of all positions, but one query; its output projection and feed-forward part, five sixths of its products, are computed for one position a
row. Results, gradients and the distribution of dropout are those of transformers' layers.
Shapes: B batch rows, T tokens, H hidden, Q positions that are wanted: all T or the first one, A attention heads, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from simlm.models.backbone import embed, layer_inputs, layers_of, post_norm_parts, run_layers, takes_token_types

FAMILIES = ("bert", "electra", "roberta", "xlm-roberta")
"""Architectures whose layers are made as BERT's, by the model_type of their configuration."""


def has_direct_layers(encoder: nn.Module) -> bool:
    """Whether this encoder can be computed here: layers as BERT's, and an attention that takes masks of any shape."""
    config = getattr(encoder, "config", None)
    return (
        isinstance(encoder, PreTrainedModel)
        and getattr(config, "model_type", None) in FAMILIES
        and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and not getattr(config, "is_decoder", False)
    )


def first_states(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
    """[B, H]: position 0 of the encoder's last hidden states, for an encoder that `has_direct_layers`.

    attention_mask: [B, T], 1 = token; None = no row is padded.
    """
    hidden_BTH = embed(encoder, input_ids, token_type_ids if takes_token_types(encoder) else None)
    layers = list(layers_of(encoder))
    mask = _mask(attention_mask)
    if encoder.training:
        if len(layers) > 1:
            hidden_BTH = run_layers(layers[:-1], hidden_BTH, layer_inputs(encoder, hidden_BTH, attention_mask))
    else:
        for layer in layers[:-1]:
            hidden_BTH = _layer(encoder, layer, hidden_BTH, mask)
    return _layer(encoder, layers[-1], hidden_BTH, mask, first_only=True)[:, 0]


def last_states(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
    """[B, T, H]: the last hidden states of an encoder in evaluation that `has_direct_layers`; those of padding mean nothing."""
    hidden_BTH = embed(encoder, input_ids, token_type_ids if takes_token_types(encoder) else None)
    mask = _mask(attention_mask)
    for layer in layers_of(encoder):
        hidden_BTH = _layer(encoder, layer, hidden_BTH, mask)
    return hidden_BTH


def _mask(attention_mask: Tensor | None) -> Tensor | None:
    """bool [B, 1, 1, T], True where there is a token."""
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]


def _layer(encoder: PreTrainedModel, layer: nn.Module, hidden_BTH: Tensor, mask_B11T: Tensor | None, *, first_only: bool = False) -> Tensor:
    """[B, Q, H]: what the layer makes of all positions, or of the first."""
    parts = post_norm_parts(encoder, layer)
    wanted_BQH = hidden_BTH[:, :1] if first_only else hidden_BTH
    num_heads = encoder.config.num_attention_heads

    def heads_BATD(states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], num_heads, -1).transpose(1, 2)

    attended_BAQD = F.scaled_dot_product_attention(
        heads_BATD(parts["query"](wanted_BQH)),
        heads_BATD(parts["key"](hidden_BTH)),
        heads_BATD(parts["value"](hidden_BTH)),
        attn_mask=mask_B11T,
        dropout_p=_rate(layer, "attention.self.dropout"),
    )
    attended_BQH = parts["attended"](attended_BAQD.transpose(1, 2).flatten(2))
    attended_BQH = parts["attention_norm"](_dropped(attended_BQH, layer, "attention.output.dropout") + wanted_BQH)
    wide_BQI = _activation(encoder.config.hidden_act)(parts["widen"](attended_BQH))
    narrow_BQH = _dropped(parts["narrow"](wide_BQI), layer, "output.dropout")
    normed_BQH: Tensor = parts["norm"](narrow_BQH + attended_BQH)
    return normed_BQH


@cache
def _activation(name: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not isinstance(name, str):
        return name
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found


def _dropped(states: Tensor, layer: nn.Module, path: str) -> Tensor:
    return F.dropout(states, _rate(layer, path)) if layer.training else states


def _rate(layer: nn.Module, path: str) -> float:
    """Of a dropout; 0 in evaluation."""
    if not layer.training:
        return 0.0
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Dropout)
    return module.p
