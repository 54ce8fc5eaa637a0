"""Does a passage contain an answer? The matching of Natural Questions and TriviaQA.

Source: `has_answer` and `SimpleTokenizer` of DPR (arXiv 2004.04906): text is NFD-normalised and cut into runs of letters, digits and
combining marks, and single other characters; an answer matches where its tokens, lower-cased, stand in a row.
Differs: an answer without any token matches nothing (in DPR it matches every passage).
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """True if one of the answer strings stands in the text as a run of whole tokens, case and Unicode form aside."""
    return matches(token_line(text), [token_line(answer) for answer in answers])


def first_answer_rank(texts: Iterable[str], answers: Sequence[str]) -> int | None:
    """Rank (from 1) of the first text that contains an answer; None if none does. A question's R@k is 1 if this is at most k."""
    lines = [token_line(answer) for answer in answers]
    for rank, text in enumerate(texts, start=1):
        if matches(token_line(text), lines):
            return rank
    return None


def answer_recall(texts_of_queries: Iterable[tuple[Iterable[str], Sequence[str]]], k: int) -> float:
    """R@k of question answering: share of the questions with an answer string in their first k passages; 0 for no questions.

    texts_of_queries: (passage texts best first, answer strings) of each question.
    """
    hits = total = 0
    for texts, answers in texts_of_queries:
        rank = first_answer_rank((text for text, _ in zip(texts, range(k), strict=False)), answers)
        hits += rank is not None
        total += 1
    return hits / total if total else 0.0


def tokens(text: str) -> list[str]:
    """Lower-cased tokens of the NFD form of a text."""
    return [token.lower() for token in _pattern().findall(unicodedata.normalize("NFD", text))]


def token_line(text: str) -> str:
    """The tokens, each between two NUL characters, which no token contains; empty for a text without tokens."""
    found = tokens(text)
    return "\0" + "\0".join(found) + "\0" if found else ""


def matches(line: str, answer_lines: Iterable[str]) -> bool:
    """True if a token line contains one of the answers' token lines."""
    return any(answer and answer in line for answer in answer_lines)


@functools.cache
def _pattern() -> re.Pattern[str]:
    r"""DPR's `([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])` in terms of `re`, which has no categories: from the Unicode tables of this Python."""
    word: list[str] = []
    blank: list[str] = []
    for ranges, categories in ((word, "LNM"), (blank, "ZC")):
        start = -1
        for code in range(sys.maxunicode + 2):
            inside = code <= sys.maxunicode and unicodedata.category(chr(code))[0] in categories
            if inside and start < 0:
                start = code
            elif not inside and start >= 0:
                ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
                start = -1
    return re.compile(f"[{''.join(word)}]+|[^{''.join(blank)}]")


__all__ = ["answer_recall", "first_answer_rank", "has_answer", "matches", "token_line", "tokens"]
