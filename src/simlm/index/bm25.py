"""BM25 with the scores of Lucene, over an inverted index that `bm25s` computes ahead of time.

Every (term, passage) score is worked out when the index is built, so a search adds up a few columns. Files: bm25s's own arrays and
vocabulary (no pickles), memory-mapped on opening, and `index.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from simlm.index.lexical import AUTO, Analyzer, check_language, detect_language, sample_rows
from simlm.index.results import Results, best_of_candidates, no_results
from simlm.rankings import Floats, Ints

ARRAYS = "bm25s"


class BM25Index:
    """Queries are strings. A passage that shares no term with the query is no result."""

    takes: ClassVar[Literal["text"]] = "text"
    OPTIONS: ClassVar[dict[str, tuple[int, int]]] = {}

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        import bm25s

        self.folder = folder
        self.info = info
        self.analyzer = Analyzer(info["language"])
        self._vocabulary: dict[str, int] = {}
        self._bm25: Any = None
        if info["num_terms"]:
            self._bm25 = bm25s.BM25.load(folder / ARRAYS, mmap=True, allow_pickle=False, show_progress=False)
            self._vocabulary = self._bm25.vocab_dict

    def __len__(self) -> int:
        return int(self.info["count"])

    def search(self, queries: Sequence[str], depth: int) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 where there are no more.

        A term that the query repeats counts as often as it is there (as in Lucene).
        """
        scores_QK, rows_QK = no_results(len(queries), depth)
        for position, query in enumerate(queries):
            terms = self._known(query)
            if not terms:
                continue
            scores_N = self._bm25.get_scores_from_ids(terms)
            candidates = np.flatnonzero(scores_N > 0)
            rows, scores = best_of_candidates(candidates, scores_N[candidates], depth)
            rows_QK[position, : len(rows)] = rows
            scores_QK[position, : len(rows)] = scores
        return scores_QK, rows_QK

    def scores_of(self, query: str, rows: Ints) -> Floats:
        """float32 [len(rows)]: the scores that these passages have for the query, 0 where they share no term with it."""
        terms = self._known(query)
        if not terms:
            return np.zeros(len(rows), dtype=np.float32)
        scores: Floats = self._bm25.get_scores_from_ids(terms)[rows].astype(np.float32)
        return scores

    def inverse_document_frequency(self, term: str) -> float:
        """log(1 + (N - n + 0.5) / (n + 0.5)) of a term of the analyzer that n of the N passages have (Lucene's)."""
        number = self._vocabulary.get(term)
        bounds = self._bm25.scores["indptr"] if number is not None else (0, 0)
        having = int(bounds[number + 1] - bounds[number]) if number is not None else 0
        return math.log(1.0 + (len(self) - having + 0.5) / (having + 0.5))

    def _known(self, text: str) -> list[int]:
        return [self._vocabulary[term] for term in self.analyzer.terms(text) if term in self._vocabulary]

    @classmethod
    def build(cls, texts: Sequence[str], folder: Path, *, k1: float, b: float, language: str) -> dict[str, Any]:
        """Write the arrays into `folder`; what `index.json` has to say about them.

        language: as in IndexSettings; "auto" is settled from a sample of the texts.
        """
        import bm25s

        check_language(language)
        if language == AUTO:
            language = detect_language(texts[row] for row in sample_rows(len(texts)))
        analyzer = Analyzer(language)
        vocabulary: dict[str, int] = {}
        # The numbers are shared objects of the vocabulary: eight bytes a term, not one object each.
        ids = [[vocabulary.setdefault(term, len(vocabulary)) for term in analyzer.terms(text)] for text in texts]
        info: dict[str, Any] = {"count": len(ids), "dim": None, "language": language, "k1": k1, "b": b, "num_terms": len(vocabulary)}
        if vocabulary:
            bm25 = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            bm25.index((ids, vocabulary), create_empty_token=False, show_progress=False)
            bm25.save(folder / ARRAYS, allow_pickle=False, show_progress=False)
        return info
