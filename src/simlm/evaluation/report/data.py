"""What the pages of the report show, as data for other pages: `report.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from simlm.evaluation.report.charts import thin
from simlm.evaluation.report.examples import Example
from simlm.evaluation.report.results import final_row, row_label
from simlm.evaluation.report.steps import StepRecord, hardware, versions
from simlm.evaluation.report.verdicts import verdicts

FILE = "report.json"


def report_data(
    metrics: dict[str, Any], steps: Sequence[StepRecord], examples: tuple[Sequence[Example], Sequence[Example]] | None
) -> dict[str, Any]:
    """The report as JSON values: metrics (as in metrics.json), verdicts, final, steps, curves, wins, losses, hardware, versions.

    examples: queries that the last retriever wins and loses against BM25; none = not known, then wins and losses are null.
    Of a curve as many points are kept as the HTML page draws; points are [step, value].
    """
    final = final_row(metrics)
    wins, losses = ([_example(example) for example in side] for side in examples) if examples is not None else (None, None)
    return {
        "metrics": metrics,
        "verdicts": [asdict(verdict) for verdict in verdicts(metrics)],
        "final": final and {"name": final, "label": row_label(final)},
        "steps": [_step(step) for step in steps],
        "curves": [
            {"step": step.name, "kind": kind, "measure": measure, "points": [list(point) for point in thin(points)]}
            for step in steps
            for (kind, measure), points in step.curves.items()
        ],
        "wins": wins,
        "losses": losses,
        "hardware": hardware(list(steps)),
        "versions": dict(versions(list(steps))),
    }


def _step(step: StepRecord) -> dict[str, Any]:
    manifest = step.manifest
    return {
        "name": step.name,
        "stage": manifest.stage,
        "seconds": manifest.seconds,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "bytes": step.num_bytes,
        "created": manifest.created,
        "facts": manifest.facts,
    }


def _example(example: Example) -> dict[str, Any]:
    """Pairs are named by their sides: bm25 and final."""
    sides = ("bm25", "final")
    return {
        "query": example.query,
        "query_id": example.query_id,
        "values": dict(zip(sides, example.values, strict=True)),
        "ranks": dict(zip(sides, example.ranks, strict=True)),
        "positive": example.positive and asdict(example.positive),
        "num_positives": example.num_positives,
        "tops": {side: top and asdict(top) for side, top in zip(sides, example.tops, strict=True)},
    }


__all__ = ["FILE", "report_data"]
