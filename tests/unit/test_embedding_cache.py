"""The embedding cache: what it finds, what it must not find, kills, and how much room it takes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simlm.data import embedding_cache
from simlm.data.embedding_cache import ALL, EmbeddingCache, passage_keys
from simlm.data.store import Store
from simlm.errors import ArtifactError

DIM = 4
FLOAT = np.dtype(np.float32)


def unit(count: int, seed: int) -> np.ndarray[Any, Any]:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    unit_length: np.ndarray[Any, Any] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_length


def keys_of(*numbers: int) -> np.ndarray[Any, Any]:
    """Keys whose order is not that of the numbers."""
    return np.array([[(number * 0x9E3779B97F4A7C15) % 2**64, number] for number in numbers], dtype=np.uint64)


def fill(
    folder: Path, about: dict[str, Any], file: Path, numbers: list[int], vectors: np.ndarray[Any, Any], parts: int = 1
) -> EmbeddingCache:
    """What a step does: its vectors are written to `file` and added in parts."""
    segment = EmbeddingCache.new_segment(folder, about)
    np.save(file, vectors)
    cache = EmbeddingCache(folder, about, segment=segment, dim=DIM, dtype=FLOAT)
    cache.begin(file)
    for rows in np.array_split(np.arange(len(numbers)), parts):
        cache.add(int(rows[0]), keys_of(*[numbers[row] for row in rows]))
    return cache


def found_in(folder: Path, about: dict[str, Any], numbers: list[int]) -> tuple[list[bool], np.ndarray[Any, Any]]:
    cache = EmbeddingCache(folder, about, segment="new", dim=DIM, dtype=FLOAT)
    cache.folder.mkdir(parents=True, exist_ok=True)
    results = np.zeros((len(numbers), DIM), dtype=np.float32)
    return cache.find(keys_of(*numbers), results).tolist(), results


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_added_is_found(tmp_path: Path, finished: bool) -> None:
    vectors = unit(5, 1)
    cache = fill(tmp_path / "cache", {"m": 1}, tmp_path / "v.npy", [10, 11, 12, 13, 14], vectors, parts=3)
    if finished:
        assert cache.finish(tmp_path / "v.npy") > 0
        assert [file.name for file in cache.folder.glob("*/part-*")] == [ALL]
    found, results = found_in(tmp_path / "cache", {"m": 1}, [14, 9, 10, 12])
    assert found == [True, False, True, True]
    np.testing.assert_array_equal(results, np.stack([vectors[4], np.zeros(DIM, np.float32), vectors[0], vectors[2]]))
    assert found_in(tmp_path / "cache", {"m": 2}, [10]) == ([False], pytest.approx(np.zeros((1, DIM))))


def test_halves_of_keys_that_meet_are_told_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", unit(2, 1))
    cache = EmbeddingCache(tmp_path / "cache", {}, segment="0", dim=DIM, dtype=FLOAT)
    cache.begin(tmp_path / "v.npy")
    cache.add(0, np.array([[7, 1], [8, 2]], dtype=np.uint64))
    reader = EmbeddingCache(tmp_path / "cache", {}, segment="1", dim=DIM, dtype=FLOAT)
    wanted = np.array([[7, 2], [8, 1], [8, 2], [0, 0], [2**64 - 1, 5]], dtype=np.uint64)
    assert reader.find(wanted, np.zeros((5, DIM), np.float32)).tolist() == [False, False, True, False, False]


def test_a_try_does_not_read_itself(tmp_path: Path) -> None:
    cache = fill(tmp_path / "cache", {}, tmp_path / "v.npy", [1, 2], unit(2, 1))
    assert not cache.find(keys_of(1, 2), np.zeros((2, DIM), np.float32)).any()
    assert EmbeddingCache.new_segment(tmp_path / "cache", {}) == "000001"


def test_a_vector_that_was_never_written_is_not_trusted(tmp_path: Path) -> None:
    vectors = unit(2, 1)
    vectors[1] = 0
    fill(tmp_path / "cache", {}, tmp_path / "v.npy", [1, 2], vectors)
    assert found_in(tmp_path / "cache", {}, [1, 2])[0] == [True, False]


def test_half_precision(tmp_path: Path) -> None:
    half = np.dtype(np.float16)
    np.save(tmp_path / "v.npy", unit(3, 1).astype(half))
    cache = EmbeddingCache(tmp_path / "cache", {}, segment="0", dim=DIM, dtype=half)
    cache.begin(tmp_path / "v.npy")
    cache.add(0, keys_of(1, 2, 3))
    results = np.zeros((1, DIM), dtype=np.float32)
    assert EmbeddingCache(tmp_path / "cache", {}, segment="1", dim=DIM, dtype=half).find(keys_of(3), results).all()
    np.testing.assert_array_equal(results[0], unit(3, 1)[2].astype(half).astype(np.float32))


def test_a_part_being_written_is_left_out_and_taken_up_again(tmp_path: Path) -> None:
    cache = fill(tmp_path / "cache", {}, tmp_path / "v.npy", [1, 2], unit(2, 1))
    (cache.folder / "000000" / ".part-000000000002.npy.tmp").write_bytes(b"\x93NUMPY torn")
    assert found_in(tmp_path / "cache", {}, [1, 2, 3])[0] == [True, True, False]
    again = EmbeddingCache(tmp_path / "cache", {}, segment="000000", dim=DIM, dtype=FLOAT)
    again.begin(tmp_path / "v.npy")
    again.finish(tmp_path / "v.npy")
    assert found_in(tmp_path / "cache", {}, [1, 2, 3])[0] == [True, True, False]


def test_killed_between_the_joined_part_and_the_deletion_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fill(tmp_path / "cache", {}, tmp_path / "v.npy", [1, 2, 3], unit(3, 1), parts=3)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.finish(tmp_path / "v.npy")
    assert len(list(cache.folder.glob("*/part-*"))) == 4
    cache.finish(tmp_path / "v.npy")
    (part,) = cache.folder.glob("*/part-*")
    assert np.load(part).shape == (3, 3)
    np.testing.assert_array_equal(found_in(tmp_path / "cache", {}, [3, 2, 1])[1], unit(3, 1)[::-1])


def disk_bytes(folder: Path) -> int:
    """Of files that are there once, whatever their number of names."""
    inodes = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return sum(inodes.values())


def test_vectors_take_their_room_once(tmp_path: Path) -> None:
    cache = fill(tmp_path / "cache", {}, tmp_path / "v.npy", list(range(2000)), unit(2000, 1))
    extra = cache.finish(tmp_path / "v.npy")
    assert extra == disk_bytes(tmp_path) - (tmp_path / "v.npy").stat().st_size
    assert extra < 2000 * 24 + 1000
    # The artifact is made again with 100 more: the first file is covered by the second, and goes.
    (tmp_path / "v.npy").unlink()
    cache = fill(tmp_path / "cache", {}, tmp_path / "w.npy", list(range(2100)), unit(2100, 2))
    assert cache.finish(tmp_path / "w.npy") < 2100 * 24 + 1000
    assert disk_bytes(tmp_path) < (tmp_path / "w.npy").stat().st_size + 2100 * 24 + 1000
    assert len(list(cache.folder.glob("*/vectors.npy"))) == 1


def test_what_a_newer_segment_lacks_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_cache, "BLOCK_ROWS", 3)
    first = unit(10, 1)
    fill(tmp_path / "cache", {}, tmp_path / "v.npy", list(range(10)), first).finish(tmp_path / "v.npy")
    (tmp_path / "v.npy").unlink()
    # 0..3 are gone from the corpus: less than half of the first file is still needed, so that part is copied.
    second = unit(8, 2)
    cache = fill(tmp_path / "cache", {}, tmp_path / "w.npy", list(range(4, 12)), second)
    cache.finish(tmp_path / "w.npy")
    assert sorted(len(np.load(file)) for file in cache.folder.glob("*/vectors.npy")) == [4, 8]
    found, results = found_in(tmp_path / "cache", {}, [3, 0, 4, 11, 12])
    assert found == [True, True, True, True, False]
    np.testing.assert_array_equal(results[:2], first[[3, 0]])
    np.testing.assert_array_equal(results[2:4], second[[0, 7]])
    # Most of a file is still needed: it stays as it is.
    cache = fill(tmp_path / "cache", {}, tmp_path / "x.npy", [20], unit(1, 3))
    cache.finish(tmp_path / "x.npy")
    assert sorted(len(np.load(file)) for file in cache.folder.glob("*/vectors.npy")) == [1, 4, 8]
    assert found_in(tmp_path / "cache", {}, [3, 4, 20])[0] == [True, True, True]


def test_the_last_two_models_are_kept(tmp_path: Path) -> None:
    for time, model in enumerate("abca"):
        cache = fill(tmp_path / "cache", {"model": model}, tmp_path / f"{time}.npy", [1], unit(1, time))
        os.utime(cache.folder / "about.json", (time, time))
        cache.finish(tmp_path / f"{time}.npy")
    assert [found_in(tmp_path / "cache", {"model": model}, [1])[0] for model in "abc"] == [[True], [False], [True]]


def test_a_disk_that_cannot_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    vectors = unit(300, 1)
    cache = fill(tmp_path / "cache", {}, tmp_path / "v.npy", list(range(300)), vectors)
    # Killed now, nothing of it counts: the vectors are not in the cache yet.
    assert found_in(tmp_path / "cache", {}, [1])[0] == [False]
    assert cache.finish(tmp_path / "v.npy") > 300 * DIM * 4
    np.testing.assert_array_equal(found_in(tmp_path / "cache", {}, [299, 5])[1], vectors[[299, 5]])


@pytest.mark.parametrize("damage", ["shorter", "wider", "rows"])
def test_a_damaged_segment_is_refused(tmp_path: Path, damage: str) -> None:
    cache = fill(tmp_path / "cache", {}, tmp_path / "v.npy", [1, 2], unit(2, 1))
    file = cache.folder / "000000" / "vectors.npy"
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "wider":
        file.unlink()
        np.save(file, np.zeros((2, DIM + 1), np.float32))
    else:
        file.unlink()
        np.save(file, unit(1, 1))
    with pytest.raises(ArtifactError, match=r"000000: this part of the embedding cache is damaged .*delete the folder"):
        found_in(tmp_path / "cache", {}, [1])


def test_keys_of_passages(tiny_store: Store, tmp_path: Path) -> None:
    table = tiny_store.passages
    keys = passage_keys(table, 0, 60)
    assert keys.shape == (60, 2) and len(np.unique(keys, axis=0)) == 60
    np.testing.assert_array_equal(passage_keys(table, 17, 23), keys[17:23])
    assert passage_keys(table, 5, 5).shape == (0, 2)


def test_title_and_text_are_told_apart(tmp_path: Path, tiny_wordpiece: Any) -> None:
    from tests.conftest import build_store

    passages = [
        {"_id": "a", "title": "granite", "text": "kettle"},
        {"_id": "b", "title": "", "text": "granite kettle"},
        {"_id": "c", "title": "granite", "text": "kettle"},
    ]
    queries = [{"_id": "q", "text": "kettle"}]
    store = build_store(tmp_path / "store", tiny_wordpiece, passages, queries, {"test": [("q", "a", 1)]})
    a, b, c = passage_keys(store.passages, 0, 3).tolist()
    assert a == c != b
    shutil.rmtree(tmp_path / "store")
