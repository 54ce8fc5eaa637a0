"""The folder of a run: where it is, that one process at a time works on it, and which digests of data files it remembers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from simlm.artifacts import disk_error, write_json
from simlm.errors import ArtifactError
from simlm.recipe import Recipe, expand_path
from simlm.runtime import Ranks

DIGESTS = ".digests.json"
LOCK = ".lock"


def run_folder(recipe: Recipe) -> Path:
    """Where the artifacts of a recipe's steps lie."""
    return expand_path(recipe.output) if recipe.output else Path("runs") / recipe.name


@contextlib.contextmanager
def held_folder(recipe: Recipe, ranks: Ranks) -> Iterator[Path]:
    """The folder of a run, made if need be and held for this process; ArtifactError if another one works on it."""
    folder = run_folder(recipe)
    if ranks.rank > 0:
        yield folder
        return
    _make_folder(folder)
    with _locked(folder):
        yield folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise disk_error(error, folder) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process; ArtifactError if another one works on it. Freed by the system if the process dies."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing to lock with
        yield
        return
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{folder}: another simlm process works on this run; wait for it, or stop it first") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def kept_digests(folder: Path) -> Iterator[dict[str, str]]:
    """Digests of files outside, by their names, sizes and dates; those that are added are kept in the folder of the run, if it is there."""
    try:
        digests: dict[str, str] = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        digests = {}
    before = dict(digests)
    yield digests
    if digests != before and folder.is_dir():
        write_json(folder / DIGESTS, digests)
