"""The paper's ablations on the user's own corpus: pre-training and retriever 1 for each row of a grid, then the comparison.

A row is one way to pre-train (an objective, a pair of replace rates, a generator, a corpus), a cell is a row with one seed. The steps of
a cell are those of the recipe's own pipeline (`simlm.pipeline.retriever1_steps`): what the recipe has made or would make is shared in its
place, everything else lies in RUN/compare/steps under its fingerprint, so that equal steps are done once whatever asks for them. A cell is
done when RUN/compare/measured holds the values of each query; its vectors, index and run are then dropped.
Source of the tables: SimLM, arXiv 2207.02578, tables 5 to 7 and section 4.3 (method.md section 1).
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from simlm.artifacts import disk_error, hardware_facts, json_digest, library_versions, open_artifact, read_manifest, sweep, write_json
from simlm.errors import ArtifactError, DataError, DiskError, RecipeError, SimlmError, TrainingError, nearest
from simlm.pipeline import Plan, Step, held_folder, make_plan, retriever1_steps, run_folder, run_step, store_splits
from simlm.progress import Progress
from simlm.recipe import GeneratorSettings, PretrainSettings, Recipe, load_recipe
from simlm.runtime import Ranks, join_processes
from simlm.types import Split

if TYPE_CHECKING:
    from simlm.evaluation.report.comparison import TableResults

TableName = Literal["objectives", "replace_rates", "generators", "variants", "corpus"]
TITLES: dict[TableName, str] = {
    "objectives": "Objective",
    "replace_rates": "Replace rate, encoder / decoder in %",
    "generators": "Generator",
    "variants": "Setting of pre-training",
    "corpus": "Pre-training corpus",
}
FOLDER, STEPS, MEASURED, FAILED, CALIBRATION = "compare", "steps", "measured", "failed", "calibration"
COMPARISON = "comparison.json"

# The parts of a chain that a row does not change, made in the recipe's own place even if the recipe was never run.
_SHARED = ("store", "bm25", "bm25_train_run", "bm25_groups", "generator")
# The same, where the mining of retriever 1 mixes runs or has a teacher.
_SHARED_BY_MINING = ("start_embeddings", "start_index", "start_train_run", "bm25_candidates", "bm25_candidate_scores")
# What nobody needs once a cell is measured.
_DROPPED = ("retriever1_run", "retriever1_index", "retriever1_embeddings")
_MODELS = ("retriever1", "pretrained")
_FORMAT = 1
_AS_IT_IS = "as in the recipe"


@dataclass(frozen=True)
class Row:
    """One way to pre-train. mismatched: on the other corpus. seeds: those it is to have."""

    table: TableName
    name: str
    pretrain: PretrainSettings
    generator: GeneratorSettings
    mismatched: bool
    seeds: tuple[int, ...]

    @property
    def content(self) -> str:
        """Equal for rows that are the same thing under several names."""
        generator = self.generator.model_dump(mode="json") if self.pretrain.needs_generator else None
        return json_digest([self.pretrain.model_dump(mode="json"), generator, self.mismatched])

    @property
    def trains(self) -> bool:
        return "none" not in self.pretrain.objective_weights

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with this row's pre-training."""
        return recipe.model_copy(update={"pretrain": self.pretrain, "generator": self.generator})


@dataclass(frozen=True)
class Cell:
    """A row with one seed. plan: its steps, `key`: name of its measured values; None and "" where a calibration has to come first.

    untimed: why the calibration failed, empty if it did not.
    """

    row: Row
    seed: int
    plan: Plan | None
    key: str
    untimed: str = ""

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """Every cell of a comparison. main: table -> the row that the others are compared with. measures: the main one first.

    rows: with the steps that the budget leaves them, as far as they are known. uncalibrated: rows as the recipe has them, to be timed.
    """

    recipe: Recipe
    base: Plan
    folder: Path
    split: Split
    splits: tuple[Split, ...]
    measures: tuple[str, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    main: dict[TableName, str]
    uncalibrated: tuple[Row, ...]
    notes: tuple[str, ...]

    def measured_file(self, key: str) -> Path:
        return self.folder / MEASURED / f"{key}.json"

    def failed_file(self, key: str) -> Path:
        return self.folder / FAILED / f"{key}.json"

    def state(self, cell: Cell) -> tuple[Literal["done", "failed", "to do"], str]:
        """Whether a cell is measured, and the error of its last try."""
        if not cell.key:
            return ("failed", cell.untimed) if cell.untimed else ("to do", "")
        if self.measured_file(cell.key).is_file():
            return "done", ""
        failure = _read(self.failed_file(cell.key))
        return ("failed", str(failure["error"])) if failure else ("to do", "")

    def steps_left(self, cell: Cell) -> str:
        """Pipeline steps that a cell still needs."""
        if cell.plan is None:
            return "known after timing"
        if self.state(cell)[0] == "done":
            return "0"
        return str(sum(cell.plan.state(step)[0] != "done" for step in cell.plan.steps))

    def training_steps(self, cell: Cell) -> str:
        """Steps of a cell's pre-training, or what decides them."""
        if not cell.row.trains:
            return "none"
        if cell.plan is None:
            return "known after timing"
        training = _named(cell.plan, "pretrained").settings.training  # type: ignore[attr-defined]
        return f"{training.max_steps:,}" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"

    def wanted(self, only: list[str] | None) -> list[Cell]:
        """The cells to be done, equal ones once, the first seed of every row before the second of any.

        only: names of rows or of tables; RecipeError for one that there is not.
        """
        known = list(dict.fromkeys([*(row.name for row in self.rows), *(row.table for row in self.rows)]))
        for name in only or []:
            if name not in known:
                raise RecipeError(f"--only {name}: no such row or table{nearest(name, known)} (here: {', '.join(known)})")
        chosen = [cell for cell in self.cells if not only or cell.row.name in only or cell.row.table in only]
        once: dict[tuple[str, int], Cell] = {}
        for cell in chosen:
            once.setdefault((cell.row.content, cell.seed), cell)
        return sorted(once.values(), key=lambda cell: cell.row.seeds.index(cell.seed))


def compare_objectives(
    recipe: Recipe | str | Path, *, only: list[str] | None = None, overrides: list[str] | None = None, quiet: bool = False
) -> Path:
    """Do what is missing of a recipe's grid and write the comparison; its folder, RUN/compare.

    Goes on where an interrupted one stopped. A cell that fails (a loss that is not finite, a model too large for the memory) is recorded
    with its error, the others go on; the next call tries it again. only: rows or tables to do now, the others are shown as far as they are
    done. Under torchrun all processes call this; there a failure stops all of them.
    Raises DataError or RecipeError, before any work, for a grid that cannot be done.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    ranks = join_processes()
    progress = Progress(quiet=quiet or ranks.rank > 0)
    grid = ranks.from_first(lambda: make_grid(recipe))
    grid.wanted(only)  # a wrong name is told before the lock is taken
    if recipe.retriever1.queries_per_step % ranks.num_ranks:
        raise RecipeError(
            f"retriever1.queries_per_step {recipe.retriever1.queries_per_step} cannot be shared by {ranks.num_ranks} processes; "
            f"set it to a multiple of {ranks.num_ranks}, or start another number of processes"
        )
    with held_folder(recipe, ranks):
        return _compare(recipe, only, progress, ranks)


def make_grid(recipe: Recipe) -> Grid:
    """The rows and cells of a recipe's comparison. Looks at the data files, trains nothing.

    Raises DataError without training queries, without queries to measure on or without the mismatched corpus, RecipeError where the recipe
    leaves nothing to compare.
    """
    base = make_plan(recipe)
    found = store_splits(recipe)
    splits: list[Split] = [split for split in ("dev", "test") if split in found]
    if "train" not in found:
        raise DataError(
            f"{recipe.data.path}: no training queries, and a comparison trains a retriever for every row; add queries and qrels for train"
        )
    if not splits:
        raise DataError(
            f"{recipe.data.path}: no dev or test queries to measure the rows on; add qrels for test, or set data.dev_fraction above 0"
        )
    declared, main, notes = _rows(recipe)
    _check(recipe, declared, main)
    timed = _calibrated(recipe, base, declared) if recipe.compare.budget == "time" else _Timed({}, [], {})
    measures = _measures(recipe)
    rows: list[Row] = []
    cells: list[Cell] = []
    for row in declared:
        reference = next(other for other in declared if other.table == row.table and other.name == main[row.table])
        budgeted = _budgeted(recipe, base, row, reference, timed.seconds)
        rows.append(budgeted or row)
        if budgeted is None:
            cells += [Cell(row, seed, None, "", timed.why_not(row, reference)) for seed in row.seeds]
        else:
            cells += [_cell(recipe, base, budgeted, seed, splits, measures) for seed in row.seeds]
    wanted = recipe.evaluate.split
    split: Split = wanted if wanted in splits else splits[-1]
    if split != wanted:
        seen = ", which training has seen as its dev measure" if split == "dev" else ""
        notes.append(f"no {wanted!r} queries: the rows are measured on {split}{seen}")
    folder = run_folder(recipe) / FOLDER
    return Grid(
        recipe, base, folder, split, tuple(splits), measures, tuple(rows), tuple(cells), main, tuple(timed.missing), tuple(notes)
    )  # fmt: skip


def objective_label(objective: str | dict[str, float]) -> str:
    """What a row of the first table is called: condenser, or replaced_lm + 0.1 bow."""
    weights = {objective: 1.0} if isinstance(objective, str) else objective
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


# The grid


def _rows(recipe: Recipe) -> tuple[list[Row], dict[TableName, str], list[str]]:
    """(rows, the main row of each table, what is worth saying)."""
    compare, pretrain, own = recipe.compare, recipe.pretrain, recipe.generator
    all_seeds = tuple(compare.seeds)
    few = all_seeds[: compare.seeds_of_others]
    replaced = pretrain.model_copy(update={"objective": "replaced_lm"})
    rows: list[Row] = []
    main: dict[TableName, str] = {}
    notes: list[str] = []

    def table(name: TableName, variants: list[tuple[str, PretrainSettings, GeneratorSettings, bool]], reference: str) -> None:
        if not variants:
            return
        kept: dict[str, Row] = {}
        shown: dict[str, str] = {}  # label -> the label under which it is shown
        for label, settings, generator, mismatched in variants:
            row = Row(name, label, settings, generator, mismatched, few)
            if row.content in kept:
                notes.append(f"compare.{name}: {label} is the same as {kept[row.content].name}, it is done and shown once")
            shown.setdefault(label, kept.setdefault(row.content, row).name)
        main[name] = shown.get(reference, variants[0][0])
        if reference not in shown and name != "objectives":  # there it is an error, see _check
            notes.append(f"compare.{name}: the recipe's own {reference} is not in the list, so the others are compared with {main[name]}")
        rows.extend(replace(row, seeds=all_seeds) if row.name == main[name] else row for row in kept.values())

    objectives = [(objective_label(one), one if isinstance(one, str) else _plain(one)) for one in compare.objectives]
    table("objectives", [(n, pretrain.model_copy(update={"objective": one}), own, False) for n, one in objectives], compare.main)
    table(
        "replace_rates",
        [
            (_rate_label(*pair), replaced.model_copy(update={"encoder_mask_rate": pair[0], "decoder_mask_rate": pair[1]}), own, False)
            for pair in compare.replace_rates
        ],
        _rate_label(pretrain.encoder_mask_rate, pretrain.decoder_mask_rate),
    )
    generators = {
        "frozen": (replaced.model_copy(update={"generator": "frozen"}), own),
        "joint": (replaced.model_copy(update={"generator": "joint"}), own),
        "random": (replaced.model_copy(update={"generator": "frozen"}), own.model_copy(update={"source": "random"})),
        "self": (replaced.model_copy(update={"generator": "self"}), own),
    }
    table("generators", [(kind, *generators[kind], False) for kind in compare.generators], pretrain.generator)
    if compare.variants:
        changed = [(_variant_label(one), _varied(replaced, one), own, False) for one in compare.variants]
        table("variants", [(_AS_IT_IS, replaced, own, False), *changed], _AS_IT_IS)
    if compare.mismatched is not None:
        first = next((one for name, one in objectives if name == compare.main), "replaced_lm")
        settings = pretrain.model_copy(update={"objective": first})
        table("corpus", [("matched", settings, own, False), ("mismatched", settings, own, True)], "matched")
    return rows, main, notes


def _plain(objective: dict[str, float]) -> str | dict[str, float]:
    """{ condenser = 1.0 } is condenser."""
    (name, weight), *others = objective.items()
    return name if not others and weight == 1 else objective


def _varied(pretrain: PretrainSettings, changes: dict[str, Any]) -> PretrainSettings:
    """The settings with some of them changed; of tables inside (`probe`, `training`) only the keys that are named."""
    given = pretrain.model_dump(exclude_unset=True)
    merged = {
        key: given[key] | value if isinstance(value, dict) and isinstance(given.get(key), dict) else value for key, value in changes.items()
    }
    try:
        return PretrainSettings.model_validate(given | merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"compare.variants: {_variant_label(changes)} does not fit the recipe's [pretrain]: {where + ': ' if where else ''}"
            f"{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _variant_label(changes: dict[str, Any]) -> str:
    """softmax = corpus, dropout = 0.1"""
    flat = {f"{key}.{inner}": value for key, table in changes.items() if isinstance(table, dict) for inner, value in table.items()}
    plain = {key: value for key, value in changes.items() if not isinstance(value, dict)}
    return ", ".join(f"{key} = {value}" for key, value in (plain | flat).items())


def _rate_label(encoder: float, decoder: float) -> str:
    return f"{100 * encoder:g}/{100 * decoder:g}"


def _check(recipe: Recipe, rows: list[Row], main: dict[TableName, str]) -> None:
    compare, retriever = recipe.compare, recipe.retriever1
    if not rows:
        raise RecipeError(
            "[compare]: objectives, replace_rates, generators and variants are empty and mismatched is not set, so there is nothing "
            'to compare; name some, for example objectives = ["replaced_lm", "none"]'
        )
    names = [objective_label(one) for one in compare.objectives]
    if not names and compare.main != type(compare).model_fields["main"].default:
        raise RecipeError(
            f"compare.main is {compare.main!r}, but compare.objectives is empty, so that there is no such row; "
            "add that row there, or leave compare.main out"
        )
    if names and compare.main not in names:
        raise RecipeError(
            f"compare.main {compare.main!r} is none of the rows of compare.objectives{nearest(compare.main, names)} "
            f"(rows: {', '.join(names)}); add it there, or name one of them"
        )
    untrained = {row.table for row in rows if row.name == main[row.table] and not row.trains}
    if "corpus" in untrained:
        raise RecipeError(
            f"compare.mismatched is set, but compare.main is {compare.main!r}, which is not pre-trained on any corpus; "
            "let compare.main name a row that is pre-trained, or leave compare.mismatched out"
        )
    if untrained and compare.budget != "data":
        raise RecipeError(
            f'compare.budget is "{compare.budget}", which gives the rows as much as the main one has, but compare.main is '
            f'{compare.main!r}, which is not pre-trained; let compare.main name a row that is, or set compare.budget = "data"'
        )
    if retriever.initial != "pretrained":
        raise RecipeError(
            f'retriever1.initial is {retriever.initial!r}: the retriever would not start from what is compared; set it to "pretrained"'
        )
    if recipe.pretrain.training.max_steps < 1 and (compare.budget != "data" or compare.mismatched is not None):
        why = f'compare.budget is "{compare.budget}"' if compare.budget != "data" else "compare.mismatched is set, a corpus of another size"
        raise RecipeError(f"{why}, which needs a number of steps to start from: set pretrain.training.max_steps")


def _measures(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's measures of rankings, the main one first (answer strings are the report's business)."""
    names = [name for name in recipe.evaluate.measures if not name.startswith("Answer@")]
    main = recipe.evaluate.main if not recipe.evaluate.main.startswith("Answer@") else "RR@10"
    return tuple(dict.fromkeys([main, *names]))


def _cell(recipe: Recipe, base: Plan, row: Row, seed: int, splits: list[Split], measures: tuple[str, ...]) -> Cell:
    """row: with the steps that its budget leaves it."""
    plan = _row_plan(recipe, base, row, seed, splits)
    last = plan.steps[-1]
    key = json_digest({"format": _FORMAT, "run": last.fingerprint, "measures": measures})[:24]
    return Cell(row, seed, plan, key)


def _row_plan(recipe: Recipe, base: Plan, row: Row, seed: int, splits: list[Split]) -> Plan:
    """The steps of a row and a seed, each with the place where its artifact lies as its name."""
    other = recipe.compare.mismatched if row.mismatched else None
    steps = retriever1_steps(row.recipe(recipe), seed=seed, splits=splits, pretrain_on=other)
    places = {step.name: _place(step, base) for step in steps}
    placed = [
        replace(step, name=places[step.name], inputs={role: places[name] for role, name in step.inputs.items()}) for step in steps
    ]  # fmt: skip
    return Plan(recipe, base.folder, tuple(placed), ())


def _place(step: Step, base: Plan) -> str:
    """Folder of a step inside the run's."""
    for own in base.steps:
        # Never in the place of a training of the recipe that is not there: `simlm run` may have begun it under other settings.
        if own.fingerprint == step.fingerprint and (own.name in _SHARED + _SHARED_BY_MINING or base.state(own)[0] == "done"):
            return own.name
    return f"{FOLDER}/{STEPS}/{step.name}-{step.fingerprint[:12]}"


def _named(plan: Plan, name: str) -> Step:
    """A step of a row by the name that it has in the recipe's own plan."""
    prefix = f"{FOLDER}/{STEPS}/{name}-"
    return next(step for step in plan.steps if step.name == name or step.name.startswith(prefix))


# Equal tokens, equal time


def _budgeted(recipe: Recipe, base: Plan, row: Row, main: Row, seconds: dict[str, float]) -> Row | None:
    """The row with the number of steps that its budget leaves it beside the main row of its table; None where that is not known yet."""
    budget = recipe.compare.budget
    if budget == "data" or not row.trains or row.content == main.content:
        return row
    if budget == "tokens":
        factor = layer_tokens(main.pretrain, base) / layer_tokens(row.pretrain, base)
    elif row.content in seconds and main.content in seconds:
        factor = seconds[main.content] / seconds[row.content]
    else:
        return None
    steps = max(1, round(row.pretrain.training.max_steps * factor))
    return replace(row, pretrain=_with_training(row.pretrain, max_steps=steps))


def layer_tokens(pretrain: PretrainSettings, plan: Plan) -> float:
    """Passes of a token through the encoder that a training step costs, a decoder's counted as its share of the encoder's layers."""
    from simlm.estimates import model_shape, objective_costs

    costs = objective_costs(pretrain)
    return costs.tokens_share * (costs.passes + costs.decoder_layers / model_shape(plan.recipe.model, plan).layers)


def _with_training(pretrain: PretrainSettings, **changes: Any) -> PretrainSettings:
    training = pretrain.training
    given = {name: getattr(training, name) for name in training.model_fields_set} | (training.model_extra or {})
    return pretrain.model_copy(update={"training": type(training).model_validate(given | changes)})


def _calibration(recipe: Recipe, base: Plan, row: Row) -> tuple[Plan, Path]:
    """(a few steps of a row's pre-training without dev measures, the file of what they took)."""
    steps = recipe.compare.calibration_steps
    short = _with_training(row.pretrain, max_steps=steps, logging_steps=1, save_steps=steps)
    probe = short.probe.model_copy(update={"num_passages": 0})
    timed = replace(row, pretrain=short.model_copy(update={"held_out_passages": 0, "probe": probe, "best_by": "last"}))
    plan = _row_plan(recipe, base, timed, recipe.seed, [])
    return plan, base.folder / FOLDER / CALIBRATION / f"{_named(plan, 'pretrained').fingerprint[:24]}.json"


@dataclass(frozen=True)
class _Timed:
    """What calibrations have found. seconds: row content -> of a step; missing: rows to be timed; errors: row content -> of a try."""

    seconds: dict[str, float]
    missing: list[Row]
    errors: dict[str, str]

    def why_not(self, row: Row, main: Row) -> str:
        """Why the steps of a row are not known although they were to be timed; empty if the timing is still to come."""
        if row.content in self.errors:
            return self.errors[row.content]
        if main.content in self.errors:
            return f"{main.name}, whose time this row is to have, could not be timed: {self.errors[main.content]}"
        return ""


def _calibrated(recipe: Recipe, base: Plan, rows: list[Row]) -> _Timed:
    """What is known of the rows' steps; one whose timing failed is to be timed again."""
    found = _Timed({}, [], {})
    once: dict[str, Row] = {}
    for row in rows:
        if row.trains:
            once.setdefault(row.content, row)
    for content, row in once.items():
        timed = _read(_calibration(recipe, base, row)[1])
        if "seconds_per_step" in timed:
            found.seconds[content] = float(timed["seconds_per_step"])
            continue
        found.missing.append(row)
        if "error" in timed:
            found.errors[content] = str(timed["error"])
    return found


def _calibrate(grid: Grid, row: Row, progress: Progress, ranks: Ranks) -> None:
    """Time a row's steps and keep the figure, so that a comparison that goes on later uses the same; or keep why that failed."""
    plan, file = _calibration(grid.recipe, grid.base, row)
    step = _named(plan, "pretrained")

    def time_it() -> None:
        _do(plan, plan.needed([step.name]), progress, ranks)
        ranks.from_first(lambda: _keep_seconds(row, plan.path(step.name) / "log.jsonl", file))

    error = _failure(time_it, ranks)
    if error:
        _write_calibration(file, {"row": row.name, "error": error})
        progress.say(f"{row.name}: failed: {error}")
    ranks.from_first(lambda: _drop(plan, ["pretrained"]))


def _keep_seconds(row: Row, log: Path, file: Path) -> None:
    """Write what a step of a timed training took; TrainingError if its log does not say."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    times = [float(line["seconds"]) for line in lines if line["kind"] == "train" and "loss" in line["measures"]]
    if len(times) < 2:
        raise TrainingError(
            f"{row.name}: the timed training logged {len(times)} steps with a loss, two are needed to time one; "
            "raise compare.calibration_steps, or see why its steps have no loss"
        )
    # The first step also pays for what is loaded and compiled on first use; the log counts in milliseconds.
    seconds = max(median(later - earlier for earlier, later in itertools.pairwise(times)), 1e-3)
    _write_calibration(file, {"row": row.name, "seconds_per_step": round(seconds, 6), "num_steps": len(times)})


def _write_calibration(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise disk_error(error, file) from error


def _drop_timed(grid: Grid) -> None:
    """Drop the models of timings that were stopped after their figure was written."""
    kept = {step.name for cell in grid.cells if cell.plan is not None for step in cell.plan.steps}
    missing = {row.content for row in grid.uncalibrated}
    for row in _rows(grid.recipe)[0]:
        if row.trains and row.content not in missing:
            plan, _ = _calibration(grid.recipe, grid.base, row)
            if _named(plan, "pretrained").name not in kept:
                _drop(plan, ["pretrained"])


# Doing it


def _compare(recipe: Recipe, only: list[str] | None, progress: Progress, ranks: Ranks) -> Path:
    grid = ranks.from_first(lambda: make_grid(recipe))
    for note in grid.notes:
        progress.say(f"note: {note}")
    shared = [name for name in _SHARED if any(step.name == name for step in grid.base.steps)]
    if not any(row.pretrain.needs_generator for row in grid.rows):
        shared = [name for name in shared if name != "generator"]
    _do(grid.base, grid.base.needed([*shared, "bm25_run"]), progress, ranks)
    if recipe.compare.budget == "time":
        ranks.from_first(lambda: _drop_timed(grid))
    if grid.uncalibrated:
        grid = _with_calibrations(grid, only, progress, ranks)
    ranks.from_first(lambda: _measure_bm25(grid))
    cells = grid.wanted(only)
    for number, cell in enumerate(cells, start=1):
        title = f"[{number}/{len(cells)}] {cell.title}"
        if ranks.from_first(lambda cell=cell: grid.state(cell)[0]) == "done":  # type: ignore[misc]
            ranks.from_first(lambda cell=cell: _drop_measured(grid, cell))  # type: ignore[misc]
            progress.say(f"{title}: done")
            continue
        if cell.plan is None:
            assert cell.untimed, "cells are done after the calibration"
            progress.say(f"{title}: failed: {cell.untimed}")
            continue
        _do_cell(grid, cell, title, progress, ranks)
        ranks.from_first(lambda: write_results(grid))
    ranks.from_first(lambda: write_results(grid))
    return grid.folder


def _with_calibrations(grid: Grid, only: list[str] | None, progress: Progress, ranks: Ranks) -> Grid:
    """The grid once the rows wanted, and those that they are compared with, are timed."""
    wanted = {cell.row.content for cell in grid.wanted(only)} | {row.content for row in grid.rows if row.name == grid.main[row.table]}
    rows = [row for row in grid.uncalibrated if row.content in wanted]
    for number, row in enumerate(rows, start=1):
        progress.say(f"[{number}/{len(rows)}] {row.name}: timing {grid.recipe.compare.calibration_steps} steps")
        _calibrate(grid, row, progress, ranks)
    return ranks.from_first(lambda: make_grid(grid.recipe))


def _do(plan: Plan, steps: list[Step], progress: Progress, ranks: Ranks) -> None:
    """Do those of the steps that are not done."""
    for step in steps:
        state, why = ranks.from_first(lambda step=step: plan.state(step))  # type: ignore[misc]
        if state == "done":
            continue
        shown = step.name.removeprefix(f"{FOLDER}/{STEPS}/")
        progress.say(f"  {shown}: {step.stage}{f' ({why})' if why else ''}")
        if ranks.rank == 0:
            plan.path(step.name).parent.mkdir(parents=True, exist_ok=True)
        seconds, peak = run_step(plan, step, progress, ranks)
        if ranks.rank == 0:
            sweep(plan.path(step.name))
        progress.say(f"  {shown}: finished in {seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB")


def _do_cell(grid: Grid, cell: Cell, title: str, progress: Progress, ranks: Ranks) -> None:
    assert cell.plan is not None
    plan = cell.plan
    progress.say(f"{title}: pre-training and retriever 1")
    error = _failure(lambda: _do(plan, list(plan.steps), progress, ranks), ranks)
    if error:
        _write_failure(grid, cell, error)
        progress.say(f"{title}: failed: {error}")
        return
    averages = ranks.from_first(lambda: _measure_cell(grid, cell))
    shown = ", ".join(f"{name} {value:.4f}" for name, value in averages.items())
    progress.say(f"{title}: {grid.split} {shown}")


def _failure(work: Callable[[], None], ranks: Ranks) -> str:
    """Do the work of one row; what it failed of where the others can go on, empty if it is done."""
    try:
        work()
    except (SimlmError, MemoryError, RuntimeError) as error:
        if isinstance(error, DiskError) or ranks.num_ranks > 1:
            raise  # a full disk stops the next row too; other processes may wait for this one in the middle of a step
        if isinstance(error, SimlmError):
            return str(error)
        if not _out_of_memory(error):
            raise
        return f"out of memory: {error}"
    return ""


def _out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for a GPU's memory; where the CPU's ends, a plain RuntimeError names the allocator."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)


def _write_failure(grid: Grid, cell: Cell, error: str) -> None:
    file = grid.failed_file(cell.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"row": cell.row.name, "seed": cell.seed, "error": error})


def _measure_cell(grid: Grid, cell: Cell) -> dict[str, float]:
    """Write the values of each query and the cost, drop what is no longer needed; the means on the reported split."""
    assert cell.plan is not None
    plan = cell.plan
    run, pretrained, retriever = (_named(plan, name) for name in ("retriever1_run", "pretrained", "retriever1"))
    splits = _values(grid, plan.path(run.name))
    content = {
        "row": cell.row.name,
        "seed": cell.seed,
        "splits": splits,
        "pretrain": _training_facts(plan.path(pretrained.name)),
        "retriever1": _training_facts(plan.path(retriever.name)),
        "fingerprints": {"pretrained": pretrained.fingerprint, "retriever1": retriever.fingerprint, "run": run.fingerprint},
        "models": {"pretrained": pretrained.name, "retriever1": retriever.name} if grid.recipe.compare.keep_models else {},
    }
    _write_measured(grid, cell.key, content)
    grid.failed_file(cell.key).unlink(missing_ok=True)
    _drop_measured(grid, cell)
    averages: dict[str, float] = splits[grid.split]["averages"]
    return {name: averages[name] for name in grid.measures[:3]}


def _write_measured(grid: Grid, key: str, content: dict[str, Any]) -> None:
    file = grid.measured_file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise disk_error(error, file) from error


def _measure_bm25(grid: Grid) -> None:
    key = _bm25_key(grid)
    if not grid.measured_file(key).is_file():
        _write_measured(grid, key, {"row": "bm25", "splits": _values(grid, grid.base.path("bm25_run"))})


def _bm25_key(grid: Grid) -> str:
    return json_digest({"format": _FORMAT, "run": grid.base.step("bm25_run").fingerprint, "measures": grid.measures})[:24]


def _values(grid: Grid, run: Path) -> dict[str, Any]:
    """split -> query rows, the value of each measure for each of them, and the means."""
    from simlm.data.store import Store
    from simlm.evaluation.measures import evaluate_queries, ranked_passages
    from simlm.rankings import Run

    store = Store.open(grid.base.path("store"))
    path = open_artifact(run, "run").path
    found: dict[str, Any] = {}
    for split in grid.splits:
        measured = evaluate_queries(ranked_passages(Run.load(path, split)), store.qrels(split), grid.measures)
        found[split] = {
            "query_rows": [int(row) for row in measured.query_ids],
            "values": {name: [round(float(value), 6) for value in values] for name, values in measured.values.items()},
            "averages": measured.averages(),
        }
    return found


def _training_facts(path: Path) -> dict[str, Any]:
    """Cost and curves of a training step."""
    from simlm.evaluation.report.charts import thin
    from simlm.evaluation.report.steps import read_curves

    manifest = read_manifest(path, "model")
    facts = manifest.facts
    kept = ("num_steps", "training_seconds", "tokens", "tokens_per_second", "passages_per_step", "train_passages", "dev", "dev_start",
            "best_step", "peak_gpu_bytes")  # fmt: skip
    curves = {f"{kind} {name}": [list(point) for point in thin(points)] for (kind, name), points in read_curves(path / "log.jsonl").items()}
    return {
        "seconds": manifest.seconds,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "curves": curves,
        **{name: facts[name] for name in kept if facts.get(name) is not None},
    }


def _drop_measured(grid: Grid, cell: Cell) -> None:
    """Make room: what lies in the comparison's own folder and has done its work."""
    assert cell.plan is not None
    _drop(cell.plan, _DROPPED if grid.recipe.compare.keep_models else (*_DROPPED, *_MODELS))


def _drop(plan: Plan, names: Iterable[str]) -> None:
    for name in names:
        place = _named(plan, name).name
        if not place.startswith(f"{FOLDER}/{STEPS}/"):
            continue  # the recipe's own
        path = plan.path(place)
        cache = path.parent / "embedding_cache"
        for folder in (path, path.with_name(f".{path.name}.work"), cache / path.name):
            if folder.exists():
                shutil.rmtree(folder)
        if cache.is_dir() and not any(cache.iterdir()):
            cache.rmdir()


# The results


def write_results(grid: Grid) -> dict[str, Any]:
    """Write comparison.json, .html and .md of what is measured so far; the content of the first."""
    from simlm.evaluation.report.comparison import Facts, summarize, write_comparison

    bm25 = _read(grid.measured_file(_bm25_key(grid)))
    facts = Facts(
        name=grid.recipe.name,
        split=grid.split,
        measures=list(grid.measures),
        main={str(table): name for table, name in grid.main.items()},
        budget=grid.recipe.compare.budget,
        significance=grid.recipe.evaluate.significance,
        num_samples=grid.recipe.evaluate.num_samples,
        seed=grid.recipe.seed,
        num_passages=int(read_manifest(grid.base.path("store"), "store").facts["passages"]["rows"]),
    )
    content = summarize(facts, _tables(grid), bm25=bm25)
    content |= {
        "settings": grid.recipe.model_dump(mode="json"),
        "notes": list(grid.notes),
        "shared": _shared_costs(grid),
        "versions": library_versions(),
        "hardware": hardware_facts(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    try:
        grid.folder.mkdir(parents=True, exist_ok=True)
        write_comparison(grid.folder, content)
    except OSError as error:
        raise disk_error(error, grid.folder) from error
    return content


def read_results(folder: Path) -> dict[str, Any]:
    """The content of comparison.json; ArtifactError if there is none."""
    content = _read(folder / COMPARISON)
    if not content:
        raise ArtifactError(f"{folder / COMPARISON}: not there or not readable; run simlm compare-objectives RECIPE")
    return content


def _tables(grid: Grid) -> list[TableResults]:
    from simlm.evaluation.report.comparison import RowResults, TableResults

    tables = []
    for table in grid.main:
        rows = []
        for row in (row for row in grid.rows if row.table == table):
            cells = [cell for cell in grid.cells if cell.row == row]
            measured = {cell.seed: content for cell in cells if cell.key and (content := _read(grid.measured_file(cell.key)))}
            errors = {cell.seed: why for cell in cells if (found := grid.state(cell))[0] == "failed" and (why := found[1])}
            trained = next((cell.plan for cell in cells if cell.plan is not None), None)
            settings = {} if trained is None else _named(trained, "pretrained").settings.model_dump(mode="json")
            rows.append(RowResults(row.name, row.content, list(row.seeds), measured, errors, settings))
        tables.append(TableResults(str(table), TITLES[table], rows))
    return tables


def _shared_costs(grid: Grid) -> list[dict[str, Any]]:
    """What all rows share, or all rows that read samples: made once, in nobody's figures."""
    costs = []
    for name in _SHARED:
        path = grid.base.path(name)
        if any(step.name == name and grid.base.state(step)[0] == "done" for step in grid.base.steps):
            manifest = read_manifest(path)
            costs.append({"step": name, "seconds": manifest.seconds, "peak_memory_bytes": manifest.peak_memory_bytes})
    return costs


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent or not readable."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


__all__ = ["Cell", "Grid", "Row", "compare_objectives", "layer_tokens", "make_grid", "objective_label", "read_results", "write_results"]
