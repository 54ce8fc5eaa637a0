"""What the report says, as data: the rows, their comparisons, and the numbers that `metrics.json` holds.

Row names, in order: bm25, start (the starting model as it is), retriever1, retriever2, reranker, distilled, hybrid.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simlm.evaluation.answers import matches, token_line
from simlm.evaluation.measures import average, evaluate_queries, parse_measure, ranked_passages
from simlm.evaluation.significance import holm, p_value, wins_ties_losses
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings
from simlm.types import Split

LABELS = {
    "bm25": "BM25",
    "start": "Starting model",
    "retriever1": "Retriever 1",
    "retriever2": "Retriever 2",
    "reranker": "Re-ranker",
    "distilled": "Distilled retriever",
    "hybrid": "Hybrid",
}
COMPARED = "reranker_from_"
"""Begin of the row names of re-rankers that are there to be compared with the re-ranker."""
SIGNIFICANT = 0.05
RANK_BANDS = ((1, 1), (2, 3), (4, 10), (11, 100), (101, None))
"""First and last rank of each band of the chart of first relevant passages; queries without one are the last column."""

Floats = NDArray[np.float64]

# Token lines of passages kept for answer matching: 50,000 passages of 600 characters are some 50 MB.
_CACHED_PASSAGES = 50_000


class Texts(Protocol):
    """Passages, or the queries of one split."""

    @property
    def ids(self) -> Any: ...
    def __len__(self) -> int: ...
    def text(self, row: int) -> str: ...
    def title(self, row: int) -> str: ...


class ReportStore(Protocol):
    """What the report needs of a store."""

    @property
    def passages(self) -> Texts: ...
    @property
    def splits(self) -> Sequence[Split]: ...
    def queries(self, split: Split) -> Texts: ...
    def qrels(self, split: Split) -> Mapping[int, Mapping[int, int]]: ...
    def answers(self, split: Split, row: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Row:
    """One run to be measured. facts: of its artifact (bytes_per_passage, milliseconds_per_query); parts: rows that it was made from."""

    name: str
    run: Run
    facts: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """metrics: content of metrics.json. main_values: row -> float64 [Q], the main measure of each query of `query_rows`.

    positives: query row -> its relevant passage rows, best grade first.
    """

    metrics: dict[str, Any]
    rows: dict[str, Row]
    query_rows: list[int]
    main_values: dict[str, Floats]
    positives: dict[int, list[int]]

    @property
    def final(self) -> str | None:
        return final_row(self.metrics)


def measure_rows(
    rows: Sequence[Row],
    store: ReportStore,
    settings: EvaluateSettings,
    *,
    name: str,
    seed: int,
    missing: Sequence[str] = (),
    teaching: Mapping[str, Any] | None = None,
) -> Results:
    """Measure every row over all judged queries of `settings.split`, and compare them.

    name: of the recipe's run. missing: what the caller knows to be absent; more may be found here. teaching: facts of the comparison of
    the teacher with the retriever that it taught, where there was one.
    Raises RecipeError for an unknown measure, even where there is nothing to measure.
    """
    split = settings.split
    main, names, answer_names = _measure_names(settings)
    notes: list[str] = []
    found_missing = list(missing)
    has_split = split in store.splits
    qrels = {query: grades for query, grades in store.qrels(split).items() if len(grades)} if has_split else {}
    query_rows = sorted(qrels)
    if has_split and not query_rows and answer_names:
        query_rows = [row for row in range(len(store.queries(split))) if store.answers(split, row)]
        if query_rows:
            notes.append(f"The {split} queries have answers but no relevance judgements: only answer recall is measured.")
            names = []
            main = main if main in answer_names else next(iter(answer_names))
    found_missing += _missing(store, split, query_rows)
    values: dict[str, dict[str, Floats]] = {}
    searched = {row.name: row for row in rows if query_rows}
    for row in searched.values():
        ranked = ranked_passages(row.run)
        values[row.name] = evaluate_queries(ranked, {query: qrels[query] for query in query_rows}, names).values if names else {}
        values[row.name] |= _answer_values(ranked, query_rows, store, split, answer_names)
        without = sum(1 for query in query_rows if not len(ranked.get(query, ())))
        if without:
            notes.append(f"{row_label(row.name)} found nothing for {without:,} of the judged queries; they count as 0.")
    main_values = {row: of_row[main] for row, of_row in values.items()}
    notes += _notes(searched, [*names, *answer_names], store, split, query_rows)
    comparisons = _compare(searched, main_values, settings, seed)
    positives = {query: _positives(qrels.get(query, {}), main) for query in query_rows}
    metrics = {
        "name": name,
        "split": split,
        "num_queries": len(query_rows),
        "num_passages": len(store.passages),
        "seed": seed,
        "main": main,
        "measures": [*names, *answer_names],
        "significance": {
            "test": settings.significance,
            "num_samples": settings.num_samples,
            "threshold": SIGNIFICANT,
            "correction": "Holm",
        },
        "rows": [_row_metrics(row, values[row.name], comparisons, query_rows, positives) for row in searched.values()],
        "comparisons": comparisons,
        "missing": found_missing,
        "notes": notes,
        "teaching": None if teaching is None else dict(teaching),
    }
    return Results(metrics, searched, query_rows, main_values, positives)


def row_label(name: str) -> str:
    """A row's name as a reader knows it; of a later round of retriever 2 ("retriever2_round3") with its number."""
    number = _round(name)
    if name.startswith(COMPARED):
        return f"{LABELS['reranker']} from {name.removeprefix(COMPARED)}"
    return f"{LABELS['retriever2']}, round {number}" if number else LABELS.get(name, name)


def trained_rows(names: Iterable[str]) -> list[str]:
    """Those of the rows that can be the retriever a pipeline ends with, last stage first."""
    present = set(names)
    rounds = sorted((name for name in present if _round(name)), key=_round, reverse=True)
    return [name for name in ("distilled", *rounds, "retriever2", "retriever1") if name in present]


def _round(name: str) -> int:
    """Number of a later round of retriever 2, 0 for any other row."""
    found = re.fullmatch(r"retriever2_round(\d+)", name)
    return int(found[1]) if found else 0


def final_row(metrics: Mapping[str, Any]) -> str | None:
    """Name of the retriever that the pipeline ends with; None if it trained none."""
    return next(iter(trained_rows(row["name"] for row in metrics["rows"])), None)


def comparison(metrics: Mapping[str, Any], row: str, against: str) -> dict[str, Any] | None:
    """The paired comparison of two rows, None if it was not made."""
    return next((item for item in metrics["comparisons"] if item["row"] == row and item["against"] == against), None)


def row_of(metrics: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A row of the metrics by its name."""
    return next((row for row in metrics["rows"] if row["name"] == name), None)


def first_relevant_rank(run_passages: NDArray[np.int64], positives: Iterable[int]) -> int | None:
    """Rank (from 1) of the first relevant passage, None if there is none."""
    hits = np.flatnonzero(np.isin(run_passages, list(positives)))
    return int(hits[0]) + 1 if len(hits) else None


def _measure_names(settings: EvaluateSettings) -> tuple[str, list[str], dict[str, int]]:
    """Main measure, names for ir_measures, and answer recalls with their cut-offs."""
    names = list(dict.fromkeys(settings.measures))
    cutoffs = list(settings.answers)
    if settings.main.startswith("Answer@") and settings.main[7:].isdecimal():
        cutoffs.append(int(settings.main[7:]))
    elif settings.main not in names:
        names.insert(0, settings.main)
    for name in names:
        parse_measure(name)
    return settings.main, names, {f"Answer@{k}": k for k in dict.fromkeys(cutoffs)}


def _missing(store: ReportStore, split: Split, query_rows: list[int]) -> list[str]:
    if split not in store.splits:
        have = ", ".join(store.splits) or "none"
        return [
            f"There are no {split} queries (splits with queries: {have}): add queries and judgements for {split} and run the recipe again."
        ]
    if not query_rows:
        return [
            f"The {len(store.queries(split)):,} {split} queries have no relevance judgements: "
            f"add qrels (query id, passage id, grade) for {split} and run the recipe again."
        ]
    return []


def _answer_values(
    ranked: Mapping[int, NDArray[np.int64]], query_rows: list[int], store: ReportStore, split: Split, cutoffs: Mapping[str, int]
) -> dict[str, Floats]:
    """Answer@k -> 1 for each query with an answer string in the text of its first k passages, else 0."""
    if not cutoffs:
        return {}
    line_of = functools.lru_cache(_CACHED_PASSAGES)(lambda row: token_line(store.passages.text(row)))
    deepest = max(cutoffs.values())
    ranks = np.full(len(query_rows), np.inf)
    for position, query in enumerate(query_rows):
        answers = [token_line(answer) for answer in store.answers(split, query)]
        if not any(answers):
            continue
        for rank, passage in enumerate(ranked.get(query, ())[:deepest], start=1):
            if matches(line_of(int(passage)), answers):
                ranks[position] = rank
                break
    return {name: (ranks <= k).astype(np.float64) for name, k in cutoffs.items()}


def _notes(rows: Mapping[str, Row], names: list[str], store: ReportStore, split: Split, query_rows: list[int]) -> list[str]:
    notes = []
    cutoffs = [int(name.rsplit("@", 1)[1]) for name in names if name.rsplit("@", 1)[-1].isdecimal()]
    deepest = min(max(cutoffs, default=0), len(store.passages))
    for row in rows.values():
        depth = _depth(row.run)
        if 0 < depth < deepest and row.name != "bm25":
            notes.append(f"{row_label(row.name)} ranks {depth:,} passages a query: beyond that cut-off its recall cannot grow.")
    if rows and split in store.splits:
        unjudged = len(store.queries(split)) - len(query_rows)
        if unjudged > 0:
            notes.append(f"{unjudged:,} of the {split} queries have no judgements and are not counted.")
        if any(name.startswith("Answer@") for name in names):
            without = sum(1 for query in query_rows if not store.answers(split, query))
            if without:
                notes.append(f"{without:,} queries have no answer strings; in Answer@k they count as 0.")
    return notes


def _compare(rows: Mapping[str, Row], values: Mapping[str, Floats], settings: EvaluateSettings, seed: int) -> list[dict[str, Any]]:
    """Each row against bm25, start, the retriever before it and the rows it was made from; p-values also corrected by Holm's method
    over the rows compared with the same one."""
    pairs: dict[str, list[str]] = {}
    trained = trained_rows(rows)
    for name, row in rows.items():
        before = [other for other in ("bm25", "start") if other in rows and name not in (other, "bm25")]
        if name in trained:
            before += trained[trained.index(name) + 1 :][:1]
        before += [part for part in row.parts if part in rows and part != name]
        if name.startswith(COMPARED) and "reranker" in rows:
            before.append("reranker")
        pairs[name] = list(dict.fromkeys(before))
    found: list[dict[str, Any]] = []
    for name, others in pairs.items():
        for other in others:
            wins, ties, losses = wins_ties_losses(values[name], values[other])
            p = p_value(values[name], values[other], method=settings.significance, num_samples=settings.num_samples, seed=seed)
            difference = float(values[name].mean() - values[other].mean())
            found.append(
                {"row": name, "against": other, "difference": difference, "p_value": p, "wins": wins, "ties": ties, "losses": losses}
            )
    for other in {item["against"] for item in found}:
        corrected = holm({item["row"]: item["p_value"] for item in found if item["against"] == other})
        for item in found:
            if item["against"] == other:
                item["p_value_holm"] = corrected[item["row"]]
    return found


def _row_metrics(
    row: Row, values: Mapping[str, Floats], comparisons: list[dict[str, Any]], query_rows: list[int], positives: Mapping[int, list[int]]
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "name": row.name,
        "label": row_label(row.name),
        "measures": {
            name: float(of_query.mean()) if name.startswith("Answer@") else average(name, of_query) for name, of_query in values.items()
        },
        "depth": _depth(row.run),
        "bytes_per_passage": row.facts.get("bytes_per_passage"),
        "milliseconds_per_query": row.facts.get("milliseconds_per_query"),
        "parts": list(row.parts),
        "first_relevant": _rank_bands(row.run, query_rows, positives),
    }
    for other in ("bm25", "start"):
        item = next((item for item in comparisons if item["row"] == row.name and item["against"] == other), None)
        metrics[f"difference_vs_{other}"] = item and item["difference"]
        metrics[f"p_value_vs_{other}"] = item and item["p_value"]
        metrics[f"p_value_vs_{other}_holm"] = item and item["p_value_holm"]
        if other == "bm25":
            metrics |= {key: item and item[key] for key in ("wins", "ties", "losses")}
    return metrics


def _rank_bands(run: Run, query_rows: list[int], positives: Mapping[int, list[int]]) -> list[int]:
    """Queries whose first relevant passage stands in each of RANK_BANDS, and in the end those without one."""
    ranked = ranked_passages(run)
    counts = [0] * (len(RANK_BANDS) + 1)
    for query in query_rows:
        rank = first_relevant_rank(ranked[query], positives[query]) if query in ranked else None
        band = next((index for index, (_, last) in enumerate(RANK_BANDS) if rank is not None and (last is None or rank <= last)), -1)
        counts[band] += 1
    return counts


def _positives(grades: Mapping[int, int], main: str) -> list[int]:
    """Relevant passages, best grade first; relevant from the grade that the main measure asks for."""
    lowest = 1 if main.startswith("Answer@") else int(parse_measure(main).params.get("rel", 1))
    return [passage for passage, grade in sorted(grades.items(), key=lambda item: (-item[1], item[0])) if grade >= lowest]


def _depth(run: Run) -> int:
    return int(np.diff(run.offsets).max()) if len(run) else 0


__all__ = [
    "COMPARED",
    "LABELS",
    "RANK_BANDS",
    "SIGNIFICANT",
    "ReportStore",
    "Results",
    "Row",
    "Texts",
    "comparison",
    "final_row",
    "first_relevant_rank",
    "measure_rows",
    "row_label",
    "row_of",
    "trained_rows",
]
