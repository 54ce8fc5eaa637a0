"""Checkpoints on disk: which are whole, which are kept, and what a full disk looks like.

A checkpoint counts only with its `complete` marker, written and synced last; older ones are deleted after that, never before.
Nothing in it depends on the number of processes that wrote it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from simlm.artifacts import disk_error, sync, write_json
from simlm.errors import DiskError

WEIGHTS = "model.safetensors"
COMPLETE = "complete"


def newest_checkpoint(root: Path) -> Path | None:
    """The whole checkpoint of the highest step; None if there is none."""
    whole = [folder for folder in root.glob("checkpoint-*") if is_whole(folder)] if root.is_dir() else []
    return max(whole, key=checkpoint_step, default=None)


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(folder.name.removeprefix("checkpoint-"))


def complete(folder: Path, facts: dict[str, Any]) -> None:
    """Sync a checkpoint's files, then write the marker."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    for name in files:
        sync(folder / name)
    write_json(folder / COMPLETE, {**facts, "files": files})
    sync(folder)
    sync(folder.parent)


def is_whole(folder: Path) -> bool:
    try:
        marker = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, json.JSONDecodeError):
        return False


def best_file(root: Path, step: int | None) -> Path:
    return root / f"best-{step}.safetensors"


def delete_leftovers(root: Path, keep: int | None = None) -> None:
    """Delete partial checkpoints, all but the `keep` newest whole ones, and best weights that no remaining checkpoint names."""
    whole = sorted((folder for folder in root.glob("checkpoint-*") if is_whole(folder)), key=checkpoint_step)
    kept = whole if keep is None else whole[-keep:]
    for folder in root.glob("checkpoint-*"):
        if folder not in kept:
            with contextlib.suppress(FileNotFoundError):
                (folder / COMPLETE).unlink()  # first, so that a kill here leaves nothing that looks whole
            shutil.rmtree(folder, ignore_errors=True)
    named = {best_file(root, json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["best_step"]) for folder in kept}
    for file in root.glob("best-*.safetensors"):
        if file not in named:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(root: Path, partial: Path | None = None) -> Iterator[None]:
    """DiskError for whatever a full disk looks like from inside torch and safetensors; the partial checkpoint is deleted."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = "No space left" in str(error) or "file write failed" in str(error) or _disk_is_full(root)
        if not isinstance(error, OSError | SafetensorError) and not full:
            raise
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        found = error if isinstance(error, OSError) and not full else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else None
        raise (disk_error(found, root) if found else DiskError(f"{root}: {error}; earlier checkpoints are intact")) from error


def _disk_is_full(root: Path) -> bool:
    return shutil.disk_usage(root).free < 1 << 20
