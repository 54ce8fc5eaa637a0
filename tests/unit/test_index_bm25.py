"""BM25: Lucene's scores by hand, nothing found, and what lies on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from simlm.errors import RecipeError
from simlm.index.bm25 import BM25Index

TEXTS = ["red apple red", "green apple", "blue sky over green sea"]
"""3, 2 and 5 terms: 10 / 3 on average."""


def build(folder: Path, texts: list[str], *, k1: float = 0.9, b: float = 0.4, language: str = "none") -> BM25Index:
    folder.mkdir(exist_ok=True)
    return BM25Index(folder, BM25Index.build(texts, folder, k1=k1, b=b, language=language))


def lucene(count: int, length: int, holding: int, *, k1: float = 0.9, b: float = 0.4) -> float:
    """Score of a term that `holding` of the three passages have and this one, of `length` terms, has `count` times."""
    idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
    return idf * count / (count + k1 * (1 - b + b * length / (10 / 3)))


def test_scores_by_hand(tmp_path: Path) -> None:
    scores, rows = build(tmp_path / "i", TEXTS).search(["red", "apple", "green apple"], 3)
    assert rows.tolist() == [[0, -1, -1], [1, 0, -1], [1, 0, 2]]
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    assert scores[0, 0] == pytest.approx(lucene(2, 3, 1), rel=1e-6)
    assert scores[1, :2] == pytest.approx([lucene(1, 2, 2), lucene(1, 3, 2)], rel=1e-6)
    assert scores[2] == pytest.approx([2 * lucene(1, 2, 2), lucene(1, 3, 2), lucene(1, 5, 2)], rel=1e-6)
    # ln(1 + 2.5 / 1.5) * 2 / (2 + 0.9 * (0.6 + 0.4 * 0.9))
    assert scores[0, 0] == pytest.approx(0.6849, abs=1e-4)


def test_a_repeated_term_of_the_query_counts_again(tmp_path: Path) -> None:
    scores, _ = build(tmp_path / "i", TEXTS).search(["sky", "sky sky"], 1)
    assert scores[1, 0] == pytest.approx(2 * scores[0, 0])


@pytest.mark.parametrize(("k1", "b"), [(0.0, 0.4), (1.2, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_k1_and_b(tmp_path: Path, k1: float, b: float) -> None:
    scores, rows = build(tmp_path / "i", TEXTS, k1=k1, b=b).search(["red apple"], 3)
    expected = {0: lucene(2, 3, 1, k1=k1, b=b) + lucene(1, 3, 2, k1=k1, b=b), 1: lucene(1, 2, 2, k1=k1, b=b)}
    assert dict(zip(rows[0, :2].tolist(), scores[0, :2].tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)


def test_without_b_length_does_not_count(tmp_path: Path) -> None:
    scores, rows = build(tmp_path / "i", TEXTS, b=0.0).search(["apple"], 2)
    assert rows.tolist() == [[0, 1]]  # equal scores: the smaller row first
    assert scores[0, 0] == scores[0, 1]


@pytest.mark.parametrize("query", ["", "   ", "?!", "zebra", "a"])
def test_nothing_known_finds_nothing(tmp_path: Path, query: str) -> None:
    scores, rows = build(tmp_path / "i", TEXTS).search([query, "sky"], 2)
    assert rows.tolist() == [[-1, -1], [2, -1]]
    assert np.isneginf(scores[0]).all()


def test_no_queries(tmp_path: Path) -> None:
    scores, rows = build(tmp_path / "i", TEXTS).search([], 5)
    assert scores.shape == rows.shape == (0, 5)


def test_depth_beyond_the_corpus(tmp_path: Path) -> None:
    _, rows = build(tmp_path / "i", TEXTS).search(["green apple"], 10)
    assert rows.tolist() == [[1, 0, 2] + [-1] * 7]


def test_depth_cuts_equal_scores_by_row(tmp_path: Path) -> None:
    _, rows = build(tmp_path / "i", ["other words"] + ["same text"] * 6).search(["same"], 3)
    assert rows.tolist() == [[1, 2, 3]]


def test_one_passage(tmp_path: Path) -> None:
    index = build(tmp_path / "i", ["only this"])
    scores, rows = index.search(["this"], 1)
    assert len(index) == 1
    assert rows.tolist() == [[0]]
    assert scores[0, 0] == pytest.approx(math.log(1 + 0.5 / 1.5) / 1.9)


@pytest.mark.parametrize("texts", [["", "", ""], ["a b c", "!", "the the"]])
def test_a_corpus_without_terms(tmp_path: Path, texts: list[str]) -> None:
    index = build(tmp_path / "i", texts, language="english")
    _, rows = index.search(["the a"], 2)
    assert len(index) == 3
    assert rows.tolist() == [[-1, -1]]


def test_a_passage_without_terms_among_others(tmp_path: Path) -> None:
    _, rows = build(tmp_path / "i", ["", "sky", ""]).search(["sky"], 3)
    assert rows.tolist() == [[1, -1, -1]]


def test_opened_again_it_finds_the_same(tmp_path: Path) -> None:
    first = build(tmp_path / "i", TEXTS, language="english")
    second = BM25Index(tmp_path / "i", json.loads(json.dumps(first.info)))
    for left, right in zip(first.search(TEXTS, 3), second.search(TEXTS, 3), strict=True):
        np.testing.assert_array_equal(left, right)
    third = build(tmp_path / "again", TEXTS, language="english")
    files = sorted(file.relative_to(tmp_path / "i") for file in (tmp_path / "i").rglob("*") if file.is_file())
    assert files
    for file in files:
        assert (tmp_path / "i" / file).read_bytes() == (third.folder / file).read_bytes()


def test_no_pickles(tmp_path: Path) -> None:
    build(tmp_path / "i", TEXTS)
    files = [file for file in (tmp_path / "i").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".npy", ".json", ".jsonl"}
    for file in files:
        if file.suffix == ".npy":
            np.load(file, allow_pickle=False)
        else:
            file.read_text(encoding="utf-8")


def test_language_told_from_the_texts(tmp_path: Path) -> None:
    texts = ["The apples are in the basket and it is there.", "A fox was at the river with the others."]
    index = build(tmp_path / "i", texts, language="auto")
    assert index.info["language"] == "english"
    assert index.search(["an apple"], 1)[1].tolist() == [[0]]


def test_unknown_language(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'german'"):
        build(tmp_path / "i", TEXTS, language="germn")
