"""mine_negatives: what is left out, in which order, and what is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.artifacts import ArtifactBuilder, build_artifact, open_artifact, read_manifest
from simlm.data.duplicates import normalised
from simlm.errors import ArtifactError, DataError, RecipeError
from simlm.progress import Progress
from simlm.rankings import Groups, Run
from simlm.recipe import MiningSettings
from simlm.stages import Context, mine_negatives
from simlm.stages.mine_negatives import mine
from simlm.types import Split
from tests.conftest import build_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

Facts = dict[str, Any]


def made_run(lists: dict[int, list[int]], scores: dict[int, list[float]] | None = None) -> Run:
    """A run of made lists, query -> passages best first, with scores 10, 9, 8 ... unless given."""
    given = scores or {query: [10.0 - rank for rank in range(len(rows))] for query, rows in lists.items()}
    return Run.from_lists("train", list(lists), [(rows, given[query]) for query, rows in lists.items()])


def teacher_of(scores: dict[int, dict[int, float]]) -> Run:
    """Query -> passage -> logit."""
    return Run.from_lists("train", list(scores), [(list(of_query), list(of_query.values())) for of_query in scores.values()])


def mined(
    lists: dict[int, list[int]],
    qrels: dict[int, dict[int, int]],
    *,
    scores: dict[int, list[float]] | None = None,
    copies: dict[int, int] | None = None,
    teacher: Run | None = None,
    **settings: Any,
) -> tuple[Groups, Facts]:
    """Groups of one made run. copies: passage -> passage of equal text."""
    return mixed({"run": made_run(lists, scores)}, qrels, copies=copies, teacher=teacher, **settings)


def mixed(
    runs: dict[str, Run],
    qrels: dict[int, dict[int, int]],
    *,
    copies: dict[int, int] | None = None,
    teacher: Run | None = None,
    **settings: Any,
) -> tuple[Groups, Facts]:
    def digests(rows: Any) -> Any:
        return np.array([(copies or {}).get(int(row), int(row)) for row in rows], dtype=np.uint64)

    return mine(runs, qrels, digests, MiningSettings(**settings), teacher=teacher, query_id=lambda row: f"q{row}")


def negatives_of(groups: Groups) -> dict[int, list[int]]:
    return {int(query): groups.negatives(place)[0].tolist() for place, query in enumerate(groups.query_rows)}


def positives_of(groups: Groups) -> dict[int, list[int]]:
    return {int(query): groups.positives(place)[0].tolist() for place, query in enumerate(groups.query_rows)}


def test_positives_are_left_out_and_scores_kept() -> None:
    groups, facts = mined({4: [7, 2, 9, 3], 0: [1, 5]}, {4: {9: 1, 2: 2}, 0: {8: 1}})
    assert groups.split == "train"
    assert groups.query_rows.tolist() == [4, 0]
    assert positives_of(groups) == {4: [2, 9], 0: [8]}
    assert negatives_of(groups) == {4: [7, 3], 0: [1, 5]}
    assert groups.positives(0)[1].tolist() == [9.0, 8.0]
    assert np.isnan(groups.positives(1)[1]).all()  # not in the run
    assert groups.negatives(0)[1].tolist() == [10.0, 7.0]
    assert facts == {
        "num_queries": 2,
        "num_groups": 2,
        "num_negatives": 4,
        "negatives_per_query": 2.0,
        "num_positives_left_out": 2,
        "num_copies_left_out": 0,
        "num_skipped_top": 0,
        "num_beyond_limit": 0,
        "num_without_positive": 0,
        "num_without_negatives": 0,
        "positive_in_run": 0.5,
    }


def test_judged_not_relevant_is_a_negative() -> None:
    groups, _ = mined({0: [7, 2, 3]}, {0: {9: 1, 2: 0, 3: -1}})
    assert positives_of(groups) == {0: [9]}
    assert negatives_of(groups) == {0: [7, 2, 3]}


def test_copies_of_a_positive_are_left_out() -> None:
    # 3 has the text of 9; 5 and 7 have one text too, but not a positive's. A judged copy is a positive, and counted as such.
    groups, facts = mined({0: [3, 5, 7, 9]}, {0: {9: 1}}, copies={3: 9, 7: 5})
    assert negatives_of(groups) == {0: [5, 7]}
    assert (facts["num_positives_left_out"], facts["num_copies_left_out"]) == (1, 1)
    groups, facts = mined({0: [3, 5]}, {0: {9: 1, 3: 1}}, copies={3: 9})
    assert negatives_of(groups) == {0: [5]}
    assert (facts["num_positives_left_out"], facts["num_copies_left_out"]) == (1, 0)


def test_depth_then_skip_top_then_num_negatives() -> None:
    run = {0: [9, 1, 2, 3, 4, 5, 6]}
    qrels = {0: {9: 1}}
    assert negatives_of(mined(run, qrels, depth=4)[0]) == {0: [1, 2, 3]}
    assert negatives_of(mined(run, qrels, skip_top=2)[0]) == {0: [3, 4, 5, 6]}  # of the candidates, positives not counted
    assert negatives_of(mined(run, qrels, num_negatives=2)[0]) == {0: [1, 2]}
    groups, facts = mined(run, qrels, depth=6, skip_top=1, num_negatives=3)
    assert negatives_of(groups) == {0: [2, 3, 4]}
    assert (facts["num_skipped_top"], facts["num_beyond_limit"]) == (1, 1)
    assert mined({0: [9, 1]}, qrels, skip_top=5)[1]["num_skipped_top"] == 1  # no more than there are


def test_below_a_share_of_the_positive() -> None:
    # The positive scores 8: 0.95 of it is 7.6, which a negative may reach.
    scores = {0: [10.0, 8.0, 7.7, 7.6, 7.5]}
    groups, facts = mined({0: [1, 9, 2, 3, 4]}, {0: {9: 1}}, scores=scores, below_positive=0.95)
    assert negatives_of(groups) == {0: [3, 4]}
    assert (facts["num_above_ceiling"], facts["num_without_ceiling"]) == (2, 0)


def test_the_lowest_of_several_positives_counts() -> None:
    scores = {0: [10.0, 8.0, 6.0, 5.0, 4.0]}
    groups, _ = mined({0: [9, 1, 8, 2, 3]}, {0: {8: 1, 9: 1}}, scores=scores, below_positive=1.0)
    assert negatives_of(groups) == {0: [2, 3]}


def test_negative_scores_have_a_ceiling_below_the_positive() -> None:
    # -2 lowered by a twentieth of its size: -2.1.
    scores = {0: [-1.0, -2.0, -2.05, -2.2]}
    groups, _ = mined({0: [1, 9, 2, 3]}, {0: {9: 1}}, scores=scores, below_positive=0.95)
    assert negatives_of(groups) == {0: [3]}


def test_a_positive_below_the_depth_still_sets_the_ceiling() -> None:
    groups, _ = mined({0: [1, 2, 3, 9]}, {0: {9: 1}}, depth=3, below_positive=1.2)
    # Scores 10, 9, 8, and 7 of the positive: 8.4.
    assert negatives_of(groups) == {0: [3]}


def test_without_a_positive_in_the_run_there_is_no_ceiling() -> None:
    groups, facts = mined({0: [1, 2], 1: [3, 9]}, {0: {9: 1}, 1: {9: 1}}, below_positive=0.5)
    assert negatives_of(groups) == {0: [1, 2]}  # query 1 has nothing below 4.5
    assert (facts["num_without_ceiling"], facts["num_above_ceiling"], facts["num_without_negatives"]) == (1, 1, 1)


def test_ceiling_follows_skip_top() -> None:
    groups, _ = mined({0: [1, 2, 9, 3, 4]}, {0: {9: 1}}, skip_top=3, below_positive=1.0)
    assert negatives_of(groups) == {0: [4]}  # 1, 2 and 3 are skipped first


# --- the teacher


TAUGHT = {0: {9: 4.0, 8: 3.0, 1: 5.0, 2: 2.5, 3: 1.9}}
"""Positives 9 and 8; candidate 4 has no score."""


def test_above_the_teachers_margin() -> None:
    # The lowest positive has 3.0: with margin 1 a candidate may score 2.0.
    run, qrels = {0: [9, 1, 2, 8, 3, 4]}, {0: {9: 1, 8: 1}}
    groups, facts = mined(run, qrels, teacher=teacher_of(TAUGHT), teacher_margin=1.0)
    assert negatives_of(groups) == {0: [3, 4]}
    assert groups.negatives(0)[1].tolist() == [6.0, 5.0]  # the miner's scores stay
    assert (facts["num_above_teacher"], facts["num_unscored"], facts["num_unscored_dropped"]) == (2, 1, 0)
    groups, facts = mined(run, qrels, teacher=teacher_of(TAUGHT), teacher_margin=1.0, teacher_unscored="drop")
    assert negatives_of(groups) == {0: [3]}
    assert (facts["num_above_teacher"], facts["num_unscored"], facts["num_unscored_dropped"]) == (2, 1, 1)


@pytest.mark.parametrize(("margin", "left"), [(0.5, [2, 3, 4]), (0.51, [3, 4]), (-2.0, [1, 2, 3, 4]), (2.0, [4])])
def test_a_teachers_margin_may_be_reached(margin: float, left: list[int]) -> None:
    groups, _ = mined({0: [9, 1, 2, 8, 3, 4]}, {0: {9: 1, 8: 1}}, teacher=teacher_of(TAUGHT), teacher_margin=margin)
    assert negatives_of(groups) == {0: left}


def test_a_teacher_that_knows_one_of_the_positives_is_enough() -> None:
    groups, _ = mined({0: [1, 2]}, {0: {9: 1, 7: 1}}, teacher=teacher_of({0: {9: 2.0, 1: 3.0, 2: 1.0}}), teacher_margin=0.0)
    assert negatives_of(groups) == {0: [2]}


def test_a_teacher_without_scores_for_the_positives_is_refused() -> None:
    lists, qrels = {0: [1, 2], 3: [1, 2], 4: [9]}, {0: {9: 1}, 3: {9: 1}, 4: {9: 1}}
    with pytest.raises(DataError, match=r"relevant passages of 2 training queries \(q0, q3\)"):  # 4 has no candidate anyway
        mined(lists, qrels, teacher=teacher_of({0: {1: 2.0}}), teacher_margin=0.0)
    with pytest.raises(DataError, match="1 teacher scores are not finite"):
        mined(lists, qrels, teacher=teacher_of({0: {1: float("nan"), 9: 1.0}}), teacher_margin=0.0)


def test_the_teacher_may_leave_nothing_of_a_query() -> None:
    groups, facts = mined(
        {0: [1, 2], 3: [5]}, {0: {9: 1}, 3: {9: 1}}, teacher=teacher_of({0: {9: 0.0, 1: 1.0, 2: 2.0}, 3: {9: 0.0}}), teacher_margin=0.0
    )
    assert negatives_of(groups) == {3: [5]}
    assert (facts["num_without_negatives"], facts["num_above_teacher"]) == (1, 2)


# --- several runs


def sources_of(groups: Groups, place: int = 0) -> list[int]:
    assert groups.negative_sources is not None
    return groups.negative_sources[groups.negative_offsets[place] : groups.negative_offsets[place + 1]].tolist()


def test_runs_are_interleaved_by_their_shares() -> None:
    runs = {"bm25": made_run({0: [1, 2, 3]}), "dense": made_run({0: [11, 12, 13, 14, 15, 16, 17, 18]})}
    groups, facts = mixed(runs, {0: {9: 1}}, mix={"bm25": 0.25, "dense": 0.75})
    # dense falls due at 4/3, 8/3, 4, 16/3, 20/3, 8 ..., bm25 at 4, 8, 12.
    assert negatives_of(groups) == {0: [11, 12, 1, 13, 14, 15, 2, 16, 17, 18, 3]}
    assert sources_of(groups) == [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert facts["negatives_of"] == {"bm25": 3, "dense": 8}
    half, _ = mixed(runs, {0: {9: 1}}, mix={"bm25": 1.0, "dense": 1.0}, num_negatives=5)
    assert negatives_of(half) == {0: [1, 11, 2, 12, 3]}
    scaled, _ = mixed(runs, {0: {9: 1}}, mix={"bm25": 1.0, "dense": 3.0})
    assert negatives_of(scaled) == negatives_of(groups)


def test_a_beginning_of_a_mixed_list_has_the_shares() -> None:
    runs = {"a": made_run({0: list(range(100))}), "b": made_run({0: list(range(100, 200))})}
    groups, _ = mixed(runs, {0: {999: 1}}, mix={"a": 0.3, "b": 0.7})
    sources = np.array(sources_of(groups)[:140])
    for length in range(1, 141):
        assert abs((sources[:length] == 0).sum() - 0.3 * length) < 1


def test_a_passage_of_several_runs_comes_once() -> None:
    # bm25 falls due first: 1 is its own; 2 is due in both lists as the second, and the first run of the mix has it.
    runs = {"bm25": made_run({0: [1, 2, 3]}), "dense": made_run({0: [1, 2, 4]})}
    groups, facts = mixed(runs, {0: {9: 1}}, mix={"bm25": 0.5, "dense": 0.5})
    assert sorted(negatives_of(groups)[0]) == [1, 2, 3, 4]
    assert facts["num_in_several_runs"] == 2
    rows, sources = negatives_of(groups)[0], sources_of(groups)
    assert dict(zip(rows, sources, strict=True)) == {1: 0, 2: 0, 3: 0, 4: 1}
    assert rows == [1, 4, 2, 3]  # what is left of dense moves up


def test_a_run_that_ends_early_leaves_the_rest_to_the_others() -> None:
    runs = {"bm25": made_run({0: [1]}), "dense": made_run({0: [11, 12, 13]})}
    assert negatives_of(mixed(runs, {0: {9: 1}}, mix={"bm25": 0.5, "dense": 0.5})[0]) == {0: [1, 11, 12, 13]}
    missing = {"bm25": made_run({}), "dense": made_run({0: [11, 12]})}
    groups, _ = mixed(missing, {0: {9: 1}}, mix={"bm25": 0.5, "dense": 0.5})
    assert (negatives_of(groups), sources_of(groups)) == ({0: [11, 12]}, [1, 1])


def test_each_run_is_filtered_by_its_own_scores() -> None:
    # bm25: the positive scores 8, so 0.95 of it is 7.6. dense: 0.5, so 0.475.
    runs = {
        "bm25": made_run({0: [1, 9, 2, 3]}, {0: [10.0, 8.0, 7.7, 7.5]}),
        "dense": made_run({0: [4, 9, 5, 6]}, {0: [0.9, 0.5, 0.48, 0.4]}),
    }
    groups, facts = mixed(runs, {0: {9: 1}}, mix={"bm25": 0.5, "dense": 0.5}, below_positive=0.95)
    assert negatives_of(groups) == {0: [3, 6]}
    assert facts["num_above_ceiling"] == 4
    assert groups.source_positive_scores is not None
    np.testing.assert_allclose(groups.source_positive_scores, [[8.0], [0.5]])
    assert groups.positives(0)[1].tolist() == [8.0]
    assert [(places.tolist(), scores.tolist()) for places, scores in groups.by_source(0)] == [([0], [8.0]), ([1], [0.5])]


def test_sources_survive_saving_and_groups_without_them_still_open(tmp_path: Path) -> None:
    runs = {"bm25": made_run({0: [1, 9]}), "dense": made_run({0: [11, 12]})}
    mixed(runs, {0: {9: 1}}, mix={"bm25": 0.5, "dense": 0.5})[0].save(tmp_path / "mixed")
    loaded = Groups.load(tmp_path / "mixed")
    assert sources_of(loaded) == [0, 1, 1]
    assert loaded.negative_sources is not None and loaded.negative_sources.dtype == np.int8
    assert loaded.source_positive_scores is not None
    np.testing.assert_array_equal(loaded.source_positive_scores, [[9.0], [np.nan]])
    mined({0: [1, 9]}, {0: {9: 1}})[0].save(tmp_path / "alone")
    alone = Groups.load(tmp_path / "alone")
    assert alone.negative_sources is None and alone.source_positive_scores is None
    assert [(places.tolist(), scores.tolist()) for places, scores in alone.by_source(0)] == [([0], [9.0])]


# --- queries and texts


def test_queries_that_become_no_groups() -> None:
    lists = {0: [1, 2], 1: [1, 2], 2: [9], 3: [], 4: [1]}
    qrels = {0: {}, 1: {1: 0}, 2: {9: 1}, 3: {9: 1}, 4: {9: 1}, 5: {9: 1}, 6: {}}
    groups, facts = mined(lists, qrels)
    assert negatives_of(groups) == {4: [1]}
    assert facts["num_queries"] == 7  # 5 and 6 are judged but not in the run
    assert facts["num_without_positive"] == 3  # 0, 1, 6
    assert facts["num_without_negatives"] == 3  # 2, 3, 5
    assert facts["num_groups"] == 1
    assert facts["positive_in_run"] == 0.25  # query 2, of 2, 3, 4 and 5


def test_nothing_at_all() -> None:
    groups, facts = mined({}, {})
    assert len(groups) == 0
    assert facts["negatives_per_query"] == 0.0


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("Red  apple\n", "red apple", True),
        ("\uff32ed apple", "red apple", True),  # full-width letter
        ("STRASSE", "stra\u00dfe", True),
        ("red apple.", "red apple", False),
        ("", "   ", True),
    ],
)
def test_texts_that_count_as_equal(left: str, right: str, equal: bool) -> None:
    assert (normalised(left) == normalised(right)) == equal


@pytest.fixture
def store(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> Store:
    """Passage 1 is a copy of 0 but for case, title and spaces; query a has 0, b is judged not relevant only, c has 3."""
    texts = ["The red apple.", "the RED  apple.", "A green apple.", "Some other fruit.", "A pear."]
    passages = [{"_id": f"p{row}", "title": f"Title {row}", "text": text} for row, text in enumerate(texts)]
    queries = [{"_id": name, "text": f"query {name}"} for name in "abc"]
    return build_store(tmp_path / "store", tiny_wordpiece, passages, queries, {"train": [("a", "p0", 1), ("b", "p2", 0), ("c", "p3", 1)]})


def mine_stage(path: Path, store: Store, lists: list[list[int]], settings: MiningSettings) -> dict[str, Any]:
    with build_artifact(path / "run", kind="run") as builder:
        ranked = [(rows, [float(-rank) for rank in range(len(rows))]) for rows in lists]
        Run.from_lists("train", range(len(lists)), ranked).save(builder.work)
    with build_artifact(path / "groups", kind="groups") as builder:
        mine_negatives.run(settings, {"store": store.path, "run": path / "run"}, Context(builder, 0, Progress(quiet=True)))
    return builder.facts


def test_stage(tmp_path: Path, store: Store) -> None:
    facts = mine_stage(tmp_path, store, [[1, 2, 0, 4], [0, 1], [3]], MiningSettings())
    groups = Groups.load(open_artifact(tmp_path / "groups", "groups").path)
    assert positives_of(groups) == {0: [0]}
    assert negatives_of(groups) == {0: [2, 4]}
    assert facts["num_copies_left_out"] == 1
    assert facts["num_without_positive"] == 1
    assert facts["num_without_negatives"] == 1
    assert facts["num_queries"] == 3
    assert open_artifact(tmp_path / "groups").manifest.facts == facts


def test_stage_reports_on_its_negatives(tmp_path: Path, store: Store) -> None:
    mine_stage(tmp_path, store, [[1, 2, 0, 4], [0, 1], [3, 0]], MiningSettings())
    report = json.loads((tmp_path / "groups" / "negatives.json").read_text(encoding="utf-8"))
    assert (report["num_groups"], report["num_negatives"], report["name"]) == (2, 3, "groups")
    assert "query a" in (tmp_path / "groups" / "negatives.html").read_text(encoding="utf-8")


def test_stage_with_two_runs_and_a_teacher(tmp_path: Path, store: Store) -> None:
    inputs = {"store": store.path}
    for name, lists in {"run.bm25": [[2, 0], [0], [3, 4]], "run.dense": [[0, 4], [0], [3, 2]]}.items():
        inputs[name] = tmp_path / name
        with build_artifact(inputs[name], kind="run") as builder:
            made_run(dict(enumerate(lists))).save(builder.work)
    inputs["teacher"] = tmp_path / "teacher"
    with build_artifact(inputs["teacher"], kind="run") as builder:
        teacher_of({0: {0: 1.0, 2: 5.0}, 2: {3: 1.0, 2: 0.0, 4: 0.0}}).save(builder.work)
    settings = MiningSettings(mix={"dense": 0.5, "bm25": 0.5}, teacher="x", teacher_margin=0.0)
    with build_artifact(tmp_path / "groups", kind="groups") as builder:
        mine_negatives.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    groups = Groups.load(tmp_path / "groups")
    assert negatives_of(groups) == {0: [4], 2: [2, 4]}
    assert sources_of(groups, 1) == [0, 1]  # as the mix has them
    assert builder.facts["negatives_of"] == {"dense": 2, "bm25": 1}
    assert builder.facts["num_above_teacher"] == 1


@pytest.mark.parametrize(
    ("settings", "roles", "message"),
    [
        (MiningSettings(mix={"bm25": 1.0, "dense": 1.0}), ["run.bm25"], "mix names bm25, dense, there are runs of bm25"),
        (MiningSettings(mix={"bm25": 1.0}), ["run.bm25", "run.other"], "there are runs of bm25, other"),
        (MiningSettings(), ["run.bm25"], "mix is empty, so one run was expected, found bm25"),
        (MiningSettings(), [], "mix is empty, so one run was expected, found none"),
        (MiningSettings(teacher="x", teacher_margin=1.0), ["run"], "there is none; give one"),
        (MiningSettings(), ["run", "teacher"], "no teacher_margin to compare them by"),
    ],
)
def test_inputs_that_do_not_fit_the_settings(
    tmp_path: Path, store: Store, settings: MiningSettings, roles: list[str], message: str
) -> None:
    with build_artifact(tmp_path / "run", kind="run") as builder:
        made_run({0: [1, 2]}).save(builder.work)
    with pytest.raises(RecipeError, match=message), build_artifact(tmp_path / "groups", kind="groups") as builder:
        inputs = {"store": store.path} | dict.fromkeys(roles, tmp_path / "run")
        mine_negatives.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))


@pytest.mark.parametrize("role", ["run", "teacher"])
def test_runs_of_another_split_or_store_are_refused(tmp_path: Path, store: Store, role: str) -> None:
    def run_of(name: str, split: Split, store_print: str) -> Path:
        builder = ArtifactBuilder(tmp_path / name, kind="run", stage="search", code_version=0, fingerprint=name)
        builder.begin()
        replace(made_run({0: [1, 2]}), split=split).save(builder.work)
        builder.finish(settings={}, inputs={"store": store_print}, seed=0, seconds=0.0, peak_memory_bytes=0)
        return tmp_path / name

    own = read_manifest(store.path).fingerprint
    good = run_of("good", "train", own)
    for name, path, message in (
        ("split", run_of("dev", "dev", own), "nothing for split 'train'"),
        ("store", run_of("other", "train", "another"), "another version of the corpus"),
    ):
        inputs = {"store": store.path, "run": good, "teacher": good} | {role: path}
        settings = MiningSettings(teacher="x", teacher_margin=1.0)
        with pytest.raises(ArtifactError, match=message), build_artifact(tmp_path / name, kind="groups") as builder:
            mine_negatives.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))


def test_stage_says_which_filters_left_nothing(tmp_path: Path, store: Store) -> None:
    with pytest.raises(
        DataError, match=r"left out: 2 judged relevant, 1 with a relevant passage's text, 1 by skip_top, 1 by below_positive"
    ):
        mine_stage(tmp_path, store, [[2, 4, 1, 0], [], [3]], MiningSettings(skip_top=1, below_positive=0.5))


def test_stage_without_any_group_says_why(tmp_path: Path, store: Store) -> None:
    with pytest.raises(DataError, match="of 3 queries 1 have no relevant passage and 2 no candidate"):
        mine_stage(tmp_path, store, [[0, 1], [2], []], MiningSettings())
    assert not (tmp_path / "groups").exists()


def test_stage_says_how_many_were_left_out(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    mine_stage(tmp_path, store, [[2], [2], [4]], MiningSettings())
    capsys.readouterr()
    with build_artifact(tmp_path / "again", kind="groups") as builder:
        inputs = {"store": store.path, "run": tmp_path / "run"}
        mine_negatives.run(MiningSettings(), inputs, Context(builder, 0, Progress()))
    assert "mined 1.0 negatives a query for 2 queries; 1 queries left out: 1 without a relevant passage" in capsys.readouterr().err
