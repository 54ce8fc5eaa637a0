"""What must not count as a negative: relevant under another id, asked for by another query in the same words, or a teacher's favourite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.data.duplicates import Duplicates, normalised, text_digest
from simlm.data.false_negatives import TeacherMargin
from simlm.data.groups import TrainingGroups
from simlm.errors import DataError
from simlm.rankings import Groups, Run, offsets_of
from tests.conftest import build_store

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

# Passages 0 and 3 have the same text (titles do not count); so have queries 1 and 2.
PASSAGES = [
    {"_id": "p0", "title": "Kettle", "text": "It boils river  water."},
    {"_id": "p1", "title": "", "text": "It folds its own lamp."},
    {"_id": "p2", "title": "", "text": "It counts fallen leaves."},
    {"_id": "p3", "title": "", "text": "it boils RIVER water."},
    {"_id": "p4", "title": "", "text": "It turns very slowly."},
    {"_id": "p5", "title": "", "text": "It turns very fast."},
]
QUERIES = [{"_id": f"q{row}", "text": text} for row, text in enumerate(["what boils", "what folds", "What  folds", "what counts"])]
QRELS = {"train": [("q0", "p0", 1), ("q1", "p1", 1), ("q2", "p4", 1), ("q2", "p2", 0), ("q3", "p2", 1)]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Store:
    folder: Path = tmp_path_factory.mktemp("twins")
    return build_store(folder / "store", tiny_wordpiece, PASSAGES, QUERIES, QRELS)


def groups_of(negatives: list[int], scores: list[float] | None = None) -> Groups:
    """Four groups with one negative each; scores of the positives, then of the negatives."""
    scores = scores or [np.nan] * 8
    return Groups(
        "train",
        np.arange(4, dtype=np.int64),
        offsets_of([1] * 4),
        np.array([0, 1, 4, 2], dtype=np.int64),
        np.array(scores[:4], dtype=np.float32),
        offsets_of([1] * 4),
        np.array(negatives, dtype=np.int64),
        np.array(scores[4:], dtype=np.float32),
    )


def excluded(groups: Groups, **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    """For each query row: excluded passage rows other than its own positive (which never is a negative), and query rows it is not
    set against; sorted, each once."""
    training = TrainingGroups(groups, num_passages=6, group_size=2, queries_per_step=4, seed=3, **options)
    step = training.step(0)
    excluded_QP, excluded_QQ = training.excluded(step)
    passages = step.passage_rows.reshape(-1)
    order = np.argsort(step.query_rows)
    assert (excluded_QQ == excluded_QQ.T).all() and excluded_QQ.diagonal().all()
    return (
        [sorted(set(passages[excluded_QP[place]].tolist()) - {int(step.passage_rows[place, 0])}) for place in order],
        [sorted(step.query_rows[excluded_QQ[place]].tolist()) for place in order],
    )


def test_without_texts_only_ids_count(store: Store) -> None:
    assert excluded(groups_of([5, 5, 3, 5]), judged=store.qrels("train")) == ([[], [], [], []], [[0], [1], [2], [3]])


def test_the_text_of_a_relevant_passage_is_no_negative_and_twins_share_theirs(store: Store) -> None:
    groups = groups_of([5, 5, 3, 5])
    duplicates = Duplicates(store.passages, store.queries("train"), groups, store.qrels("train"))
    assert duplicates.facts() == {"num_passages_with_a_twin": 2, "num_queries_with_a_twin": 2}
    passages, queries = excluded(groups, judged=store.qrels("train"), duplicates=duplicates)
    # Query 2's negative is query 0's positive under another id; queries 1 and 2 have each other's positive.
    assert passages == [[3], [4], [1], []]
    assert queries == [[0], [1, 2], [1, 2], [3]]


def test_twins_share_what_only_the_groups_know(store: Store) -> None:
    groups = groups_of([5, 5, 3, 5])
    passages, queries = excluded(groups, duplicates=Duplicates(store.passages, store.queries("train"), groups))
    assert (passages, queries) == ([[3], [4], [1], []], [[0], [1, 2], [1, 2], [3]])


def test_passages_of_no_group_are_told_by_their_text_too(store: Store) -> None:
    groups = groups_of([5, 5, 5, 5])
    duplicates = Duplicates(store.passages, store.queries("train"), groups)
    first, third = duplicates.digests(np.array([0, 3], dtype=np.int64))
    assert first == third == int.from_bytes(text_digest("It boils river water."), "little")
    assert duplicates.positives_of_twins(0).tolist() == [] and duplicates.positives_of_twins(2).tolist() == [1, 4]


def test_texts_are_compared_normalised() -> None:
    assert normalised("\ufb01ne  Straße\n") == "fine strasse"
    assert text_digest("A b") == text_digest("a\u00a0B") != text_digest("ab")


def test_random_negatives_are_not_relevant_to_a_twin(store: Store) -> None:
    groups = groups_of([5, 5, 5, 5])
    bare = Groups(
        groups.split,
        groups.query_rows,
        groups.positive_offsets,
        groups.positive_rows,
        groups.positive_scores,
        offsets_of([0] * 4),
        np.empty(0, np.int64),
        np.empty(0, np.float32),
    )
    duplicates = Duplicates(store.passages, store.queries("train"), bare)
    training = TrainingGroups(bare, num_passages=6, group_size=5, queries_per_step=4, seed=3, duplicates=duplicates)
    assert sorted(training.choose(1, 0)[0][1:].tolist()) == [0, 2, 3, 5]


# Positives 0, 1, 4, 2 and negatives 1, 0, 5, 5.
SCORES = [5.0, 3.0, 2.0, 4.0, 4.5, 3.1, -1.0, 3.0]


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, [[], [0], [], []]),  # 3.1 > 3
        (0.5, [[], [0], [], []]),  # 4.5 is not above 5 - 0.5
        (0.6, [[1], [0], [], []]),
        (2.0, [[1], [0], [], [5]]),
        (99.0, [[1], [0], [5], [5]]),
    ],
)
def test_what_the_teacher_scores_within_the_margin_is_no_negative(margin: float, expected: list[list[int]]) -> None:
    groups = groups_of([1, 0, 5, 5], SCORES)
    passages, queries = excluded(groups, margin=TeacherMargin(margin, groups))
    assert passages == expected
    # Query 1 takes query 0's positive for relevant, so neither is set against the other in any direction.
    assert queries[0] == queries[1] == [0, 1]


def test_a_run_of_the_teacher_decides_where_the_scores_of_the_groups_are_the_miners() -> None:
    groups = groups_of([1, 0, 5, 5], [9.0] * 8)
    teacher = Run.from_lists("train", [2, 0, 1], [([4, 5], [2.0, 2.5]), ([0, 1], [5.0, 1.0]), ([0, 3], [9.0, 8.0])])
    margin = TeacherMargin(1.0, groups, teacher)
    assert margin.num_without == 2  # query 1, whose positive has no score, and query 3, which is not there
    assert excluded(groups, margin=margin)[0] == [[], [], [5], []]


def test_teachers_that_cannot_be_compared_are_refused() -> None:
    groups = groups_of([1, 0, 5, 5])
    with pytest.raises(DataError, match="all positives of none of the 4 training queries"):
        TeacherMargin(1.0, groups)
    with pytest.raises(DataError, match="1 of 2 teacher scores are not finite"):
        TeacherMargin(1.0, groups, Run.from_lists("train", [0], [([0, 1], [1.0, np.nan])]))
