"""What choosing an index has measured: choice.json, a table (terminal, choice.md), a plot of quality, memory and time (choice.svg)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from simlm.artifacts import write_json

JSON, MARKDOWN, PLOT = "choice.json", "choice.md", "choice.svg"
COLUMNS = ("index", "memory", "of exact", "disk", "quality", "build", "p50", "p95")


def write_choice(folder: Path, content: Mapping[str, Any]) -> None:
    """Write all three files into a folder."""
    write_json(folder / JSON, content)
    (folder / MARKDOWN).write_text(markdown(content), encoding="utf-8")
    draw(content, folder / PLOT)


def terminal_table(content: Mapping[str, Any]) -> Table:
    """Candidates by memory, the chosen one marked."""
    table = Table(title=caption(content), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "index" else "right", no_wrap=True)
    for row in _by_memory(content):
        style = "bold green" if row["label"] == content["chosen"] else "dim" if row["left_out"] else ""
        table.add_row(*_cells(content, row), style=style)
    return table


def markdown(content: Mapping[str, Any]) -> str:
    """The table with its caption, and the plot beside it."""
    lines = [f"# Index of {content['run']}, retriever {content['retriever']}", "", caption(content), "", conclusion(content), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    for row in _by_memory(content):
        cells = _cells(content, row)
        lines.append("| " + " | ".join([f"**{cells[0]}**" if row["label"] == content["chosen"] else cells[0], *cells[1:]]) + " |")
    return "\n".join([*lines, "", f"![quality, memory and time]({PLOT})", ""])


def caption(content: Mapping[str, Any]) -> str:
    exact = ", ".join(f"{name} {content['exact'][name]:.4f}" for name in content["measures"])
    return (
        f"quality: the lower share of exact fp32 search ({exact}) on {content['num_queries']:,} dev queries; "
        "times in ms, one query on one core"
    )


def conclusion(content: Mapping[str, Any]) -> str:
    """One sentence: what was chosen and what it saves, or what would have to give."""
    limits = f"at least {content['min_quality']:.2%} of exact search in at most {_size(content['budget_bytes'])}"
    built = [row for row in content["candidates"] if row["quality"] is not None and row["resident_bytes"] <= content["budget_bytes"]]
    if content["chosen"]:
        row = next(row for row in built if row["label"] == content["chosen"])
        times = 1 / row["bytes_ratio"]
        return f"Chosen: {row['label']}, the smallest with {limits}: {row['quality']:.2%} with 1/{times:.1f} of the memory of exact search."
    if not built:
        return f"None: nothing fits into {_size(content['budget_bytes'])}; give a larger budget."
    best = max(built, key=lambda row: row["quality"])
    return (
        f"None: no index has {limits}; the best within the budget is {best['label']} with {best['quality']:.2%}. "
        "Ask for less, or give a larger budget."
    )


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Memory against quality, and against the time of a query; one mark a candidate, the chosen one ringed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in content["candidates"] if row["quality"] is not None]
    # The same bytes for the same content.
    with mpl.rc_context({"svg.hashsalt": "simlm", "font.size": 9}):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        for place, (key, label) in enumerate((("quality", "quality, share of exact search"), ("p95_milliseconds", "p95 of one query, ms"))):
            axes = figure.add_subplot(1, 2, place + 1)
            for kind in dict.fromkeys(row["candidate"]["type"] for row in rows):
                own = [row for row in rows if row["candidate"]["type"] == kind]
                memory = [row["resident_bytes"] / 1e6 for row in own]
                axes.scatter(memory, [row[key] for row in own], s=22, label=kind)
            for row in rows:
                if row["label"] == content["chosen"]:
                    axes.scatter([row["resident_bytes"] / 1e6], [row[key]], s=120, facecolors="none", edgecolors="black", label="chosen")
            axes.set_xscale("log")
            axes.set_xlabel("memory, MB")
            axes.set_ylabel(label)
            axes.grid(visible=True, alpha=0.3)
            if key == "quality":
                axes.axhline(content["min_quality"], linestyle="--", linewidth=0.8, color="grey")
                axes.legend(loc="lower right")
            else:
                axes.set_yscale("log")
            if content["budget_bytes"] <= 2 * max(row["resident_bytes"] for row in rows):
                axes.axvline(content["budget_bytes"] / 1e6, linestyle="--", linewidth=0.8, color="grey")
        figure.savefig(file, format="svg", metadata={"Date": None})


def _by_memory(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sorted(content["candidates"], key=lambda row: (row["resident_bytes"], row["label"]))


def _cells(content: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    memory = [row["label"], _size(row["resident_bytes"]), f"{row['resident_bytes'] / content['exact_bytes']:.1%}"]
    if row["left_out"]:
        return [*memory, "", "over budget", "", "", ""]
    times = [f"{row['p50_milliseconds']:.2f}", f"{row['p95_milliseconds']:.2f}"]
    return [*memory, _size(row["disk_bytes"]), f"{row['quality']:.4f}", f"{row['build_seconds']:.1f} s", *times]


def _size(count: float) -> str:
    """Bytes in powers of 1000, as budgets are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
