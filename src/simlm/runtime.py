"""What a process sets up once, at its start: the memory allocator and the group of processes that torchrun started."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from simlm.errors import SimlmError

Value = TypeVar("Value")

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of handing every large tensor back to the kernel; True if it was done.

    glibc maps each large block anew and unmaps it when it is freed, so that every elementwise operation on CPU tensors pays page
    faults. Linux with glibc only. Memory given back at
    the boundaries between steps (`release_memory`) keeps the resident set near what is used. SIMLM_MALLOC=0 turns it off.
    """
    if not sys.platform.startswith("linux") or os.environ.get("SIMLM_MALLOC") == "0":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 256 * 2**20))


def release_memory() -> None:
    """Give freed memory back to the system (glibc only; elsewhere nothing happens)."""
    import gc

    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class MemoryBound:
    """Keeps what `tune_allocator` holds back within bounds: call it once a step or batch.

    Blocks of ever new sizes leave holes in a heap that is never trimmed (a generator of 16 MB of weights was seen to grow to 5.7 GB in
    92 steps). Whenever the resident set has grown by `slack_bytes` since the last time, freed pages go back to the system.
    """

    def __init__(self, slack_bytes: int = 2**30) -> None:
        self.slack_bytes = slack_bytes
        self.floor_bytes = resident_bytes()

    def __call__(self) -> None:
        if resident_bytes() > self.floor_bytes + self.slack_bytes:
            release_memory()
            self.floor_bytes = resident_bytes()


def resident_bytes() -> int:
    """Resident set of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on one recipe together."""

    rank: int = 0
    num_ranks: int = 1

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.num_ranks > 1:
            import torch.distributed

            torch.distributed.barrier()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank, on every rank."""
        if self.num_ranks == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.num_ranks
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """What rank 0 computes, on every rank."""
        if self.num_ranks == 1:
            return compute()
        import torch.distributed

        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [(compute(), None)]
            except SimlmError as error:
                box = [(None, error)]
        torch.distributed.broadcast_object_list(box, src=0)
        value, failure = box[0]
        if failure is not None:
            raise failure
        return value  # type: ignore[no-any-return]


def leave_processes() -> None:
    """After work that went well: leave the group of processes, if there is one.

    What holds the group (a wrapped model) is collected first, and all wait for each other: a group torn down while the interpreter
    ends can wait for ever for a thread that waits for the interpreter.
    """
    import gc

    if "torch" not in sys.modules:
        return
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def join_processes() -> Ranks:
    """Join the processes that torchrun started (RANK, WORLD_SIZE); alone where there is no torchrun."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks <= 1:
        return Ranks()
    import torch

    if not torch.distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Ranks wait for rank 0 through steps that only it does, which can take days on a large corpus.
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=30))
    return Ranks(torch.distributed.get_rank(), num_ranks)
