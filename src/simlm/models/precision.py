"""Which device computes, and where bf16, int8 and weights of 16 bits pay.

bf16 is "fast" where the processor multiplies bf16 matrices itself: CUDA devices from compute capability 8, x86 with AVX512-BF16 or
AMX, ARM with the bf16 extension. Elsewhere it is emulated, and slower than fp32. int8 products are there on x86 processors; how much they
gain depends on VNNI. fp16 is fp32 with weights of 16 bits, on x86 processors: a short text alone is bound by reading the weights, and takes
half of the time.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from simlm.errors import DataError, ModelError

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "fast"]
Computed = Literal["fp32", "fp16", "bf16", "int8"]
"""What a precision can come to on a device."""

_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As /proc/cpuinfo names them: the first two on x86, the last on ARM."""


@cache
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True where the processor has bf16 matrix products; False where the system does not say (anything but Linux)."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return not _CPU_FLAGS.isdisjoint(value.split())
    return False


def resolve_bf16(wanted: bool | Literal["auto"], device_type: str) -> bool:
    """Whether to compute in bf16 on a device ("cpu", "cuda" ...); "auto" = where it is fast."""
    if wanted != "auto":
        return wanted
    if device_type == "cpu":
        return cpu_has_bf16()
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_int8(device_type: str) -> bool:
    """Whether a device computes in int8 here: x86 processors, with oneDNN, which torch's builds for them bring."""
    if device_type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def has_half_weights(device_type: str) -> bool:
    """Whether a device multiplies with weights of 16 bits here: x86 processors, with FBGEMM, which torch's builds for them bring."""
    return device_type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def checked_precision(precision: str, where: str) -> Precision:
    """The precision, if it is one; DataError otherwise. where: what the error calls it."""
    if precision not in get_args(Precision):
        raise DataError(f"{where}: found {precision!r}; one of {', '.join(get_args(Precision))} was expected")
    return cast("Precision", precision)


def resolve_precision(wanted: Precision, device_type: str) -> Computed:
    """What a device ("cpu", "cuda" ...) computes in.

    "auto" and "fast" are bf16 where it is fast. Elsewhere "auto" is fp32, and "fast" int8 where there is that. Told from the kind of
    processor, never by timing: the same machine gives the same vectors every time. Raises ModelError for "int8" and "fp16" where there is
    none.
    """
    if wanted == "fp32":
        return "fp32"
    if wanted == "fp16":
        if not has_half_weights(device_type):
            raise ModelError(
                f'precision = "fp16" was asked for on {device_type} of {platform.machine()}; it is there on x86 processors only; '
                'use "auto", which computes in bf16 where that is fast'
            )
        return "fp16"
    if wanted == "bf16" or (wanted != "int8" and resolve_bf16("auto", device_type)):
        return "bf16"
    if wanted == "auto" or (wanted == "fast" and not has_int8(device_type)):
        return "fp32"
    if not has_int8(device_type):
        raise ModelError(
            f'precision = "int8" was asked for on {device_type} of {platform.machine()}; it is there on x86 processors only; '
            'use "auto" (exact) or "fast" (int8 or bf16, where there is one of them)'
        )
    return "int8"


def best_device(use_cpu: bool = False) -> torch.device:
    """CUDA where there is one (not with `use_cpu`), else whatever accelerator torch sees, else the CPU."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None else torch.device("cpu")
