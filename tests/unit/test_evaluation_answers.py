"""Answer matching as DPR does it."""

from __future__ import annotations

import pytest

from simlm.evaluation.answers import answer_recall, first_answer_rank, has_answer, tokens


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It was founded in 1776, in Philadelphia.", "philadelphia", True),
        ("It was founded in 1776, in Philadelphia.", "1776", True),
        ("The catalog of cats", "cat", False),  # whole tokens only
        ("in the U.S. Senate", "U.S. senate", True),
        ("in the US Senate", "U.S. Senate", False),  # punctuation is tokens
        ("Caf\u00e9 Noir", "cafe\u0301 noir", True),  # composed and decomposed forms are the same after NFD
        ("Cafe Noir", "caf\u00e9 noir", False),  # accents count
        ("\uc11c\uc6b8\ud2b9\ubcc4\uc2dc\ub294", "\uc11c\uc6b8\ud2b9\ubcc4\uc2dc", False),  # Korean: the particle is part of the token
        ("a  b\n\nc", "a b c", True),  # white space does not count
        ("STRASSE", "stra\u00dfe", False),  # lower-case, not case-folded
        ("anything", "", False),
        ("anything", " \u200b ", False),  # an answer without tokens matches nothing
        ("", "x", False),
        ("x", "x x", False),
    ],
)
def test_has_answer(text: str, answer: str, expected: bool) -> None:
    assert has_answer(text, [answer]) is expected


def test_tokens_are_those_of_the_simple_tokenizer() -> None:
    assert tokens("Don't x_y 3.5%\t\u20ac5") == ["don", "'", "t", "x", "_", "y", "3", ".", "5", "%", "\u20ac", "5"]
    assert tokens("e\u0301") == ["e\u0301"] == tokens("\u00e9")
    assert tokens("a\u00a0b\x00c\u200bd") == ["a", "b", "c", "d"]  # separators and control characters are no tokens


def test_any_of_several_answers() -> None:
    assert has_answer("a b c", ["z", "b"])
    assert not has_answer("a b c", [])


def test_rank_and_recall() -> None:
    texts = ["nothing", "the Answer", "answer again"]
    assert first_answer_rank(texts, ["answer"]) == 2
    assert first_answer_rank(texts, ["other"]) is None
    questions = [(texts, ["answer"]), (texts, ["nothing"]), ([], ["x"]), (texts, ["absent"])]
    assert answer_recall(questions, 1) == 1 / 4
    assert answer_recall(questions, 2) == 2 / 4
    assert answer_recall([], 5) == 0.0
