"""Models at work: batches through a bi-encoder or cross-encoder without gradients, on one device, in fp32, fp16, bf16 or int8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simlm.errors import ModelError
from simlm.models.half_weights import to_half_weights
from simlm.models.int8 import to_int8
from simlm.models.precision import Computed, Precision, best_device, resolve_precision
from simlm.runtime import MemoryBound

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Batches = Iterable[tuple[Ints, dict[str, Tensor]]]
"""Positions of a batch's rows in the results, and the model's inputs."""


class Inference:
    """A model in evaluation mode on its device.

    In bf16 the matrix products run in bf16, with weights converted once; norms, residuals and results stay float32. On two cores that is
    as fast as everything in bf16 and closer to fp32 (160 passages of medquad: cosines differ by 0.002 at most, not 0.004). In int8 the same
    products run in 8-bit integers (see models/int8.py), in fp16 they take weights of 16 bits (models/half_weights.py). Raises ModelError
    if int8 or fp16 is asked for where there is none.
    """

    def __init__(self, model: nn.Module, *, precision: Precision = "fp32", device: str | torch.device | None = None) -> None:
        self.device = torch.device(device) if device is not None else best_device()
        self.precision: Computed = resolve_precision(precision, self.device.type)
        self.model = model.to(device=self.device, dtype=torch.float32).eval()
        if self.precision == "int8":
            to_int8(self.model)
        elif self.precision == "fp16":
            to_half_weights(self.model)
        elif self.precision == "bf16":
            for module in model.modules():
                # Not subclasses: the cross-encoder's last layer is one, and keeps float32.
                if type(module) is nn.Linear:
                    module.to(torch.bfloat16)

    def run(self, batches: Batches, results: Floats, *, name: Callable[[int], str] = "input {}".format) -> None:
        """Write the model's output for each batch into `results` [N, ...] at the batch's positions.

        name: what the error calls a position. Raises ModelError if an output is not finite.
        """
        outputs: list[tuple[Ints, Tensor]] = []
        # Batches of ever new sizes leave holes in the heap: within one call it was seen to grow to 8.6 GiB.
        bound_memory = MemoryBound()
        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            for positions, tensors in batches:
                needed = without_full_mask(tensors)
                moved = {key: tensor.to(self.device, non_blocking=True) for key, tensor in needed.items()}
                outputs.append((positions, self.model(**moved)))
                bound_memory()
        # Copied back at the end, so that an accelerator never waits for the next batch.
        for positions, output in outputs:
            results[positions] = output.cpu().numpy()
        rows = results.reshape(len(results), -1)
        if not np.isfinite(rows).all():
            number = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            remedy = "its weights are damaged: train it again" if self.precision == "fp32" else 'use precision = "fp32"'
            raise ModelError(f"the model's output for {name(number)} is not finite in {self.precision}; {remedy}")


def without_full_mask(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same model inputs without the attention mask where it hides nothing, which is faster."""
    mask = tensors.get("attention_mask")
    if mask is None or not bool(mask.all()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "attention_mask"}
