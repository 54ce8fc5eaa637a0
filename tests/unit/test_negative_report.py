"""The report on mined negatives: every number here can be counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from simlm.cli import app
from simlm.errors import ArtifactError
from simlm.evaluation.negatives import MinedRun, effective_numbers, hardness, measure_negatives, overlap, positive_ranks, words
from simlm.evaluation.report.negatives import conclusions, render_html, sections, terminal_tables, write_negatives
from simlm.negative_report import negative_reports
from simlm.pipeline import run_recipe
from simlm.rankings import Groups, Run, offsets_of
from tests.toy.corpus import write_beir
from tests.unit.test_pipeline import recipe_for

SHARED = "red green blue black white grey pink brown gold"
TEXTS = [f"{SHARED} one", f"{SHARED.upper()}, two!", "a pear", "an apple", "an apple", "some fig", "<script>alert(1)</script> & more"]
NAN = float("nan")


class Texts:
    def __init__(self, texts: list[str], prefix: str) -> None:
        self.texts = texts
        self.ids = [f"{prefix}{row}" for row in range(len(texts))]

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int) -> str:
        return self.texts[row]

    def title(self, row: int) -> str:
        return ""


QRELS = {0: {0: 1}, 1: {5: 2, 3: 0}, 2: {4: 0}}
STORE: Any = SimpleNamespace(
    passages=Texts(TEXTS, "p"),
    splits=["train"],
    queries=lambda split: Texts(["what is <b>it</b>", "second", "third"], "q"),
    qrels=lambda split: QRELS,
)


def make(
    positives: list[dict[int, float]], negatives: list[dict[int, float]], sources: list[int] | None = None, of_runs: Any = None
) -> Groups:
    """Groups of query rows 0, 1 ..., each passage -> score."""
    return Groups(
        "train",
        np.arange(len(positives)),
        offsets_of([len(part) for part in positives]),
        np.array([row for part in positives for row in part], dtype=np.int64),
        np.array([score for part in positives for score in part.values()], dtype=np.float32),
        offsets_of([len(part) for part in negatives]),
        np.array([row for part in negatives for row in part], dtype=np.int64),
        np.array([score for part in negatives for score in part.values()], dtype=np.float32),
        None if sources is None else np.array(sources, dtype=np.int8),
        None if of_runs is None else np.array(of_runs, dtype=np.float32),
    )


# Query 1's positive is not in the run. 3 and 4 have one text; 1 has nearly the words of positive 0.
GROUPS = make([{0: 10.0}, {5: NAN}], [{1: 12.0, 2: 10.0, 3: 9.5, 4: 4.0}, {1: 3.0, 6: 2.0}])
RUN = Run.from_lists("train", [0, 1], [([1, 2, 0, 3, 4], [12.0, 10.5, 10.0, 9.5, 4.0]), ([1, 6], [3.0, 2.0])])


def measured(groups: Groups = GROUPS, runs: list[MinedRun] | None = None, **options: Any) -> dict[str, Any]:
    digest = np.array([0, 1, 2, 3, 3, 5, 6], dtype=np.uint64)
    given = {"name": "bm25_groups", "digests": lambda rows: digest[rows], "facts": {"num_without_negatives": 1, "num_without_positive": 1}}
    return measure_negatives(groups, runs or [MinedRun("run", RUN, None, cosine=False)], STORE, seed=3, **(given | options))


def test_hardness_is_told_by_the_positive() -> None:
    (run,) = measured()["runs"]
    shares = dict(zip(["<0.5", *run["hardness"]["edges"]], run["hardness"]["counts"], strict=True))
    assert {edge: number for edge, number in shares.items() if number} == {"<0.5": 1, 0.95: 1, 1.0: 1, 1.2: 1}
    assert run["hardness"]["num_without_positive_score"] == 2  # those of query 1
    assert run["num_negatives"] == 6


def test_hardness_of_scores_below_zero_and_at_zero() -> None:
    np.testing.assert_allclose(hardness(np.array([-2.1, -2.0, -1.0]), np.array([-2.0, -2.0, -2.0])), [0.95, 1.0, 1.5])
    assert np.isnan(hardness(np.array([1.0]), np.array([0.0]))).all()
    assert np.isnan(hardness(np.array([1.0]), np.array([NAN]))).all()


def test_ranks_of_positives() -> None:
    assert positive_ranks(RUN, QRELS).tolist() == [3, 0]  # query 2 has no relevant passage
    bands = {(band["from"], band["to"]): band["queries"] for band in measured()["runs"][0]["positive_ranks"]}
    assert bands == {(1, 1): 0, (2, 3): 1, (4, 10): 0, (11, 50): 0, (51, None): 0, (None, None): 1}


def test_ranks_of_positives_deep_down_and_not_searched() -> None:
    deep = Run.from_lists("train", [0], [([*range(100, 199), 0], [float(-rank) for rank in range(100)])])
    assert positive_ranks(deep, {0: {0: 1}, 4: {0: 1}}).tolist() == [100, 0]
    content = measured(runs=[MinedRun("run", deep, None, cosine=False)])
    assert content["runs"][0]["positive_ranks"][4] == {"from": 51, "to": None, "queries": 1}


def test_effective_number_of_negatives_by_hand() -> None:
    one = effective_numbers(np.array([0.3, 0.3, 0.3, 0.3]), np.zeros(4, dtype=np.int64), 1, 0.02)
    np.testing.assert_allclose(one, [4.0])  # all the same: all count
    np.testing.assert_allclose(effective_numbers(np.array([0.9, 0.1]), np.zeros(2, dtype=np.int64), 1, 0.01), [1.0], atol=1e-6)
    # Weights 3/4 and 1/4: the entropy is ln 4 - 3/4 ln 3.
    scores = np.array([0.5 + 0.1 * math.log(3), 0.5, 0.7])
    numbers = effective_numbers(scores, np.array([0, 0, 2]), 3, 0.1)
    np.testing.assert_allclose(numbers, [4 / 3**0.75, 1.0])  # query 1 has none and is not there


def test_effective_numbers_only_of_cosines_and_at_each_temperature() -> None:
    assert measured()["runs"][0]["effective"] == []
    groups = make([{0: 0.5}], [{1: 0.5 + 0.1 * math.log(3), 2: 0.5}])
    (run,) = measured(groups, [MinedRun("run", RUN, None, cosine=True)], temperatures=[0.1, 1000.0])["runs"]
    assert run["effective"] == [
        {"temperature": 0.1, "mean": 1.755, "median": 1.755},
        {"temperature": 1000.0, "mean": 2.0, "median": 2.0},
    ]


def test_suspects_by_the_runs_own_scores() -> None:
    suspects = measured()["suspects"]
    assert (suspects["by"], suspects["num_queries"], suspects["num_negatives"], suspects["num_compared"]) == ("run", 1, 1, 4)
    (example,) = suspects["examples"]
    assert (example["query_id"], example["positive"]["passage_id"], example["negative"]["passage_id"]) == ("q0", "p0", "p1")
    assert (example["score"], example["positive_score"], example["place"]) == (12.0, 10.0, 1)


def test_suspects_by_a_teacher() -> None:
    teacher = Run.from_lists("train", [1, 0], [([5, 1, 6], [1.0, 1.5, 4.0]), ([0, 1, 2], [9.0, 2.0, 9.5])])
    suspects = measured(teacher=teacher)["suspects"]
    # Query 0: 2 of the 2 scored compared, 2 is above; query 1: both are above its positive. 3 and 4 have no score.
    assert (suspects["by"], suspects["num_queries"], suspects["num_negatives"], suspects["num_compared"]) == ("teacher", 2, 3, 4)
    assert [(item["query_id"], item["negative"]["passage_id"]) for item in suspects["examples"]] == [("q1", "p6"), ("q0", "p2")]
    assert suspects["examples"][0]["score"] == 4.0 and suspects["examples"][0]["positive_score"] == 1.0


def test_suspects_are_held_against_the_best_positive_and_shown_with_it() -> None:
    groups = make([{0: 10.0, 5: 11.0}], [{1: 10.5, 2: 12.0}])
    suspects = measured(groups)["suspects"]
    assert suspects["num_negatives"] == 1
    assert suspects["examples"][0]["positive"]["passage_id"] == "p5"


def test_suspects_beyond_the_number_shown_are_counted() -> None:
    groups = make([{0: 1.0}, {5: 1.0}, {0: 1.0}], [{1: 2.0}, {1: 4.0}, {1: 3.0}])
    suspects = measured(groups, num_examples=2)["suspects"]
    assert suspects["num_negatives"] == 3
    assert [item["query_id"] for item in suspects["examples"]] == ["q1", "q2"]
    assert measured(groups, num_examples=0)["suspects"]["examples"] == []


def test_words_that_two_texts_share() -> None:
    assert overlap(words("The cat, the hat."), words("the CAT")) == pytest.approx(2 / 3)
    assert overlap(words("..."), words("")) == 0.0


def test_near_duplicates_of_a_positive() -> None:
    near = measured()["near_duplicates"]
    # 9 of 11 words; query 1's positive shares nothing with its negatives.
    assert (near["num_negatives"], near["num_queries"], near["num_compared"], near["num_examined_queries"]) == (1, 1, 6, 2)
    assert near["examples"][0]["overlap"] == round(9 / 11, 4)
    assert near["examples"][0]["negative"]["passage_id"] == "p1"


def test_what_comes_again() -> None:
    repeated = measured()["repeated"]
    assert (repeated["num_copies_within"], repeated["num_queries_with_copies"]) == (1, 1)  # 3 and 4
    assert (repeated["num_distinct"], repeated["mean_uses"]) == (5, 1.2)
    assert repeated["most_frequent"][0] == {"passage_id": "p1", "num_queries": 2}
    assert repeated["share_of_most_used_percent"] == round(2 / 6, 4)
    assert len(repeated["most_frequent"]) == 5


def test_lengths_and_short_lists() -> None:
    lists = measured(group_sizes=(2, 4))["lists"]
    assert lists["lengths"] == {"0%": 2, "10%": 2, "50%": 2, "90%": 4, "100%": 4}
    assert lists["short"] == {"2": 0, "4": 1}
    assert (lists["num_without_negatives"], lists["num_without_positive"], lists["mean"]) == (1, 1, 3.0)


def test_runs_of_a_mix_are_told_apart() -> None:
    # Run a: 1 scores 12 of 10; run b: 2 scores 0.37 of 0.5 and 3 scores 0.6.
    groups = make([{0: 10.0}], [{1: 12.0, 2: 0.37, 3: 0.6}], [0, 1, 1], [[10.0], [0.5]])
    runs = [MinedRun("a", RUN, 0.25, cosine=False), MinedRun("b", RUN, 0.75, cosine=True)]
    first, second = (content := measured(groups, runs))["runs"]
    assert (first["num_negatives"], second["num_negatives"]) == (1, 2)
    assert (sum(first["hardness"]["counts"]), first["hardness"]["counts"][-1]) == (1, 1)
    assert sum(second["hardness"]["counts"][:4]) == 1 and second["hardness"]["counts"][-1] == 1
    assert content["suspects"]["num_negatives"] == 2
    assert first["effective"] == [] and second["effective"][0]["median"] is not None


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured()
    monkeypatch.setattr("simlm.evaluation.negatives._BLOCK", 1)
    assert measured() == whole


def test_page_is_one_file_and_escapes_all_texts(tmp_path: Path) -> None:
    content = measured(teacher=Run.from_lists("train", [1], [([5, 6], [1.0, 4.0])]))
    write_negatives(tmp_path / "deep" / "negatives", content)
    page = (tmp_path / "deep" / "negatives.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "deep" / "negatives.json").read_text(encoding="utf-8")) == content
    assert page == render_html(content)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "prefers-color-scheme: dark" in page
    for outside in ("http:", "https:", "src=", "<link", "url("):
        assert outside not in page


def test_conclusions_name_the_setting_that_helps() -> None:
    told = [verdict.text for verdict in conclusions(measured(group_sizes=(16,)))]
    assert any("25.0% of the negatives outscore" in text and "below_positive drops them" in text for text in told)
    assert any("2 of 2 queries have too few negatives for groups of 16" in text for text in told)
    assert not any("too few" in verdict.text for verdict in conclusions(measured()))  # no training is known
    taught = measured(teacher=Run.from_lists("train", [1], [([5, 6], [1.0, 4.0])]))
    assert any("teacher_margin drops them" in verdict.text for verdict in conclusions(taught))


def test_terminal_tables_have_no_texts_of_the_data() -> None:
    content = measured()
    assert len(terminal_tables(content)) == len(sections(content)) == 4
    shown = str(sections(content))
    assert not any(text in shown for text in [*TEXTS, "second"])


def test_report_of_a_run_and_what_it_was_trained_with(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    recipe = recipe_for(tmp_path, mining={"depth": 20, "num_negatives": 5})
    folder = run_recipe(recipe, only=["bm25_groups"], quiet=True)
    made = json.loads((folder / "bm25_groups" / "negatives.json").read_text(encoding="utf-8"))
    (found,) = negative_reports(folder)
    assert found.content == made  # nothing is trained yet, so nothing more is known
    result = CliRunner().invoke(app, ["negative-report", str(folder), "--step", "bm25_groups"])
    assert result.exit_code == 0 and "removed: num_negatives" in result.output
    assert (folder / "negatives" / "bm25_groups.html").is_file()
    with pytest.raises(ArtifactError, match="no finished groups 'bm25_group'; did you mean 'bm25_groups'"):
        negative_reports(folder, ["bm25_group"])
    with pytest.raises(ArtifactError, match="holds no mined groups"):
        negative_reports(tmp_path)
