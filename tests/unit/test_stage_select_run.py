"""select_run: the best on dev; without dev the last; never by the test queries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.artifacts import build_artifact, open_artifact
from simlm.errors import ArtifactError
from simlm.progress import Progress
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings
from simlm.stages import Context, select_run
from simlm.types import Split

if TYPE_CHECKING:
    from simlm.data.store import Store


def make_run(path: Path, store: Store, ranks: dict[Split, int], **facts: Any) -> Path:
    """A run with the answer of every query at this rank of each split."""
    with build_artifact(path, kind="run") as builder:
        for split, rank in ranks.items():
            lists = []
            for query, grades in store.qrels(split).items():
                answer = next(row for row, grade in grades.items() if grade > 0)
                others = [row for row in range(20) if row not in grades][: rank - 1]
                lists.append(([*others, answer, 59 - query], [float(-place) for place in range(rank + 1)]))
            Run.from_lists(split, range(len(lists)), lists).save(builder.work)
        builder.facts.update(facts)
    return path


def select(path: Path, store: Store, runs: dict[str, Path], **settings: Any) -> dict[str, Any]:
    inputs = {"store": store.path} | {f"run.{name}": run for name, run in runs.items()}
    with build_artifact(path, kind="run") as builder:
        select_run.run(EvaluateSettings(**settings), inputs, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def assert_copied(path: Path, source: Path, splits: list[Split]) -> None:
    assert sorted(entry.name for entry in open_artifact(path, "run").path.iterdir() if entry.is_dir()) == sorted(splits)
    for split in splits:
        for name in ("query_rows", "offsets", "passage_rows", "scores"):
            np.testing.assert_array_equal(np.load(path / split / f"{name}.npy"), np.load(source / split / f"{name}.npy"))


def test_the_best_on_dev_whatever_the_test_queries_say(tmp_path: Path, tiny_store: Store) -> None:
    runs = {
        "bm25": make_run(tmp_path / "a", tiny_store, {"dev": 4, "test": 1}, index_type="bm25"),
        "retriever1": make_run(tmp_path / "b", tiny_store, {"dev": 2, "test": 5}, index_type="flat", milliseconds_per_query=3.5),
        "retriever2": make_run(tmp_path / "c", tiny_store, {"dev": 3, "test": 1}, index_type="flat"),
    }
    facts = select(tmp_path / "best", tiny_store, runs)
    assert facts["selected"] == "retriever1"
    assert facts["selected_by"] == "RR@10"
    assert facts["dev_values"] == pytest.approx({"bm25": 1 / 4, "retriever1": 1 / 2, "retriever2": 1 / 3})
    # What the chosen run says of itself goes along.
    assert (facts["index_type"], facts["milliseconds_per_query"]) == ("flat", 3.5)
    assert_copied(tmp_path / "best", tmp_path / "b", ["dev", "test"])


def test_by_the_main_measure(tmp_path: Path, tiny_store: Store) -> None:
    # R@3 sees no difference between ranks 1 and 3, so the later is taken.
    runs = {name: make_run(tmp_path / name, tiny_store, {"dev": rank}) for name, rank in (("first", 1), ("third", 3), ("fourth", 4))}
    assert select(tmp_path / "rr", tiny_store, runs)["selected"] == "first"
    facts = select(tmp_path / "recall", tiny_store, runs, main="R@3")
    assert (facts["selected"], facts["selected_by"]) == ("third", "R@3")
    assert facts["dev_values"] == {"first": 1.0, "third": 1.0, "fourth": 0.0}


@pytest.mark.parametrize("with_dev", [[], ["bm25"], ["bm25", "retriever1"]])
def test_without_dev_in_every_run_the_last(tmp_path: Path, tiny_store: Store, with_dev: list[str]) -> None:
    runs = {}
    for rank, name in enumerate(("bm25", "retriever1", "retriever2"), start=1):
        ranks: dict[Split, int] = {"dev": rank, "test": rank} if name in with_dev else {"test": rank}
        runs[name] = make_run(tmp_path / name, tiny_store, ranks)
    facts = select(tmp_path / "best", tiny_store, runs)
    assert (facts["selected"], facts["selected_by"], facts["dev_values"]) == ("retriever2", None, {})
    assert_copied(tmp_path / "best", tmp_path / "retriever2", ["test"])


def test_one_run(tmp_path: Path, tiny_store: Store) -> None:
    facts = select(tmp_path / "best", tiny_store, {"bm25": make_run(tmp_path / "bm25", tiny_store, {"dev": 2})})
    assert facts["selected"] == "bm25"
    assert_copied(tmp_path / "best", tmp_path / "bm25", ["dev"])


def test_a_run_without_splits_is_refused(tmp_path: Path, tiny_store: Store) -> None:
    with pytest.raises(ArtifactError, match="holds no run of any split"):
        select(tmp_path / "best", tiny_store, {"bm25": make_run(tmp_path / "bm25", tiny_store, {})})
