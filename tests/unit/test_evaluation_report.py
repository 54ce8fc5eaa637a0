"""The report: rows, comparisons and verdicts worked out by hand; the page's escaping; what is missing; the stage on a tiny store."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from simlm.artifacts import Artifact, ArtifactBuilder, Kind, build_artifact, open_artifact
from simlm.errors import RecipeError
from simlm.evaluation.measures import evaluate_run, read_trec_qrels, read_trec_run
from simlm.evaluation.report import Results, Row, measure_rows, terminal_table, verdicts, write_pages
from simlm.evaluation.report.charts import Series, line_chart, stacked_bar, thin, training_panels
from simlm.evaluation.report.examples import clean, cut, wins_and_losses
from simlm.evaluation.report.page import markdown_text
from simlm.evaluation.report.results import comparison, final_row
from simlm.evaluation.report.steps import flat_settings, read_curves, read_steps
from simlm.evaluation.report.tables import duration, milliseconds, size
from simlm.evaluation.report.verdicts import mark, p_text
from simlm.progress import Progress
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings
from simlm.stages import Context
from simlm.stages.evaluate import run as evaluate_stage
from simlm.types import Split

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" \x00\u202e | *bold* [link](http://x) `code`"


class FakeTexts:
    def __init__(self, texts: list[str], prefix: str) -> None:
        self.texts = texts
        self.ids = [f"{prefix}{row}" for row in range(len(texts))]

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int) -> str:
        return self.texts[row]

    def title(self, row: int) -> str:
        return f"title {row}" if row % 2 else ""


class FakeStore:
    """A store in memory: 20 passages, queries with the answer `answer N`."""

    def __init__(self, qrels: dict[int, dict[int, int]], *, num_queries: int, splits: tuple[Split, ...] = ("train", "test")) -> None:
        self.passages = FakeTexts([f"passage {row} holds answer {row}" for row in range(20)], "p")
        self.table = FakeTexts([f"question {row}" for row in range(num_queries)], "q")
        self.splits = splits
        self.judged = qrels
        self.with_answers = True

    def queries(self, split: Split) -> FakeTexts:
        assert split in self.splits
        return self.table

    def qrels(self, split: Split) -> dict[int, dict[int, int]]:
        return {row: self.judged.get(row, {}) for row in range(len(self.table))}

    def answers(self, split: Split, row: int) -> tuple[str, ...]:
        return (f"Answer {row}",) if self.with_answers else ()


def run_with_ranks(ranks: dict[int, int | None], *, depth: int = 20) -> Run:
    """A run in which query q finds passage q at this rank (None: not at all)."""
    lists = []
    for query, rank in ranks.items():
        others = [row for row in range(20) if row != query][: depth if rank is None else depth - 1]
        if rank is not None:
            others.insert(rank - 1, query)
        lists.append((others, [float(-place) for place in range(len(others))]))
    return Run.from_lists("test", list(ranks), lists)


def measured(ranks: dict[str, list[int | None]], **settings: Any) -> Results:
    """Results of rows given by the rank of each query's only relevant passage."""
    num_queries = len(next(iter(ranks.values())))
    store = FakeStore({row: {row: 1} for row in range(num_queries)}, num_queries=num_queries)
    rows = [
        Row(
            name, run_with_ranks(dict(enumerate(of_row))), {"bytes_per_passage": 1536.0, "milliseconds_per_query": 2.5}, PARTS.get(name, ())
        )
        for name, of_row in ranks.items()
    ]
    return measure_rows(rows, store, EvaluateSettings(**settings), name="tiny", seed=1)


PARTS = {"hybrid": ("distilled", "bm25"), "reranker": ("retriever1",)}


def tones(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    return [(verdict.tone, verdict.text) for verdict in verdicts(metrics)]


def test_rows_hold_measures_comparisons_and_costs() -> None:
    metrics = measured({"bm25": [1, 2, 4, None], "start": [2, 2, None, None], "retriever1": [1, 1, 5, 1]}).metrics
    assert [row["name"] for row in metrics["rows"]] == ["bm25", "start", "retriever1"]
    assert (metrics["num_queries"], metrics["num_passages"], metrics["split"], metrics["main"]) == (4, 20, "test", "RR@10")
    bm25, _, trained = metrics["rows"]
    assert bm25["measures"]["RR@10"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 4)
    assert trained["measures"]["RR@10"] == pytest.approx((1 + 1 + 1 / 5 + 1) / 4)
    assert bm25["p_value_vs_bm25"] is None and bm25["difference_vs_bm25"] is None and bm25["wins"] is None
    assert (trained["wins"], trained["ties"], trained["losses"]) == (2, 1, 1)
    # Differences to BM25 0.5, -0.05, 1: of the 8 sign patterns, those with |sum| >= 1.45 are ++(+-)1 and their mirrors.
    assert trained["p_value_vs_bm25"] == 4 / 8
    assert trained["difference_vs_start"] == pytest.approx(trained["measures"]["RR@10"] - 1 / 4)
    assert (trained["bytes_per_passage"], trained["milliseconds_per_query"], trained["depth"]) == (1536.0, 2.5, 20)
    assert bm25["first_relevant"] == [1, 1, 1, 0, 0, 1]
    json.dumps(metrics, allow_nan=False)


def test_holm_runs_over_the_rows_of_the_table() -> None:
    metrics = measured({"bm25": [9] * 12, "start": [9] * 11 + [8], "retriever1": [1] * 12}).metrics
    raw = {row["name"]: row["p_value_vs_bm25"] for row in metrics["rows"]}
    corrected = {row["name"]: row["p_value_vs_bm25_holm"] for row in metrics["rows"]}
    assert raw == {"bm25": None, "start": 1.0, "retriever1": 2 / 2**12}
    assert corrected == {"bm25": None, "start": 1.0, "retriever1": 4 / 2**12}
    assert [mark(row) for row in metrics["rows"]] == ["", "", "▲"]


def test_a_better_pipeline_says_so_first() -> None:
    ranks: dict[str, list[int | None]] = {"bm25": [5] * 15, "start": [6] * 15, "retriever1": [3] * 15, "distilled": [2] * 15}
    found = tones(measured(ranks).metrics)
    assert found[0] == ("good", "The distilled retriever is better than BM25: RR@10 0.500 against 0.200 (+0.300, corrected p < 0.001).")
    assert found[1][0] == "good" and "better than the model it started from: RR@10 0.500 against 0.167" in found[1][1]
    assert all(tone != "bad" for tone, _ in found)


def test_a_pipeline_below_bm25_says_so_in_its_first_words() -> None:
    found = tones(measured({"bm25": [1] * 15, "start": [2] * 15, "retriever1": [2] * 15, "distilled": [4] * 15}).metrics)
    assert found[0] == (
        "bad",
        "The pipeline ends below BM25: the distilled retriever has RR@10 0.250 against 1.000 (-0.750, corrected p < 0.001).",
    )
    assert found[1][0] == "bad" and found[1][1].startswith("The pipeline ends below the model it started from")
    assert found[2][0] == "warn" and "below the stage before it, retriever 1: RR@10 0.250 against 0.500 (-0.250, p < 0.001)" in found[2][1]


def test_a_difference_that_may_be_chance_is_called_that() -> None:
    better = tones(measured({"bm25": [2, 2, 2], "retriever1": [2, 2, 1]}).metrics)
    assert better[0][0] == "warn" and "not measurably better than BM25" in better[0][1] and "p = 1.00" in better[0][1]
    worse = tones(measured({"bm25": [2, 2, 2], "retriever1": [2, 2, 3]}).metrics)
    assert worse[0][0] == "bad" and "may be chance, but the training has not paid off" in worse[0][1]
    level = tones(measured({"bm25": [2, 2, 2], "retriever1": [2, 2, 2]}).metrics)
    assert level[0] == ("warn", "Retriever 1 is level with BM25: RR@10 0.500 against 0.500 (+0.000, corrected p = 1.00).")
    assert "Only 3 judged queries" in level[-1][1]


def test_hybrid_and_reranker_are_held_against_what_they_were_made_from() -> None:
    base: dict[str, list[int | None]] = {"bm25": [3] * 15, "retriever1": [2] * 15, "reranker": [4] * 15, "distilled": [2] * 15}
    below = tones(measured(base | {"hybrid": [3] * 15}).metrics)
    assert any(
        tone == "warn" and "Hybrid search is below the better of its two parts, the distilled retriever" in text for tone, text in below
    )
    assert any(tone == "warn" and "The re-ranker is below the run it re-ranked, retriever 1" in text for tone, text in below)
    above = tones(measured(base | {"hybrid": [1] * 15}).metrics)
    assert any(tone == "good" and "Hybrid search is better than either of its parts" in text for tone, text in above)
    level = tones(measured(base | {"hybrid": [2] * 15}).metrics)
    assert any(tone == "plain" and "as good as the better of its parts" in text for tone, text in level)


def test_nothing_trained_and_one_query() -> None:
    metrics = measured({"bm25": [1], "start": [2]}).metrics
    assert final_row(metrics) is None
    found = tones(metrics)
    assert "No retriever was trained" in found[0][1]
    assert "Only 1 judged query:" in found[-1][1]
    assert metrics["rows"][1]["p_value_vs_bm25"] == 1.0
    t_test = measured({"bm25": [1], "retriever1": [2]}, significance="t-test").metrics
    assert t_test["rows"][1]["p_value_vs_bm25"] is None
    assert "no test possible" in tones(t_test)[0][1]


def test_no_labels_is_a_report_and_not_a_crash(tmp_path: Path) -> None:
    settings = EvaluateSettings()
    row = Row("bm25", run_with_ranks({0: 1}))
    for store, message in (
        (FakeStore({}, num_queries=3), "The 3 test queries have no relevance judgements"),
        (FakeStore({}, num_queries=3, splits=("train",)), "There are no test queries (splits with queries: train)"),
        (FakeStore({}, num_queries=3, splits=()), "There are no test queries (splits with queries: none)"),
    ):
        results = measure_rows([row], store, settings, name="tiny", seed=1)
        assert results.metrics["rows"] == [] and results.metrics["num_queries"] == 0
        assert message in results.metrics["missing"][0]
        assert tones(results.metrics)[0] == ("warn", "Nothing was measured.")
        write_pages(tmp_path, results, store, [], split="test", examples=5)
        for page in ("report.html", "report.md"):
            assert message[:30] in (tmp_path / page).read_text(encoding="utf-8")
        assert "Nothing was measured." in _printed(results.metrics)


def test_no_rows_at_all() -> None:
    store = FakeStore({0: {0: 1}}, num_queries=1)
    metrics = measure_rows([], store, EvaluateSettings(), name="tiny", seed=1, missing=["bm25 was not searched"]).metrics
    assert [text for _, text in tones(metrics)] == ["Nothing was measured.", "bm25 was not searched"]


def test_queries_without_results_or_judgements_are_named() -> None:
    store = FakeStore({0: {0: 1}, 1: {1: 1}, 2: {2: 0}}, num_queries=5)
    results = measure_rows([Row("bm25", run_with_ranks({0: 1, 4: 1}, depth=5))], store, EvaluateSettings(), name="tiny", seed=1)
    assert results.metrics["num_queries"] == 3  # also the one without a relevant passage
    assert results.metrics["rows"][0]["measures"]["RR@10"] == pytest.approx(1 / 3)
    assert results.metrics["notes"][0] == "BM25 found nothing for 2 of the judged queries; they count as 0."
    assert "2 of the test queries have no judgements and are not counted." in results.metrics["notes"]
    shallow = measure_rows([Row("reranker", run_with_ranks({0: 1, 1: 1, 2: 1}, depth=5))], store, EvaluateSettings(), name="tiny", seed=1)
    assert any("Re-ranker ranks 5 passages a query" in note for note in shallow.metrics["notes"])


def test_answer_recall_in_the_table() -> None:
    results = measured({"bm25": [1, 3], "retriever1": [1, None]}, answers=[1, 5], measures=["R@5"], main="Answer@2")
    assert results.metrics["measures"] == ["R@5", "Answer@1", "Answer@5", "Answer@2"]
    assert results.metrics["rows"][0]["measures"] == {"R@5": 1.0, "Answer@1": 0.5, "Answer@5": 1.0, "Answer@2": 0.5}
    assert results.metrics["rows"][1]["measures"]["Answer@5"] == 0.5
    store = FakeStore({}, num_queries=2)  # Natural Questions' test set: answers, no judged passages
    settings = EvaluateSettings(answers=[1])
    only = measure_rows([Row("bm25", run_with_ranks({0: 1, 1: 2}))], store, settings, name="nq", seed=1).metrics
    assert only["rows"][0]["measures"] == {"Answer@1": 0.5} and only["main"] == "Answer@1"
    store.with_answers = False
    assert measure_rows([], store, settings, name="nq", seed=1).metrics["missing"]


def test_graded_judgements_and_the_positive_that_is_shown() -> None:
    store = FakeStore({0: {5: 1, 6: 3, 7: 0}}, num_queries=1)
    graded = EvaluateSettings(main="RR(rel=2)@10", measures=["R(rel=2)@50"])
    row = Row("bm25", Run.from_lists("test", [0], [([5, 7, 6], [3.0, 2.0, 1.0])]))
    results = measure_rows([row], store, graded, name="tiny", seed=1)
    assert results.positives == {0: [6]}
    assert results.metrics["rows"][0]["measures"] == {"RR(rel=2)@10": pytest.approx(1 / 3), "R(rel=2)@50": 1.0}


def test_an_unknown_measure_is_refused_even_without_rows() -> None:
    with pytest.raises(RecipeError, match="did you mean 'RR@10'"):
        measure_rows([], FakeStore({}, num_queries=1), EvaluateSettings(main="mrr@10"), name="x", seed=1)


def test_wins_and_losses() -> None:
    results = measured({"bm25": [1, 2, 4, None, 1, 3], "retriever1": [1, 1, 5, 1, 2, 3]})
    store = FakeStore({}, num_queries=6)
    wins, losses = wins_and_losses(results, store, "test", 25)
    assert [(example.query_id, example.ranks) for example in wins] == [("q3", (None, 1)), ("q1", (2, 1))]
    assert [(example.query_id, example.ranks) for example in losses] == [("q4", (1, 2)), ("q2", (4, 5))]
    win = wins[0]
    assert win.positive is not None and win.positive.passage_id == "p3" and win.positive.relevant and win.positive.title == "title 3"
    assert win.tops[0] is not None and win.tops[0].passage_id == "p0" and not win.tops[0].relevant
    assert win.tops[1] is not None and win.tops[1].relevant
    assert [example.query_id for example in wins_and_losses(results, store, "test", 1)[0]] == ["q3"]
    assert wins_and_losses(results, store, "test", 0) == ([], [])


class _Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "circle", "line"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_self_contained_and_text_stays_text(tmp_path: Path) -> None:
    results = measured({"bm25": [1, 2, 4, None], "retriever1": [2, 1, 5, 1]})
    results.metrics["name"] = NASTY
    results.metrics["notes"].append(NASTY)
    store = FakeStore({}, num_queries=4)
    store.passages.texts = [NASTY] * 20
    store.table.texts = [NASTY] * 4
    with build_artifact(tmp_path / "step", kind="model", stage="train_retriever", settings={"nasty": {"key<b>": NASTY}}) as builder:
        builder.facts["note"] = NASTY
        (builder.work / "log.jsonl").write_text(
            json.dumps({"step": 1, "seconds": 1, "kind": "train", "measures": {"loss<script>": 2.0, "loss": 1.0}}), encoding="utf-8"
        )
    write_pages(tmp_path, results, store, read_steps({f"<b>{NASTY}": tmp_path / "step"}), split="test", examples=5)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "b<script>", "iframe", "object", "link", "base", "form"}
    assert all(not key.startswith("on") and key != "style" for _, attributes in page.tags for key in attributes)
    assert all(attributes["href"].startswith("#") for tag, attributes in page.tags if tag == "a" and attributes["href"])
    assert "<script>alert('x')</script>" in "".join(page.words)
    assert not re.search(r"url\(|@import|https?://", text.replace("http://x", ""))
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    policy = next(str(attributes["content"]) for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"style-src 'sha256-{digest}'" in policy
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown and not re.search(r"(?<!\\)\]\(http", markdown)


def test_markdown_text() -> None:
    assert markdown_text("a|b\n*c* <d> `e` [f](g) & h_i") == r"a\|b \*c\* &lt;d> \`e\` \[f\](g) &amp; h\_i"
    assert markdown_text("- item") == r"\- item"
    assert markdown_text("1. item") == r"1\. item"
    assert markdown_text("0.02") == "0.02"
    assert markdown_text("") == ""


def test_pages_tell_the_outcome_first_and_everything_else(tmp_path: Path) -> None:
    results = measured({"bm25": [1] * 15, "start": [3] * 15, "retriever1": [2] * 15}, num_samples=100)
    with build_artifact(tmp_path / "retriever1", kind="model", stage="train_retriever", settings={"temperature": 0.02}, seed=3) as builder:
        (builder.work / "log.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "seconds": step, "kind": kind, "measures": {name: value}}) + "\n"
                for step, kind, name, value in ((1, "train", "loss", 2.0), (2, "train", "loss", 1.0), (2, "dev", "RR@10", 0.5))
            ),
            encoding="utf-8",
        )
    steps = read_steps({"retriever1": tmp_path / "retriever1"})
    write_pages(tmp_path, results, FakeStore({}, num_queries=15), steps, split="test", examples=3)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert markdown.splitlines()[2].startswith("**The pipeline ends below BM25")
    assert "| Retriever 1 | 0.500 |" in markdown and "temperature = 0.02" in markdown and "train\\_retriever" in markdown
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in (
        "The pipeline ends below BM25",
        "retriever1: loss",
        "retriever1: dev RR@10",
        steps[0].manifest.fingerprint,
        "polyline",
        "15 judged",
    ):
        assert expected in page
    assert "prefers-color-scheme: dark" in page


def _printed(metrics: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(terminal_table(metrics))
    for verdict in verdicts(metrics):
        console.print(verdict)
    return console.export_text()


def test_terminal_table() -> None:
    metrics = measured({"bm25": [5] * 15, "start": [6] * 15, "retriever1": [2] * 15}).metrics
    metrics["name"] = "[bold]brackets[/x]"
    text = _printed(metrics)
    assert "[bold]brackets[/x]: 15 test queries, 20 passages" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("Retriever 1"))
    assert line.split() == ["Retriever", "1", "0.500▲", "0.631", "1.000", "1.000", "1.000", "+0.300", "<0.001", "15/0", "1,536", "2.5"]
    assert "is better than BM25" in text


def test_charts() -> None:
    assert thin([(0.0, 1.0)] * 3) == [(0.0, 1.0)] * 3
    thinned = thin([(float(step), 2.0) for step in range(1001)], 100)
    assert len(thinned) <= 100 and thinned[-1] == (1000.0, 2.0) and thinned[0][0] == 5.0
    for points in ([(0.0, 0.0)], [(5.0, 3.0)], [(0.0, 1e9), (1.0, -1e9)], [(0.0, 1e-9), (7.0, 2e-9)], [(1.0, 0.7), (2.0, 0.7)]):
        drawn = line_chart([Series("<b>", points, dots=True)], label="a & b")
        assert "nan" not in drawn and "inf" not in drawn and "<b>" not in drawn and "a &amp; b" in drawn
        assert all(-1 <= float(y) <= 191 for y in re.findall(r'cy="([-.\d]+)"', drawn))
    assert stacked_bar([0, 0], labels=["a", "b"]).count("<rect") == 0
    assert stacked_bar([1, 3], labels=["<a>", "b"]).count("<rect") == 2


def test_logs_are_read_leniently(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "kind": "train", "measures": {"loss": 2.0, "grad_norm": 1.0}}\n'
        '{"step": 2, "kind": "train", "measures": {"loss": NaN}}\n'
        '[1]\n{"step": "x"}\n'
        '{"step": 3, "kind": "dev", "measures": {"RR@10": 0.5, "text": "no"}}\n'
        '{"step": 4, "ki',
        encoding="utf-8",
    )
    assert read_curves(log) == {("train", "loss"): [(1.0, 2.0)], ("train", "grad_norm"): [(1.0, 1.0)], ("dev", "RR@10"): [(3.0, 0.5)]}
    assert read_curves(tmp_path / "absent") == {}
    with build_artifact(tmp_path / "step", kind="model") as builder:
        (builder.work / "log.jsonl").write_bytes(log.read_bytes())
    panels = training_panels(read_steps({"s": tmp_path / "step"})[0])
    assert [panel.title for panel in panels] == ["loss", "dev RR@10"]


def test_small_formats() -> None:
    assert [duration(value) for value in (0, 0.44, 9.96, 59.4, 61, 3599, 3661)] == [
        "0.0 s",
        "0.4 s",
        "10 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "1 h 01 min",
    ]
    assert [size(value) for value in (0, 1023, 2048, 5 * 2**20, 1.5 * 2**30)] == ["0 B", "1023 B", "2.0 KiB", "5.0 MiB", "1.5 GiB"]
    assert [milliseconds(value) for value in (None, 0.123, 4.56, 1234.0)] == ["", "0.12", "4.6", "1,234"]
    assert [p_text(value) for value in (None, 0.0001, 0.0123, 0.456)] == ["no test possible", "p < 0.001", "p = 0.012", "p = 0.46"]
    assert flat_settings({"a": 1, "b": {"c": "x", "d": None}, "e": []}) == [("a", "1"), ("b.c", '"x"')]
    assert clean(" a\x00\nb\u202e ") == "a b"
    assert cut("word " * 10, 12) == "word word…" and cut("x" * 20, 10) == "x" * 9 + "…" and cut("short") == "short"


# The stage.


def artifact(
    path: Path, kind: Kind, *, inputs: dict[str, str] | None = None, facts: dict[str, Any] | None = None, run: Run | None = None
) -> Artifact:
    builder = ArtifactBuilder(path, kind=kind, stage="search", code_version=1, fingerprint=f"print of {path.name}")
    builder.begin()
    if run is not None:
        run.save(builder.work)
    builder.facts.update(facts or {})
    return builder.finish(settings={"depth": 5}, inputs=inputs or {}, seed=1, seconds=2.0, peak_memory_bytes=2**30)


def run_stage(folder: Path, inputs: dict[str, Path], settings: EvaluateSettings) -> dict[str, Any]:
    builder = ArtifactBuilder(folder / "report", kind="report", stage="evaluate", code_version=1, fingerprint="x")
    builder.begin()
    evaluate_stage(settings, inputs, Context(builder, 7, Progress(quiet=True)))
    done = builder.finish(settings={}, inputs={}, seed=7, seconds=1.0, peak_memory_bytes=1)
    metrics: dict[str, Any] = json.loads(done.file("metrics.json").read_text(encoding="utf-8"))
    assert done.manifest.facts["num_queries"] == metrics["num_queries"]
    return metrics


def store_run(store: Any, split: Split, rank: int) -> Run:
    """A run over all queries of a store that has the first relevant passage at this rank of 5, with equal scores."""
    rows, lists = [], []
    for query, grades in store.qrels(split).items():
        relevant = next(row for row, grade in grades.items() if grade > 0)
        passages = [row for row in range(10) if row != relevant][:4]
        passages.insert(rank - 1, relevant)
        rows.append(query)
        lists.append((passages, [9.0, 9.0, 8.0, 7.0, 6.0] if rank > 2 else [9.0, 8.0, 7.0, 6.0, 5.0]))
    return Run.from_lists(split, rows, lists)


def test_stage_writes_a_whole_report(tmp_path: Path, tiny_store: Any) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    inputs = {"store": tiny_store.path}
    costs = {"bytes_per_passage": 10.0, "milliseconds_per_query": 0.5}
    for name, rank in (("bm25", 4), ("retriever1", 1)):
        artifact(folder / f"{name}_run", "run", run=store_run(tiny_store, "test", rank), facts=costs)
    artifact(folder / "best_run", "run", facts={"selected": "retriever1"}, run=store_run(tiny_store, "test", 1))
    artifact(folder / "reranker_run", "run", inputs={"run": "print of best_run"}, run=store_run(tiny_store, "test", 2))
    artifact(
        folder / "hybrid_run",
        "run",
        inputs={"dense": "print of retriever1_run", "bm25": "print of bm25_run"},
        run=store_run(tiny_store, "test", 1),
    )
    artifact(folder / "start_run", "run", run=store_run(tiny_store, "dev", 1))
    order = ("bm25", "start", "retriever1", "reranker", "hybrid")
    inputs |= {f"run.{name}": folder / f"{name}_run" for name in order}
    inputs |= {f"step.{name}_run": folder / f"{name}_run" for name in (*order, "best")}
    metrics = run_stage(folder, inputs, EvaluateSettings(measures=["RR@10", "R@5"]))
    assert metrics["name"] == "my-run" and metrics["seed"] == 7 and metrics["num_queries"] == 12
    assert [row["name"] for row in metrics["rows"]] == ["bm25", "retriever1", "reranker", "hybrid"]
    assert {row["name"]: row["parts"] for row in metrics["rows"]}["hybrid"] == ["bm25", "retriever1"]
    assert comparison(metrics, "reranker", "retriever1") is not None
    assert metrics["missing"] == ["start was not searched for the test queries, so it has no row."]
    report = open_artifact(folder / "report", "report").path
    qrels = read_trec_qrels(report / "qrels.trec")
    assert len(qrels) == 12
    for row in metrics["rows"]:
        file = report / "runs" / f"{row['name']}.trec"
        assert all(len(passages) == 5 for passages in read_trec_run(file).values())
        assert evaluate_run(file, qrels, ["RR@10", "R@5"]) == pytest.approx(row["measures"])
    assert "Retriever 1 is better than BM25" in (report / "report.md").read_text(encoding="utf-8")
    again = tmp_path / "again" / "my-run"
    again.mkdir(parents=True)
    assert run_stage(again, inputs, EvaluateSettings(measures=["RR@10", "R@5"])) == metrics


def test_what_came_of_comparing_teacher_and_student_is_in_the_report(tmp_path: Path, tiny_store: Any) -> None:
    facts = {"student_name": "retriever2", "measure": "RR@10", "measured_on": "dev", "teacher": 0.5, "student": 0.9, "num_queries": 12}
    facts |= {"p_value": 0.01, "outcome": "worse", "action": "skip"}
    builder = ArtifactBuilder(tmp_path / "teacher_check", kind="report", stage="check_teacher", code_version=1, fingerprint="x")
    builder.begin()
    builder.facts.update(facts)
    builder.finish(settings={}, inputs={}, seed=1, seconds=2.0, peak_memory_bytes=1)
    artifact(tmp_path / "bm25_run", "run", run=store_run(tiny_store, "test", 4))
    artifact(tmp_path / "distilled_run", "run", run=store_run(tiny_store, "test", 1))
    inputs = {"store": tiny_store.path} | {f"run.{name}": tmp_path / f"{name}_run" for name in ("bm25", "distilled")}
    metrics = run_stage(tmp_path, inputs | {"step.teacher_check": tmp_path / "teacher_check"}, EvaluateSettings())
    assert metrics["teaching"] == facts
    told = "Not distilled: the distilled retriever is retriever 2 as it was"
    assert any(tone == "warn" and text.startswith(told) for tone, text in tones(metrics))
    for page in ("report.html", "report.md"):
        assert told in (tmp_path / "report" / page).read_text(encoding="utf-8")
    assert told in _printed(metrics).replace("\n", " ")
    (tmp_path / "other").mkdir()
    assert run_stage(tmp_path / "other", inputs, EvaluateSettings())["teaching"] is None


def test_stage_without_the_split(tmp_path: Path, tiny_store: Any, tiny_wordpiece: Any) -> None:
    from tests.conftest import build_store, tiny_passages

    bare = build_store(tmp_path / "store", tiny_wordpiece, tiny_passages(), [], {})
    artifact(tmp_path / "bm25", "index")
    metrics = run_stage(tmp_path, {"store": bare.path, "step.bm25": tmp_path / "bm25"}, EvaluateSettings())
    assert metrics["rows"] == [] and any("no training queries" in text for text in metrics["missing"])
    assert any("There are no test queries" in text for text in metrics["missing"])
    assert "no test queries" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
