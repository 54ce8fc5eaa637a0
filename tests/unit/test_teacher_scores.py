"""The store of teachers' scores: every value comes back, a torn file costs its own pairs only, and keys tell teachers apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simlm.data import teacher_scores
from simlm.data.teacher_scores import FANOUT, Teacher, TeacherScores, pair_keys, teachers_of
from simlm.errors import ArtifactError, DataError, DiskError, ShapeError

TEACHER = Teacher("reranker", weights="w", tokenizer="", max_pair_tokens=192, precision="fp32", store="s")


def rows(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_keys_order_by_split_query_and_passage() -> None:
    assert pair_keys("train", rows(0), rows(7)).tolist() == [7]
    assert pair_keys("train", rows(3), rows(7)).tolist() == [3 * 2**32 + 7]
    assert pair_keys("dev", rows(3), rows(7)).tolist() == [2**62 + 3 * 2**32 + 7]
    assert pair_keys("test", rows(2**30 - 1), rows(2**32 - 1)).tolist() == [2**63 + 2**62 - 1]
    assert pair_keys("test", rows(), rows()).tolist() == []


@pytest.mark.parametrize(("queries", "passages"), [([2**30], [0]), ([0], [2**32]), ([-1], [0]), ([0], [-1]), ([0, 1], [0])])
def test_rows_that_no_key_can_hold(queries: list[int], passages: list[int]) -> None:
    with pytest.raises(ShapeError):
        pair_keys("train", rows(*queries), rows(*passages))


def test_what_was_kept_is_found_in_any_order(tmp_path: Path) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    assert np.isnan(scores.find("train", rows(1, 2), rows(3, 4))).all()
    assert scores.append("train", rows(5, 1, 1), rows(0, 9, 2), floats(0.5, -8.25, 3.0)) == 3
    assert scores.append("test", rows(1), rows(2), floats(7.0)) == 1
    for one in (scores, TeacherScores(scores.folder), TeacherScores.open(tmp_path, TEACHER)):
        found = one.find("train", rows(1, 5, 1, 1, 6, 5), rows(2, 0, 9, 3, 0, 1))
        np.testing.assert_array_equal(found, floats(3.0, 0.5, -8.25, np.nan, np.nan, np.nan))
        assert one.find("test", rows(1), rows(2)).tolist() == [7.0]
        assert np.isnan(one.find("dev", rows(1), rows(2))[0])
        assert (len(one), one.num_queries(), one.dropped) == (4, {"train": 2, "test": 1}, [])
        assert one.find("dev", rows(), rows()).shape == (0,)


def test_a_known_pair_is_not_kept_again(tmp_path: Path) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    assert scores.append("train", rows(1, 1, 2), rows(4, 4, 4), floats(1.0, 2.0, 3.0)) == 2
    assert scores.append("train", rows(1, 2), rows(4, 5), floats(9.0, 4.0)) == 1
    assert scores.append("train", rows(1), rows(4), floats(9.0)) == 0
    assert scores.find("train", rows(1, 2, 2), rows(4, 4, 5)).tolist() == [1.0, 3.0, 4.0]
    assert (len(scores), scores.num_segments) == (3, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_and_nothing_is_kept(tmp_path: Path, value: float) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    with pytest.raises(DataError, match="1 teacher scores are not finite numbers, the first is of dev query row 2 with passage row 4"):
        scores.append("dev", rows(1, 2), rows(3, 4), floats(1.0, value))
    assert len(TeacherScores(scores.folder)) == 0
    with pytest.raises(ShapeError, match="1 scores for 2 pairs"):
        scores.append("dev", rows(1, 2), rows(3, 4), floats(1.0))


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "keys", "scores", "empty"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_damaged_segment_costs_its_own_pairs_only(tmp_path: Path, damage: str, place: int) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    for query in range(3):
        scores.append("train", rows(query, query), rows(1, 2), floats(query, -query))
    path = sorted(scores.folder.glob("*.scores"))[place]
    data = bytearray(path.read_bytes())
    changed = {
        "cut": data[:-1],
        "longer": data + b"\0",
        "header": b"X" + data[1:],
        "keys": data[:24] + bytes([data[24] ^ 1]) + data[25:],
        "scores": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
    }[damage]
    path.write_bytes(changed)
    seen = TeacherScores(scores.folder)
    assert seen.dropped == [path.name] and path.exists()  # a reader touches nothing
    again = TeacherScores.open(tmp_path, TEACHER)
    assert again.dropped == [path.name] and not path.exists()
    found = again.find("train", rows(0, 1, 2), rows(1, 1, 1))
    assert np.isnan(found).tolist() == [query == place for query in range(3)]
    assert again.append("train", rows(place), rows(1), floats(5.0)) == 1
    assert TeacherScores.open(tmp_path, TEACHER).find("train", rows(place), rows(1)).tolist() == [5.0]


def test_half_a_write_is_no_segment(tmp_path: Path) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    scores.append("train", rows(1), rows(2), floats(3.0))
    (scores.folder / "00000001-00000001.tmp").write_bytes(b"SIMLMPS1half")
    assert len(TeacherScores(scores.folder)) == 1
    TeacherScores.open(tmp_path, TEACHER)
    assert not list(scores.folder.glob("*.tmp"))


KILLED = """
import sys
from pathlib import Path
import numpy as np
from simlm.data.teacher_scores import Teacher, TeacherScores
scores = TeacherScores.open(Path(sys.argv[1]), Teacher("reranker", "w", "", 192, "fp32", "s"))
for query in range(10**6):
    passages = np.arange(2000)
    scores.append("train", np.full(2000, query), passages, (passages + query).astype(np.float32))
    print(query, flush=True)
"""


def test_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    for number, lines in enumerate((3, 9, 20)):  # merges happen after 8 and 16
        root = tmp_path / str(number)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        done = [int(process.stdout.readline()) for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        scores = TeacherScores.open(root, TEACHER)
        for query in done:
            np.testing.assert_array_equal(scores.find("train", np.full(2000, query), np.arange(2000)), np.arange(2000) + np.float32(query))


def test_many_segments_become_few_and_keep_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_scores, "BLOCK_PAIRS", 7)
    scores = TeacherScores.open(tmp_path, TEACHER)
    rng = np.random.default_rng(0)
    pairs = rng.permutation(200 * 40)
    values = rng.standard_normal(len(pairs)).astype(np.float32)
    for part in np.array_split(np.arange(len(pairs)), FANOUT**2 + 3):  # keys of all segments lie in each other's range
        scores.append("dev", pairs[part] // 40, pairs[part] % 40, values[part])
    assert scores.num_segments == 4  # one of 64 appends, three of one
    assert len(list(scores.folder.glob("*.scores"))) == 4
    for one in (scores, TeacherScores(scores.folder)):
        np.testing.assert_array_equal(one.find("dev", pairs // 40, pairs % 40), values)
        assert len(one) == 8000
    assert scores.num_bytes <= 8000 * 12 + 4 * 24 + 400


def test_killed_between_a_merge_and_the_removal_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    for query in range(FANOUT - 1):
        scores.append("train", rows(query), rows(0), floats(query))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scores.append("train", rows(FANOUT - 1), rows(0), floats(FANOUT - 1))
    assert len(list(scores.folder.glob("*.scores"))) == FANOUT + 1
    assert len(TeacherScores(scores.folder)) == FANOUT
    again = TeacherScores.open(tmp_path, TEACHER)
    assert (len(again), again.num_segments, len(list(again.folder.glob("*.scores")))) == (FANOUT, 1, 1)
    assert again.find("train", np.arange(FANOUT), np.zeros(FANOUT, np.int64)).tolist() == list(range(FANOUT))


@pytest.mark.parametrize(
    "change", [{"weights": "v"}, {"tokenizer": "t"}, {"max_pair_tokens": 128}, {"precision": "bf16"}, {"store": "other"}]
)
def test_whatever_changes_a_score_is_in_the_key(tmp_path: Path, change: dict[str, str]) -> None:
    TeacherScores.open(tmp_path, TEACHER).append("train", rows(1), rows(2), floats(3.0))
    other = replace(TEACHER, **change)  # type: ignore[arg-type]
    assert other.key != TEACHER.key
    assert np.isnan(TeacherScores.open(tmp_path, other).find("train", rows(1), rows(2))[0])


def test_the_name_is_not_in_the_key_and_is_that_of_the_last_use(tmp_path: Path) -> None:
    TeacherScores.open(tmp_path, TEACHER).append("train", rows(1), rows(2), floats(3.0))
    moved = TeacherScores.open(tmp_path, replace(TEACHER, name="moved"))
    assert moved.find("train", rows(1), rows(2)).tolist() == [3.0]
    assert [scores.teacher.name for scores in teachers_of(tmp_path)] == ["moved"]


def test_what_holds_no_scores(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no teacher's scores yet"):
        teachers_of(tmp_path / "pair_scores")
    with pytest.raises(ArtifactError, match=r"no teacher\.json here"):
        TeacherScores(tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps({"name": "x"}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"teacher\.json: not readable"):
        TeacherScores(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiskError):
        TeacherScores.open(tmp_path / "file", TEACHER)


def test_quantiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = TeacherScores.open(tmp_path, TEACHER)
    assert scores.quantiles([0.5]) == []
    scores.append("train", np.zeros(50, np.int64), np.arange(50), np.arange(50, dtype=np.float32))
    scores.append("train", np.zeros(51, np.int64), np.arange(50, 101), np.arange(50, 101, dtype=np.float32))
    assert scores.quantiles([0.0, 0.05, 0.5, 1.0]) == [0.0, 5.0, 50.0, 100.0]
    monkeypatch.setattr(teacher_scores, "SAMPLED", 10)
    assert scores.quantiles([0.5])[0] == pytest.approx(50.0, abs=10)


def test_memory_does_not_grow_with_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_scores, "BLOCK_PAIRS", 10_000)
    scores = TeacherScores.open(tmp_path, TEACHER)
    passages = np.arange(2000)
    tracemalloc.start()
    for first in range(0, 16 * 50, 50):  # 1.6 million pairs, 19 MB, merged twice
        scores.append("train", np.repeat(np.arange(first, first + 50), 2000), np.tile(passages, 50), np.ones(100_000, np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scores.num_segments == 2
    assert peak < 12 << 20  # an append of 100,000 pairs itself takes some 8 MB
