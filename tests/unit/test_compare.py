"""The grid of a comparison, its budgets, and what is said of its numbers."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from simlm import compare
from simlm.errors import DataError, RecipeError
from simlm.evaluation.report import comparison
from simlm.evaluation.report.comparison import Facts, RowResults, TableResults, summarize
from simlm.pipeline import make_plan
from simlm.recipe import Recipe, parse_recipe
from tests.toy.corpus import write_beir


def recipe_for(folder: Path, pretrain: dict[str, Any] | None = None, **grid: Any) -> Recipe:
    defaults: dict[str, Any] = {"objectives": ["replaced_lm", "none"], "replace_rates": [], "generators": [], "seeds": [1, 2, 3]}
    return parse_recipe(
        {
            "name": "t",
            "output": str(folder / "run"),
            "data": {"dataset": "beir", "path": str(folder / "data"), "dev_fraction": 0.0},
            "model": {
                "start": "scratch",
                "config": {
                    "model_type": "bert",
                    "hidden_size": 16,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                },
            },
            "prepare": {"train_vocabulary": 300, "max_passage_tokens": 32, "num_workers": 1},
            "pretrain": {"training": {"max_steps": 90}} | (pretrain or {}),
            "compare": defaults | grid,
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_beir(tmp_path / "data", num_passages=30)
    return tmp_path


def grid_rows(grid: compare.Grid) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(row.table, row.name, row.seeds) for row in grid.rows]


# The grid


def test_every_table_has_a_main_row_with_all_seeds(data: Path) -> None:
    grid = compare.make_grid(
        recipe_for(
            data,
            objectives=["replaced_lm", "none", {"replaced_lm": 1.0, "bow": 0.1}],
            replace_rates=[[0.15, 0.3], [0.3, 0.5]],
            generators=["random", "frozen", "self"],
        )
    )
    assert grid_rows(grid) == [
        ("objectives", "replaced_lm", (1, 2, 3)),
        ("objectives", "none", (1,)),
        ("objectives", "replaced_lm + 0.1 bow", (1,)),
        ("replace_rates", "15/30", (1,)),
        ("replace_rates", "30/50", (1, 2, 3)),
        ("generators", "random", (1,)),
        ("generators", "frozen", (1, 2, 3)),
        ("generators", "self", (1,)),
    ]
    assert grid.main == {"objectives": "replaced_lm", "replace_rates": "30/50", "generators": "frozen"}


def test_rows_that_are_the_same_thing_are_done_once_and_first_seeds_come_first(data: Path) -> None:
    grid = compare.make_grid(recipe_for(data, replace_rates=[[0.15, 0.3], [0.3, 0.5]], generators=["frozen", "random"]))
    assert [(cell.row.name, cell.seed) for cell in grid.wanted(None)] == [
        ("replaced_lm", 1),
        ("none", 1),
        ("15/30", 1),
        ("random", 1),
        ("replaced_lm", 2),
        ("replaced_lm", 3),
    ]
    keys = {(cell.row.name, cell.seed): cell.key for cell in grid.cells}
    assert keys["replaced_lm", 2] == keys["30/50", 2] == keys["frozen", 2]
    assert len({keys["replaced_lm", 1], keys["none", 1], keys["15/30", 1], keys["random", 1]}) == 4


def test_a_duplicate_in_a_table_is_said_and_left_out(data: Path) -> None:
    grid = compare.make_grid(recipe_for(data, objectives=["replaced_lm", "none", {"none": 1.0}, "replaced_lm"]))
    assert [row.name for row in grid.rows] == ["replaced_lm", "none"]
    assert len(grid.notes) == 2
    assert "none is the same as none, it is done and shown once" in grid.notes[0]


def test_only_takes_rows_and_tables(data: Path) -> None:
    grid = compare.make_grid(recipe_for(data, replace_rates=[[0.15, 0.3]]))
    assert [(cell.row.name, cell.seed) for cell in grid.wanted(["none"])] == [("none", 1)]
    assert [cell.row.name for cell in grid.wanted(["replace_rates"])] == ["15/30"] * 3
    with pytest.raises(RecipeError, match=r"--only nones: no such row or table; did you mean 'none'"):
        grid.wanted(["nones"])


def test_what_rows_share_lies_in_the_recipes_own_place(data: Path) -> None:
    recipe = recipe_for(data)
    grid = compare.make_grid(recipe)
    plans = {(cell.row.name, cell.seed): cell.plan for cell in grid.cells}
    first, second, none = plans["replaced_lm", 1], plans["replaced_lm", 2], plans["none", 1]
    assert first is not None and second is not None and none is not None
    shared = [step.name for step in first.steps if "/" not in step.name]
    assert shared == ["store", "bm25", "bm25_train_run", "bm25_groups", "generator"]
    assert {step.name for step in first.steps} & {step.name for step in second.steps} == set(shared)
    assert "generator" not in {step.name for step in none.steps}
    own = {step.name: step.fingerprint for step in make_plan(recipe).steps}
    for step in first.steps[:5]:
        assert step.fingerprint == own[step.name]
        assert step.seed == recipe.seed
    assert {step.seed for step in second.steps if step.stage in ("pretrain", "train_retriever")} == {2}
    assert all(name in {step.name for step in first.steps} for step in first.steps for name in step.inputs.values())


def test_a_seed_that_is_the_recipes_makes_the_recipes_own_retriever(data: Path) -> None:
    recipe = recipe_for(data, seeds=[42])
    (cell, _) = compare.make_grid(recipe).cells
    assert cell.plan is not None
    own = {step.name: step.fingerprint for step in make_plan(recipe).steps}
    assert cell.plan.steps[-1].fingerprint == own["retriever1_run"]
    assert cell.plan.steps[-1].name.startswith("compare/steps/retriever1_run-")


def test_a_mismatched_corpus_has_the_tokenizer_of_the_recipe_and_a_generator_of_its_own(data: Path) -> None:
    write_beir(data / "other", num_passages=24, seed=9)
    recipe = recipe_for(data, objectives=[], mismatched={"dataset": "beir", "path": str(data / "other")})
    grid = compare.make_grid(recipe)
    assert grid_rows(grid) == [("corpus", "matched", (1, 2, 3)), ("corpus", "mismatched", (1,))]
    plan = grid.cells[-1].plan
    assert plan is not None
    steps = {step.name.removeprefix("compare/steps/").split("-")[0]: step for step in plan.steps}
    other = steps["other_store"]
    assert other.settings.tokenizer == str((data / "run" / "store" / "tokenizer").resolve())  # type: ignore[attr-defined]
    assert other.settings.train_vocabulary is None  # type: ignore[attr-defined]
    assert steps["pretrained"].inputs["store"] == other.name
    assert steps["generator"].inputs == {"store": other.name}
    assert steps["generator"].name.startswith("compare/steps/"), "not the recipe's"
    assert steps["retriever1"].inputs["store"] == "store"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"main": "condensr"}, RecipeError, r"compare.main 'condensr' is none of the rows"),
        ({"objectives": []}, RecipeError, "nothing to compare"),
        ({"mismatched": {"dataset": "beir", "path": "/nowhere"}}, DataError, "/nowhere"),
        ({"budget": "tokens", "pretrain": {"training": {}}}, RecipeError, "set pretrain.training.max_steps"),
    ],
)
def test_a_grid_that_cannot_be_done_is_refused_before_any_work(
    data: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare.make_grid(recipe_for(data, **changes))


def test_a_retriever_that_does_not_start_from_the_pretraining_is_refused(data: Path) -> None:
    recipe = recipe_for(data)
    changed = recipe.model_copy(update={"retriever1": recipe.retriever1.model_copy(update={"initial": "start"})})
    with pytest.raises(RecipeError, match="would not start from what is compared"):
        compare.make_grid(changed)


@pytest.mark.parametrize(("splits", "message"), [(("test",), "no training queries"), (("train",), "no dev or test queries")])
def test_queries_are_needed(tmp_path: Path, splits: tuple[str, ...], message: str) -> None:
    write_beir(tmp_path / "data", num_passages=30, splits=splits)
    with pytest.raises(DataError, match=message):
        compare.make_grid(recipe_for(tmp_path))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"objectives": ["condensr"]}, "did you mean 'condenser'"),
        ({"replace_rates": [[0.5, 0.3]]}, "encoder <= decoder"),
        ({"replace_rates": [[0.3]]}, "replace_rates"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": []}, "at least 1"),
        ({"generators": ["electra"]}, "'frozen', 'joint', 'random' or 'self'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_for(tmp_path, **grid)


# Budgets


def steps_of(grid: compare.Grid) -> dict[str, str]:
    return {cell.row.name: grid.training_steps(cell) for cell in grid.cells}


def test_equal_tokens_weigh_a_decoders_tokens_by_its_layers(data: Path) -> None:
    """Encoder of 4 layers, decoder of 2: replaced_lm costs 1 + 2/4 a token, masked_lm 1; 90 steps become 135."""
    grid = compare.make_grid(recipe_for(data, objectives=["replaced_lm", "masked_lm", "none"], budget="tokens"))
    assert steps_of(grid) == {"replaced_lm": "90", "masked_lm": "135", "none": "none"}


def test_equal_time_waits_for_the_calibration_and_then_uses_it(data: Path) -> None:
    recipe = recipe_for(data, objectives=["replaced_lm", "masked_lm", "none"], budget="time")
    grid = compare.make_grid(recipe)
    assert steps_of(grid) == {"replaced_lm": "90", "masked_lm": "known after timing", "none": "none"}
    assert [row.name for row in grid.uncalibrated] == ["replaced_lm", "masked_lm"]
    for row, seconds in zip(grid.uncalibrated, (0.3, 0.2), strict=True):
        _, file = compare._calibration(recipe, grid.base, row)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds_per_step": seconds}), encoding="utf-8")
    grid = compare.make_grid(recipe)
    assert steps_of(grid) == {"replaced_lm": "90", "masked_lm": "135", "none": "none"}
    assert not grid.uncalibrated


# What is said of the numbers


def measured(values: list[float], *, probe: float = 0.5, seconds: float = 10.0) -> dict[str, Any]:
    averages = {"RR@10": sum(values) / len(values)}
    curves = {"dev probe_RR@10": [[0, 0.1], [10, probe]], "train encoder_loss": [[5, 3.0], [10, 2.0]]}
    return {
        "splits": {"test": {"query_rows": list(range(len(values))), "values": {"RR@10": values}, "averages": averages}},
        "pretrain": {
            "seconds": seconds,
            "training_seconds": seconds,
            "tokens_per_second": 1000.0,
            "peak_memory_bytes": 2**30,
            "dev": {"probe_RR@10": probe},
            "curves": curves,
        },
        "retriever1": {},
        "fingerprints": {},
        "models": {},
    }


FACTS = Facts(
    name="toy",
    split="test",
    measures=["RR@10"],
    main={"objectives": "replaced_lm"},
    budget="data",
    significance="randomization",
    num_samples=10_000,
    seed=0,
    num_passages=100,
)

# Eight queries; the main row's seeds average 0.5 and 0.7.
MAIN = {1: measured([0.5] * 8), 2: measured([0.7] * 8)}


def summary(*rows: RowResults, bm25: dict[str, Any] | None = None) -> dict[str, Any]:
    table = TableResults("objectives", "Objective", [RowResults("replaced_lm", "main", [1, 2], MAIN), *rows])
    return summarize(FACTS, [table], bm25=bm25 or {})


def test_mean_spread_and_differences_over_common_seeds() -> None:
    content = summary(RowResults("bow", "b", [1], {1: measured([0.6] * 8)}), RowResults("none", "n", [1], {1: measured([0.1] * 8)}))
    main, bow, none = content["tables"][0]["rows"]
    assert main["mean"]["RR@10"] == pytest.approx(0.6)
    assert main["spread"]["RR@10"] == pytest.approx(0.2 / 2**0.5)  # of 0.5 and 0.7, n - 1
    assert bow["spread"]["RR@10"] is None
    # Seed 1 alone: 0.6 - 0.5, although the means over all seeds are equal.
    assert bow["against_main"]["seeds"] == [1]
    assert bow["against_main"]["difference"] == pytest.approx(0.1)
    # All 8 differences have one sign: 2 of the 2^8 sign patterns are as large, exactly.
    assert bow["against_main"]["p_value"] == pytest.approx(2 / 256)
    assert bow["against_main"]["p_value_holm"] == pytest.approx(4 / 256), "two rows are compared with the main one"
    assert main["against_none"]["difference"] == pytest.approx(0.4)
    assert main["against_none"]["seeds"] == [1]
    assert none["against_none"] is None
    assert (content["num_queries"], content["cells"]) == (8, {"wanted": 4, "done": 4, "failed": 0})


def test_a_difference_within_the_spread_or_without_significance_is_none() -> None:
    mixed = [0.6, 0.4, 0.7, 0.3, 0.6, 0.4, 0.5, 0.6]
    content = summary(
        RowResults("bow", "b", [1], {1: measured([0.6] * 8)}),
        RowResults("ict", "i", [1], {1: measured(mixed)}),
        RowResults("none", "n", [1], {1: measured([0.1] * 8)}),
        RowResults("condenser", "c", [1], {1: measured([0.9] * 8)}),
    )
    found = {row["name"]: comparison.outcome(row) for row in content["tables"][0]["rows"]}
    assert found == {
        "replaced_lm": "main",
        "bow": "within spread",  # 0.1 on every query, but the seeds of the main row lie 0.2 apart
        "ict": "no difference shown",
        "none": "worse",
        "condenser": "better",
    }


def test_conclusions_say_what_failed_is_missing_or_has_not_paid_off() -> None:
    content = summary(
        RowResults("none", "n", [1], {1: measured([0.9] * 8)}),
        RowResults("bow", "b", [1], {}, {1: "the loss of step 3 is not a finite number"}),
        bm25={"splits": {"test": {"averages": {"RR@10": 0.95}}}},
    )
    texts = [verdict.text for verdict in comparison.conclusions(content)]
    assert texts[0] == "1 of 4 trainings failed; their errors are below."
    assert any(re.match(r"Objective: replaced_lm has not paid off against no pre-training: -0\.400", text) for text in texts)
    assert "Every row is below BM25 (RR@10 0.950); the best, none, has 0.900." in texts
    assert "3 of 4 trainings are measured, 1 not yet." in texts
    assert "Only 8 judged queries: all but large differences may be chance." in texts
    assert "step 3 is not a finite number" in comparison.render_markdown(content)


def test_nothing_measured_yet_makes_a_page() -> None:
    table = TableResults("objectives", "Objective", [RowResults("replaced_lm", "main", [1], {}), RowResults("none", "n", [1], {})])
    content = summarize(FACTS, [table], bm25={})
    assert "0 of 2 trainings are measured" in comparison.render_html(content)
    assert [comparison.outcome(row) for row in content["tables"][0]["rows"]] == ["main", "to do"]


def test_the_page_is_well_formed_and_runs_no_script() -> None:
    rows = [RowResults(f"row {number} <b>", str(number), [1], {1: measured([0.6] * 8, seconds=10.0)}) for number in range(6)]
    page = comparison.render_html(summary(*rows))
    assert "<script" not in page
    assert "row 3 <b>" not in page
    assert "row 3 &lt;b&gt;" in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) > 14
    for picture in pictures:
        ET.fromstring(picture)


def test_the_plot_places_means_on_its_scale() -> None:
    content = summary(RowResults("bow", "b", [1], {1: measured([0.6] * 8)}))
    plot = comparison.dot_plot(content, content["tables"][0])
    low, high = plot["low"], plot["high"]
    assert low <= 0.6 - 0.2 / 2**0.5 and high >= 0.6 + 0.2 / 2**0.5
    picture = ET.fromstring({name: svg for name, svg, _ in plot["lines"]}["bow"])
    (mean,) = [line for line in picture.iter("line") if line.get("class") == "mean"]
    assert float(mean.get("x1", "")) == pytest.approx(100 * (0.6 - low) / (high - low), abs=0.01)


def test_labels_of_the_scatter_plot_do_not_cover_each_other() -> None:
    content = summary(*[RowResults(f"objective {n}", str(n), [1], {1: measured([0.6] * 8, seconds=10.0)}) for n in range(5)])
    drawn = ET.fromstring(comparison.scatter(content) or "")
    baselines = sorted(float(text.get("y", "")) for text in drawn.iter("text") if text.get("class") == "name")
    assert len(baselines) == 6
    assert min(later - earlier for earlier, later in itertools.pairwise(baselines)) >= 15
