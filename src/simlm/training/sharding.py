"""Sharded training (FSDP2): each process keeps its part of weights, gradients and optimiser state; checkpoints do not know of it.

The whole task is one unit: weights are gathered once a step (twice with a contrast), before the first micro-batch, and dropped in the
last backward pass. So processes may have different numbers of micro-batches, and a task may use its parameters as it likes inside
`forward`. What is saved is whole, in the order and under the names of unsharded training: any number of processes goes on from it,
sharded or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_STATE_DICT_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class Sharded(nn.Module):
    """A task whose trained parameters lie in parts on all processes, until `restore`. All processes have to call its methods."""

    def __init__(self, task: nn.Module, device_type: str) -> None:
        super().__init__()
        self.task = task
        mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
        # FSDP2 has no way back, and hooks on every submodule's state dict: remember which were there before.
        self._hooks = [(module, {name: set(getattr(module, name)) for name in _STATE_DICT_HOOKS}) for module in task.modules()]
        # What is not trained has neither gradient nor moments to share, and a task may write to it (a refreshed generator).
        frozen = {parameter for parameter in task.parameters() if not parameter.requires_grad}
        fully_shard(self, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)

    def forward(self, **micro_batch: Any) -> Any:
        return self.task(**micro_batch)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For all micro-batches of a step but the last: gradients stay here, weights stay whole."""
        self._set_last(False)
        try:
            yield
        finally:
            self._set_last(True)

    def _set_last(self, last: bool) -> None:
        assert isinstance(self, FSDPModule)
        self.set_requires_gradient_sync(last)
        self.set_reshard_after_backward(last)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """While it lasts the task's parameters are ordinary tensors with all their values."""
        assert isinstance(self, FSDPModule)
        self.unshard()
        try:
            yield
        finally:
            self.reshard()

    def weights(self) -> dict[str, Tensor]:
        """The task's state dict, whole, on the CPU; tied weights once."""
        assert isinstance(self, FSDPModule)
        self.reshard()
        kept: dict[int, str] = {}
        weights: dict[str, Tensor] = {}
        for name, value in self.task.state_dict(keep_vars=True).items():
            if id(value) not in kept:
                kept[id(value)] = name
                weights[name] = whole_tensor(value.detach()).cpu().contiguous()
        return weights

    def restore(self) -> None:
        """Give the task ordinary parameters again, ties included, and leave nothing of the sharding on it."""
        assert isinstance(self, FSDPModule)
        self.reshard()
        new: dict[int, nn.Parameter] = {}
        for module in self.task.modules():
            parameters: dict[str, Any] = module._parameters
            for name, parameter in parameters.items():
                if isinstance(parameter, DTensor):
                    if id(parameter) not in new:
                        # A copy: what is gathered may be a view of a padded buffer.
                        value = whole_tensor(parameter.detach()).clone()
                        new[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    parameters[name] = new[id(parameter)]
        for module, hooks in self._hooks:
            for name, before in hooks.items():
                found = getattr(module, name)
                for added in found.keys() - before:
                    del found[added]


def whole_tensor(value: Tensor) -> Tensor:
    """All values of a tensor of which each process has a part; any other as it is. All processes have to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor of the parameter's shape as that is laid out: on its device, and this process's part where it is sharded."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state dict with whole tensors, on the CPU. All processes have to call it."""
    state = optimizer.state_dict()
    whole = {
        place: {name: whole_tensor(value).cpu() if isinstance(value, Tensor) else value for name, value in entry.items()}
        for place, entry in state["state"].items()
    }
    return {**state, "state": whole}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give a sharded optimiser what `optimizer_state`, or an unsharded one's state_dict, has kept."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        place: {
            name: like(parameters[place], value) if isinstance(value, Tensor) and value.shape == parameters[place].shape else value
            for name, value in entry.items()
        }
        for place, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})
