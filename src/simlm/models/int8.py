"""Matrix products in 8-bit integers on x86 processors: weights rounded once, activations row by row as they come.

Activations are whole numbers from 0 to 255 times a step of their row, above the least of their row, so a text's vector does not depend on
what else is in its batch. Weights are whole numbers times a step of their output column. Processors without VNNI add two products of
neighbours in 16 bits and cut what is more, so neighbours of one sign are 127 together at most: the integer sums are exact, and the same
on every processor. Everything that is not a product with weights (norms, attention, activation functions, residuals) stays float32.
Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

_INPUT_LEVELS, _WEIGHT_LEVELS, _SAFE_LEVELS = 255, 127, 63
_SMALLEST = 1e-30
"""A step at least, so that rows of one value divide by something."""


class Int8Linear(nn.Module):
    """float32 [..., N]: near what a Linear layer computes, at about twice its speed without VNNI, more with it. For inference only.

    linear: float32; not changed, and not kept: the rounded weights take a quarter of its memory.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            weight_NK = linear.weight.detach()
            self._step_N = _weight_steps(weight_NK).clamp_min(_SMALLEST)
            levels_NK = (weight_NK / self._step_N[:, None]).round().to(torch.int8)
            self._packed = torch.ops.onednn.qlinear_prepack(levels_NK, None)
            self._zero_N = torch.zeros(self.out_features, dtype=torch.int64)
            # What a row's least value adds to its outputs, per unit of it.
            self._offset_N = levels_NK.sum(dim=1) * self._step_N
            self._bias_N = torch.zeros(self.out_features) if linear.bias is None else linear.bias.detach().clone()

    def forward(self, hidden: Tensor) -> Tensor:
        rows_MK = hidden.reshape(-1, self.in_features)
        least_M1 = rows_MK.amin(dim=1, keepdim=True)
        step_M1 = ((rows_MK.amax(dim=1, keepdim=True) - least_M1) / _INPUT_LEVELS).clamp_min_(_SMALLEST)
        # Truncating after adding a half rounds, since nothing is negative.
        levels_MK = (rows_MK - least_M1).mul_(1 / step_M1).add_(0.5).to(torch.uint8)
        sums_MN = _product(levels_MK, self._packed, self._step_N, self._zero_N)
        product_MN = torch.addcmul(self._bias_N, sums_MN, step_M1, out=sums_MN).addcmul_(least_M1, self._offset_N)
        return product_MN.view(*hidden.shape[:-1], self.out_features)


def to_int8(model: nn.Module) -> None:
    """Replace every Linear layer of the model (of exactly that class) by its `Int8Linear`, in place."""
    for name, module in list(model.named_modules()):
        # Not subclasses: the cross-encoder's last layer is one, and keeps float32.
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear(module))


def _weight_steps(weight_NK: Tensor) -> Tensor:
    """[N]: the least step at which no sum of two products overflows."""
    largest_N = weight_NK.abs().amax(dim=1)
    if weight_NK.shape[1] % 2 or not _neighbours_are_added():
        return largest_N / _SAFE_LEVELS
    pairs_NP2 = weight_NK.reshape(len(weight_NK), -1, 2)
    together_N = torch.maximum(pairs_NP2.clamp_min(0).sum(dim=2), -pairs_NP2.clamp_max(0).sum(dim=2)).amax(dim=1)
    return together_N / _WEIGHT_LEVELS


@cache
def _neighbours_are_added() -> bool:
    """Whether this processor's products of full 8-bit numbers are exact as long as neighbours are small together."""
    with torch.inference_mode():
        weights_NK = torch.tensor([[127, 0], [0, 127], [64, 63], [-127, 0], [0, -127], [-64, -63]], dtype=torch.int8).repeat(8, 64)
        packed = torch.ops.onednn.qlinear_prepack(weights_NK, None)
        ones_N, zeros_N = torch.ones(len(weights_NK)), torch.zeros(len(weights_NK), dtype=torch.int64)
        for num_rows in (1, 37):
            inputs_MK = torch.full((num_rows, weights_NK.shape[1]), 255, dtype=torch.uint8)
            wanted_MN = 255.0 * weights_NK.sum(dim=1).expand(num_rows, -1)
            if not torch.equal(_product(inputs_MK, packed, ones_N, zeros_N), wanted_MN):
                return False
    return True


def _product(levels_MK: Tensor, packed: Tensor, step_N: Tensor, zero_N: Tensor) -> Tensor:
    """float32 [M, N]: integer products, times the step of each output."""
    product_MN: Tensor = torch.ops.onednn.qlinear_pointwise(
        levels_MK, 1.0, 0, packed, step_N, zero_N, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product_MN
