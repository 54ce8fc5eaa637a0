"""Which characters of a passage match a query: words whose BM25 terms the query has too."""

from __future__ import annotations

import re

from simlm.index.lexical import Analyzer

Spans = list[tuple[int, int]]

_WORD = re.compile(r"[^\W_]+(?:[\u0300-\u036f][^\W_]*)*")
"""Letters and digits with the accents that are written after them; what the analyzer takes apart further is taken apart below."""
REMEMBERED_WORDS = 200_000
"""Some 40 MB; past that they are looked up afresh."""


class WordTerms(dict[str, frozenset[str]]):
    """Word -> its terms. Kept for as long as a run is open: the words of answers are few, and looking them up is most of the work."""

    def __init__(self, analyzer: Analyzer) -> None:
        super().__init__()
        self.analyzer = analyzer

    def __missing__(self, word: str) -> frozenset[str]:
        if len(self) >= REMEMBERED_WORDS:
            self.clear()
        self[word] = terms = frozenset(self.analyzer.terms(word))
        return terms


class Highlighter:
    """Spans for one query; what a word matches is worked out once, however often it comes."""

    def __init__(self, terms_of: WordTerms, query: str) -> None:
        self._words = _Words(terms_of, frozenset(terms_of.analyzer.terms(query)))

    def spans(self, text: str) -> Spans:
        """[start, end) of each match in characters of `text`, in order, without overlaps."""
        if not self._words.terms:
            return []
        words, found = self._words, Spans()
        for match in _WORD.finditer(text):
            parts = words[match.group()]
            if parts:
                start = match.start()
                found += [(start + begin, start + end) for begin, end in parts]
        return found


class _Words(dict[str, Spans]):
    """Word -> the parts of it that match, made when they are first asked for."""

    def __init__(self, terms_of: WordTerms, terms: frozenset[str]) -> None:
        super().__init__()
        self.terms_of = terms_of
        self.terms = terms

    def __missing__(self, word: str) -> Spans:
        self[word] = parts = [] if self.terms.isdisjoint(self.terms_of[word]) else self._parts(word)
        return parts

    def _parts(self, word: str) -> Spans:
        """Of a word that matches: all of it, or pairs of its characters where those are the terms, neighbours joined."""
        own = self.terms_of[word]
        if len(own) == 1 or word in own:
            return [(0, len(word))]
        merged: Spans = []
        for begin in range(len(word) - 1):
            if self.terms.isdisjoint(self.terms_of[word[begin : begin + 2]]):
                continue
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], begin + 2)
            else:
                merged.append((begin, begin + 2))
        return merged


__all__ = ["Highlighter", "Spans", "WordTerms"]
