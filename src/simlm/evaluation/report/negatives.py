"""The report on mined negatives: what it says in words, as a terminal table, and as negatives.json and negatives.html.

The page is one file, as the other reports are: no script, no outside asset, all texts escaped.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simlm.artifacts import write_json
from simlm.evaluation.report.charts import bar
from simlm.evaluation.report.tables import count
from simlm.evaluation.report.verdicts import Verdict

if TYPE_CHECKING:
    from rich.table import Table

# Above these shares the page warns: of negatives that outscore their positive, of negatives nearly the same as one, of queries
# without enough negatives, of negatives that the most used hundredth of the passages makes up.
_MANY_ABOVE, _MANY_NEAR, _MANY_SHORT, _MANY_REPEATED = 0.1, 0.01, 0.1, 0.2
_HERE = Path(__file__).parent
Rows = list[tuple[str, str]]

REMOVED = {
    "num_positives_left_out": "judged relevant",
    "num_copies_left_out": "text of a relevant passage",
    "num_skipped_top": "skip_top",
    "num_above_ceiling": "below_positive",
    "num_above_teacher": "teacher_margin",
    "num_unscored_dropped": "no teacher score",
    "num_in_several_runs": "in several runs",
    "num_beyond_limit": "num_negatives",
}
"""Fact of the mining -> what removed so many candidates."""


def write_negatives(path: Path, content: Mapping[str, Any]) -> None:
    """Write PATH.json and PATH.html; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.html").write_bytes(render_html(content).encode("utf-8", errors="replace"))
    write_json(path.with_name(f"{path.name}.json"), content)


def conclusions(content: Mapping[str, Any]) -> list[Verdict]:
    """What the numbers say, and which setting answers them; what should be looked at first."""
    found = []
    suspects, near = content["suspects"], content["near_duplicates"]
    if suspects["num_compared"]:
        share = suspects["num_negatives"] / suspects["num_compared"]
        judge = "the teacher" if suspects["by"] == "teacher" else "the run itself"
        text = f"{_percent(share)} of the negatives outscore the best positive, as {judge} has it ({suspects['num_queries']:,} queries)."
        setting = "teacher_margin" if suspects["by"] == "teacher" else "below_positive"
        many = share > _MANY_ABOVE
        found.append(Verdict("warn" if many else "plain", text + (f" Some will be relevant: {setting} drops them." if many else "")))
    if near["num_negatives"]:
        share = near["num_negatives"] / max(near["num_compared"], 1)
        text = f"{near['num_negatives']:,} of {near['num_compared']:,} negatives looked at have nearly the words of a positive."
        found.append(Verdict("warn" if share > _MANY_NEAR else "plain", text))
    for size, number in content["lists"]["short"].items():
        if content["lists"]["trained"] and number > _MANY_SHORT * content["num_groups"]:
            text = (
                f"{number:,} of {content['num_groups']:,} queries have too few negatives for groups of {size}: some come twice in a group."
            )
            found.append(Verdict("warn", text))
            break
    repeated = content["repeated"]
    if repeated["share_of_most_used_percent"] > _MANY_REPEATED:
        text = f"One passage in a hundred makes up {_percent(repeated['share_of_most_used_percent'])} of all negatives."
        found.append(Verdict("warn", text))
    found += [_hard(run) for run in content["runs"] if run["num_negatives"]]
    return sorted(found, key=lambda verdict: verdict.tone != "warn")


def _hard(run: Mapping[str, Any]) -> Verdict:
    effective = [row for row in run["effective"] if row["median"] is not None]
    name = _named(run["name"])
    if not effective:
        return Verdict("plain", f"{name}: no effective number, as their scores are no cosines that a loss would weigh them by.")
    told = ", ".join(f"{row['median']:.1f} at temperature {row['temperature']:g}" for row in effective)
    return Verdict("plain", f"{name}: of a query's negatives so many share the gradient (median): {told}.")


def terminal_tables(content: Mapping[str, Any]) -> list[Table]:
    """Tables of rich: the numbers of the page without its texts."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    drawn = []
    for title, rows in sections(content):
        table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, show_header=False)
        table.add_column("", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        for label, value in rows:
            table.add_row(escape(label), escape(value))
        drawn.append(table)
    return drawn


def sections(content: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """(title, [(what, how much)]) of all that is counted."""
    lists, repeated = content["lists"], content["repeated"]
    suspects, near = content["suspects"], content["near_duplicates"]
    spread = " / ".join(f"{value:,}" for value in lists["lengths"].values())
    overview = [
        ("queries with a group", count(content["num_groups"])),
        ("negatives", count(content["num_negatives"])),
        (f"a query ({' / '.join(lists['lengths'])})", spread),
    ]
    overview += [(f"queries with fewer than {int(size) - 1} (groups of {size})", count(number)) for size, number in lists["short"].items()]
    for key, label in (("num_without_negatives", "left out: no candidate"), ("num_without_positive", "left out: no relevant passage")):
        if lists[key] is not None:
            overview.append((label, count(lists[key])))
    removed = [(f"removed: {label}", count(content["facts"][key])) for key, label in REMOVED.items() if content["facts"].get(key)]
    found = [("Lists", overview + removed)]
    for run in content["runs"]:
        title = _named(run["name"]) + (f", share {run['share']:g}" if run["share"] is not None else "")
        rows = [("negatives", count(run["num_negatives"]))]
        rows += [(f"score as a share of the positive's: {label}", text) for label, _, text in hardness_lines(run)]
        rows += [(f"first relevant passage {label}", text) for label, _, text in rank_lines(run)]
        rows += [
            (f"effective number at temperature {row['temperature']:g} (median, mean)", f"{row['median']:.2f}, {row['mean']:.2f}")
            for row in run["effective"]
            if row["median"] is not None
        ]
        found.append((title, rows))
    judge = "the teacher's score" if suspects["by"] == "teacher" else "the run's score"
    found.append(
        (
            "Suspects",
            [
                (f"above the best positive, by {judge}", f"{suspects['num_negatives']:,} of {suspects['num_compared']:,}"),
                ("queries with such negatives", count(suspects["num_queries"])),
                (f"nearly a positive's words ({near['threshold']:.0%})", f"{near['num_negatives']:,} of {near['num_compared']:,}"),
                ("queries with such negatives, of those looked at", f"{near['num_queries']:,} of {near['num_examined_queries']:,}"),
            ],
        )
    )
    again = [
        ("copies of another negative of the query", count(repeated["num_copies_within"])),
        ("queries with such copies", count(repeated["num_queries_with_copies"])),
        ("different passages", f"{repeated['num_distinct']:,} of {content['num_passages']:,}"),
        ("queries that a passage is a negative of (mean)", f"{repeated['mean_uses']:,.1f}"),
        ("share of the most used hundredth", _percent(repeated["share_of_most_used_percent"])),
    ]
    if repeated["most_frequent"]:
        again.append(("queries that the most used one is a negative of", count(repeated["most_frequent"][0]["num_queries"])))
    found.append(("Again and again", again))
    return found


def hardness_lines(run: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(band of shares of the positive's score, share of the negatives, as text), last those whose positive the run does not have."""
    edges, counts = run["hardness"]["edges"], run["hardness"]["counts"]
    labels = [
        f"below {edges[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} and above",
    ]
    unknown = run["hardness"]["num_without_positive_score"]
    total = max(run["num_negatives"], 1)
    lines = [(label, number / total, _percent(number / total)) for label, number in zip(labels, counts, strict=True)]
    return [*lines, ("positive not scored", unknown / total, _percent(unknown / total))]


def rank_lines(run: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(band of ranks, share of the queries with a relevant passage, as text)."""
    total = max(sum(band["queries"] for band in run["positive_ranks"]), 1)
    return [(_band(band), band["queries"] / total, _percent(band["queries"] / total)) for band in run["positive_ranks"]]


def _band(band: Mapping[str, Any]) -> str:
    if band["from"] is None:
        return "not found"
    if band["from"] == band["to"]:
        return f"at rank {band['from']}"
    return f"at rank {band['from']} to {band['to']}" if band["to"] else f"at rank {band['from']} and deeper"


def render_html(content: Mapping[str, Any]) -> str:
    style = "\n" + (_HERE / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=count)
    charts = [(_named(run["name"]), _bars(hardness_lines(run)), _bars(rank_lines(run))) for run in content["runs"]]
    return environment.get_template("negatives.html.jinja").render(
        content=content,
        conclusions=conclusions(content),
        sections=sections(content),
        charts=charts,
        style=style,
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _bars(lines: list[tuple[str, float, str]]) -> list[tuple[str, Markup, str]]:
    highest = max((share for _, share, _ in lines), default=0.0) or 1.0
    return [(label, bar(share / highest, style="fill final", label=f"{label}: {text}"), text) for label, share, text in lines]


def _named(name: str) -> str:
    return "Negatives" if name == "run" else f"Negatives of {name}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


__all__ = ["conclusions", "render_html", "sections", "terminal_tables", "write_negatives"]
