"""Measures worked out by hand, and the inputs that evaluation tools get wrong."""

from __future__ import annotations

import gzip
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simlm.errors import DataError, RecipeError
from simlm.evaluation.measures import (
    DEFAULT_MEASURES,
    evaluate_queries,
    evaluate_run,
    measure_run,
    parse_measure,
    read_trec_qrels,
    read_trec_run,
    write_trec_qrels,
    write_trec_run,
)
from simlm.rankings import Run


def test_hand_computed_measures() -> None:
    # q1: relevant at ranks 2 and 4 of 4, one of three relevant not found. q2: relevant at rank 1.
    run = {"q1": ["n", "a", "m", "b"], "q2": ["x"]}
    qrels = {"q1": {"a": 1, "b": 1, "c": 1}, "q2": {"x": 1}}
    values = evaluate_run(run, qrels, ["RR@10", "RR@1", "nDCG@10", "R@2", "R@1000", "AP", "P@4", "Success@2"])
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert values["RR@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert values["RR@1"] == pytest.approx((0 + 1) / 2)
    assert values["nDCG@10"] == pytest.approx((dcg / ideal + 1) / 2)
    assert values["R@2"] == pytest.approx((1 / 3 + 1) / 2)
    assert values["R@1000"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["AP"] == pytest.approx(((1 / 2 + 2 / 4) / 3 + 1) / 2)
    assert values["P@4"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert values["Success@2"] == 1.0


def test_a_judged_query_absent_from_the_run_counts_as_zero() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 1}}
    assert evaluate_run({"q1": ["a"], "q2": []}, qrels, DEFAULT_MEASURES) == dict.fromkeys(DEFAULT_MEASURES, pytest.approx(1 / 3))
    assert evaluate_run({}, qrels, ["RR@10", "AP"]) == {"RR@10": 0.0, "AP": 0.0}


def test_a_query_without_a_relevant_passage_counts_as_zero_like_trec_eval() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"a": 0, "b": -1}}
    assert evaluate_run({"q1": ["a"], "q2": ["a", "b"]}, qrels, ["RR@10", "nDCG@10", "R@50", "AP"]) == {
        "RR@10": 0.5,
        "nDCG@10": 0.5,
        "R@50": 0.5,
        "AP": 0.5,
    }


def test_a_query_without_judgements_is_ignored() -> None:
    assert evaluate_run({"q1": ["a"], "other": ["a"]}, {"q1": {"a": 1}, "empty": {}}, ["RR@10"]) == {"RR@10": 1.0}


def test_no_common_query_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match=r"none of the 1 queries of the run .*'17'.*'q1'.*same data set"):
        evaluate_run({"17": ["a"]}, {"q1": {"a": 1}}, ["RR@10"])


def test_no_judgements_at_all() -> None:
    assert evaluate_run({"q1": ["a"]}, {}, ["RR@10", "AP"]) == {"RR@10": 0.0, "AP": 0.0}


def test_grades() -> None:
    # Gains are the grades themselves (trec_eval); R(rel=2) asks for grade 2 or more; negative grades are grade 0.
    run = {"q": ["one", "bad", "three"]}
    qrels = {"q": {"one": 1, "three": 3, "two": 2, "bad": -2}}
    values = evaluate_run(run, qrels, ["nDCG@10", "R@50", "R(rel=2)@50", "RR(rel=2)@10", "RR(rel=4)@10"])
    dcg = 1 + 3 / math.log2(4)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@10"] == pytest.approx(dcg / ideal)
    assert values["R@50"] == pytest.approx(2 / 3)
    assert values["R(rel=2)@50"] == pytest.approx(1 / 2)
    assert values["RR(rel=2)@10"] == pytest.approx(1 / 3)
    assert values["RR(rel=4)@10"] == 0.0


def test_equal_scores_keep_the_order_of_the_run_whatever_the_ids() -> None:
    for relevant, others in (("a", ["y", "z"]), ("z", ["a", "b"])):
        dictionary = dict.fromkeys([others[0], relevant, others[1]], 1.0)
        for run in ({"q": dictionary}, {"q": list(dictionary)}):
            assert evaluate_run(run, {"q": {relevant: 1}}, ["RR@10", "RR", "nDCG@1", "R@1"]) == {
                "RR@10": 0.5,
                "RR": 0.5,
                "nDCG@1": 0.0,
                "R@1": 0.0,
            }
    run = Run.from_lists("test", [0], [([9, 3, 7], [1.0, 1.0, 1.0])])  # ties: smaller row first
    assert measure_run(run, {0: {7: 1}}, ["RR@10"]) == {"RR@10": 0.5}


def test_dictionary_scores_decide_not_their_order() -> None:
    assert evaluate_run({"q": {"a": 0.1, "b": 0.9}}, {"q": {"b": 1}}, ["RR@10"]) == {"RR@10": 1.0}
    with pytest.raises(DataError, match="not a number"):
        evaluate_run({"q": {"a": math.nan}}, {"q": {"a": 1}}, ["RR@10"])
    with pytest.raises(DataError, match="twice"):
        evaluate_run({"q": ["a", "a"]}, {"q": {"a": 1}}, ["RR@10"])


def test_run_and_store() -> None:
    class Store:
        def qrels(self, split: str) -> dict[int, dict[int, int]]:
            assert split == "dev"
            return {4: {10: 1}, 5: {11: 1}}

    run = Run.from_lists("dev", [5, 4], [([3, 11], [2.0, 1.0]), ([10], [1.0])])
    assert evaluate_run(run, Store(), ["RR@10"]) == {"RR@10": 0.75}
    assert evaluate_run(run, {4: {10: 1}, 5: {11: 1}}, ["RR@10"]) == {"RR@10": 0.75}
    with pytest.raises(DataError, match="give the store"):
        evaluate_run(run, 3, ["RR@10"])  # type: ignore[arg-type]


def test_per_query_values_and_aliases() -> None:
    result = evaluate_queries({"b": ["x"]}, {"a": {"x": 1}, "b": {"x": 1}}, ["MRR@10", "RR@10", "NumRet"])
    assert result.query_ids == ["a", "b"]
    assert result.values["MRR@10"].tolist() == [0.0, 1.0] == result.values["RR@10"].tolist()
    assert result.averages() == {"MRR@10": 0.5, "RR@10": 0.5, "NumRet": 1.0}


def test_more_queries_than_a_chunk_and_deeper_than_the_name_cache() -> None:
    num_queries, depth = 1300, 1200
    ranked = {query: np.roll(np.arange(depth), query % depth) for query in range(num_queries)}
    qrels = {query: {0: 1} for query in range(num_queries)}  # passage 0 stands at rank query % depth + 1
    ranks = np.arange(num_queries) % depth + 1
    result = evaluate_queries(ranked, qrels, ["RR@10", "R@1000", "RR"])
    np.testing.assert_allclose(result.values["RR@10"], np.where(ranks <= 10, 1 / ranks, 0))
    np.testing.assert_allclose(result.values["R@1000"], ranks <= 1000)
    np.testing.assert_allclose(result.values["RR"], 1 / ranks)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), unique=True, max_size=12), st.dictionaries(st.integers(0, 12), st.integers(-1, 3), min_size=1, max_size=6)
)
def test_cutting_the_run_at_the_cut_off_changes_nothing(passages: list[int], grades: dict[int, int]) -> None:
    together = evaluate_queries({0: passages}, {0: grades}, ["RR@3", "nDCG@3", "R@5", "P@2", "AP", "Rprec"])
    import ir_measures

    names = {0: {str(passage): float(-rank) for rank, passage in enumerate(passages)}}
    expected = ir_measures.calc_aggregate(
        [parse_measure(name) for name in together.values],
        {"0": {str(passage): max(0, grade) for passage, grade in grades.items()}},
        {"0": names[0]} if passages else {},
    )
    for name, values in together.values.items():
        assert values[0] == pytest.approx(expected[parse_measure(name)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mrr@10", r"did you mean 'RR@10'"),
        ("MRR_10", r"did you mean 'RR@10'"),
        ("ndcg@10", r"did you mean 'nDCG@10'"),
        ("nDCQ@20", r"did you mean 'nDCG@20'"),
        ("recall@100", r"did you mean 'R@100'"),
        ("precision at 5", r"not readable.*did you mean 'P@5'"),
        ("zzzz", r"unknown measure 'zzzz' \(known: .*nDCG"),
        ("R", r"R takes cutoff \(needed\)"),
        ("R@many", "do not fit"),
        ("R@1.5", "do not fit"),
        ("R(2)@50", "do not fit"),
        ("R(grade=2)@50", "do not fit"),
        ("R(rel=open('x'))@50", "do not fit"),
        ("R@0", "1 or more"),
        ("", "not readable"),
    ],
)
def test_bad_measure_names(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate_run({"q": ["a"]}, {"q": {"a": 1}}, [name])


def test_measure_names_mean_what_ir_measures_means() -> None:
    import ir_measures

    assert parse_measure("R(rel=2)@50") == ir_measures.R(rel=2) @ 50
    assert parse_measure(" nDCG@10 ") == ir_measures.nDCG @ 10
    assert parse_measure("IPrec@0.1") == ir_measures.IPrec @ 0.1
    assert parse_measure("nDCG(gains={0: 0, 1: 2})@5") == ir_measures.nDCG(gains={0: 0, 1: 2}) @ 5


def test_trec_files_there_and_back(tmp_path: Path) -> None:
    write_trec_run(tmp_path / "a.trec", [("q 1", ["z", "a", "m"], [2.0, 2.0, 2.0]), ("q2", ["b"], [0.1])], tag="simlm")
    write_trec_qrels(tmp_path / "qrels.trec", [("q 1", "a", 2), ("q2", "c\u3000d", 0)])
    lines = (tmp_path / "a.trec").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["q%201", "Q0", "z", "1"],
        ["q%201", "Q0", "a", "2"],
        ["q%201", "Q0", "m", "3"],
        ["q2", "Q0", "b", "1"],
    ]
    scores = [np.float32(line.split()[4]) for line in lines[:3]]
    assert scores[0] == 2.0 > scores[1] > scores[2] > 1.999  # trec_eval, which sorts ties by id, keeps the order
    assert read_trec_run(tmp_path / "a.trec") == {"q%201": ["z", "a", "m"], "q2": ["b"]}
    assert read_trec_qrels(tmp_path / "qrels.trec") == {"q%201": {"a": 2}, "q2": {"c%E3%80%80d": 0}}
    assert evaluate_run(tmp_path / "a.trec", str(tmp_path / "qrels.trec"), ["RR@10"]) == {"RR@10": 0.25}


def test_trec_run_order_is_score_then_rank_then_line(tmp_path: Path) -> None:
    file = tmp_path / "run.gz"
    with gzip.open(file, "wt", encoding="utf-8") as handle:
        handle.write("\ufeffq Q0 low 1 1.5 t\n\nq Q0 c 9 2 t\r\nq Q0 a 3 2 t\nq Q0 b 3 2 t\n")
    assert read_trec_run(file) == {"q": ["a", "b", "c", "low"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 p 1 0.5\n", r":1: 5 fields"),
        ("q Q0 p 1 0.5 t\nq Q0 r one 0.5 t\n", r":2: rank 'one'"),
        ("q Q0 p 1 nan t\n", r":1: .*must be numbers"),
        ("q Q0 p 1 2 t\nq Q0 p 2 1 t\n", r":2: .*twice"),
        (b"q Q0 \xff 1 2 t\n", "not readable as text"),
    ],
)
def test_broken_run_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "run.trec"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_trec_run(file)


def test_qrels_files(tmp_path: Path) -> None:
    file = tmp_path / "qrels.tsv"
    file.write_text("query-id\tcorpus-id\tscore\nq\ta\t2\nq\tb\t-1\nq\ta\t2\n", encoding="utf-8")
    assert read_trec_qrels(file) == {"q": {"a": 2, "b": -1}}
    for content, message in (
        ("q 0 a x\n", r":1: grade 'x'"),
        ("q 0 a 1\nq 0 a 2\n", r":2: .*grade 2, but 1"),
        ("q a\n", r":1: 2 fields"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_trec_qrels(file)
    with pytest.raises(DataError, match="no such file"):
        read_trec_qrels(tmp_path / "absent")
    (tmp_path / "broken.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="not readable"):
        read_trec_qrels(tmp_path / "broken.gz")


def test_evaluation_needs_no_torch() -> None:
    code = (
        "import sys, simlm.evaluation.measures, simlm.evaluation.significance, simlm.evaluation.answers\n"
        "import simlm.evaluation.report, simlm.stages.evaluate\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'ir_measures'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
