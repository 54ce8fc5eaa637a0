"""Exports of a finished run: what was trained and computed, as files that other tools read.

A new target is one function `write(run, folder, progress) -> facts` and one row of the table. Each target gets a folder of its own, named
after it, inside the export; `export.json` beside them says what was exported from what. The whole appears at once, or not at all.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from simlm.artifacts import disk_error, sync, write_json
from simlm.errors import DataError, nearest
from simlm.export.finished_run import FinishedRun
from simlm.progress import Progress

INFO = "export.json"
FORMAT = 1

Writer = Callable[[FinishedRun, Path, Progress], dict[str, Any]]

TARGETS: dict[str, str] = {
    "sentence-transformers": "simlm.export.model_folders:write",
    "onnx": "simlm.export.onnx_models:write",
    "faiss": "simlm.export.vectors:write_faiss",
    "parquet": "simlm.export.vectors:write_parquet",
    "trec": "simlm.export.trec:write",
}


def export_run(
    run: Path | str,
    folder: Path | str,
    targets: Sequence[str],
    *,
    retriever: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write some targets of a run into a new folder; what `export.json` says of them.

    retriever: which of the run's; none = the one that `simlm search` would take, of a finished run.
    overwrite: put the new export in the place of an earlier one, which is only then deleted.
    Raises DataError for an unknown target or a folder that is in use, ArtifactError if the run lacks what a target needs.
    """
    progress = progress or Progress()
    folder = Path(folder)
    folder = folder.resolve() if folder.name in ("", "..") else folder.parent.resolve() / folder.name
    writers = {name: _writer(name) for name in dict.fromkeys(targets)}
    if not writers:
        raise DataError(f"nothing to export; name one or more of {', '.join(TARGETS)}")
    _check_place(folder, overwrite)
    source = FinishedRun(Path(run), retriever)
    work = folder.with_name(f".{folder.name}.work")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Left by an export that was killed.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        info = {"format": FORMAT, "run": source.name, "targets": _written(writers, source, work, progress)}
        write_json(work / INFO, info)
        _put_in_place(work, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return info


def _writer(target: str) -> Writer:
    if target not in TARGETS:
        raise DataError(f"unknown export target {target!r}{nearest(target, TARGETS)} (known: {', '.join(TARGETS)})")
    module, _, name = TARGETS[target].partition(":")
    return cast("Writer", getattr(importlib.import_module(module), name))


def _written(writers: dict[str, Writer], source: FinishedRun, work: Path, progress: Progress) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, write in writers.items():
        progress.say(f"export: {name}")
        place = work / name
        place.mkdir()
        facts[name] = write(source, place, progress)
        facts[name]["bytes_total"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return facts


def _check_place(folder: Path, overwrite: bool) -> None:
    """Refuse a place where something is, unless it is an earlier export that may be replaced."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise DataError(f"{folder}: a file or a link is there; give the name of a new folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{folder}: not empty, so nothing was written; give a new folder, or --overwrite to replace an earlier export")
    if not (folder / INFO).is_file():
        raise DataError(f"{folder}: holds no {INFO}, so it is not an export and is not replaced; give a new folder")


def _put_in_place(work: Path, folder: Path) -> None:
    """The new export under its name; the earlier one goes when the new one is there, and stays if that fails."""
    for file in [*work.rglob("*"), work]:
        sync(file)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(work, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


__all__ = ["INFO", "TARGETS", "FinishedRun", "export_run"]
