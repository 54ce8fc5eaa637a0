"""What every index of the table promises, whatever its type."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simlm.artifacts import MANIFEST, build_artifact, peak_memory_bytes, reset_peak_memory, write_json
from simlm.errors import ArtifactError, RecipeError, ShapeError
from simlm.index import INDEXES, INFO, Index, build_vectors, check_options, flat, index_class, load_index, open_index, vectors
from simlm.index.flat import FlatIndex
from simlm.index.stored import rounded
from simlm.index.vectors import shortened
from simlm.losses.compression import cut

NUM_PASSAGES, NUM_QUERIES, DIM = 300, 20, 16


@dataclasses.dataclass(frozen=True)
class Row:
    """A type of the table with options that change what it is. recall: of the exact best 10, at least; exact: its scores are.

    Random vectors have no clusters: ivf, pq and rabitq do far better on real ones.
    """

    type: str
    recall: float
    exact: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-6


ROWS = {
    "flat": Row("flat", 1.0),
    "flat float16": Row("flat", 0.99, options={"dtype": "float16"}, tolerance=1e-3),
    "flat int8": Row("flat", 0.95, options={"dtype": "int8"}, tolerance=2e-2),
    "hnsw": Row("hnsw", 0.99),
    "ivf": Row("ivf", 0.6),
    "pq": Row("pq", 0.6, exact=False),
    "pq rescored": Row("pq", 0.9, options={"rescore": 4, "rescore_dtype": "float32"}),
    "ivf rescored": Row("ivf", 0.6, options={"rescore": 2, "rescore_dtype": "float16"}, tolerance=1e-3),
    "rabitq": Row("rabitq", 0.8, tolerance=2e-2),
    "rabitq as it is": Row("rabitq", 0.4, exact=False, options={"rescore": 0}),
    "rabitq of 4 bits": Row("rabitq", 0.8, exact=False, options={"bits": 4, "rescore": 0}),
    "rabitq in lists": Row("rabitq", 0.8, options={"num_lists": 4, "num_probes": 3, "rescore": 6, "query_bits": 4}, tolerance=2e-2),
    "half of the numbers": Row("flat", 0.3, exact=False, options={"dim": 8}),
    "half of the numbers rescored": Row("rabitq", 0.6, options={"dim": 8, "rescore": 12, "bits": 4}, tolerance=2e-2),
    "bm25": Row("bm25", 1.0),
}


def test_every_type_is_held_to_the_contract() -> None:
    # The client of a server has contract tests of its own.
    assert {row.type for row in ROWS.values()} == set(INDEXES) - {"milvus"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Passages as an index type takes them, queries, and the exact scores [Q, N] (0 or below: no result for BM25)."""

    passages: Any
    queries: Any
    scores: np.ndarray[Any, Any]


def vectors_of(count: int, seed: int) -> np.ndarray[Any, Any]:
    """float32 [count, DIM], unit length."""
    drawn: np.ndarray[Any, Any] = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


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
    if takes_text(name):
        texts, queries = texts_of(num_passages, 1), texts_of(NUM_QUERIES, 2, words=3)
        return Corpus(texts, queries, exact_bm25(texts, queries))
    passages, queries_QD = vectors_of(num_passages, 1), vectors_of(NUM_QUERIES, 2)
    return Corpus(passages, queries_QD, queries_QD @ passages.T)


def takes_text(name: str) -> bool:
    return bool(index_class(ROWS[name].type).takes == "text")


Build = Callable[..., Index]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a finished index artifact in a folder of its own and open it."""

    def made(name: str, passages: Any, folder: str = "index", **options: Any) -> Index:
        kind, options = ROWS[name].type, ROWS[name].options | options
        with build_artifact(tmp_path / folder, kind="index") as builder:
            if takes_text(name):
                info = index_class(kind).build(passages, builder.work, k1=0.9, b=0.4, language="none")
            else:
                np.save(tmp_path / f"{folder}.npy", passages)
                info = build_vectors(kind, tmp_path / f"{folder}.npy", builder.work, options=options, seed=3)
            write_json(builder.work / INFO, info | {"type": kind, "store_fingerprint": "s"})
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


every_index = pytest.mark.parametrize("name", ROWS)
every_index_of_vectors = pytest.mark.parametrize("name", [name for name in ROWS if not takes_text(name)])
every_index_of_any_size = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "num_lists" not in row.options])
every_type = pytest.mark.parametrize("name", sorted({row.type for row in ROWS.values()}))


def recall_of(rows: Any, scores: Any, depth: int = 10) -> float:
    """Share of the exact best that are among the results."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return float(np.mean([len(set(found.tolist()) & set(wanted.tolist())) / depth for found, wanted in zip(rows, best, strict=True)]))


@every_index
def test_recall_of_the_exact_best(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    index = build(name, corpus.passages)
    assert len(index) == NUM_PASSAGES
    scores, rows = index.search(corpus.queries, 10)
    assert_well_formed(scores, rows, (NUM_QUERIES, 10), NUM_PASSAGES)
    assert recall_of(rows, corpus.scores) >= ROWS[name].recall


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.exact])
def test_scores_are_those_of_the_vectors_that_are_kept(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    scores, rows = build(name, corpus.passages).search(corpus.queries, 5)
    np.testing.assert_allclose(scores, np.take_along_axis(corpus.scores, rows, axis=1), rtol=1e-5, atol=ROWS[name].tolerance)


@every_index
def test_opened_elsewhere_it_finds_the_same(build: Build, name: str, tmp_path: Path) -> None:
    corpus = corpus_for(name)
    before = build(name, corpus.passages).search(corpus.queries, 10)
    shutil.move(tmp_path / "index", tmp_path / "moved")
    (tmp_path / "index.npy").unlink(missing_ok=True)
    again = load_index(tmp_path / "moved")
    assert again.info["type"] == ROWS[name].type
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


@every_index_of_any_size
def test_depth_beyond_the_corpus(build: Build, name: str) -> None:
    corpus = corpus_for(name, 7)
    scores, rows = build(name, corpus.passages).search(corpus.queries, 12)
    assert_well_formed(scores, rows, (NUM_QUERIES, 12), 7)
    for place in range(NUM_QUERIES):
        wanted = np.flatnonzero(corpus.scores[place] > 0).tolist() if takes_text(name) else list(range(7))
        assert sorted(rows[place][rows[place] >= 0].tolist()) == wanted


@every_index_of_any_size
def test_one_passage(build: Build, name: str) -> None:
    passages = ["w1 w2"] if takes_text(name) else vectors_of(1, 1)
    queries = ["w2", "w1"] if takes_text(name) else vectors_of(2, 2)
    index = build(name, passages)
    assert len(index) == 1
    scores, rows = index.search(queries, 3)
    assert_well_formed(scores, rows, (2, 3), 1)
    assert rows.tolist() == [[0, -1, -1], [0, -1, -1]]


@every_index_of_any_size
def test_equal_passages_are_ordered_by_row(build: Build, name: str) -> None:
    corpus = corpus_for(name, 40)
    # Passages 0, 1 and 2, each three times over, between others.
    passages = [corpus.passages[row] for row in (3, 0, 1, 2, 4, 2, 1, 0, 5, 6, 0, 1, 2)]
    index = build(name, passages if takes_text(name) else np.stack(passages))
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
    assert recall_of(rows, corpus.scores) >= ROWS[name].recall - 0.02


@every_type
def test_unknown_option(name: str) -> None:
    check_options(name, {})
    known = index_class(name).OPTIONS
    if not known:
        with pytest.raises(RecipeError, match=r"index\.options\.num_lists: unknown option.*it has none"):
            check_options(name, {"num_lists": 8})
    for option, (default, bound) in known.items():
        check_options(name, {option: default})
        with pytest.raises(RecipeError, match=rf"index\.options\.{option}s: unknown option.*did you mean '{option}'"):
            check_options(name, {f"{option}s": default})
        if isinstance(bound, tuple):
            with pytest.raises(RecipeError, match=rf"index\.options\.{option}: found 'int7'; did you mean 'int8'"):
                check_options(name, {option: "int7"})
            continue
        for value in (-1, 2.5, "8", True):
            with pytest.raises(RecipeError, match=rf"index\.options\.{option}: .* whole number"):
                check_options(name, {option: value})


def test_unknown_type() -> None:
    with pytest.raises(RecipeError, match="did you mean 'hnsw'"):
        index_class("hnws")


def masks(count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Passages that are allowed: all, most, a few, one, none."""
    rng = np.random.default_rng(7)
    return {
        "all": np.ones(count, dtype=bool),
        "most": rng.random(count) < 0.9,
        "few": rng.random(count) < 0.06,
        "one": np.arange(count) == count // 2,
        "none": np.zeros(count, dtype=bool),
    }


@every_index
@pytest.mark.parametrize("which", masks(1))
def test_only_what_is_allowed_is_found(build: Build, name: str, which: str) -> None:
    corpus = corpus_for(name)
    allowed = masks(NUM_PASSAGES)[which]
    index = build(name, corpus.passages)
    scores, rows = index.search(corpus.queries, 10, allowed=allowed)
    assert_well_formed(scores, rows, (NUM_QUERIES, 10), NUM_PASSAGES)
    assert allowed[rows[rows >= 0]].all()
    if which == "all":
        for left, right in zip(index.search(corpus.queries, 10), (scores, rows), strict=True):
            np.testing.assert_array_equal(left, right)
    # As many as there are, however few: an approximate index looks farther where less is allowed.
    there = np.minimum((corpus.scores > 0)[:, allowed].sum(axis=1) if takes_text(name) else allowed.sum(), 10)
    np.testing.assert_array_equal((rows >= 0).sum(axis=1), there)
    if allowed.sum() >= 10 and not takes_text(name):
        assert recall_of(rows, np.where(allowed, corpus.scores, -np.inf)) >= ROWS[name].recall


def test_a_graph_is_not_content_with_far_passages(build: Build) -> None:
    # All but the query's own cluster is allowed: more than a graph is left aside for, and nothing that its walk meets early.
    rng = np.random.default_rng(5)
    centres, cluster = vectors_of(10, 3), np.repeat(np.arange(10), 300)
    passages = centres[cluster] + 0.3 * rng.standard_normal((len(cluster), DIM)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    index = build("hnsw", passages, hnsw_neighbours=8, ef_search=16)
    for allowed in (cluster > 0, rng.random(len(cluster)) < 0.9):
        _, rows = index.search(passages[:20], 10, allowed=allowed)
        assert allowed[rows].all()
        assert recall_of(rows, np.where(allowed, passages[:20] @ passages.T, -np.inf)) >= 0.95


@pytest.mark.parametrize("name", ["ivf", "pq", "rabitq"])
def test_lists_find_what_is_allowed_far_from_the_query(build: Build, name: str) -> None:
    # The nearest lists hold nothing that is allowed: half of the clusters, the far one.
    rng = np.random.default_rng(5)
    centres, cluster = vectors_of(10, 3), np.repeat(np.arange(10), 300)
    passages = centres[cluster] + 0.1 * rng.standard_normal((len(cluster), DIM)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    allowed = np.isin(cluster, np.argsort(centres @ centres[0])[:5])
    _, rows = build(name, passages, num_lists=40, num_probes=4, rescore=20).search(passages[:20], 10, allowed=allowed)
    assert allowed[rows].all()
    assert recall_of(rows, np.where(allowed, passages[:20] @ passages.T, -np.inf)) >= 0.8


@every_index
def test_a_mask_of_another_corpus_is_refused(build: Build, name: str) -> None:
    corpus = corpus_for(name)
    index = build(name, corpus.passages)
    for mask in (np.ones(NUM_PASSAGES - 1, bool), np.ones(NUM_PASSAGES, np.int64)):
        with pytest.raises(ShapeError, match=r"allowed: .*bool \[300\]"):
            index.search(corpus.queries[:1], 3, allowed=mask)


def files_of(index: Path) -> list[Path]:
    return sorted(file for file in index.rglob("*") if file.is_file() and file.name != MANIFEST)


@every_index
def test_a_truncated_index_is_refused(build: Build, name: str, tmp_path: Path) -> None:
    build(name, corpus_for(name).passages)
    for file in files_of(tmp_path / "index"):
        whole = file.read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 1):
            file.unlink()  # linked vectors are those of the encode step
            file.write_bytes(whole[:length])
            for verify in ("full", "parsed"):
                with pytest.raises(ArtifactError, match=f"{file.name}: .*bytes, the manifest says"):
                    open_index(tmp_path / "index", verify=verify)  # type: ignore[arg-type]
        file.unlink()
        file.write_bytes(whole)
    open_index(tmp_path / "index")


@every_index
def test_an_index_with_changed_bytes_is_refused(build: Build, name: str, tmp_path: Path) -> None:
    build(name, corpus_for(name).passages)
    rng = np.random.default_rng(11)
    for file in files_of(tmp_path / "index"):
        whole = file.read_bytes()
        for _ in range(4):
            changed = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                changed[place] ^= int(rng.integers(1, 256))
            if changed == whole:
                continue
            file.unlink()
            file.write_bytes(changed)
            with pytest.raises(ArtifactError, match=f"{file.name}: its SHA-256"):
                open_index(tmp_path / "index")
            if file.name not in ("vectors.npy", "scales.npy"):
                with pytest.raises(ArtifactError, match=f"{file.name}: its SHA-256"):
                    open_index(tmp_path / "index", verify="parsed")
        file.unlink()
        file.write_bytes(whole)


@every_index_of_vectors
def test_vectors_of_another_corpus_are_refused(build: Build, name: str, tmp_path: Path) -> None:
    # Digests that fit: a folder put together by hand.
    build(name, vectors_of(NUM_PASSAGES, 1))
    other = build(name, vectors_of(NUM_PASSAGES + 5, 1), folder="other")
    info = json.loads((tmp_path / "index" / INFO).read_text(encoding="utf-8"))
    with build_artifact(tmp_path / "mixed", kind="index") as builder:
        shutil.copytree(other.folder, builder.work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        write_json(builder.work / INFO, info)
    with pytest.raises(ArtifactError, match=r"expected.*build_index"):
        open_index(tmp_path / "mixed")


def test_a_file_that_faiss_cannot_read_is_refused(tmp_path: Path) -> None:
    with build_artifact(tmp_path / "index", kind="index") as builder:
        (builder.work / "index.faiss").write_bytes(b"IxHJ nonsense")
        write_json(builder.work / INFO, {"type": "hnsw", "count": 5, "dim": 16})
    with pytest.raises(ArtifactError, match=r"index\.faiss: faiss .* cannot read it"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("info", [[], {}, {"type": 3}, "flat"])
def test_a_description_of_nothing_is_refused(tmp_path: Path, info: Any) -> None:
    with build_artifact(tmp_path / "index", kind="index") as builder:
        write_json(builder.work / INFO, info)
    with pytest.raises((ArtifactError, RecipeError), match=r"not readable|unknown index type"):
        open_index(tmp_path / "index")


@every_index_of_vectors
def test_vectors_that_are_not_searched_are_not_counted_as_memory(build: Build, name: str) -> None:
    index = build(name, vectors_of(NUM_PASSAGES, 1))
    searched = sum(file.stat().st_size for file in index.folder.iterdir() if file.is_file() and file.name not in (INFO, MANIFEST))
    assert index.info["resident_bytes"] == searched
    assert (index.folder / "rescoring").is_dir() == bool(ROWS[name].options.get("rescore", 4 if name == "rabitq" else 0))


def test_int8_halves_and_halves_again(build: Build) -> None:
    passages = vectors_of(1000, 1)
    sizes = {dtype: build("flat", passages, folder=dtype, dtype=dtype).info["resident_bytes"] for dtype in ("float32", "float16", "int8")}
    assert sizes["float32"] - 2 * 128 < 64_000
    assert abs(sizes["float32"] - 2 * sizes["float16"]) < 300
    assert abs(sizes["float16"] - 2 * sizes["int8"] + 2 * 4000) < 600  # a scale of four bytes a passage


def test_int8_vectors_are_rounded_by_their_own_greatest_number() -> None:
    codes, scales = rounded(np.array([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]], np.float32))
    np.testing.assert_array_equal(codes, [[127, -50, 0], [0, 0, 0]])
    np.testing.assert_allclose(scales, [0.01, 0.0], rtol=1e-6)


def test_a_cut_is_that_of_training() -> None:
    whole = vectors_of(9, 3)
    whole[4, :8] = 0
    for size in (1, 8, DIM):
        np.testing.assert_allclose(shortened(whole, size), cut(torch.from_numpy(whole), size).numpy(), rtol=1e-6)
    assert shortened(whole, 0).shape == (9, DIM)


def test_candidates_of_cut_vectors_are_scored_with_the_whole(build: Build) -> None:
    corpus = corpus_for("flat")
    _, rows = build("flat", corpus.passages, dim=8, rescore=30, rescore_dtype="float32").search(corpus.queries, 10)
    np.testing.assert_array_equal(rows, np.argsort(-corpus.scores, axis=1)[:, :10])


def test_vectors_that_are_cut_off_while_they_are_searched(build: Build) -> None:
    corpus = corpus_for("flat")
    index = build("flat", corpus.passages, rescore=3)
    index.search(corpus.queries[:1], 10)
    os.truncate(index.folder / "rescoring" / "vectors.npy", 200)
    with pytest.raises(ArtifactError, match=r"rescoring/vectors\.npy: shorter than it was"):
        index.search(corpus.queries[:1], 10)


def test_files_are_closed_with_the_index(build: Build) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        open_index(build("flat", vectors_of(5, 1), rescore=2).folder)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 10


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
        ("rabitq", {"num_probes": 5}, "num_probes: has no effect"),
        ("rabitq", {"bits": 10}, "bits: found 10; 9 at most"),
        ("flat", {"dim": 17}, "dim: 17 of vectors that have 16 numbers"),
    ],
)
def test_options_that_do_not_fit_the_corpus(build: Build, name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(name, vectors_of(NUM_PASSAGES, 1), **options)


@every_index_of_vectors
def test_built_block_by_block_it_is_the_same(build: Build, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_for(name)
    whole = build(name, corpus.passages).search(corpus.queries, 10)
    monkeypatch.setattr(vectors, "BLOCK_PASSAGES", 70)
    monkeypatch.setattr(vectors, "SAMPLED_AT_ONCE", 33)
    let_go: list[int] = []
    monkeypatch.setattr(vectors, "forget_pages", lambda mapping: let_go.append(mapping is not None))
    scores, rows = build(name, corpus.passages, folder="blocks").search(corpus.queries, 10)
    np.testing.assert_array_equal(rows, whole[1])
    np.testing.assert_allclose(scores, whole[0], atol=1e-6)  # a graph is searched along other ways
    # Whatever was copied out of the file of vectors, its pages were let go.
    linked = name == "flat"
    assert all(let_go)
    assert bool(let_go) != linked
