"""Queries that the pipeline's last retriever wins and loses against BM25, with the passages."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simlm.evaluation.report.results import ReportStore, Results, first_relevant_rank
from simlm.types import Split

# Characters of a passage that are shown.
_SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class ShownPassage:
    """A passage as it is shown; relevant: judged relevant for the query."""

    passage_id: str
    title: str
    text: str
    relevant: bool


@dataclass(frozen=True)
class Example:
    """One query; pairs are (BM25, the last retriever). values: main measure; ranks: of the first relevant passage, None where none was
    found; tops: first passage, None where nothing was found; positive: the relevant passage that is ranked best by either."""

    query: str
    query_id: str
    values: tuple[float, float]
    ranks: tuple[int | None, int | None]
    positive: ShownPassage | None
    num_positives: int
    tops: tuple[ShownPassage | None, ShownPassage | None]


def wins_and_losses(results: Results, store: ReportStore, split: Split, number: int) -> tuple[list[Example], list[Example]]:
    """At most `number` queries that gain most over BM25 and as many that lose most, by the main measure; empty without both rows.

    Largest difference first, among equal ones the smaller query row.
    """
    final = results.final
    if final is None or "bm25" not in results.rows:
        return [], []
    shower = _Shower(results, store, split, ("bm25", final))
    differences = results.main_values[final] - results.main_values["bm25"]
    found: tuple[list[Example], list[Example]] = ([], [])
    for sign, shown in zip((1, -1), found, strict=True):
        order = np.lexsort((np.arange(len(differences)), -sign * differences))[:number]
        shown += [shower.example(int(position)) for position in order if sign * differences[position] > 0]
    return found


class _Shower:
    """Looks up what is shown of a query."""

    def __init__(self, results: Results, store: ReportStore, split: Split, pair: tuple[str, str]) -> None:
        self.results = results
        self.store = store
        self.queries = store.queries(split)
        self.values = [results.main_values[name] for name in pair]
        self.runs = [results.rows[name].run for name in pair]
        self.places = [{int(query): place for place, query in enumerate(run.query_rows)} for run in self.runs]

    def example(self, position: int) -> Example:
        """position: in the judged queries of the results."""
        query = self.results.query_rows[position]
        positives = self.results.positives[query]
        bm25, final = (self._ranking(side, query) for side in (0, 1))
        best_rank = {row: min(_rank(bm25, row), _rank(final, row)) for row in positives}
        shown = min(positives, key=best_rank.__getitem__, default=None)
        relevant = set(positives)
        return Example(
            query=clean(self.queries.text(query)),
            query_id=str(self.queries.ids[query]),
            values=(float(self.values[0][position]), float(self.values[1][position])),
            ranks=(first_relevant_rank(bm25, positives), first_relevant_rank(final, positives)),
            positive=None if shown is None else _passage(self.store, shown, relevant),
            num_positives=len(positives),
            tops=(self._top(bm25, relevant), self._top(final, relevant)),
        )

    def _ranking(self, side: int, query: int) -> NDArray[np.int64]:
        place = self.places[side].get(query)
        return np.empty(0, np.int64) if place is None else self.runs[side].ranked(place)[0]

    def _top(self, ranking: NDArray[np.int64], relevant: set[int]) -> ShownPassage | None:
        return _passage(self.store, int(ranking[0]), relevant) if len(ranking) else None


def _rank(ranking: NDArray[np.int64], row: int) -> int:
    """Rank of a passage, beyond every rank where it is not there."""
    return first_relevant_rank(ranking, [row]) or sys.maxsize


def _passage(store: ReportStore, row: int, relevant: set[int]) -> ShownPassage:
    return ShownPassage(
        str(store.passages.ids[row]), clean(store.passages.title(row)), cut(clean(store.passages.text(row))), row in relevant
    )


def clean(text: str) -> str:
    """Text without control characters and without runs of blanks; direction marks that could reorder the page are dropped."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def cut(text: str, most: int = _SHOWN_CHARACTERS) -> str:
    """At most `most` characters, ended at a word's end and with an ellipsis where something is left out."""
    if len(text) <= most:
        return text
    head = text[: most - 1]
    word_end = head.rfind(" ")
    return (head[:word_end] if word_end > most * 0.7 else head) + "…"


__all__ = ["Example", "ShownPassage", "clean", "cut", "wins_and_losses"]
