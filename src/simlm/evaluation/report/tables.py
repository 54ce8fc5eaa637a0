"""How numbers are written, and the result table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simlm.evaluation.report.results import SIGNIFICANT, final_row
from simlm.evaluation.report.verdicts import mark

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(metrics: Mapping[str, Any]) -> Table:
    """The result table for rich: a row a system, the best value of each measure in bold. metrics: content of metrics.json."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=escape(f"{metrics['name']}: {metrics['num_queries']:,} {metrics['split']} queries, {metrics['num_passages']:,} passages"),
        caption=escape(caption(metrics)) if metrics["rows"] else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in metrics["measures"] if metrics["rows"] else []:
        table.add_column(name, justify="right", no_wrap=True)
    if metrics["rows"]:
        table.add_column("vs BM25", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)
        table.add_column("won/lost", justify="right", no_wrap=True)
        table.add_column("B/passage", justify="right", no_wrap=True)
        table.add_column("ms/query", justify="right", no_wrap=True)
    best = best_values(metrics)
    final = final_row(metrics)
    for row in metrics["rows"]:
        cells = [Text(row["label"], style="bold" if row["name"] == final else "")]
        for name in metrics["measures"]:
            value = row["measures"][name]
            sign = mark(row) if name == metrics["main"] else ""
            cells.append(Text(f"{value:.3f}{sign}", style="bold" if value == best[name] else ""))
        difference = row["difference_vs_bm25"]
        color = {"▲": "green", "▼": "red"}.get(mark(row), "")
        cells.append(Text("" if difference is None else f"{difference:+.3f}", style=color))
        cells.append(Text(p_cell(row["p_value_vs_bm25"])))
        cells.append(Text("" if row["wins"] is None else f"{row['wins']}/{row['losses']}"))
        cells.append(Text(count(row["bytes_per_passage"])))
        cells.append(Text(milliseconds(row["milliseconds_per_query"])))
        table.add_row(*cells)
    return table


def caption(metrics: Mapping[str, Any]) -> str:
    """What the marks of the table mean."""
    test = "paired randomization test" if metrics["significance"]["test"] == "randomization" else "paired t-test"
    return (
        f"Difference, p and won/lost queries: {metrics['main']} against BM25, {test}; "
        f"▲ better, ▼ worse with p < {SIGNIFICANT} after Holm's correction."
    )


def best_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Measure -> the highest value of any row."""
    return {name: max(row["measures"][name] for row in metrics["rows"]) for name in metrics["measures"] if metrics["rows"]}


def p_cell(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None) -> str:
    """A number of things, with thousands separated; empty where it is not known."""
    return "" if value is None else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s, 0.4 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """1.2 GiB, 340 MiB, 12 KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} B"


__all__ = ["best_values", "caption", "count", "duration", "milliseconds", "p_cell", "size", "terminal_table"]
