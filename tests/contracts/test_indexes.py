"""What every index of the table promises, whatever its type."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simlm.artifacts import MANIFEST, build_artifact, peak_memory_bytes, reset_peak_memory, write_json
from simlm.errors import ArtifactError, RecipeError, ShapeError
from simlm.index import INDEXES, INFO, Index, check_options, flat, index_class, load_index, open_index
from simlm.index.flat import FlatIndex

NUM_PASSAGES, NUM_QUERIES, DIM = 300, 20, 16
RECALL = {"flat": 1.0, "hnsw": 0.99, "ivf": 0.6, "pq": 0.6, "bm25": 1.0}
"""Of the exact best 10, at least. Random vectors have no clusters: ivf and pq do far better on real ones."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Passages as an index type takes them, queries, and the exact scores [Q, N] (0 or below: no result for BM25)."""

    passages: Any
    queries: Any
    scores: np.ndarray[Any, Any]


def vectors_of(count: int, seed: int) -> np.ndarray[Any, Any]:
    """float32 [count, DIM], unit length."""
    vectors: np.ndarray[Any, Any] = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def texts_of(count: int, seed: int, words: int = 12) -> list[str]:
    """Words w0 ... w49, some passages several times longer than others."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, 50, words * (1 + row % 3))) for row in range(count)]


def exact_bm25(texts: list[str], queries: list[str], k1: float = 0.9, b: float = 0.4) -> np.ndarray[Any, Any]:
    split = [text.split() for text in texts]
    average = sum(map(len, split)) / len(split)
    scores = np.zeros((len(queries), len(texts)))
    for place, query in enumerate(queries):
        for term in query.split():
            counts = np.array([words.count(term) for words in split])
            holding = (counts > 0).sum()
            idf = np.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            lengths = np.array([len(words) for words in split])
            scores[place] += idf * counts / (counts + k1 * (1 - b + b * lengths / average))
    return scores


def corpus_for(name: str, num_passages: int = NUM_PASSAGES) -> Corpus:
    if index_class(name).takes == "text":
        texts, queries = texts_of(num_passages, 1), texts_of(NUM_QUERIES, 2, words=3)
        return Corpus(texts, queries, exact_bm25(texts, queries))
    passages, queries_QD = vectors_of(num_passages, 1), vectors_of(NUM_QUERIES, 2)
    return Corpus(passages, queries_QD, queries_QD @ passages.T)


Build = Callable[..., Index]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a finished index artifact in a folder of its own and open it."""

    def made(name: str, passages: Any, folder: str = "index", **options: int) -> Index:
        with build_artifact(tmp_path / folder, kind="index") as builder:
            if index_class(name).takes == "text":
                info = index_class(name).build(passages, builder.work, k1=0.9, b=0.4, language="none")
            else:
                np.save(tmp_path / f"{folder}.npy", passages)
                info = index_class(name).build(tmp_path / f"{folder}.npy", builder.work, options=options, seed=3)
            write_json(builder.work / INFO, info | {"type": name, "store_fingerprint": "s"})
        return open_index(tmp_path / folder)

    return made


def assert_well_formed(scores: Any, rows: Any, shape: tuple[int, int], size: int) -> None:
    """Types, shape, best first, ties by row, no passage twice, what is missing at the end."""
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    assert scores.shape == rows.shape == shape
    np.testing.assert_array_equal(rows == -1, np.isneginf(scores))
    for query_scores, query_rows in zip(scores, rows, strict=True):
        found = query_rows[query_rows >= 0]
        assert (query_rows[: len(found)] >= 0).all()
        assert len(set(found.tolist())) == len(found) <= size
        assert (found < size).all()
        keys = list(zip((-query_scores[: len(found)]).tolist(), found.tolist(), strict=True))
        assert keys == sorted(keys)


every_index = pytest.mark.parametrize("name", INDEXES)
every_index_of_vectors = pytest.mark.parametrize("name", [name for name in INDEXES if index_class(name).takes == "vectors"])


@every_index
def test_recall_of_the_exact_best(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    index = build(name, corpus.passages)
    assert len(index) == NUM_PASSAGES
    scores, rows = index.search(corpus.queries, 10)
    assert_well_formed(scores, rows, (NUM_QUERIES, 10), NUM_PASSAGES)
    best = np.argsort(-corpus.scores, axis=1, kind="stable")[:, :10]
    recall = np.mean([len(set(found.tolist()) & set(wanted.tolist())) / 10 for found, wanted in zip(rows, best, strict=True)])
    assert recall >= RECALL[name]


@pytest.mark.parametrize("name", [name for name in INDEXES if name != "pq"])
def test_scores_are_exact_where_nothing_is_compressed(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    scores, rows = build(name, corpus.passages).search(corpus.queries, 5)
    np.testing.assert_allclose(scores, np.take_along_axis(corpus.scores, rows, axis=1), rtol=1e-5, atol=1e-6)


@every_index
def test_opened_elsewhere_it_finds_the_same(build: Build, name: str, tmp_path: Path) -> None:
    corpus = corpus_for(name)
    before = build(name, corpus.passages).search(corpus.queries, 10)
    shutil.move(tmp_path / "index", tmp_path / "moved")
    (tmp_path / "index.npy").unlink(missing_ok=True)
    again = load_index(tmp_path / "moved")
    assert again.info["type"] == name
    for left, right in zip(before, again.search(corpus.queries, 10), strict=True):
        np.testing.assert_array_equal(left, right)


@every_index
def test_built_again_it_finds_the_same(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    first = build(name, corpus.passages).search(corpus.queries, 10)
    second = build(name, corpus.passages, folder="second").search(corpus.queries, 10)
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


@every_index
def test_one_query_at_a_time_finds_the_same(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    index = build(name, corpus.passages)
    together_scores, together_rows = index.search(corpus.queries, 10)
    for place in range(5):
        scores, rows = index.search(corpus.queries[place : place + 1], 10)
        np.testing.assert_array_equal(rows[0], together_rows[place])
        np.testing.assert_allclose(scores[0], together_scores[place], rtol=1e-5)


@every_index
def test_depth_beyond_the_corpus(build: Build, name: str) -> None:
    corpus = corpus_for(name, 7)
    scores, rows = build(name, corpus.passages).search(corpus.queries, 12)
    assert_well_formed(scores, rows, (NUM_QUERIES, 12), 7)
    for place in range(NUM_QUERIES):
        wanted = np.flatnonzero(corpus.scores[place] > 0).tolist() if index_class(name).takes == "text" else list(range(7))
        assert sorted(rows[place][rows[place] >= 0].tolist()) == wanted


@every_index
def test_one_passage(build: Build, name: str) -> None:
    passages = ["w1 w2"] if index_class(name).takes == "text" else vectors_of(1, 1)
    queries = ["w2", "w1"] if index_class(name).takes == "text" else vectors_of(2, 2)
    index = build(name, passages)
    assert len(index) == 1
    scores, rows = index.search(queries, 3)
    assert_well_formed(scores, rows, (2, 3), 1)
    assert rows.tolist() == [[0, -1, -1], [0, -1, -1]]


@every_index
def test_equal_passages_are_ordered_by_row(build: Build, name: str) -> None:
    corpus = corpus_for(name, 40)
    # Passages 0, 1 and 2, each three times over, between others.
    passages = [corpus.passages[row] for row in (3, 0, 1, 2, 4, 2, 1, 0, 5, 6, 0, 1, 2)]
    index = build(name, passages if index_class(name).takes == "text" else np.stack(passages))
    queries = corpus.passages[:3]
    for place, copies in enumerate(([1, 7, 10], [2, 6, 11], [3, 5, 12])):
        scores, rows = index.search(queries[place : place + 1], 13)
        where = [rows[0].tolist().index(row) for row in copies]
        assert where == sorted(where)
        assert len({float(scores[0, position]) for position in where}) == 1


@every_index
def test_no_queries(build: Build, name: str) -> None:
    corpus = corpus_for(name, 5)
    scores, rows = build(name, corpus.passages).search(corpus.queries[:0], 3)
    assert_well_formed(scores, rows, (0, 3), 5)


@every_index_of_vectors
def test_queries_of_another_dimension(build: Build, name: str) -> None:
    index = build(name, vectors_of(5, 1))
    with pytest.raises(ShapeError, match=r"shape \(2, 8\).*\[Q, 16\]"):
        index.search(np.zeros((2, 8), np.float32), 3)


@every_index_of_vectors
def test_half_precision_vectors(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    scores, rows = build(name, corpus.passages.astype(np.float16)).search(corpus.queries, 10)
    assert_well_formed(scores, rows, (NUM_QUERIES, 10), NUM_PASSAGES)
    best = np.argsort(-corpus.scores, axis=1)[:, :10]
    recall = np.mean([len(set(found.tolist()) & set(wanted.tolist())) / 10 for found, wanted in zip(rows, best, strict=True)])
    assert recall >= RECALL[name] - 0.02


@every_index
def test_unknown_option(name: str) -> None:
    check_options(name, {})
    known = index_class(name).OPTIONS
    if known:
        option = next(iter(known))
        check_options(name, {option: 64})
        with pytest.raises(RecipeError, match=rf"index\.options\.{option}s: unknown option.*did you mean '{option}'"):
            check_options(name, {f"{option}s": 64})
        for value in (-1, 2.5, "8", True):
            with pytest.raises(RecipeError, match=rf"index\.options\.{option}: .* whole number"):
                check_options(name, {option: value})
    else:
        with pytest.raises(RecipeError, match=r"index\.options\.num_lists: unknown option.*it has none"):
            check_options(name, {"num_lists": 8})


def test_unknown_type() -> None:
    with pytest.raises(RecipeError, match="did you mean 'hnsw'"):
        index_class("hnws")


@every_index
def test_a_damaged_index_is_refused(build: Build, name: str, tmp_path: Path) -> None:
    build(name, corpus_for(name, 20).passages)
    largest = max(
        (file for file in (tmp_path / "index").rglob("*") if file.name != MANIFEST and file.is_file()), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes, the manifest says"):
        open_index(tmp_path / "index")


def test_an_index_without_its_description_is_refused(tmp_path: Path) -> None:
    with build_artifact(tmp_path / "index", kind="index"):
        pass
    with pytest.raises(ArtifactError, match=r"index\.json: not readable.*build_index"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("memory_bytes", [1, 3000, 60_000, 2**28])
@pytest.mark.parametrize("depth", [1, 25, 700])
def test_flat_is_exact_with_ties_whatever_the_blocks(build: Build, memory_bytes: int, depth: int) -> None:
    # Quarters: sums are exact in any order, so equal scores are equal to the last bit, and there are many.
    rng = np.random.default_rng(0)
    passages, queries = ((rng.integers(-2, 3, (count, DIM)) / 4).astype(np.float32) for count in (600, 20))
    built = build("flat", passages)
    scores, rows = FlatIndex(built.folder, built.info).search(queries, depth, memory_bytes=memory_bytes)
    exact = queries @ passages.T
    best = np.argsort(-exact, axis=1, kind="stable")[:, :depth]
    found = min(depth, 600)
    np.testing.assert_array_equal(rows[:, :found], best)
    np.testing.assert_array_equal(scores[:, :found], np.take_along_axis(exact, best, axis=1))
    assert (rows[:, found:] == -1).all()


@pytest.mark.parametrize("depth", [1, 30, 2000])
def test_flat_gives_the_same_bits_for_any_memory(build: Build, depth: int) -> None:
    # Several tiles of queries and of passages, with a rest of each.
    passages, queries = vectors_of(3500, 1), vectors_of(1100, 2)
    built = build("flat", passages)
    index = FlatIndex(built.folder, built.info)
    scores, rows = index.search(queries, depth)
    exact = queries.astype(np.float64) @ passages.T.astype(np.float64)
    best = np.sort(-exact, axis=1)[:, :depth]
    np.testing.assert_allclose(scores, -best, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, axis=1), -best, atol=1e-6)
    for memory_bytes in (1, 100 * 2**20, 2**31):
        for left, right in zip(index.search(queries, depth, memory_bytes=memory_bytes), (scores, rows), strict=True):
            assert left.tobytes() == right.tobytes()


def test_flat_ranks_negative_zero_and_infinite_scores(build: Build) -> None:
    # Scores of the query (1, 0, ...): 0.0, -0.0, -1, 1, -inf, nan, 0.0.
    passages = np.zeros((7, DIM), dtype=np.float32)
    passages[:, 0] = [0.0, -0.0, -1.0, 1.0, -np.inf, np.nan, 0.0]
    queries = np.zeros((1, DIM), dtype=np.float32)
    queries[0, 0] = 1
    index = build("flat", passages[:, :1])
    scores, rows = index.search(queries[:, :1], 7)
    assert rows.tolist() == [[3, 0, 1, 6, 2, -1, -1]]
    assert scores.tolist() == [[1.0, 0.0, 0.0, 0.0, -1.0, -np.inf, -np.inf]]


def test_flat_keeps_to_its_memory(build: Build) -> None:
    # Ever better passages: each one is a candidate. 3 tiles of queries, 40 of passages.
    passages = np.sort(np.random.default_rng(0).random((40 * flat.TILE, 1)).astype(np.float32), axis=0)
    built = build("flat", passages)
    index = FlatIndex(built.folder, built.info)
    queries = np.ones((flat.TILE, 1), dtype=np.float32)
    index.search(queries[:2], 5)
    peaks = {}
    for budget in (128 * 2**20, 2**31):
        reset_peak_memory()
        before = peak_memory_bytes()
        _, rows = index.search(queries, 5, memory_bytes=budget)
        peaks[budget] = peak_memory_bytes() - before
        assert rows[7].tolist() == [40 * flat.TILE - 1 - place for place in range(5)]
    assert peaks[128 * 2**20] < 128 * 2**20 < 300 * 2**20 < peaks[2**31], peaks


def test_flat_takes_queries_in_pieces(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_for("flat")
    index = build("flat", corpus.passages)
    whole = index.search(corpus.queries, 5)
    monkeypatch.setattr(flat, "QUERIES_AT_ONCE", 7)
    pieces = index.search(corpus.queries, 5)
    np.testing.assert_array_equal(whole[1], pieces[1])
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-5)


def test_flat_takes_no_room_of_its_own(build: Build, tmp_path: Path) -> None:
    index = build("flat", vectors_of(5, 1))
    assert (index.folder / "vectors.npy").samefile(tmp_path / "index.npy")


def test_ivf_with_all_lists_is_exact(build: Build) -> None:
    corpus = corpus_for("ivf")
    _, rows = build("ivf", corpus.passages, num_lists=6, num_probes=6).search(corpus.queries, 10)
    np.testing.assert_array_equal(rows, np.argsort(-corpus.scores, axis=1)[:, :10])


def test_pq_with_clusters(build: Build) -> None:
    corpus = corpus_for("pq")
    index = build("pq", corpus.passages, code_bytes=8, num_lists=4, num_probes=4)
    scores, rows = index.search(corpus.queries, 10)
    assert_well_formed(scores, rows, (NUM_QUERIES, 10), NUM_PASSAGES)
    assert index.info["code_bytes"] == 8
    assert (
        np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(rows, np.argsort(-corpus.scores)[:, :10], strict=True)]) > 0.6
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ivf", {"num_lists": 400}, "num_lists: 400 lists for a corpus of 300 passages"),
        ("ivf", {"num_lists": 4, "num_probes": 5}, "num_probes: 5 of 4 lists"),
        ("pq", {"code_bytes": 5}, "code_bytes: 5 does not divide the dimension 16; try 2, 4, 8"),
        ("pq", {"num_probes": 5}, "num_probes: has no effect"),
    ],
)
def test_options_that_do_not_fit_the_corpus(build: Build, name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(name, vectors_of(NUM_PASSAGES, 1), **options)
