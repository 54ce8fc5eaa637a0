"""The encoder's last state of the first position alone: what a `[CLS]` retriever reads.

The last layer needs keys and values of all positions, but one query; its output projection and feed-forward part, five sixths of its
products, are then computed for one position a row. The result, its gradient and the distribution of dropout are those of the whole layer.
Shapes: B batch rows, T tokens, H hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from simlm.models.backbone import embed, layer_inputs, layers_of, post_norm_parts, run_layers, takes_token_types

FAMILIES = ("bert", "electra", "roberta", "xlm-roberta")
"""Architectures whose layers are made as BERT's, by the model_type of their configuration."""


def has_shortcut(encoder: nn.Module) -> bool:
    """Whether `first_states` can take this encoder: layers as BERT's, and an attention that takes masks of any shape."""
    config = getattr(encoder, "config", None)
    return (
        isinstance(encoder, PreTrainedModel)
        and getattr(config, "model_type", None) in FAMILIES
        and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and not getattr(config, "is_decoder", False)
    )


def first_states(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
    """[B, H]: position 0 of the encoder's last hidden states, for an encoder that `has_shortcut`.

    attention_mask: [B, T], 1 = token; None = no row is padded.
    """
    hidden_BTH = embed(encoder, input_ids, token_type_ids if takes_token_types(encoder) else None)
    layers = layers_of(encoder)
    if len(layers) > 1:
        hidden_BTH = run_layers(layers[:-1], hidden_BTH, layer_inputs(encoder, hidden_BTH, attention_mask))
    return _last_layer(encoder, layers[-1], hidden_BTH, attention_mask)


def _last_layer(encoder: PreTrainedModel, layer: nn.Module, hidden_BTH: Tensor, attention_mask: Tensor | None) -> Tensor:
    config = encoder.config
    parts = post_norm_parts(encoder, layer)
    first_BH = hidden_BTH[:, 0]
    rows, num_heads = first_BH.shape[0], config.num_attention_heads

    def heads(states: Tensor) -> Tensor:
        return states.view(rows, -1, num_heads, states.shape[-1] // num_heads).transpose(1, 2)

    attended_BNTH = F.scaled_dot_product_attention(
        heads(parts["query"](first_BH)),
        heads(parts["key"](hidden_BTH)),
        heads(parts["value"](hidden_BTH)),
        attn_mask=None if attention_mask is None else attention_mask.bool()[:, None, None, :],
        dropout_p=_dropout(layer, "attention.self.dropout") if layer.training else 0.0,
    )
    attended_BH = parts["attended"](attended_BNTH.transpose(1, 2).reshape(rows, -1))
    attended_BH = F.dropout(attended_BH, _dropout(layer, "attention.output.dropout"), layer.training)
    attended_BH = parts["attention_norm"](attended_BH + first_BH)
    activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
    wide_BI = activation(parts["widen"](attended_BH))
    narrow_BH = F.dropout(parts["narrow"](wide_BI), _dropout(layer, "output.dropout"), layer.training)
    normed_BH: Tensor = parts["norm"](narrow_BH + attended_BH)
    return normed_BH


def _dropout(layer: nn.Module, path: str) -> float:
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Dropout)
    return module.p
