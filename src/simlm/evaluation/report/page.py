"""report.html, report.md and report.json from the results and the records of the steps.

The HTML page is one file: no script, no outside asset, a content security policy that allows nothing but its own style sheet.
All text is escaped, so that a passage with markup stays text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simlm.artifacts import write_json
from simlm.evaluation.report import charts, data, tables
from simlm.evaluation.report.examples import wins_and_losses
from simlm.evaluation.report.results import RANK_BANDS, ReportStore, Results, comparison, row_label, row_of
from simlm.evaluation.report.steps import StepRecord, flat_settings, hardware, versions
from simlm.evaluation.report.verdicts import mark, p_text, verdicts
from simlm.types import Split

# Queries of wins and of losses on view; the rest is behind a fold.
_AT_ONCE = 8
_HERE = Path(__file__).parent

WHAT_ROWS_ARE = {
    "bm25": "words, no training",
    "start": "before training",
    "retriever1": "on BM25's negatives",
    "retriever2": "on mined negatives",
    "reranker": "over the best run",
    "distilled": "from the re-ranker",
    "hybrid": "vectors and BM25",
}


def write_pages(folder: Path, results: Results, store: ReportStore, steps: Sequence[StepRecord], *, split: Split, examples: int) -> None:
    """Write `report.html`, `report.md` and `report.json` into a folder. examples: queries shown among wins and among losses."""
    content = page_content(results, store, list(steps), split=split, examples=examples)
    (folder / "report.html").write_bytes(render_html(content).encode("utf-8", errors="replace"))
    (folder / "report.md").write_bytes(render_markdown(content).encode("utf-8", errors="replace"))
    write_json(folder / data.FILE, data.report_data(results.metrics, steps, (content["wins"], content["losses"])))


def page_content(results: Results, store: ReportStore, steps: list[StepRecord], *, split: Split, examples: int) -> dict[str, Any]:
    """What both templates show."""
    metrics = results.metrics
    wins, losses = wins_and_losses(results, store, split, examples)
    final = results.final
    seconds, memory = [step.manifest.seconds for step in steps], [step.manifest.peak_memory_bytes for step in steps]
    return {
        "metrics": metrics,
        "verdicts": verdicts(metrics),
        "caption": tables.caption(metrics),
        "best": tables.best_values(metrics),
        "final": final,
        "final_label": row_label(final) if final else "",
        "what_rows_are": WHAT_ROWS_ARE,
        "tiles": _tiles(metrics, final),
        "measure_panels": _measure_panels(metrics, final),
        "bands": _bands(metrics),
        "trainings": [(step, panels) for step in steps if (panels := charts.training_panels(step))],
        "at_once": _AT_ONCE,
        "wins": wins,
        "losses": losses,
        "versus": comparison(metrics, final, "bm25") if final else None,
        "steps": steps,
        "longest": max(seconds, default=0.0),
        "largest": max(memory, default=0),
        "total_seconds": sum(seconds),
        "total_bytes": sum(step.num_bytes for step in steps),
        "hardware": hardware(steps),
        "versions": versions(steps),
        "last": max((step.manifest.created for step in steps), default=""),
    }


def render_html(content: dict[str, Any]) -> str:
    style = "\n" + (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment(autoescape=True).get_template("page.html.jinja").render(content, style=style, style_digest=digest)


def render_markdown(content: dict[str, Any]) -> str:
    environment = _environment(autoescape=False)
    environment.filters["md"] = markdown_text
    return environment.get_template("page.md.jinja").render(content)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in one line: markup, tables and HTML are escaped."""
    one_line = re.sub(r"\s+", " ", str(text)).strip().replace("&", "&amp;").replace("<", "&lt;")
    one_line = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", one_line)
    # What would start a list, a quotation or a rule at the start of a line.
    return re.sub(r"^([-+>=]|\d+(?=[.)](\s|$)))", lambda match: match[0] + "\\" if match[0].isdigit() else "\\" + match[0], one_line)


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(bar=charts.bar, stacked_bar=charts.stacked_bar, flat_settings=flat_settings, mark=mark, p_text=p_text)
    environment.filters.update(
        duration=tables.duration, size=tables.size, count=tables.count, milliseconds=tables.milliseconds, p_cell=tables.p_cell
    )
    return environment


def _tiles(metrics: dict[str, Any], final: str | None) -> list[tuple[str, str, str]]:
    """(label, number, remark) of the figures at the top."""
    tiles = []
    main = metrics["main"]
    for row in metrics["rows"]:
        if row["name"] in (final, "bm25", "start", "hybrid"):
            difference = row["difference_vs_bm25"]
            remark = main if difference is None else f"{main}, {difference:+.3f} to BM25"
            tiles.append((row["label"], f"{row['measures'][main]:.3f}", remark))
    tiles.sort(key=lambda tile: tile[0] != (row_label(final) if final else None))
    last = row_of(metrics, final) if final else None
    if last is not None and last["milliseconds_per_query"] is not None and last["bytes_per_passage"] is not None:
        taken, stored = tables.milliseconds(last["milliseconds_per_query"]), tables.count(last["bytes_per_passage"])
        tiles.append(("A query takes", f"{taken} ms", f"{stored} bytes a passage"))
    return tiles


def _measure_panels(metrics: dict[str, Any], final: str | None) -> list[tuple[str, list[tuple[str, Any, str]]]]:
    """(measure, [(label, bar, value)]) of each measure; bars start at 0, the scale ends at 1 or at the highest value above."""
    panels = []
    for name in sorted(metrics["measures"], key=lambda name: name != metrics["main"]):
        highest = max([1.0, *(row["measures"][name] for row in metrics["rows"])])
        baseline = next((row["measures"][name] / highest for row in metrics["rows"] if row["name"] == "bm25"), None)
        lines = []
        for row in metrics["rows"]:
            value = row["measures"][name]
            style = "fill final" if row["name"] == final else "fill base" if row["name"] == "bm25" else "fill"
            label = f"{row['label']}, {name} {value:.3f}"
            lines.append((row["label"], charts.bar(value / highest, style=style, reference=baseline, label=label), f"{value:.3f}"))
        panels.append((name, lines))
    return panels


def _bands(metrics: dict[str, Any]) -> dict[str, Any]:
    """The chart of the ranks of first relevant passages."""
    labels = [f"rank {first}" if first == last else f"{first} to {last}" if last else f"{first} and deeper" for first, last in RANK_BANDS]
    labels.append("not found")
    lines = []
    for row in metrics["rows"]:
        told = ", ".join(f"{label}: {number:,}" for label, number in zip(labels, row["first_relevant"], strict=True))
        lines.append(
            (
                row["label"],
                charts.stacked_bar(row["first_relevant"], labels=labels, label=f"{row['label']}: {told}"),
                row["first_relevant"][0],
            )
        )
    return {"labels": labels, "lines": lines}


__all__ = ["markdown_text", "page_content", "render_html", "render_markdown", "write_pages"]
