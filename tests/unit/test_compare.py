"""The grid of a comparison, its budgets, and what is said of its numbers."""

from __future__ import annotations

import io
import itertools
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from simlm import compare
from simlm.errors import DataError, DiskError, RecipeError, TrainingError
from simlm.estimates import objective_costs
from simlm.evaluation.report import comparison
from simlm.evaluation.report.charts import tick_text, ticks
from simlm.evaluation.report.comparison import Facts, RowResults, TableResults, summarize
from simlm.evaluation.significance import holm
from simlm.pipeline import make_plan
from simlm.progress import Progress
from simlm.recipe import OBJECTIVE_NAMES, PretrainSettings, Recipe, parse_recipe
from simlm.runtime import Ranks
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


def test_variants_stand_beside_the_recipes_own_settings(data: Path) -> None:
    recipe = recipe_for(
        data, objectives=["replaced_lm"], variants=[{"softmax": "corpus"}, {"dropout": 0.1, "decoder_layers": 1}, {"decoder_layers": 2}]
    )
    grid = compare.make_grid(recipe)
    assert grid_rows(grid)[1:] == [
        ("variants", "as in the recipe", (1, 2, 3)),
        ("variants", "softmax = corpus", (1,)),
        ("variants", "dropout = 0.1, decoder_layers = 1", (1,)),
    ]
    assert grid.notes == ("compare.variants: decoder_layers = 2 is the same as as in the recipe, it is done and shown once",)
    softmax, both = (row.pretrain for row in grid.rows[2:4])
    assert (softmax.softmax, softmax.dropout, softmax.decoder_layers) == ("corpus", recipe.pretrain.dropout, 2)
    assert (both.softmax, both.dropout, both.decoder_layers) == ("vocabulary", 0.1, 1)
    keys = {(cell.row.name, cell.seed): cell.key for cell in grid.cells}
    assert keys["replaced_lm", 2] == keys["as in the recipe", 2]
    assert len({key for (_, seed), key in keys.items() if seed == 1}) == 3


def test_a_variant_changes_single_keys_of_inner_tables(data: Path) -> None:
    recipe = recipe_for(data, objectives=[], variants=[{"training": {"learning_rate": 0.25}, "probe": {"num_passages": 7}}])
    _, row = compare.make_grid(recipe).rows
    assert row.name == "training.learning_rate = 0.25, probe.num_passages = 7"
    assert row.pretrain.training.learning_rate == 0.25
    assert row.pretrain.training.max_steps == recipe.pretrain.training.max_steps
    assert row.pretrain.probe.num_passages == 7


def test_a_variant_that_does_not_fit_the_recipe_is_refused(data: Path) -> None:
    recipe = recipe_for(data, objectives=[], variants=[{"encoder_mask_rate": 0.45}, {"encoder_mask_rate": 0.6, "decoder_mask_rate": 0.7}])
    assert [row.name for row in compare.make_grid(recipe).rows][1] == "encoder_mask_rate = 0.45"
    # 0.6 is above the default decoder rate, which is not this recipe's.
    high = recipe_for(data, objectives=[], variants=[{"encoder_mask_rate": 0.6}])
    high = high.model_copy(update={"pretrain": high.pretrain.model_copy(update={"decoder_mask_rate": 0.8})})
    assert [row.pretrain.encoder_mask_rate for row in compare.make_grid(high).rows][1] == 0.6
    low = recipe.pretrain.model_copy(update={"decoder_mask_rate": 0.4})
    with pytest.raises(RecipeError, match=r"compare\.variants: encoder_mask_rate = 0\.45 does not fit.*decoder_mask_rate 0\.4 is below"):
        compare.make_grid(recipe.model_copy(update={"pretrain": low}))


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


def test_a_main_row_that_is_a_duplicate_is_the_row_it_is_the_same_as(data: Path) -> None:
    recipe = recipe_for(data, objectives=[], generators=["random", "frozen", "self"])
    recipe = recipe.model_copy(update={"generator": recipe.generator.model_copy(update={"source": "random"})})
    grid = compare.make_grid(recipe)
    assert grid_rows(grid) == [("generators", "random", (1, 2, 3)), ("generators", "self", (1,))]
    assert grid.main == {"generators": "random"}
    assert grid.notes == ("compare.generators: frozen is the same as random, it is done and shown once",)


def test_what_became_the_main_row_of_a_list_without_the_recipes_own_is_said(data: Path) -> None:
    grid = compare.make_grid(recipe_for(data, replace_rates=[[0.15, 0.3], [0.3, 0.3]], generators=["self", "joint"]))
    assert grid.main == {"objectives": "replaced_lm", "replace_rates": "15/30", "generators": "self"}
    assert grid.notes == (
        "compare.replace_rates: the recipe's own 30/50 is not in the list, so the others are compared with 15/30",
        "compare.generators: the recipe's own frozen is not in the list, so the others are compared with self",
    )


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
        (
            {"budget": "tokens", "main": "none"},
            RecipeError,
            r'compare.budget is "tokens".*compare.main is \'none\', which is not pre-trained',
        ),
        ({"budget": "time", "main": "none"}, RecipeError, r'or set compare.budget = "data"'),
        (
            {"objectives": [], "main": "bow", "generators": ["joint"]},
            RecipeError,
            r"compare.main is 'bow', but compare.objectives is empty",
        ),
        ({"main": "none", "mismatched": {"dataset": "beir", "path": "/nowhere"}}, RecipeError, "compare.mismatched is set, but"),
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
        ({"variants": [{}]}, "an empty table; name a setting"),
        ({"variants": [{"sofmax": "corpus"}]}, "did you mean 'softmax'"),
        ({"variants": [{"softmax": "words"}]}, "'vocabulary' or 'corpus'"),
        ({"variants": [{"objective": "bow"}]}, "compare.objectives compares objectives"),
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


def test_a_row_of_two_tables_with_different_main_rows_is_done_with_the_steps_of_each(data: Path) -> None:
    """masked_lm costs 1 a token, replaced_lm 1.5: 60 steps beside masked_lm's 90, but 90 where it is the main row itself."""
    recipe = recipe_for(
        data, objectives=["masked_lm", "replaced_lm"], main="masked_lm", budget="tokens", replace_rates=[[0.3, 0.5], [0.15, 0.3]]
    )
    grid = compare.make_grid(recipe)
    assert steps_of(grid) == {"masked_lm": "90", "replaced_lm": "60", "30/50": "90", "15/30": "90"}
    done = grid.wanted(None)
    assert {cell.key for cell in done} == {cell.key for cell in grid.cells}, "nothing in the tables is left undone"
    assert len(done) == len({cell.key for cell in done}) == 3 + 1 + 3 + 1
    shown = {row.name: row.content for row in grid.rows}
    assert shown["replaced_lm"] != shown["30/50"]
    results = [
        TableResults(
            str(table), str(table), [RowResults(row.name, row.content, list(row.seeds), {}) for row in grid.rows if row.table == table]
        )
        for table in grid.main
    ]
    facts = replace(FACTS, main={str(table): name for table, name in grid.main.items()})
    assert summarize(facts, results, bm25={})["cells"]["wanted"] == 8


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


def states_of(grid: compare.Grid) -> dict[str, tuple[str, str]]:
    return {cell.row.name: grid.state(cell) for cell in grid.cells if cell.seed == 1}


def test_a_row_that_cannot_be_timed_fails_alone_and_is_tried_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(data, objectives=["replaced_lm", "masked_lm", "bow", "none"], budget="time")
    tried: list[str] = []
    broken = {"masked_lm"}

    def train(plan: Any, steps: list[Any], *_: Any) -> None:
        (objective,) = steps[-1].settings.objective_weights
        tried.append(objective)
        if objective in broken:
            raise TrainingError("the loss of step 3 is not a finite number")
        log = plan.path(steps[-1].name) / "log.jsonl"
        log.parent.mkdir(parents=True)
        lines = [{"kind": "train", "seconds": 0.5 * number, "measures": {"loss": 1.0}} for number in range(1, 4)]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def time_them(only: list[str] | None = None) -> compare.Grid:
        tried.clear()
        return compare._with_calibrations(compare.make_grid(recipe), only, Progress(quiet=True), Ranks())

    monkeypatch.setattr(compare, "_do", train)
    grid = time_them()
    assert tried == ["replaced_lm", "masked_lm", "bow"]
    assert states_of(grid) == {
        "replaced_lm": ("to do", ""),
        "masked_lm": ("failed", "the loss of step 3 is not a finite number"),
        "bow": ("to do", ""),
        "none": ("to do", ""),
    }
    assert steps_of(grid)["bow"] == "90"
    assert not list((data / "run" / "compare" / "steps").iterdir()), "nothing of the timings is kept"

    broken.clear()
    grid = time_them()
    assert tried == ["masked_lm"]
    assert (steps_of(grid)["masked_lm"], grid.uncalibrated) == ("90", ())


def test_a_main_row_that_cannot_be_timed_fails_the_rows_that_are_to_have_its_time(data: Path) -> None:
    recipe = recipe_for(data, objectives=["replaced_lm", "masked_lm"], budget="time")
    grid = compare.make_grid(recipe)
    _, file = compare._calibration(recipe, grid.base, grid.uncalibrated[0])
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"row": "replaced_lm", "error": "too large"}), encoding="utf-8")
    grid = compare.make_grid(recipe)
    assert states_of(grid) == {
        "replaced_lm": ("to do", ""),
        "masked_lm": ("failed", "replaced_lm, whose time this row is to have, could not be timed: too large"),
    }
    assert [row.name for row in grid.uncalibrated] == ["replaced_lm", "masked_lm"]


def test_one_logged_step_cannot_be_timed(data: Path, tmp_path: Path) -> None:
    row = compare.make_grid(recipe_for(data)).rows[0]
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "train", "seconds": 1.0, "measures": {"loss": 1.0}}\n', encoding="utf-8")
    with pytest.raises(TrainingError, match=r"replaced_lm: the timed training logged 1 steps with a loss, two are needed"):
        compare._keep_seconds(row, log, tmp_path / "file.json")


def test_a_model_of_a_timing_that_was_stopped_is_dropped(data: Path) -> None:
    recipe = recipe_for(data, objectives=["replaced_lm", "masked_lm"], budget="time")
    grid = compare.make_grid(recipe)
    places = []
    for row in grid.uncalibrated:
        plan, file = compare._calibration(recipe, grid.base, row)
        places.append(plan.path(compare._named(plan, "pretrained").name))
        places[-1].mkdir(parents=True)
        if row.name == "masked_lm":
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"seconds_per_step": 0.2}), encoding="utf-8")
    compare._drop_timed(compare.make_grid(recipe))
    assert [place.exists() for place in places] == [True, False], "the first is still to be timed"


# What fails


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TrainingError("not finite"), "not finite"),
        (MemoryError("large"), "out of memory: large"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: [enforce fail] DefaultCPUAllocator"),
    ],
)
def test_what_one_row_fails_of_stops_no_other(error: Exception, told: str) -> None:
    def work() -> None:
        raise error

    assert compare._failure(work, Ranks()).startswith(told)
    with pytest.raises(type(error)):
        compare._failure(work, Ranks(0, 2))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), DiskError("full"), KeyError("x")])
def test_other_errors_stop_the_comparison(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        compare._failure(work, Ranks())


def test_every_objective_that_trains_has_costs() -> None:
    for name in OBJECTIVE_NAMES:
        if name != "none":
            assert objective_costs(PretrainSettings(objective=name)).passes >= 1
    assert objective_costs(PretrainSettings(objective="cropping")).tokens_share == 0.55


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
            "dev": {"probe_RR@10": probe, "probe_whitened_RR@10": 0.641},
            "dev_start": {"probe_RR@10": 0.388},
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
# Seeds of 0.50, 0.48 and 0.52: s = 0.02 on 2 degrees of freedom, t(0.975) = 4.3027.
CLOSE = {1: measured([0.5] * 8), 2: measured([0.48] * 8), 3: measured([0.52] * 8)}


def summary(*rows: RowResults, main: dict[int, dict[str, Any]] = MAIN, bm25: dict[str, Any] | None = None) -> dict[str, Any]:
    table = TableResults("objectives", "Objective", [RowResults("replaced_lm", "main", sorted(main), main), *rows])
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
        main=CLOSE,
    )
    found = {row["name"]: comparison.outcome(row) for row in content["tables"][0]["rows"]}
    assert found == {
        "replaced_lm": "main",
        "bow": "within spread",  # 0.1 on every query: five times s, but below the limit of 0.122
        "ict": "no difference shown",
        "none": "worse",
        "condenser": "better",
    }


def limit_of(row: dict[str, Any]) -> float:
    return float(row["against_main"]["seed_limit"])


def test_the_limit_is_what_two_lots_of_seeds_of_one_row_differ_by() -> None:
    content = summary(
        RowResults("below", "a", [1], {1: measured([0.62] * 8)}),
        RowResults("above", "b", [1], {1: measured([0.623] * 8)}),
        # Common seeds 1 and 2: twice as many values, and its own s of 0.04 on 1 degree of freedom is pooled with 0.02 on 2.
        RowResults("two", "c", [1, 2], {1: measured([0.6] * 8), 2: measured([0.6 - 0.04 * 2**0.5] * 8)}),
        main=CLOSE,
    )
    _, below, above, two = content["tables"][0]["rows"]
    assert limit_of(below) == limit_of(above) == pytest.approx(4.30265 * 0.02 * 2**0.5, rel=1e-5)  # 0.1217
    assert (comparison.outcome(below), comparison.outcome(above)) == ("within spread", "better")
    pooled = ((2 * 0.02**2 + 0.04**2) / 3) ** 0.5
    assert limit_of(two) == pytest.approx(3.18245 * pooled * 1.0, rel=1e-5)


def test_few_rows_without_an_effect_are_called_better_or_worse() -> None:
    """Seeds alone: 5% of the differences of two single seeds lie beyond the limit; beyond one s of three seeds lie more than half."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(20_000, 4))
    spread = draws[:, :3].std(axis=1, ddof=1)
    apart = np.abs(draws[:, 3] - draws[:, 0])
    assert np.mean(apart > spread) > 0.5
    # The common seed is also one of the three that s comes from, which makes s and the difference depend on each other a little.
    assert np.mean(apart > stats.t.ppf(0.975, 2) * spread * 2**0.5) < 0.06


def test_a_main_row_with_one_seed_holds_no_difference_back_but_says_so() -> None:
    content = summary(
        RowResults("bow", "b", [1], {1: measured([0.6] * 8)}),
        RowResults("none", "n", [1], {1: measured([0.1] * 8)}),
        main={1: measured([0.5] * 8)},
    )
    assert [comparison.outcome(row) for row in content["tables"][0]["rows"]] == ["main", "better (one seed)", "worse (one seed)"]
    texts = {verdict.text: verdict.tone for verdict in comparison.conclusions(content)}
    assert (
        "Objective: replaced_lm has RR@10 0.500 with one seed. Against it better (one seed): bow (+0.100); worse (one seed): none (-0.400)."
        in texts
    )
    (gain,) = [text for text in texts if "than no pre-training" in text]
    assert gain.startswith("Objective: replaced_lm is better than no pre-training with one seed: +0.400")
    assert texts[gain] == "warn"


@pytest.mark.parametrize(
    ("none", "tone", "told"),
    [
        ([0.1] * 8, "good", "is better than no pre-training: +0.400"),
        ([0.9] * 8, "bad", "is worse than no pre-training: -0.400"),
        ([0.45] * 8, "warn", "differs from no pre-training within what other seeds may turn (±0.122): +0.050"),
        ([0.6, 0.4, 0.7, 0.3, 0.7, 0.5, 0.6, 0.5], "warn", ": no difference to no pre-training shown: -0.037"),
    ],
)
def test_gains_need_significance_first_and_then_more_than_other_seeds_would_change(none: list[float], tone: str, told: str) -> None:
    content = summary(RowResults("none", "n", [1], {1: measured(none)}), main=CLOSE)
    (verdict,) = [verdict for verdict in comparison.conclusions(content) if "no pre-training" in verdict.text]
    assert (verdict.tone, told in verdict.text) == (tone, True), verdict.text


def test_holm_counts_the_rows_that_are_still_to_come() -> None:
    assert holm({"a": 0.01, "b": 0.02}, num_tests=5) == pytest.approx({"a": 0.05, "b": 0.08})
    rows = [RowResults("bow", "b", [1], {1: measured([0.6] * 8)}), *(RowResults(f"{n}", f"{n}", [1], {}) for n in range(3))]
    assert summary(*rows)["tables"][0]["rows"][1]["against_main"]["p_value_holm"] == pytest.approx(4 * 2 / 256)


def test_rows_measured_on_different_queries_are_not_compared() -> None:
    other = measured([0.6] * 8)
    other["splits"]["test"]["query_rows"][0] = 99
    with pytest.raises(AssertionError, match="different queries"):
        summary(RowResults("bow", "b", [1], {1: other}))


def test_a_retriever_that_has_hardly_learned_is_said() -> None:
    content = summary(main={1: measured([0.0274] * 8)}, bm25={"splits": {"test": {"averages": {"RR@10": 0.5}}}})
    (verdict,) = [verdict for verdict in comparison.conclusions(content) if "BM25" in verdict.text]
    assert verdict.tone == "bad"
    assert verdict.text.startswith(
        "Every row is below a tenth of BM25 (RR@10 0.500); the best, replaced_lm, has 0.0274: retriever 1 has hardly"
    )
    assert "retriever1.training.max_steps" in verdict.text


def cells_of(content: dict[str, Any], place: int = 0) -> dict[str, str]:
    table = content["tables"][0]
    return dict(zip(comparison.headings(content, table), comparison.row_cells(content, table, table["rows"][place]), strict=True))


def test_the_probe_is_shown_from_start_to_end() -> None:
    cells = cells_of(summary())
    assert (cells["probe"], cells["whitened"], cells["RR@10"]) == ("0.388 -> 0.500", "0.641", "0.600 ±0.141")
    older = measured([0.05] * 8)
    del older["pretrain"]["dev_start"], older["pretrain"]["dev"]["probe_whitened_RR@10"]
    cells = cells_of(summary(main={1: older}))
    assert (cells["probe"], cells["RR@10"]) == ("0.500", "0.0500")
    assert "whitened" not in cells


def test_a_full_table_fits_the_width_of_a_log() -> None:
    full = {seed: measured([0.5 + seed / 100, 0.4, 0.6, 0.7], seconds=7_000.0) for seed in (1, 2, 3)}
    for one in full.values():
        found = one["splits"]["test"]
        found["averages"] |= dict.fromkeys(("nDCG@10", "R@100"), 0.512)
        found["values"] |= {name: [0.512] * 4 for name in ("nDCG@10", "R@100")}
    names = ["replaced_lm", "none", "replaced_lm + 0.1 bow"]
    table = TableResults("objectives", "Objective", [RowResults(name, name, [1, 2, 3], full) for name in names])
    content = summarize(replace(FACTS, measures=["RR@10", "nDCG@10", "R@100"]), [table], bm25={})
    console = Console(width=160, file=io.StringIO())
    console.print(comparison.terminal_tables(content)[0])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.512 ±0.000" in text and "difference" in text and "1 h 57 min" in text
    assert "…" not in text


def test_ticks_have_the_decimals_of_their_step() -> None:
    found = ticks(0.03, 0.1)
    assert [tick_text(one, found[1] - found[0]) for one in found] == ["0.025", "0.050", "0.075", "0.100"]
    assert [tick_text(one, 2.5) for one in (0.0, 2.5, -0.0)] == ["0.0", "2.5", "0.0"]
    assert [tick_text(one, 1e-9) for one in (1e-9, 2e5)] == ["0.000000", "2.0e+05"]
    narrow = summary(main={1: measured([0.027] * 8), 2: measured([0.0271] * 8)})
    low, high = comparison.dot_plot(narrow, narrow["tables"][0])["ends"]
    assert 0.026 < float(low) < 0.027
    assert 0.0271 < float(high) < 0.028


def test_pages_are_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison.write_comparison(tmp_path, summary())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["comparison.html", "comparison.json", "comparison.md"]
    before = (tmp_path / "comparison.md").read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        comparison._write_text(tmp_path / "comparison.md", "half")
    assert (tmp_path / "comparison.md").read_bytes() == before


def test_conclusions_say_what_failed_is_missing_or_has_not_paid_off() -> None:
    content = summary(
        RowResults("none", "n", [1], {1: measured([0.9] * 8)}),
        RowResults("bow", "b", [1], {}, {1: "the loss of step 3 is not a finite number"}),
        main=CLOSE,
        bm25={"splits": {"test": {"averages": {"RR@10": 0.95}}}},
    )
    texts = [verdict.text for verdict in comparison.conclusions(content)]
    assert texts[0] == "1 of 5 trainings failed; their errors are below."
    assert any(re.match(r"Objective: replaced_lm is worse than no pre-training: -0\.400", text) for text in texts)
    assert "Every row is below BM25 (RR@10 0.950); the best, none, has 0.900." in texts
    assert "4 of 5 trainings are measured, 1 not yet." in texts
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
