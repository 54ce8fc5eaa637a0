"""Matrix products in 8-bit integers on x86 processors: weights rounded once, activations row by row as they come.

Weights are whole numbers from -63 to 63 times a scale of their output column. Seven bits, because processors without VNNI add pairs of
products in 16 bits, which 8-bit weights overflow: this way the integer sums are exact, and the same on every processor. Activations are
whole numbers from -127 to 127 times a scale of their row, so a text's vector does not depend on what else is in its batch. Everything
that is not a product with weights (norms, attention, activation functions, residuals) stays float32.
Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WEIGHT_LEVELS, _INPUT_LEVELS, _INPUT_ZERO = 63, 127, 128
_SMALLEST = 1e-30
"""Largest magnitude that a row of zeros is taken to have."""


class Int8Linear(nn.Module):
    """float32 [..., N]: near what a Linear layer computes, at about twice its speed without VNNI, more with it. For inference only.

    linear: float32; not changed, and not kept: the rounded weights take a quarter of its memory.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            weight_NK = linear.weight.detach()
            scale_N = weight_NK.abs().amax(dim=1).clamp_min(_SMALLEST) / _WEIGHT_LEVELS
            rounded_NK = (weight_NK / scale_N[:, None]).round().to(torch.int8)
            self._packed = torch.ops.onednn.qlinear_prepack(rounded_NK, None)
            self._scale_N = scale_N
            self._zero_N = torch.zeros(len(scale_N), dtype=torch.int64)
            self._bias_N = torch.zeros(len(scale_N)) if linear.bias is None else linear.bias.detach().clone()

    def forward(self, hidden: Tensor) -> Tensor:
        rows_MK = hidden.reshape(-1, self.in_features)
        largest_M1 = torch.maximum(rows_MK.amax(dim=1, keepdim=True), -rows_MK.amin(dim=1, keepdim=True)).clamp_min_(_SMALLEST)
        # Truncating after adding a half rounds, since all sums are positive.
        levels_MK = (rows_MK * (_INPUT_LEVELS / largest_M1)).add_(_INPUT_ZERO + 0.5).to(torch.uint8)
        sums_MN = torch.ops.onednn.qlinear_pointwise(
            levels_MK, 1.0, _INPUT_ZERO, self._packed, self._scale_N, self._zero_N, None, 1.0, 0, torch.float32, "none", [], ""
        )
        product_MN = torch.addcmul(self._bias_N, sums_MN, largest_M1 / _INPUT_LEVELS, out=sums_MN)
        return product_MN.view(*hidden.shape[:-1], self.out_features)


def to_int8(model: nn.Module) -> None:
    """Replace every Linear layer of the model (of exactly that class) by its `Int8Linear`, in place."""
    for name, module in list(model.named_modules()):
        # Not subclasses: the cross-encoder's last layer is one, and keeps float32.
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear(module))
