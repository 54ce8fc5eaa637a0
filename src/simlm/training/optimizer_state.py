"""AdamW's moments beside saved weights, so that training can be continued as if it had not ended.

`optimizer.safetensors` holds, by parameter name, exp_avg, exp_avg_sq and step of every trained parameter; no pickle.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from simlm.artifacts import disk_error, sync
from simlm.errors import RecipeError
from simlm.recipe import TrainingSettings
from simlm.training.sharding import like, whole_tensor

OPTIMIZER_FILE = "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def save_optimizer(optimizer: torch.optim.Optimizer, task: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write the state of AdamW over the parameters of `task` into folder/optimizer.safetensors.

    write: False on ranks above 0, which have to call it too where parameters are sharded.
    A parameter that has had no gradient yet gets the state of its first step. Raises DiskError if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(task).items():
        state: dict[str, Tensor] = optimizer.state.get(parameter, {})
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = whole_tensor(state.get(moment, torch.zeros_like(parameter)).detach()).cpu().contiguous()
        tensors[f"step.{name}"] = state.get("step", torch.zeros(())).detach().float().cpu()
    if not write:
        return
    temporary = folder / f".{OPTIMIZER_FILE}.tmp"
    try:
        safetensors.torch.save_file(tensors, str(temporary), metadata={"optimizer": "adamw"})
        sync(temporary)
        os.replace(temporary, folder / OPTIMIZER_FILE)
    except OSError as error:
        raise disk_error(error, folder) from error


def load_optimizer(optimizer: torch.optim.Optimizer, task: nn.Module, folder: Path) -> None:
    """Give AdamW the state that `save_optimizer` wrote; see `check_optimizer` for errors."""
    check_optimizer(task, folder)
    with safe_open(str(folder / OPTIMIZER_FILE), framework="pt") as file:
        for name, parameter in trained_parameters(task).items():
            # AdamW's own layout: the step lies on the device only where a fused kernel counts it.
            fused = any(group.get("fused") for group in optimizer.param_groups)
            state: dict[str, Any] = {"step": file.get_tensor(f"step.{name}").to(parameter.device if fused else "cpu")}
            for moment in _MOMENTS:
                state[moment] = like(parameter, file.get_tensor(f"{moment}.{name}"))
            optimizer.state[parameter] = state


def check_optimizer(task: nn.Module, folder: Path) -> None:
    """RecipeError unless folder/optimizer.safetensors is the state of exactly the parameters that `task` trains.

    It names the first parameter that differs. Reads the file's header only.
    """
    path = folder / OPTIMIZER_FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if not name.startswith("step.")}  # noqa: SIM118
    except SafetensorError as error:
        raise RecipeError(f"{path}: not readable ({error}); continue from another copy of the folder") from error
    way_out = (
        "go on with the same objectives and generator as that run, or from a copy of its folder without "
        f"{OPTIMIZER_FILE} and manifest.json, which starts a fresh optimiser"
    )
    wanted = {f"{moment}.{name}": tuple(value.shape) for name, value in trained_parameters(task).items() for moment in _MOMENTS}
    for name, shape in wanted.items():
        parameter = name.partition(".")[2]
        if name not in shapes:
            raise RecipeError(
                f"{path}: has no state for the parameter {parameter!r}, which this run trains and the run that wrote it did not "
                f"(a joint generator cannot go on from the optimiser state of a frozen one); {way_out}"
            )
        if shapes[name] != shape:
            raise RecipeError(f"{path}: the state of the parameter {parameter!r} has shape {shapes[name]}, {shape} was expected; {way_out}")
    for name in shapes:
        if name not in wanted:
            raise RecipeError(
                f"{path}: holds the state of the parameter {name.partition('.')[2]!r}, which this run does not train "
                f"(a frozen generator cannot go on from the optimiser state of a joint one); {way_out}"
            )


def require_adamw(settings: TrainingSettings, purpose: str) -> None:
    """RecipeError if training uses another optimiser than AdamW, whose state is the one that is known by name."""
    name = str((settings.model_extra or {}).get("optim", _ADAMW[-1]))
    if name not in _ADAMW:
        raise RecipeError(
            f"training.optim is {name!r}, but {purpose} works with AdamW only; leave training.optim out, or one of: {', '.join(_ADAMW)}"
        )


def trained_parameters(task: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter, tied ones once, frozen ones not."""
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
