"""Mixed precision in training: the device, whether bf16 pays there, and the context that computes in it."""

from __future__ import annotations

import torch

from simlm.models.precision import best_device, cpu_has_bf16, resolve_bf16

training_device = best_device


def autocast(device_type: str, bf16: bool) -> torch.autocast:
    """Context in which matrix products run in bf16, if `bf16`.

    The cache of cast weights is off: with it the gradients of all pieces of a step that share a cast weight would add up in bf16.
    """
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)


__all__ = ["autocast", "cpu_has_bf16", "resolve_bf16", "training_device"]
