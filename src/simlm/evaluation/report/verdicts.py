"""The outcome in words, the most important first. A pipeline that ends below BM25 or below its own start says so here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from simlm.evaluation.report.results import COMPARED, SIGNIFICANT, comparison, final_row, row_label, row_of, trained_rows

Tone = Literal["good", "plain", "warn", "bad"]
_STYLES = {"good": "green", "plain": "", "warn": "yellow", "bad": "bold red"}

# Fewer judged queries than this and only large differences can be told from chance; TREC's tracks have 43 and more.
_FEW_QUERIES = 50
_TEACHERS = {"better": "is better than", "level": "is not measurably different from", "worse": "is worse than"}


@dataclass(frozen=True)
class Verdict:
    """One sentence and how it is meant."""

    tone: Tone
    text: str

    def __str__(self) -> str:
        return self.text

    def __rich__(self) -> Text:
        return Text(self.text, style=_STYLES[self.tone])


def verdicts(metrics: Mapping[str, Any]) -> list[Verdict]:
    """What the numbers say, in order of weight; what is missing comes first where there is nothing to say."""
    found = [Verdict("warn", text) for text in metrics["missing"]]
    if not metrics["rows"]:
        return [Verdict("warn", "Nothing was measured."), *found]
    final = final_row(metrics)
    if final is None:
        found.insert(0, Verdict("warn", "No retriever was trained in this run; the rows show what is there without training."))
    else:
        found = [_outcome(metrics, final, other) for other in ("bm25", "start") if row_of(metrics, other)] + found
    if metrics.get("teaching"):
        found.append(teaching_verdict(metrics["teaching"]))
    found += _later_stages(metrics)
    found += _compared_rerankers(metrics)
    found += _hybrid(metrics)
    num_queries = metrics["num_queries"]
    if num_queries < _FEW_QUERIES:
        queries = "1 judged query" if num_queries == 1 else f"{num_queries} judged queries"
        found.append(Verdict("warn", f"Only {queries}: all but large differences may be chance."))
    return found


def teaching_verdict(facts: Mapping[str, Any]) -> Verdict:
    """Teacher against the retriever that it is to teach, and what was done about it. facts: of a check_teacher step."""
    student = _the(facts["student_name"])
    measure, queries = facts["measure"], "dev queries" if facts["measured_on"] == "dev" else "training groups, which both were trained on"
    numbers = (
        f"{measure} {facts['teacher']:.3f} against {facts['student']:.3f} on {facts['num_queries']:,} {queries}, {p_text(facts['p_value'])}"
    )
    told = f"The teacher {_TEACHERS[facts['outcome']]} {student}, which it is to teach ({numbers})"
    worse = facts["outcome"] == "worse"
    if facts["action"] == "skip":
        why = " No mixture of the two is better than the student alone." if "teacher_weight" in facts else ""
        return Verdict("warn", f"Not distilled: the distilled retriever is {student} as it was. {told}.{why}")
    if facts["action"] == "mix":
        share = facts["teacher_weight"]
        mixture = f"{share:.2f} x teacher + {1 - share:.2f} x {student}, {measure} {facts['mixture']:.3f}"
        return Verdict("warn" if worse else "plain", f"{told}. What is distilled is a mixture chosen on the same queries: {mixture}.")
    if worse:
        return Verdict("warn", f"{told}, and is distilled all the same.")
    return Verdict("plain", f"{told}.")


def mark(row: Mapping[str, Any], against: str = "bm25") -> str:
    """▲ significantly better, ▼ significantly worse than `against` (p < 0.05 after Holm's correction), else empty."""
    p, difference = row.get(f"p_value_vs_{against}_holm"), row.get(f"difference_vs_{against}")
    if p is None or p >= SIGNIFICANT or not difference:
        return ""
    return "▲" if difference > 0 else "▼"


def p_text(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`, or that there is none."""
    if p is None:
        return "no test possible"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _outcome(metrics: Mapping[str, Any], final: str, other: str) -> Verdict:
    """The retriever at the end of the pipeline against BM25 or the start."""
    item = comparison(metrics, final, other)
    assert item is not None, "every row is compared with bm25 and start"
    name, what = _the(final), "BM25" if other == "bm25" else "the model it started from"
    numbers = _numbers(metrics, item)
    significant = item["p_value_holm"] is not None and item["p_value_holm"] < SIGNIFICANT
    if item["difference"] < 0:
        chance = "" if significant else " The difference may be chance, but the training has not paid off."
        return Verdict("bad", f"The pipeline ends below {what}: {name} has {numbers}.{chance}")
    if item["difference"] == 0:
        return Verdict("warn", f"{name.capitalize()} is level with {what}: {numbers}.")
    if not significant:
        return Verdict("warn", f"{name.capitalize()} is not measurably better than {what}: {numbers}. The difference may be chance.")
    return Verdict("good", f"{name.capitalize()} is better than {what}: {numbers}.")


def _later_stages(metrics: Mapping[str, Any]) -> list[Verdict]:
    """Stages that end below the one before them."""
    found = []
    names = [row["name"] for row in metrics["rows"]]
    order = [*reversed(trained_rows(names)), *(["reranker"] if "reranker" in names else [])]
    for name in order:
        for item in metrics["comparisons"]:
            if item["row"] != name or item["against"] in ("bm25", "start") or item["difference"] >= 0:
                continue
            chance = "" if (item["p_value"] or 0.0) < SIGNIFICANT else " The difference may be chance."
            verb = "is below the run it re-ranked," if name == "reranker" else "is below the stage before it,"
            found.append(Verdict("warn", f"{_the(name).capitalize()} {verb} {_the(item['against'])}: {_numbers(metrics, item)}.{chance}"))
    return found


def _compared_rerankers(metrics: Mapping[str, Any]) -> list[Verdict]:
    """Re-rankers from other checkpoints against the recipe's own."""
    found = []
    for row in metrics["rows"]:
        item = comparison(metrics, row["name"], "reranker") if row["name"].startswith(COMPARED) else None
        if item is None:
            continue
        significant = item["p_value_holm"] is not None and item["p_value_holm"] < SIGNIFICANT
        if not significant:
            outcome = "is not measurably different from the recipe's own, which starts elsewhere"
        else:
            outcome = "is better than the recipe's own" if item["difference"] > 0 else "is worse than the recipe's own"
        found.append(Verdict("plain", f"{row_label(row['name'])} {outcome}: {_numbers(metrics, item)}."))
    return found


def _hybrid(metrics: Mapping[str, Any]) -> list[Verdict]:
    row = row_of(metrics, "hybrid")
    if row is None:
        return []
    main = metrics["main"]
    parts = [part for name in row["parts"] or ["bm25", final_row(metrics) or ""] if (part := row_of(metrics, name))]
    if not parts:
        return []
    best = max(parts, key=lambda part: float(part["measures"][main]))
    item = comparison(metrics, "hybrid", best["name"])
    difference = row["measures"][main] - best["measures"][main]
    numbers = _numbers(metrics, item) if item else f"{main} {row['measures'][main]:.3f} against {best['measures'][main]:.3f}"
    if difference < 0:
        return [Verdict("warn", f"Hybrid search is below the better of its two parts, {_the(best['name'])}: {numbers}.")]
    significant = item is not None and item["p_value"] is not None and item["p_value"] < SIGNIFICANT
    if difference > 0 and significant:
        return [Verdict("good", f"Hybrid search is better than either of its parts: {numbers} of {_the(best['name'])}.")]
    return [Verdict("plain", f"Hybrid search is as good as the better of its parts, {_the(best['name'])}: {numbers}.")]


def _numbers(metrics: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    main = metrics["main"]
    row, other = row_of(metrics, item["row"]), row_of(metrics, item["against"])
    assert row is not None and other is not None
    corrected = item["against"] in ("bm25", "start") or item["row"].startswith(COMPARED)
    told = "corrected " + p_text(item["p_value_holm"]) if corrected and item["p_value_holm"] is not None else p_text(item["p_value"])
    return f"{main} {row['measures'][main]:.3f} against {other['measures'][main]:.3f} ({item['difference']:+.3f}, {told})"


def _the(name: str) -> str:
    """A row's name within a sentence."""
    if name == "bm25":
        return "BM25"
    label = row_label(name).lower()
    return label if name.startswith("retriever") else f"the {label}"


__all__ = ["Tone", "Verdict", "mark", "p_text", "teaching_verdict", "verdicts"]
