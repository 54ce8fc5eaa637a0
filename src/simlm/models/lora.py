"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: put into an encoder before training, merged into its weights after.

While training, a linear layer W becomes W + alpha / rank * B A with W fixed; B starts at 0, so the model starts as the checkpoint. The
merged encoder has the layers and the names it had before.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from simlm.errors import ModelError, nearest, require_extra
from simlm.recipe import LoraSettings


def add_lora(encoder: PreTrainedModel, settings: LoraSettings, *, seed: int) -> None:
    """Give the encoder adapters, in place; of its own weights none is trained any more, but for those of a pooler, which is part of a head.

    encoder: without a head, or the encoder inside a model with one. seed: of the adapters' first values.
    Raises MissingExtraError without peft, ModelError if no linear layer has a name of `target_modules`.
    """
    require_extra("peft", "lora", "training with low-rank adapters (lora)")
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(encoder, settings.target_modules)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, encoder)
    for name, parameter in encoder.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(True)


def merge_lora(encoder: PreTrainedModel) -> None:
    """Add what the adapters have learned to the weights and take them out, in place; an encoder without adapters stays as it is."""
    adapted = [(name, module) for name, module in encoder.named_modules() if hasattr(module, "lora_A")]
    for name, module in adapted:
        module.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(encoder.get_submodule(parent), attribute, module.get_base_layer())
    if adapted:
        encoder.requires_grad_(True)


def _targets(encoder: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear) and not name.startswith("pooler.")]
    if isinstance(wanted, str):
        return linear
    for name in wanted:
        if not any(layer == name or layer.endswith(f".{name}") for layer in linear):
            endings = sorted({layer.rsplit(".", 1)[-1] for layer in linear})
            raise ModelError(
                f"lora.target_modules: no linear layer of this {encoder.config.model_type} encoder is called {name!r}"
                f"{nearest(name, endings)} (there are: {', '.join(endings)})"
            )
    return [layer for layer in linear if any(layer == name or layer.endswith(f".{name}") for name in wanted)]
