"""The report of a run as the server gives it: data for the page, and the HTML file as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simlm.artifacts import open_artifact
from simlm.evaluation.report.data import FILE, report_data
from simlm.evaluation.report.steps import read_steps

HIDDEN = {"title": "", "text": "[not shown: deleted, or on the block list]"}


@dataclass(frozen=True)
class Report:
    """data: what `GET /report` answers. html: bytes of the page; None where the run has none, or it may quote what is hidden."""

    data: dict[str, Any]
    html: bytes | None


def read_report(run: Path, is_hidden: Callable[[str], bool] | None) -> Report | None:
    """The report of a run, None if it has none.

    is_hidden: whether a passage is deleted or on the block list; such passages are left out of the examples. The HTML page is a finished
    file that quotes passages, so there is none then. None = nothing is hidden.
    """
    folder = run / "report"
    if not folder.is_dir():
        return None
    manifest = open_artifact(folder, "report").manifest
    if FILE in manifest.files:
        data: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    else:
        # Made before there was report.json: everything but the examples is still there.
        names = [role.removeprefix("step.") for role in manifest.inputs if role.startswith("step.")]
        steps = read_steps({name: run / name for name in names if (run / name).is_dir()})
        steps.sort(key=lambda step: step.manifest.created)
        data = report_data(json.loads((folder / "metrics.json").read_text(encoding="utf-8")), steps, None)
    if is_hidden is not None:
        data["wins"], data["losses"] = (_redacted(data[side], is_hidden) for side in ("wins", "losses"))
        return Report({"html": False, **data}, None)
    html = (folder / "report.html").read_bytes() if "report.html" in manifest.files else None
    return Report({"html": html is not None, **data}, html)


def _redacted(examples: list[dict[str, Any]] | None, is_hidden: Callable[[str], bool]) -> list[dict[str, Any]] | None:
    if examples is None:
        return None

    def shown(passage: dict[str, Any] | None) -> dict[str, Any] | None:
        return passage | HIDDEN if passage is not None and is_hidden(passage["passage_id"]) else passage

    return [
        example | {"positive": shown(example["positive"]), "tops": {side: shown(top) for side, top in example["tops"].items()}}
        for example in examples
    ]


__all__ = ["Report", "read_report"]
