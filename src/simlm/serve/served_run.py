"""A finished run as the server holds it: opened once, asked many times, replaced as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.errors import DataError
from simlm.index.lexical import NO_LANGUAGE, Analyzer
from simlm.searcher import LIST_NAMES, ListName, Question, Ranking, Rankings, example_query, open_everything
from simlm.serve.block_list import read_block_list
from simlm.serve.faults import Fault
from simlm.serve.filters import Mask, MetadataFilters
from simlm.serve.highlights import Highlighter, WordTerms
from simlm.serve.report import read_report
from simlm.serve.schemas import MAX_K, MAX_QUERY_CHARACTERS, SearchRequest

if TYPE_CHECKING:
    from simlm.models.precision import Precision
    from simlm.models.reranker import Reranker
    from simlm.models.retriever import Retriever


@dataclass(frozen=True)
class Asked:
    """A search request that has been checked against the run that will answer it."""

    run: ServedRun
    request: SearchRequest
    mode: ListName
    lists: tuple[ListName, ...]
    allowed: Mask | None
    arrived: float = field(default_factory=time.perf_counter)


class ServedRun:
    """Models, indexes, filters, block list and report of a run.

    unknown_ids: entries of the block list that name no passage of the corpus. Raises ArtifactError if parts of the run do not fit together,
    DataError if the block list cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        retriever: str | None = None,
        block_list: Path | None = None,
        query_precision: Precision | None = None,
    ) -> None:
        self.name = folder.resolve().name
        self.searcher = open_everything(folder, retriever=retriever, query_precision=query_precision)
        self.table = self.searcher.store.passages
        self.blocked: Mask | None = None
        self.unknown_ids: list[str] = []
        if block_list is not None:
            blocked, self.unknown_ids = read_block_list(block_list).mask(self.table)
            self.blocked = blocked if blocked.any() else None
        self.filters = MetadataFilters(self.table, self.blocked)
        self._corpus_size = len(self.table) - self.searcher.additions.num_added()
        self.report = read_report(folder, None if self.blocked is None and not len(self.searcher.additions.deleted) else self._is_hidden)
        language = NO_LANGUAGE if self.searcher.bm25 is None else self.searcher.bm25.info["language"]
        self.word_terms = WordTerms(Analyzer(language))
        self.modes: tuple[ListName, ...] = self.searcher.lists
        self.default_mode: ListName = self.searcher.mode
        alive = self.searcher.additions.alive(len(self.table))
        found = self._not_blocked() if alive is None else self._not_blocked() & alive
        self.created = int((folder / "store" / "manifest.json").stat().st_mtime)
        self.info: dict[str, Any] = {
            "name": self.name,
            "passages": int(np.count_nonzero(found)),
            "modes": list(self.modes),
            "default_mode": self.default_mode,
            "retriever": self.searcher.retriever or None,
            "example_query": example_query(folder)[:MAX_QUERY_CHARACTERS],
            "filter_fields": self.filters.choices(found),
            "has_report": self.report is not None,
            "max_k": MAX_K,
            "max_query_characters": MAX_QUERY_CHARACTERS,
        }

    def _not_blocked(self) -> Mask:
        return np.ones(len(self.table), dtype=np.bool_) if self.blocked is None else ~self.blocked

    # --- what it has

    def retriever(self) -> Retriever:
        """The model that makes vectors; a 404 fault if the run has BM25 only."""
        if self.searcher.dense is None:
            raise Fault(404, "no_retriever", f"{self.name} has no trained retriever, so it makes no embeddings")
        retriever: Retriever = self.searcher.dense[0]
        return retriever

    def reranker(self) -> Reranker:
        """The cross-encoder; a 404 fault if the run has none."""
        if self.searcher.reranker is None:
            raise Fault(404, "no_reranker", f"{self.name} has no re-ranker")
        reranker: Reranker = self.searcher.reranker
        return reranker

    def passage(self, passage_id: str) -> dict[str, Any]:
        """A passage by its id; a 404 fault if there is none, or it is blocked."""
        row = self.table.ids.find(passage_id)
        if row is None or (self.blocked is not None and self.blocked[row]):
            raise Fault(404, "passage_not_found", "no passage has this id", param="passage_id")
        return self.passage_of(row)

    def passage_of(self, row: int) -> dict[str, Any]:
        """Id, title, text and metadata of the passage at a row."""
        table = self.table
        return {"passage_id": table.ids[row], "title": table.title(row), "text": table.text(row), "metadata": table.metadata(row)}

    def _is_hidden(self, passage_id: str) -> bool:
        """Whether a passage of the report is on the block list, was deleted, or has another text since."""
        row = self.table.ids.find(passage_id)
        return row is None or row >= self._corpus_size or (self.blocked is not None and bool(self.blocked[row]))

    # --- search

    def asked(self, request: SearchRequest) -> Asked:
        """The request, checked; a 422 fault if this run cannot do what it wants."""
        mode = request.mode or self.default_mode
        if mode not in self.modes:
            raise Fault(422, "mode_not_available", f"mode {mode!r} is not in this run; it has {', '.join(self.modes)}", param="mode")
        try:
            allowed = self.filters.mask(request.filters)
        except DataError as error:
            raise Fault(422, "unknown_filter", str(error), param="filters") from None
        return Asked(self, request, mode, self.modes if request.compare else (mode,), allowed)

    def answers(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """What `POST /search` answers to each request; they go through the models together."""
        questions = [Question(one.request.query, one.request.k, one.lists, one.allowed) for one in asked]
        return [self._answer(one, found) for one, found in zip(asked, self.searcher.ask(questions), strict=True)]

    def _answer(self, asked: Asked, found: Rankings) -> dict[str, Any]:
        request = asked.request
        writer = _HitWriter(self, request.query, found)
        answer: dict[str, Any] = {
            "query": request.query,
            "mode": asked.mode,
            "took_milliseconds": 0.0,
            "hits": writer.hits(found[asked.mode], asked.mode, request.k),
        }
        if request.compare:
            answer["lists"] = {name: writer.hits(found[name], name, request.k) for name in self.modes}
        answer["took_milliseconds"] = round((time.perf_counter() - asked.arrived) * 1000, 3)
        return answer


class _HitWriter:
    """Hits of one answer. What a passage shows is worked out once, in however many lists it is."""

    def __init__(self, run: ServedRun, query: str, found: Rankings) -> None:
        self.run = run
        self.highlighter = Highlighter(run.word_terms, query)
        self.places = {name: {row: place for place, row in enumerate(ranking.rows)} for name, ranking in found.items()}
        self.found = found
        self.shown: dict[int, dict[str, Any]] = {}

    def hits(self, ranking: Ranking, name: ListName, k: int) -> list[dict[str, Any]]:
        return [
            {"rank": rank, "score": score, **self._shown(row)}
            for rank, (row, score) in enumerate(zip(ranking.rows[:k], ranking.scores[:k], strict=True), start=1)
        ]

    def _shown(self, row: int) -> dict[str, Any]:
        if row not in self.shown:
            passage = self.run.passage_of(row)
            places = {name: self.places[name].get(row) if name in self.places else None for name in LIST_NAMES}
            self.shown[row] = passage | {
                "highlights": self.highlighter.spans(passage["text"]),
                "title_highlights": self.highlighter.spans(passage["title"]),
                "ranks": {name: None if place is None else place + 1 for name, place in places.items()},
                "scores": {name: None if place is None else self.found[name].scores[place] for name, place in places.items()},
            }
        return self.shown[row]


__all__ = ["Asked", "ServedRun"]
