"""Text -> the terms that BM25 counts, for any script.

Words are runs of letters, digits and the marks that belong to them (`numpy.linalg.norm` is three words, `read_csv` two), lower-cased after
Unicode NFKC. Where words are not separated (Chinese, Japanese, Thai, Lao, Khmer, Burmese) terms are the overlapping pairs of characters of
a run; Korean words carry particles, so they give the word and its pairs of characters. What is left goes through the stop words and the
Snowball stemmer of one language. Scripts are told apart word by word: only stop words and stemmer depend on `language`.

One-character words are left out wherever words are separated (English "c", Korean particles that stand alone), as bm25s's own tokeniser
does, whose token pattern wants two characters or more. Where they are not separated a single character is a word and stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from simlm.errors import RecipeError, nearest

NO_LANGUAGE = "none"
AUTO = "auto"
LONGEST_TERM = 64
"""Characters; longer words (base64, hashes) are cut there, so that no vocabulary entry is a million characters long."""
REMEMBERED_TERMS = 1 << 19
"""Terms of words that an analyzer has seen; about 100 MB. Past that it starts afresh, and common words are soon back."""
SAMPLE_CHARACTERS = 2000
"""Read of each passage when the language is told from a sample."""

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff"  # radicals, iteration marks, Hiragana, Katakana
    "\u3100-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # Bopomofo, Han, half-width Katakana
)
_HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"

_STOP_WORD_TABLES = {
    "danish": "STOPWORDS_DANISH",
    "dutch": "STOPWORDS_DUTCH",
    "english": "STOPWORDS_EN",
    "french": "STOPWORDS_FRENCH",
    "german": "STOPWORDS_GERMAN",
    "italian": "STOPWORDS_ITALIAN",
    "norwegian": "STOPWORDS_NORWEGIAN",
    "portuguese": "STOPWORDS_PORTUGUESE",
    "russian": "STOPWORDS_RUSSIAN",
    "spanish": "STOPWORDS_SPANISH",
    "swedish": "STOPWORDS_SWEDISH",
    "turkish": "STOPWORDS_TURKISH",
}
"""bm25s has these lists; English is Lucene's 33 words. Languages without a list are stemmed only."""


class Analyzer:
    """Terms of a text in one language; the same for passages and queries.

    Terms of words are remembered, up to a bound: a corpus has far fewer different words than words.
    """

    def __init__(self, language: str) -> None:
        check_language(language)
        if language == AUTO:
            raise RecipeError('language "auto" has to be settled with `detect_language` first')
        self.language = language
        self._stem = _stemmer(language)
        self._stop_words = stop_words(language)
        self._words, self._parts = _patterns()
        self._known: dict[str, tuple[str, ...]] = {}
        self._num_remembered = 0

    def terms(self, text: str) -> list[str]:
        """Terms in the order of the text, repetitions included; empty for a text without letters or digits."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        found: list[str] = []
        known = self._known
        for word in self._words.findall(text.lower()):
            terms = known.get(word)
            if terms is None:
                terms = self._terms_of(word)
                self._remember(word, terms)
            found.extend(terms)
        return found

    def _remember(self, word: str, terms: tuple[str, ...]) -> None:
        if len(word) > LONGEST_TERM:
            return
        # A word without terms takes room too.
        self._num_remembered += len(terms) + 1
        if self._num_remembered > REMEMBERED_TERMS:
            self._known.clear()
            self._num_remembered = len(terms) + 1
        self._known[word] = terms

    def _terms_of(self, word: str) -> tuple[str, ...]:
        if word.isascii():
            return self._spaced(word)
        parts = self._parts.findall(word)
        if len(parts) > 1 and all(not unspaced and len(hangul + other) == 1 for unspaced, hangul, other in parts):
            # A number and its counter ("March" is 3 and the syllable for month): as one word they say something.
            return (word[:LONGEST_TERM],)
        terms: list[str] = []
        for unspaced, hangul, other in parts:
            if unspaced:
                terms += pairs(unspaced)
            elif hangul:
                terms += [hangul[:LONGEST_TERM], *pairs(hangul)] if len(hangul) > 1 else []
            else:
                terms += self._spaced(other)
        return tuple(terms)

    def _spaced(self, word: str) -> tuple[str, ...]:
        return () if len(word) == 1 or word in self._stop_words else (self._stem(word[:LONGEST_TERM]),)


def pairs(run: str) -> list[str]:
    """Overlapping pairs of characters; a single character stands for itself."""
    return [run] if len(run) == 1 else [run[place : place + 2] for place in range(len(run) - 1)]


def check_language(language: str) -> None:
    """Raise RecipeError unless it is "auto", "none" or a language that Snowball stems."""
    known = [AUTO, NO_LANGUAGE, *languages()]
    if language not in known:
        raise RecipeError(f"language {language!r} is not known{nearest(language, known)} (known: {', '.join(known)})")


@cache
def languages() -> tuple[str, ...]:
    """Names of Snowball's stemmers."""
    import Stemmer

    return tuple(sorted(Stemmer.algorithms()))


@cache
def stop_words(language: str) -> frozenset[str]:
    """Stop words of a language; empty where there is no list."""
    from bm25s import stopwords

    name = _STOP_WORD_TABLES.get(language)
    return frozenset(getattr(stopwords, name)) if name else frozenset()


def detect_language(sample: Iterable[str]) -> str:
    """The language whose stop words are commonest in a sample of the corpus, or "none".

    "none" where less than half of the characters are of spaced scripts, or where less than a tenth of the words are stop words of any
    language: running text has 20 to 50 %, lists of names next to none, and then a stemmer would be a guess.
    """
    words, parts = _patterns()
    counts: Counter[str] = Counter()
    unspaced_characters = spaced_characters = 0
    for text in sample:
        for word in words.findall(unicodedata.normalize("NFKC", text[:SAMPLE_CHARACTERS]).lower()):
            for unspaced, hangul, other in parts.findall(word):
                unspaced_characters += len(unspaced) + len(hangul)
                if other:
                    spaced_characters += len(other)
                    counts[other] += 1
    total = counts.total()
    if total == 0 or unspaced_characters > spaced_characters:
        return NO_LANGUAGE
    shares = {language: sum(counts[word] for word in stop_words(language)) / total for language in _STOP_WORD_TABLES}
    best = max(sorted(shares), key=lambda language: _evidence(counts, total, language))
    return best if shares[best] >= 0.1 else NO_LANGUAGE


def _evidence(counts: Counter[str], total: int, language: str) -> float:
    """Share of the words that are stop words of the language; a word that several languages have counts for each in part."""
    return sum(counts[word] / _num_languages_of(word) for word in stop_words(language)) / total


@cache
def _num_languages_of(word: str) -> int:
    return sum(word in stop_words(language) for language in _STOP_WORD_TABLES)


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Words; and the parts of a word by script: (unspaced, hangul, other)."""
    marks = _mark_ranges()
    words = re.compile(rf"[^\W_](?:[^\W_]|[{marks}])*")
    parts = re.compile(rf"([{_UNSPACED}]+)|([{_HANGUL}]+)|([^{_UNSPACED}{_HANGUL}]+)")
    return words, parts


def _mark_ranges() -> str:
    """Combining marks of the basic plane as a character class: vowel signs and accents belong to the word they stand in."""
    marks = [code for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M")]
    ranges: list[list[int]] = []
    for code in marks:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _stemmer(language: str) -> Callable[[str], str]:
    if language == NO_LANGUAGE:
        return str
    import Stemmer

    # The analyzer remembers stems itself.
    stemmer = Stemmer.Stemmer(language, 0)
    stem: Callable[[str], str] = stemmer.stemWord
    return stem


def sample_rows(count: int, size: int = 1000) -> Sequence[int]:
    """At most `size` rows spread evenly over 0..count-1: what the language is told from."""
    return range(0, count, max(count // size, 1))[:size]


__all__ = ["AUTO", "NO_LANGUAGE", "Analyzer", "check_language", "detect_language", "languages", "pairs", "sample_rows", "stop_words"]
