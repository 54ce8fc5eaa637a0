"""Which device computes, and where bf16 pays.

bf16 is "fast" where the processor multiplies bf16 matrices itself: CUDA devices from compute capability 8, x86 with AVX512-BF16 or
AMX, ARM with the bf16 extension. Elsewhere it is emulated, and slower than fp32.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]

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


def best_device(use_cpu: bool = False) -> torch.device:
    """CUDA where there is one (not with `use_cpu`), else whatever accelerator torch sees, else the CPU."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None else torch.device("cpu")
