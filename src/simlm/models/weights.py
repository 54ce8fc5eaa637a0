"""Which model it is, told from what computes: its weights and the configuration that they are used with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

_ASIDE = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "architectures", "id2label", "label2id", "sentence_transformers"}
)
"""Fields of a configuration that no output depends on: where a model lies, what saved it, and names of labels."""


def model_digest(model: nn.Module) -> str:
    """SHA-256 of every weight (name, type, shape, bytes) and of the configurations in the model; equal for a copy at another path."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    seen: set[int] = set()
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            fields = {key: value for key, value in config.to_dict().items() if key not in _ASIDE}
            digest.update(f"{name} {json.dumps(fields, sort_keys=True, default=str)}\n".encode())
    return digest.hexdigest()
