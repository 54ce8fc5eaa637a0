"""Terms of texts in many scripts, by hand; stop words, stems and the choice of a language."""

from __future__ import annotations

import pytest

from simlm.errors import RecipeError
from simlm.index import lexical
from simlm.index.lexical import Analyzer, check_language, detect_language, pairs, sample_rows, stop_words


def terms(text: str, language: str = "none") -> list[str]:
    return Analyzer(language).terms(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red apples, green APPLES!", ["red", "apples", "green", "apples"]),
        ("numpy.linalg.norm(x, ord=2)", ["numpy", "linalg", "norm", "ord"]),
        ("read_csv __init__ str.join", ["read", "csv", "init", "str", "join"]),
        ("don't 3.14 2024-01-31", ["don", "14", "2024", "01", "31"]),
        ("C is a b c", ["is"]),  # one-character words are left out
        ("caf\u00e9 na\u00efve", ["caf\u00e9", "na\u00efve"]),
        ("cafe\u0301", ["caf\u00e9"]),  # letter and combining accent: one character under NFKC
        ("\uff2e\uff35\uff2d \ufb01le", ["num", "file"]),  # full-width letters, the ligature fi
        # Cyrillic; the one-letter word is left out
        ("\u0412 \u043a\u043d\u0438\u0433\u0430\u0445", ["\u043a\u043d\u0438\u0433\u0430\u0445"]),
        # Devanagari keeps its vowel signs
        ("\u0915\u0940 \u0939\u093f\u0928\u094d\u0926\u0940", ["\u0915\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940"]),
        ("\u0627\u0644\u0639\u0631\u0628\u064a\u0629", ["\u0627\u0644\u0639\u0631\u0628\u064a\u0629"]),
    ],
)
def test_separated_words(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u6771\u4eac\u30bf", ["\u6771\u4eac", "\u4eac\u30bf"]),  # Han and Katakana together: overlapping pairs
        ("\u6c34\u3002", ["\u6c34"]),  # one character is a word where words are not separated
        ("\u0e20\u0e32\u0e29", ["\u0e20\u0e32", "\u0e32\u0e29"]),  # Thai
        ("\u4f7f\u7528numpy\u5e93", ["\u4f7f\u7528", "numpy", "\u5e93"]),  # scripts within a word are told apart
        ("A\u80a1", ["\u80a1"]),
    ],
)
def test_scripts_without_spaces_give_pairs(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\uc11c\uc6b8\uc758", ["\uc11c\uc6b8\uc758", "\uc11c\uc6b8", "\uc6b8\uc758"]),  # the word, then its pairs
        ("\uc11c\uc6b8", ["\uc11c\uc6b8", "\uc11c\uc6b8"]),
        ("\uc774 \ub9d0", []),  # one-character words are left out
        ("numpy\ub294", ["numpy"]),  # the particle too
        ("1990\ub144\ub300", ["1990", "\ub144\ub300", "\ub144\ub300"]),
        ("3\uc6d4", ["3\uc6d4"]),  # March: two parts of one character stay together
        ("\u1109\u1165\u110b\u116e\u11af", ["\uc11c\uc6b8", "\uc11c\uc6b8"]),  # letters composed to syllables
    ],
)
def test_korean_gives_words_and_pairs(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


@pytest.mark.parametrize("text", ["", "   \n\t", "!? ... --", "_ __", "\U0001f600"])
def test_a_text_without_words_has_no_terms(text: str) -> None:
    assert terms(text) == []
    assert terms(text, "english") == []


def test_english_stop_words_and_stems() -> None:
    assert terms("The apples are falling into THE river", "english") == ["appl", "fall", "river"]
    # Stop words go before stemming; without a language both stay.
    assert terms("The falling", "none") == ["the", "falling"]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("german", "Die H\u00e4user und Stra\u00dfen", ["haus", "strass"]),
        ("french", "l'eau des chevaux", ["eau", "cheval"]),
        ("russian", "\u0432 \u043a\u043d\u0438\u0433\u0430\u0445", ["\u043a\u043d\u0438\u0433"]),
        ("finnish", "taloissa", ["talo"]),  # stemmed, no list of stop words
    ],
)
def test_other_languages(language: str, text: str, expected: list[str]) -> None:
    assert terms(text, language) == expected


def test_english_has_the_33_words_of_lucene() -> None:
    assert len(stop_words("english")) == 33
    assert stop_words("finnish") == stop_words("none") == frozenset()


def test_long_words_are_cut() -> None:
    assert terms("x" * 1000) == ["x" * 64]
    assert terms("\uac00" * 100)[0] == "\uac00" * 64


def test_pairs() -> None:
    assert pairs("a") == ["a"]
    assert pairs("abc") == ["ab", "bc"]


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "REMEMBERED_TERMS", 10)
    analyzer = Analyzer("english")
    text = " ".join(f"word{number} falling" for number in range(200))
    found = analyzer.terms(text)
    assert found == [term for number in range(200) for term in (f"word{number}", "fall")]
    assert len(analyzer._known) <= 5  # two a word: itself and its term
    analyzer.terms("y" * 1000)
    assert all(len(word) <= 64 for word in analyzer._known)
    assert analyzer.terms(text) == found


def test_unknown_language() -> None:
    with pytest.raises(RecipeError, match="did you mean 'english'"):
        Analyzer("englsh")
    with pytest.raises(RecipeError, match="detect_language"):
        Analyzer("auto")
    check_language("auto")


@pytest.mark.parametrize(
    ("sample", "language"),
    [
        (["The cat is on the mat, and it was there for a long time."], "english"),
        (["Der Hund ist in dem Haus und die Katze ist nicht bei ihm."], "german"),
        (["Le chat est dans la maison avec les enfants de la voisine."], "french"),
        (["numpy linalg norm", "scipy sparse matrix"], "none"),  # names only
        (["\uc11c\uc6b8\uc740 \ud55c\uad6d\uc758 \uc218\ub3c4 the"], "none"),
        (["\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd the of"], "none"),
        ([""], "none"),
        ([], "none"),
    ],
)
def test_language_of_a_sample(sample: list[str], language: str) -> None:
    assert detect_language(sample) == language


def test_sample_rows_are_spread() -> None:
    assert list(sample_rows(10, 3)) == [0, 3, 6]
    assert list(sample_rows(2, 3)) == [0, 1]
    assert list(sample_rows(0)) == []
