"""The comparison of pre-trainings: means and spreads over seeds, paired tests over queries, costs; as JSON, a page and terminal tables.

Two kinds of chance are kept apart. The spread s is the sample standard deviation over seeds: what another seed of pre-training and
retriever would change. A difference of two means over n seeds each has the standard deviation s sqrt(2 / n), so that it stays within the
spread up to t(0.975) times that, t with the degrees of freedom that s rests on (`_seed_limit`). The p-value is of a paired test over
queries, on values averaged over the seeds that both rows have: what other queries would change, given those seeds; Holm's correction runs
over all rows of a table that are to be compared, measured or not.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from simlm.artifacts import write_json
from simlm.evaluation.report.charts import Series, line_chart, tick_text, ticks
from simlm.evaluation.report.page import markdown_text
from simlm.evaluation.report.results import SIGNIFICANT
from simlm.evaluation.report.steps import flat_settings
from simlm.evaluation.report.tables import count, duration, p_cell, size
from simlm.evaluation.report.verdicts import Verdict, p_text
from simlm.evaluation.significance import Method, holm, p_value, wins_ties_losses

if TYPE_CHECKING:
    from rich.table import Table

PROBE, WHITENED = "probe_RR@10", "probe_whitened_RR@10"
NONE = "none"
SHOWN_MEASURES = 3
BUDGETS = {
    "data": "as many steps of as many passages",
    "tokens": "the same tokens through encoder and decoder layers (a decoder's counted as its share of the encoder's layers)",
    "time": "the same seconds of training steps, by a calibration",
}
# Fewer judged queries and only large differences can be told from chance.
_FEW_QUERIES = 50
# Below this share of BM25's measure a retriever has hardly learned: what is compared is noise around nothing.
_HARDLY_LEARNED = 0.1
# A measure below this has four decimals, any other three.
_SMALL = 0.1
_HERE = Path(__file__).parent

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowResults:
    """What is measured of a row. content: equal for the same thing in two tables. measured: seed -> content of its measured file.

    errors: seed -> why it failed. settings: of the pre-training.
    """

    name: str
    content: str
    seeds: list[int]
    measured: dict[int, dict[str, Any]]
    errors: dict[int, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TableResults:
    """One table of the comparison."""

    name: str
    title: str
    rows: list[RowResults]


@dataclass(frozen=True)
class Facts:
    """What all tables share. measures: the main one first. main: table -> the row that the others are compared with."""

    name: str
    split: str
    measures: list[str]
    main: dict[str, str]
    budget: str
    significance: Method
    num_samples: int
    seed: int
    num_passages: int


def summarize(facts: Facts, tables: Sequence[TableResults], *, bm25: Mapping[str, Any]) -> dict[str, Any]:
    """The content of comparison.json, as far as the rows are measured.

    bm25: content of its measured file, empty if there is none.
    """
    untrained = next((row for table in tables for row in table.rows if row.name == NONE and table.name == "objectives"), None)
    wanted = {(row.content, seed): seed in row.measured for table in tables for row in table.rows for seed in row.seeds}
    failed = {(row.content, seed) for table in tables for row in table.rows for seed in row.errors}
    done = [row for table in tables for row in table.rows if row.measured]
    num_queries = len(next(iter(done[0].measured.values()))["splits"][facts.split]["query_rows"]) if done else 0
    return {
        "format": 1,
        "name": facts.name,
        "split": facts.split,
        "measures": facts.measures,
        "num_queries": num_queries,
        "num_passages": facts.num_passages,
        "budget": facts.budget,
        "seed": facts.seed,
        "significance": {"test": facts.significance, "num_samples": facts.num_samples},
        "bm25": bm25["splits"][facts.split]["averages"] if bm25 else None,
        "cells": {"wanted": len(wanted), "done": sum(wanted.values()), "failed": len(failed)},
        "tables": [_table(facts, table, untrained) for table in tables],
    }


def write_comparison(folder: Path, content: Mapping[str, Any]) -> None:
    """Write comparison.json, comparison.html and comparison.md into a folder, each in one move, the first last."""
    _write_text(folder / "comparison.html", render_html(content))
    _write_text(folder / "comparison.md", render_markdown(content))
    write_json(folder / "comparison.json", content)


def _write_text(path: Path, text: str) -> None:
    """Write a page so that a reader sees either the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(text.encode("utf-8", errors="replace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def conclusions(content: Mapping[str, Any]) -> list[Verdict]:
    """What the numbers say and what they do not, the most important first."""
    found = [verdict for table in content["tables"] for verdict in _outcomes(content, table)]
    found += _gains(content) + _below_bm25(content) + _single_seeds(content)
    cells = content["cells"]
    if cells["failed"]:
        found.insert(0, Verdict("bad", f"{cells['failed']} of {cells['wanted']} trainings failed; their errors are below."))
    if cells["done"] < cells["wanted"]:
        left = cells["wanted"] - cells["done"]
        found.append(Verdict("warn", f"{cells['done']} of {cells['wanted']} trainings are measured, {left} not yet."))
    if 0 < content["num_queries"] < _FEW_QUERIES:
        found.append(Verdict("warn", f"Only {content['num_queries']} judged queries: all but large differences may be chance."))
    return found or [Verdict("warn", "Nothing is measured yet.")]


def outcome(row: Mapping[str, Any]) -> str:
    """A row against the main one of its table, in a few words."""
    if row["is_main"]:
        return "main"
    if not row["num_seeds"]:
        return "failed" if row["errors"] else "to do"
    against = row["against_main"]
    if against is None:
        return "not compared yet"
    if against["p_value_holm"] is None or against["p_value_holm"] >= SIGNIFICANT or against["difference"] == 0:
        return "no difference shown"
    if against["within_spread"]:
        return "within spread"
    return _direction(against) + (" (one seed)" if against["seed_limit"] is None else "")


def _direction(against: Mapping[str, Any]) -> str:
    return "better" if against["difference"] > 0 else "worse"


# Of the terminal columns that may wrap: their longest words.
_LEAST_WIDTHS = {"": len("replaced_lm"), "outcome": len("difference"), "probe": len("0.388 ->")}


def terminal_tables(content: Mapping[str, Any]) -> list[Table]:
    """A table of rich for each of the comparison's tables."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    tables = []
    for table in content["tables"]:
        drawn = Table(title=escape(table["title"]), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
        for place, heading in enumerate(headings(content, table)):
            # Where the terminal is too narrow, names, outcomes and probes go over two lines; the numbers beside them stay whole.
            side: Literal["left", "right"] = "left" if place == 0 or heading == "outcome" else "right"
            least = _LEAST_WIDTHS.get(heading)
            drawn.add_column(escape(heading), justify=side, no_wrap=least is None, min_width=least, overflow="fold")
        for row in table["rows"]:
            drawn.add_row(*(escape(cell) for cell in row_cells(content, table, row)), style="bold" if row["is_main"] else "")
        tables.append(drawn)
    return tables


def caption(content: Mapping[str, Any]) -> str:
    """How to read the tables."""
    test = "paired randomization test" if content["significance"]["test"] == "randomization" else "paired t-test"
    other = " (the mismatched one those of its own corpus)" if any(table["name"] == "corpus" for table in content["tables"]) else ""
    return (
        f"{content['num_queries']:,} judged {content['split']} queries, {content['num_passages']:,} passages. Within a table every "
        f"pre-trained row had {BUDGETS[content['budget']]}{other}. After ±: the standard deviation over seeds, where there are two "
        f"or more. Differences are of {content['measures'][0]}, over the seeds that both rows have; p is of a {test} over "
        "queries, corrected for the number of rows to be compared (Holm). "
        f"A difference with p of {SIGNIFICANT} or more is none that was shown. "
        "One that two lots of seeds of a single row would exceed in fewer than one case in twenty is better or worse; "
        "a smaller one is within spread and may turn with other seeds. "
        "That limit is t(0.975) s sqrt(2 / common seeds), s the standard deviation over the seeds of the main row, "
        "pooled with the other row's where that has two or more; "
        "one seed: the main row has no spread yet to hold a difference against. "
        "Probe: RR@10 of [CLS] on held-out passages at the start -> at the end of pre-training, whitened: at its end, after whitening; "
        "time, tokens a second and peak memory: of pre-training, its dev measures included."
    )


_COSTS = ["time", "tokens/s", "memory"]


def headings(content: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """Column heads that go with `row_cells`."""
    none = ["to none"] if table["has_none"] else []
    whitened = ["whitened"] if _has_whitened(table) else []
    return ["", "seeds", *content["measures"][:SHOWN_MEASURES], "to main", "p, Holm", "outcome", *none, "probe", *whitened, *_COSTS]


def row_cells(content: Mapping[str, Any], table: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """A row as text, a cell a column."""
    against, none = row["against_main"], row["against_none"]
    cells = [row["name"], f"{row['num_seeds']}/{len(row['wanted_seeds'])}"]
    for name in content["measures"][:SHOWN_MEASURES]:
        mean, spread = row["mean"].get(name), row["spread"].get(name)
        cells.append("" if mean is None else _mean_text(mean, spread))
    cells += ["", ""] if against is None else [f"{against['difference']:+.3f}", p_cell(against["p_value_holm"])]
    cells.append(outcome(row))
    if table["has_none"]:
        cells.append("" if none is None else f"{none['difference']:+.3f}" + (" *" if _significant(none) else ""))
    cost = row["cost"]
    memory = cost["peak_gpu_bytes"] or cost["peak_memory_bytes"]
    start = "" if row["probe_start"] is None else f"{row['probe_start']:.3f} -> "
    cells.append("" if row["probe"] is None else f"{start}{row['probe']:.3f}")
    if _has_whitened(table):
        cells.append("" if row["probe_whitened"] is None else f"{row['probe_whitened']:.3f}")
    cells.append("" if cost["seconds"] is None else duration(cost["seconds"]))
    cells += [count(cost["tokens_per_second"]), "" if memory is None else size(memory)]
    return cells


def _has_whitened(table: Mapping[str, Any]) -> bool:
    return any(row["probe_whitened"] is not None for row in table["rows"])


def _mean_text(mean: float, spread: float | None) -> str:
    """0.612, or 0.0274 ±0.0031: three decimals, four for a mean below 0.1, and the spread as many."""
    decimals = 4 if abs(mean) < _SMALL else 3
    return f"{mean:.{decimals}f}" + (f" ±{spread:.{decimals}f}" if spread is not None else "")


def render_html(content: Mapping[str, Any]) -> str:
    style = "\n" + (_HERE / "page.css").read_text(encoding="utf-8") + (_HERE / "comparison.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=duration, size=size, count=count)
    return environment.get_template("comparison.html.jinja").render(
        content=content,
        conclusions=conclusions(content),
        caption=caption(content),
        tables=[
            (table, headings(content, table), [row_cells(content, table, row) for row in table["rows"]]) for table in content["tables"]
        ],
        plots={table["name"]: dot_plot(content, table) for table in content["tables"]},
        scatter=scatter(content),
        curves=curve_panels(content),
        flat_settings=flat_settings,
        style=style,
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def render_markdown(content: Mapping[str, Any]) -> str:
    lines = [f"# {markdown_text(content['name'])}: pre-trainings compared", ""]
    lines += [f"- {markdown_text(one.text)}" for one in conclusions(content)]
    for table in content["tables"]:
        heads = headings(content, table)
        lines += ["", f"## {markdown_text(table['title'])}", "", "| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
        lines += ["| " + " | ".join(markdown_text(cell) for cell in row_cells(content, table, row)) + " |" for row in table["rows"]]
        failed = [(row["name"], seed, error) for row in table["rows"] for seed, error in row["errors"].items()]
        lines += [f"\n{markdown_text(name)}, seed {seed}: failed: {markdown_text(error)}" for name, seed, error in failed]
    lines += ["", markdown_text(caption(content)), ""]
    if content["bm25"]:
        lines += [f"BM25 on the same queries: {_values(content, content['bm25'])}.", ""]
    return "\n".join(lines)


# The numbers


def _table(facts: Facts, table: TableResults, untrained: RowResults | None) -> dict[str, Any]:
    main = next(row for row in table.rows if row.name == facts.main[table.name])
    against_main = {row.name: _compare(facts, row, main, main) for row in table.rows if row.content != main.content}
    against_none = {row.name: _compare(facts, row, untrained, main) for row in table.rows if untrained and row.content != untrained.content}
    for compared in (against_main, against_none):
        corrected = holm({name: item["p_value"] for name, item in compared.items() if item is not None}, num_tests=len(compared))
        for name, p in corrected.items():
            item = compared[name]
            assert item is not None
            item["p_value_holm"] = p
    return {
        "name": table.name,
        "title": table.title,
        "main": main.name,
        "has_none": untrained is not None and bool(untrained.measured),
        "rows": [
            {"is_main": row is main, "against_main": against_main.get(row.name), "against_none": against_none.get(row.name)}
            | _row(facts, row)
            for row in table.rows
        ],
    }


def _row(facts: Facts, row: RowResults) -> dict[str, Any]:
    means = {name: _means(facts, row, name) for name in facts.measures}
    pretrained = [measured["pretrain"] for measured in row.measured.values()]
    ends = [one.get("dev", {}) for one in pretrained]
    return {
        "name": row.name,
        "content": row.content,
        "wanted_seeds": row.seeds,
        "num_seeds": len(row.measured),
        "mean": {name: float(np.mean(values)) for name, values in means.items() if values},
        "spread": {name: _spread(values) for name, values in means.items()},
        "probe": _mean(ends, PROBE),
        "probe_start": _mean([one.get("dev_start", {}) for one in pretrained], PROBE),
        "probe_whitened": _mean(ends, WHITENED),
        "cost": {
            "seconds": _mean(pretrained, "seconds"),
            "training_seconds": _mean(pretrained, "training_seconds"),
            "num_steps": _mean(pretrained, "num_steps"),
            "tokens": _mean(pretrained, "tokens"),
            "tokens_per_second": _mean(pretrained, "tokens_per_second"),
            "peak_memory_bytes": _highest(pretrained, "peak_memory_bytes"),
            "peak_gpu_bytes": _highest(pretrained, "peak_gpu_bytes"),
        },
        "seeds": {
            str(seed): {
                "averages": {split: values["averages"] for split, values in measured["splits"].items()},
                "pretrain": measured["pretrain"],
                "retriever1": measured["retriever1"],
                "fingerprints": measured["fingerprints"],
                "models": measured["models"],
            }
            for seed, measured in sorted(row.measured.items())
        },
        "errors": {str(seed): error for seed, error in sorted(row.errors.items())},
        "settings": row.settings,
    }


def _compare(facts: Facts, row: RowResults, other: RowResults, main: RowResults) -> dict[str, Any] | None:
    """Difference and test on the seeds that both have; None without any. main: of the table, the row with the most seeds."""
    seeds = [seed for seed in row.measured if seed in other.measured]
    if not seeds:
        return None
    rows_of_queries = {tuple(one.measured[seed]["splits"][facts.split]["query_rows"]) for one in (row, other) for seed in seeds}
    assert len(rows_of_queries) == 1, f"{row.name} and {other.name} are measured on different queries"
    values, against = (_per_query(facts, one, seeds) for one in (row, other))
    wins, ties, losses = wins_ties_losses(values, against)
    difference = float((values - against).mean()) if len(values) else 0.0
    limit = _seed_limit(facts, main, {one.content: one for one in (row, other)}, len(seeds))
    return {
        "seeds": seeds,
        "difference": difference,
        "seed_limit": limit,
        "within_spread": limit is not None and abs(difference) <= limit,
        "p_value": p_value(values, against, method=facts.significance, num_samples=facts.num_samples, seed=facts.seed),
        "p_value_holm": None,
        "wins": wins,
        "ties": ties,
        "losses": losses,
    }


def _seed_limit(facts: Facts, main: RowResults, compared: Mapping[str, RowResults], num_seeds: int) -> float | None:
    """How far two means over num_seeds seeds each lie apart in 19 of 20 cases if only the seeds differ; None while main has one seed.

    t(0.975) s sqrt(2 / num_seeds): s is main's standard deviation over seeds, pooled with those of the rows compared that have one.
    """
    from scipy import stats

    measure = facts.measures[0]
    if len(main.measured) < 2:
        return None
    rows = {main.content: main, **compared}
    spreads = [
        (len(row.measured) - 1, float(np.std(_means(facts, row, measure), ddof=1))) for row in rows.values() if len(row.measured) > 1
    ]
    degrees = sum(df for df, _ in spreads)
    pooled = math.sqrt(sum(df * spread**2 for df, spread in spreads) / degrees)
    return float(stats.t.ppf(0.975, degrees)) * pooled * math.sqrt(2 / num_seeds)


def _per_query(facts: Facts, row: RowResults, seeds: list[int]) -> Floats:
    """The main measure of each query, averaged over seeds."""
    values_SQ = np.array([row.measured[seed]["splits"][facts.split]["values"][facts.measures[0]] for seed in seeds], dtype=np.float64)
    mean_Q: Floats = values_SQ.mean(axis=0)
    return mean_Q


def _means(facts: Facts, row: RowResults, measure: str) -> list[float]:
    return [float(row.measured[seed]["splits"][facts.split]["averages"][measure]) for seed in sorted(row.measured)]


def _spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _mean(facts: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [float(one[name]) for one in facts if one.get(name) is not None]
    return sum(found) / len(found) if found else None


def _highest(facts: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((float(one[name]) for one in facts if one.get(name) is not None), default=None)


# In words


_OUTCOMES = ("better", "worse", "better (one seed)", "worse (one seed)", "within spread", "no difference shown")


def _outcomes(content: Mapping[str, Any], table: Mapping[str, Any]) -> list[Verdict]:
    """The rows of a table against its main row."""
    measure = content["measures"][0]
    main = _main(table)
    if not main["num_seeds"]:
        return []
    told: dict[str, list[str]] = {}
    for row in table["rows"]:
        against = row["against_main"]
        told.setdefault(outcome(row), []).append(row["name"] + (f" ({against['difference']:+.3f})" if against is not None else ""))
    parts = [f"{word}: {', '.join(told[word])}" for word in _OUTCOMES if word in told]
    text = f"{_subject(table)}: {main['name']} has {measure} {_with_spread(main, measure)}"
    return [Verdict("plain", text + (f". Against it {'; '.join(parts)}" if parts else "") + ".")]


def _gains(content: Mapping[str, Any]) -> list[Verdict]:
    """Whether pre-training pays at all: the main row, and a mismatched corpus, against no pre-training."""
    found = []
    told = set()
    for table in content["tables"]:
        for row in table["rows"] if table["name"] == "corpus" else [_main(table)]:
            against = row["against_none"]
            if against is None or row["content"] in told:
                continue
            told.add(row["content"])
            name = f"{_subject(table)}: {row['name']}"
            shown = f"{against['difference']:+.3f}, corrected {p_text(against['p_value_holm'])}"
            if not _significant(against) or against["difference"] == 0:
                found.append(Verdict("warn", f"{name}: no difference to no pre-training shown: {shown}."))
            elif against["within_spread"]:
                limit = f"±{against['seed_limit']:.3f}"
                found.append(Verdict("warn", f"{name} differs from no pre-training within what other seeds may turn ({limit}): {shown}."))
            elif against["seed_limit"] is None:
                found.append(Verdict("warn", f"{name} is {_direction(against)} than no pre-training with one seed: {shown}."))
            elif against["difference"] < 0:
                found.append(Verdict("bad", f"{name} is worse than no pre-training: {shown}."))
            else:
                found.append(Verdict("good", f"{name} is better than no pre-training: {shown}."))
    return found


def _below_bm25(content: Mapping[str, Any]) -> list[Verdict]:
    measure = content["measures"][0]
    rows = [row for table in content["tables"] for row in table["rows"] if row["num_seeds"]]
    if not rows or not content["bm25"]:
        return []
    best = max(rows, key=lambda row: float(row["mean"][measure]))
    own, bm25 = best["mean"][measure], content["bm25"][measure]
    if own >= bm25:
        return []
    told = f"BM25 ({measure} {bm25:.3f}); the best, {best['name']}, has {_mean_text(own, None)}"
    if own < _HARDLY_LEARNED * bm25:
        why = "retriever 1 has hardly learned, so differences between the rows say little; raise retriever1.training.max_steps"
        return [Verdict("bad", f"Every row is below a tenth of {told}: {why}.")]
    return [Verdict("warn", f"Every row is below {told}.")]


def _single_seeds(content: Mapping[str, Any]) -> list[Verdict]:
    rows = {row["content"]: row for table in reversed(content["tables"]) for row in table["rows"] if row["num_seeds"] == 1}
    if not rows:
        return []
    names = ", ".join(row["name"] for row in rows.values())
    return [Verdict("plain", f"One seed each, so what another seed would change is not known: {names}.")]


def _main(table: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in table["rows"] if row["is_main"])
    return found


def _subject(table: Mapping[str, Any]) -> str:
    return str(table["title"]).split(",", maxsplit=1)[0]


def _with_spread(row: Mapping[str, Any], measure: str) -> str:
    spread, seeds = row["spread"][measure], row["num_seeds"]
    return _mean_text(row["mean"][measure], spread) + (f" over {seeds} seeds" if spread is not None else " with one seed")


def _values(content: Mapping[str, Any], averages: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_mean_text(averages[name], None)}" for name in content["measures"] if name in averages)


def _significant(item: Mapping[str, Any]) -> bool:
    return item["p_value_holm"] is not None and item["p_value_holm"] < SIGNIFICANT


# Plots


def dot_plot(content: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """{"low", "high": of the scale, "ends": the same as text, "lines": [(row, picture, value)]}, the best first.

    A picture shows mean, spread and each seed of the main measure.
    """
    measure = content["measures"][0]
    rows = sorted((row for row in table["rows"] if row["num_seeds"]), key=lambda row: -float(row["mean"][measure]))
    if not rows:
        return {"low": 0.0, "high": 1.0, "ends": ("0", "1"), "lines": []}
    seeds = {row["name"]: [one["averages"][content["split"]][measure] for one in row["seeds"].values()] for row in rows}
    ends = [value for values in seeds.values() for value in values]
    ends += [row["mean"][measure] + sign * (row["spread"][measure] or 0.0) for row in rows for sign in (-1, 1)]
    low, high, step = _rounded(min(ends), max(ends))
    main = next((row["mean"][measure] for row in rows if row["is_main"]), None)
    lines = []
    for row in rows:
        mean, spread = row["mean"][measure], row["spread"][measure]
        told = f"{row['name']}: {measure} {_with_spread(row, measure)}"
        marks = []
        if main is not None:
            marks.append(_tick("reference", _percent(main, low, high), -4, 18))
        if spread is not None:
            start, end = _percent(mean - spread, low, high), _percent(mean + spread, low, high)
            marks.append(Markup('<rect class="spread" x="{}" width="{}" y="3" height="8"/>').format(f"{start:.3f}", f"{end - start:.3f}"))
        marks += [_tick("seed", _percent(value, low, high), 3, 11) for value in seeds[row["name"]]]
        marks.append(_tick("mean main" if row["is_main"] else "mean", _percent(mean, low, high), 0, 14))
        picture = Markup(
            '<svg class="dots" viewBox="0 0 100 14" preserveAspectRatio="none" role="img" aria-label="{}"><title>{}</title>'
            '<rect class="track" width="100" y="6" height="2"/>{}</svg>'
        ).format(told, told, Markup("").join(marks))
        lines.append((row["name"], picture, _mean_text(mean, spread)))
    return {"low": low, "high": high, "ends": (tick_text(low, step), tick_text(high, step)), "lines": lines}


# Pixels of the scatter plot's own coordinates.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 360, 56, 24, 16, 44
_LABEL_HEIGHT, _LABEL_WIDTH = 15, 7.8


def scatter(content: Mapping[str, Any]) -> Markup | None:
    """Quality against cost: the main measure over the seconds of pre-training, a dot a row; None with fewer than two rows."""
    measure = content["measures"][0]
    rows = {row["content"]: row for table in reversed(content["tables"]) for row in table["rows"] if row["num_seeds"]}
    points = [(row["name"], row["cost"]["training_seconds"] or 0.0, row["mean"][measure], row["is_main"]) for row in rows.values()]
    if len(points) < 2:
        return None
    levels = ticks(min(y for _, _, y, _ in points), max(y for _, _, y, _ in points))
    times = ticks(0.0, max(x for _, x, _, _ in points) or 1.0)
    low, high, longest = levels[0], levels[-1], times[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / longest * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn: list[Markup] = []
    for level in levels:
        down = place(0, level)[1]
        drawn.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}" text-anchor="end">{}</text>').format(
                _LEFT, _WIDTH - _RIGHT, f"{down:.1f}", f"{down:.1f}", _LEFT - 8, f"{down + 4:.1f}", tick_text(level, levels[1] - levels[0])
            )
        )
    for seconds in times:
        at = f"{place(seconds, low)[0]:.1f}"
        label = f"{seconds:,.4g} s"
        drawn.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(at, _HEIGHT - _BOTTOM + 18, label))
    drawn.append(Markup('<text x="{}" y="{}" text-anchor="middle">pre-training</text>').format(_WIDTH // 2, _HEIGHT - 6))
    # (left, right, baseline) of what a label must not cover: first the dots, then the labels before it.
    taken = [(across - 6, across + 6, down + 5) for across, down in (place(x, y) for _, x, y, _ in points)]
    for name, x, y, is_main in sorted(points, key=lambda point: -point[2]):
        across, down = place(x, y)
        title = Markup("<title>{}: {} {}, {} s</title>").format(name, measure, _mean_text(y, None), f"{x:,.1f}")
        at, style = f"{across:.1f}", "main" if is_main else "other"
        drawn.append(Markup('<circle class="point {}" cx="{}" cy="{}" r="5">{}</circle>').format(style, at, f"{down:.1f}", title))
        text_x, text_y = _free(across, down, len(name) * _LABEL_WIDTH, taken)
        drawn.append(Markup('<text class="name" x="{}" y="{}">{}</text>').format(f"{text_x:.1f}", f"{text_y:.1f}", name))
    told = "; ".join(f"{name} {_mean_text(y, None)} in {x:,.1f} s" for name, x, y, _ in points)
    return Markup('<svg class="chart scatter" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, f"{measure} over seconds of pre-training: {told}", Markup("").join(drawn)
    )


def _free(x: float, y: float, width: float, taken: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Start and baseline of a label: right of its point or left of it, where nothing else is; else lower, until there is room."""

    def covered(start: float, baseline: float) -> bool:
        return any(start < end and begin < start + width and abs(baseline - other) < _LABEL_HEIGHT for begin, end, other in taken)

    sides = [start for start in (x + 9, x - 9 - width) if start > 0 and start + width < _WIDTH] or [max(0.0, _WIDTH - width)]
    lower = 0.0
    while True:
        for start in sides:
            if not covered(start, y + 5 + lower):
                taken.append((start, start + width, y + 5 + lower))
                return start, y + 5 + lower
        lower += 3.0


def curve_panels(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each row its probe beside the main row's, and its losses; of the first seed that is measured."""
    panels = []
    seen = set()
    for table in content["tables"]:
        main = next(row for row in table["rows"] if row["is_main"])
        for row in table["rows"]:
            if row["content"] in seen:
                continue
            seen.add(row["content"])
            own, reference = _curves(row), _curves(main)
            probe = [Series(row["name"], own[f"dev {PROBE}"], dots=True)] if f"dev {PROBE}" in own else []
            if probe and row is not main and f"dev {PROBE}" in reference:
                probe.append(Series(main["name"], reference[f"dev {PROBE}"], dots=True))
            losses = [
                Series(f"{kind} {part} loss", own[f"{kind} {part}_loss"], dots=kind == "dev")
                for part in ("encoder", "decoder")
                for kind in ("train", "dev")
                if f"{kind} {part}_loss" in own
            ] or [Series(f"{kind} loss", own[f"{kind} loss"], dots=kind == "dev") for kind in ("train", "dev") if f"{kind} loss" in own]
            panels += [_panel(f"{row['name']}: {what}", series) for what, series in (("probe RR@10", probe), ("loss", losses)) if series]
    return panels


def _curves(row: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    first = next(iter(row["seeds"].values()), None)
    if first is None:
        return {}
    return {name: [(float(x), float(y)) for x, y in points] for name, points in first["pretrain"]["curves"].items() if points}


def _panel(title: str, series: list[Series]) -> dict[str, Any]:
    ends = "; ".join(f"{one.label} from {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}" for one in series)
    legend = [(f"s{index}", one.label) for index, one in enumerate(series)] if len(series) > 1 else []
    return {"title": title, "svg": line_chart(series, label=f"{title} over training steps: {ends}"), "legend": legend}


def _tick(style: str, at: float, top: float, bottom: float) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}" vector-effect="non-scaling-stroke"/>').format(
        style, f"{at:.3f}", f"{at:.3f}", top, bottom
    )


def _percent(value: float, low: float, high: float) -> float:
    return 100 * min(1.0, max(0.0, (value - low) / (high - low)))


def _rounded(low: float, high: float) -> tuple[float, float, float]:
    """Round values that enclose low..high, with a little room, never of width 0; and what they are multiples of."""
    room = max(0.05 * (high - low), 1e-3 * max(abs(high), 1e-3))
    step = 10.0 ** math.floor(math.log10((high - low) + 2 * room)) / 4
    bottom = 0.0 if low == 0 else max(0.0, math.floor((low - room) / step) * step) if low >= 0 else math.floor((low - room) / step) * step
    return bottom, math.ceil((high + room) / step) * step, step


__all__ = [
    "Facts",
    "RowResults",
    "TableResults",
    "caption",
    "conclusions",
    "curve_panels",
    "dot_plot",
    "headings",
    "outcome",
    "render_html",
    "render_markdown",
    "row_cells",
    "scatter",
    "summarize",
    "terminal_tables",
    "write_comparison",
]
