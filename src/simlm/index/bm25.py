"""BM25 with the scores of Lucene, over an inverted index that `bm25s` computes ahead of time.

Every (term, passage) score is worked out when the index is built, so a search adds up a few columns. Files: bm25s's own arrays and
vocabulary (no pickles), memory-mapped on opening, and `index.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.index.lexical import AUTO, Analyzer, check_language, detect_language, sample_rows
from simlm.index.results import Results, best_of_candidates, no_results
from simlm.index.vectors import Option, checked_mask
from simlm.rankings import Floats, Ints, offsets_of

ARRAYS = "bm25s"


class BM25Index:
    """Queries are strings. A passage that shares no term with the query is no result."""

    takes: ClassVar[Literal["text"]] = "text"
    OPTIONS: ClassVar[dict[str, Option]] = {}

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

    def search(self, queries: Sequence[str], depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 where there are no more.

        A term that the query repeats counts as often as it is there (as in Lucene). allowed: bool [N], the passages that may be results;
        none = all. They do not change the scores.
        """
        if allowed is not None:
            allowed = checked_mask(allowed, len(self))
        scores_QK, rows_QK = no_results(len(queries), depth)
        for position, query in enumerate(queries):
            terms = self._known(query)
            if not terms:
                continue
            scores_N = self._bm25.get_scores_from_ids(terms)
            candidates = np.flatnonzero(scores_N > 0 if allowed is None else (scores_N > 0) & allowed)
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
        average = sum(map(len, ids)) / max(len(ids), 1)
        info: dict[str, Any] = {"count": len(ids), "dim": None, "language": language, "k1": k1, "b": b, "num_terms": len(vocabulary)}
        info["average_terms"] = average
        if vocabulary:
            bm25 = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            bm25.index((ids, vocabulary), create_empty_token=False, show_progress=False)
            bm25.save(folder / ARRAYS, allow_pickle=False, show_progress=False)
        return info

    @classmethod
    def build_addition(cls, texts: Sequence[str], folder: Path, base: BM25Index, corpus: Sequence[str]) -> dict[str, Any]:
        """Write the index of passages that are added to those of `base`; what `index.json` has to say about it.

        Words weigh what they weigh in `base`, and a passage is long or short against its average, so that scores of the two can be
        compared. corpus: the texts of `base`, read if it was written by a version that did not keep the average.
        """
        import bm25s

        average = base.info.get("average_terms")
        if average is None:
            average = sum(len(base.analyzer.terms(text)) for text in corpus) / max(len(corpus), 1)
        k1, b = float(base.info["k1"]), float(base.info["b"])
        vocabulary: dict[str, int] = {}
        postings: list[list[tuple[int, float]]] = []
        for row, text in enumerate(texts):
            counts = Counter(base.analyzer.terms(text))
            longer = 1 - b + b * counts.total() / average if average else 1.0
            for term, count in counts.items():
                number = vocabulary.setdefault(term, len(vocabulary))
                if number == len(postings):
                    postings.append([])
                postings[number].append((row, base.inverse_document_frequency(term) * count / (count + k1 * longer)))
        info = {name: base.info[name] for name in ("dim", "language", "k1", "b")} | {"average_terms": average}
        if vocabulary:
            bm25 = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            bm25.vocab_dict = vocabulary
            bm25.unique_token_ids_set = set(vocabulary.values())
            bm25.nonoccurrence_array = None
            bm25.scores = {
                "data": np.array([score for column in postings for _, score in column], dtype=np.float32),
                "indices": np.array([row for column in postings for row, _ in column], dtype=np.int32),
                "indptr": offsets_of([len(column) for column in postings]),
                "num_docs": len(texts),
            }
            bm25.save(folder / ARRAYS, allow_pickle=False, show_progress=False)
        return info | {"count": len(texts), "num_terms": len(vocabulary)}
