"""Which characters of a passage match a query: words whose BM25 terms the query has too."""

from __future__ import annotations

import re

from simlm.index.lexical import Analyzer

Spans = list[tuple[int, int]]

_WORD = re.compile(r"[^\W_]+(?:[\u0300-\u036f][^\W_]*)*")
"""Letters and digits with the accents that are written after them; what the analyzer takes apart further is taken apart below."""
REMEMBERED_WORDS = 200_000
"""Some 80 MB; past that they are looked up afresh."""


class _Seen:
    """Words and their terms, and the words that each term stands for."""

    def __init__(self) -> None:
        self.terms: dict[str, frozenset[str]] = {}
        self.words: dict[str, set[str]] = {}


class WordTerms:
    """Word -> its terms, and back. Kept for as long as a run is open: the words of answers are few, and looking them up takes long."""

    def __init__(self, analyzer: Analyzer) -> None:
        self.analyzer = analyzer
        self._seen = _Seen()

    def seen(self) -> _Seen:
        """What is remembered; whoever has it may go on with it after it was given up for a new one."""
        if len(self._seen.terms) >= REMEMBERED_WORDS:
            self._seen = _Seen()
        return self._seen

    def learn(self, seen: _Seen, word: str) -> frozenset[str]:
        """The word's terms, remembered."""
        terms = frozenset(self.analyzer.terms(word))
        for term in terms:
            seen.words.setdefault(term, set()).add(word)
        seen.terms[word] = terms
        return terms


class Highlighter:
    """Spans for one query; which words match it is known from the words that were seen with its terms before."""

    def __init__(self, terms_of: WordTerms, query: str) -> None:
        self._terms_of = terms_of
        self._seen = terms_of.seen()
        self._terms = frozenset(terms_of.analyzer.terms(query))
        self._matching: set[str] = set().union(*(self._seen.words.get(term, ()) for term in self._terms))
        self._parts: dict[str, Spans] = {}

    def spans(self, text: str) -> Spans:
        """[start, end) of each match in characters of `text`, in order, without overlaps."""
        if not self._terms:
            return []
        words = set(_WORD.findall(text))
        for word in words.difference(self._seen.terms):
            if not self._terms.isdisjoint(self._terms_of.learn(self._seen, word)):
                self._matching.add(word)
        if self._matching.isdisjoint(words):
            return []
        found = Spans()
        for match in _WORD.finditer(text):
            word = match.group()
            if word in self._matching:
                start = match.start()
                found += [(start + begin, start + end) for begin, end in self._parts_of(word)]
        return found

    def _parts_of(self, word: str) -> Spans:
        """Of a word that matches: all of it, or pairs of its characters where those are the terms, neighbours joined."""
        if word in self._parts:
            return self._parts[word]
        own = self._terms_of_word(word)
        merged: Spans = []
        if len(own) == 1 or word in own:
            merged.append((0, len(word)))
        else:
            for begin in range(len(word) - 1):
                if self._terms.isdisjoint(self._terms_of_word(word[begin : begin + 2])):
                    continue
                if merged and begin <= merged[-1][1]:
                    merged[-1] = (merged[-1][0], begin + 2)
                else:
                    merged.append((begin, begin + 2))
        self._parts[word] = merged
        return merged

    def _terms_of_word(self, word: str) -> frozenset[str]:
        known = self._seen.terms.get(word)
        return self._terms_of.learn(self._seen, word) if known is None else known


__all__ = ["Highlighter", "Spans", "WordTerms"]
