"""Recipe -> plan -> run: which steps there are, which of them are done, and doing the rest.

A step is one stage with its settings and its inputs (other steps). Its fingerprint is the digest of all three, of the stage's code
version and of what lies outside (data files, local checkpoints); a step whose artifact has the same fingerprint is done. So a changed
setting re-runs its step and what depends on it, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from simlm.artifacts import (
    ArtifactBuilder,
    Manifest,
    disk_error,
    json_digest,
    open_artifact,
    peak_memory_bytes,
    reset_peak_memory,
    sweep,
    write_json,
)
from simlm.errors import ArtifactError, DataError, DiskError, RecipeError, SimlmError, nearest
from simlm.progress import Progress
from simlm.recipe import DataSettings, ModelSettings, Recipe, expand_path, load_recipe
from simlm.runtime import Ranks, join_processes, release_memory
from simlm.stages import STAGES, Context
from simlm.types import Split

State = Literal["done", "stale", "to do"]
DIGESTS = ".digests.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Step:
    """One node of the plan. inputs: role -> name of the step whose artifact is read."""

    name: str
    stage: str
    settings: BaseModel
    inputs: dict[str, str]
    outside: dict[str, Any]
    """Digests of what the step reads besides artifacts."""
    fingerprint: str
    seed: int

    @property
    def version(self) -> int:
        return STAGES[self.stage].version


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe in an order in which every input comes first."""

    recipe: Recipe
    folder: Path
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    """What is left out, and why."""

    def step(self, name: str) -> Step:
        for step in self.steps:
            if step.name == name:
                return step
        raise RecipeError(f"no step {name!r} in this recipe{nearest(name, [step.name for step in self.steps])}")

    def path(self, name: str) -> Path:
        return self.folder / name

    def state(self, step: Step) -> tuple[State, str]:
        """State of a step and, where it is stale, why."""
        path = self.path(step.name)
        if not path.exists():
            if self.builder(step).interrupted() == "same":
                return "to do", "interrupted, goes on where it was"
            return "to do", self.left_behind(step)
        try:
            manifest = open_artifact(path, verify="sizes").manifest
        except ArtifactError as error:
            return "stale", str(error)
        if manifest.fingerprint == step.fingerprint:
            return "done", ""
        return "stale", _why_stale(step, manifest)

    def builder(self, step: Step) -> ArtifactBuilder:
        """The work folder of a step."""
        row = STAGES[step.stage]
        return ArtifactBuilder(
            self.path(step.name), kind=row.kind, stage=step.stage, code_version=row.version, fingerprint=step.fingerprint
        )

    def basis(self, step: Step) -> dict[str, Any]:
        """What the fingerprint of a step is the digest of."""
        inputs = {role: self.step(name).fingerprint for role, name in step.inputs.items()}
        return _basis(step.stage, step.settings, step.seed, inputs, step.outside)

    def left_behind(self, step: Step) -> str:
        """What an interrupted training with another fingerprint has reached, and what has changed since; empty if there is none.

        Without a whole checkpoint there is nothing to lose, so that does not count.
        """
        from simlm.training.checkpoints import checkpoint_step, newest_checkpoint

        builder = self.builder(step)
        if builder.interrupted() != "other":
            return ""
        checkpoint = newest_checkpoint(builder.resume / "checkpoints")
        if checkpoint is None:
            return ""
        changed = _changes(builder.interrupted_basis(), self.basis(step))
        return f"interrupted after training step {checkpoint_step(checkpoint):,}, changed since: {changed}"

    def refuse_left_behind(self, steps: list[Step]) -> None:
        """RecipeError if doing these steps, as far as they are not done, would throw away an interrupted training."""
        for step in steps:
            found = self.left_behind(step)
            if found and self.state(step)[0] != "done":
                raise RecipeError(
                    f"step {step.name!r}: {found}. Going on would mix two trainings, so either put the old values back, "
                    f"or give up what was trained: simlm {step.stage.replace('_', '-')} RECIPE --start-over {step.name}"
                )

    def needed(self, names: list[str]) -> list[Step]:
        """The steps named and all that they depend on, in order."""
        wanted = set(names)
        for step in reversed(self.steps):
            if step.name in wanted:
                wanted.update(step.inputs.values())
        return [step for step in self.steps if step.name in wanted]


def make_plan(recipe: Recipe) -> Plan:
    """The steps of a recipe. Reads the sizes and dates of the data files (and their digests, cached), trains nothing.

    Raises DataError or RecipeError if the data set is not there or the recipe does not fit together.
    """
    folder = run_folder(recipe)
    cache = _read_digests(folder)
    before = dict(cache)
    planner = _Planner(recipe, cache)
    planner.build()
    if cache != before and folder.is_dir():
        write_json(folder / DIGESTS, cache)
    return Plan(recipe, folder, tuple(planner.steps), tuple(planner.notes))


def retriever1_steps(recipe: Recipe, *, seed: int, splits: list[Split], pretrain_on: DataSettings | None = None) -> tuple[Step, ...]:
    """Pre-training and retriever 1 alone, on BM25's negatives, as far as a run over the queries of `splits`.

    Names are those of the recipe's own plan, and so are the fingerprints where nothing differs. seed: of pre-training and of the retriever,
    everything else keeps the recipe's. pretrain_on: pre-train, and train the generator, on this corpus instead ("other_store", with the
    tokenizer of the recipe's store); the rest stays on the recipe's data.
    """
    folder = run_folder(recipe)
    cache = _read_digests(folder)
    before = dict(cache)
    planner = _Planner(recipe, cache)
    planner.seeds = {"pretrain": seed, "train_retriever": seed}
    planner.build_retriever1(splits, pretrain_on)
    if cache != before and folder.is_dir():
        write_json(folder / DIGESTS, cache)
    return tuple(planner.steps)


def run_folder(recipe: Recipe) -> Path:
    """Where the artifacts of a recipe's steps lie."""
    return expand_path(recipe.output) if recipe.output else Path("runs") / recipe.name


def run_recipe(
    recipe: Recipe | str | Path,
    *,
    only: list[str] | None = None,
    overrides: list[str] | None = None,
    start_over: list[str] | None = None,
    quiet: bool = False,
) -> Path:
    """Run a recipe (or, with `only`, the steps named and what they need); the folder of the run.

    Finished steps are skipped, an interrupted one goes on from its last checkpoint. Under torchrun all processes call this.
    start_over: steps whose interrupted work is deleted first. Without it a training that was interrupted under other settings is a
    RecipeError, which names them.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    ranks = join_processes()
    progress = Progress(quiet=quiet or ranks.rank > 0)
    with held_folder(recipe, ranks):
        return _run(recipe, only, start_over or [], progress, ranks)


@contextlib.contextmanager
def held_folder(recipe: Recipe, ranks: Ranks) -> Iterator[Path]:
    """The folder of a run, made if need be and held for this process; ArtifactError if another one works on it."""
    folder = run_folder(recipe)
    if ranks.rank > 0:
        yield folder
        return
    _make_folder(folder)
    with _locked(folder):
        yield folder


def _run(settled: Recipe, only: list[str] | None, start_over: list[str], progress: Progress, ranks: Ranks) -> Path:
    plan = ranks.from_first(lambda: make_plan(settled))
    ranks.from_first(lambda: _start_over(plan, start_over, progress))
    names = [step.name for step in plan.steps] if only is None else only
    steps = plan.needed(names)
    for step in steps:
        queries = getattr(step.settings, "queries_per_step", ranks.num_ranks)
        if queries % ranks.num_ranks:
            raise RecipeError(
                f"queries_per_step {queries} of step {step.name!r} cannot be shared by {ranks.num_ranks} processes; "
                f"set it to a multiple of {ranks.num_ranks}, or start another number of processes"
            )
    ranks.from_first(lambda: plan.refuse_left_behind(steps))
    for note in plan.notes:
        progress.say(f"note: {note}")
    for number, step in enumerate(steps, start=1):
        state, why = ranks.from_first(lambda step=step: plan.state(step))  # type: ignore[misc]
        title = f"[{number}/{len(steps)}] {step.name}"
        if state == "done":
            if ranks.rank == 0:
                sweep(plan.path(step.name))
            progress.say(f"{title}: done")
            continue
        progress.say(f"{title}: {STAGES[step.stage].module.rsplit('.', 1)[-1]}{f' ({why})' if why else ''}")
        seconds, peak = run_step(plan, step, progress, ranks)
        progress.say(f"{title}: finished in {seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB")
    return plan.folder


def run_step(plan: Plan, step: Step, progress: Progress, ranks: Ranks) -> tuple[float, int]:
    """Do one step and put its artifact in place; (seconds with earlier tries, peak memory in bytes)."""
    row = STAGES[step.stage]
    inputs = {role: plan.path(name) for role, name in step.inputs.items()}
    builder = plan.builder(step)
    ranks.from_first(lambda: _prepare_step(plan, step, inputs, builder))
    earlier = builder.earlier_seconds()
    release_memory()
    reset_peak_memory()
    _reset_gpu_peak()
    started = time.monotonic()
    if row.distributed or ranks.rank == 0:
        num_ranks = ranks.num_ranks if row.distributed else 1
        context = Context(builder, step.seed, progress, ranks.rank, num_ranks)
        try:
            row.load()(step.settings, inputs, context)
        except OSError as error:
            raise _explained(error, builder) from error
        finally:
            seconds = earlier + time.monotonic() - started
            if ranks.rank == 0 and builder.resume.is_dir():
                builder.note_seconds(seconds)
    ranks.barrier()
    seconds = earlier + time.monotonic() - started
    peak = peak_memory_bytes()
    if ranks.rank == 0:
        builder.facts |= _gpu_facts()
        try:
            builder.finish(
                settings=step.settings.model_dump(mode="json"),
                inputs={role: plan.step(name).fingerprint for role, name in step.inputs.items()} | step.outside,
                seed=step.seed,
                seconds=seconds,
                peak_memory_bytes=peak,
            )
        except OSError as error:
            raise disk_error(error, builder.work) from error
    ranks.barrier()
    return seconds, peak


def _prepare_step(plan: Plan, step: Step, inputs: dict[str, Path], builder: ArtifactBuilder) -> None:
    from simlm.estimates import estimate_step

    for path in inputs.values():
        open_artifact(path)
    needed = estimate_step(plan, step).disk_bytes
    free = shutil.disk_usage(plan.folder).free
    if free < needed:
        raise DiskError(
            f"{plan.folder}: step {step.name!r} needs about {needed / 2**20:,.0f} MiB of disk, {free / 2**20:,.0f} MiB are free; "
            "free some space or set `output` to another disk. Finished steps are intact"
        )
    plan.refuse_left_behind([step])
    builder.begin(plan.basis(step))


def _reset_gpu_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _gpu_facts() -> dict[str, int]:
    """Largest GPU memory that torch held for this process's tensors during the step; nothing where no GPU is used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"peak_gpu_bytes": int(torch.cuda.max_memory_allocated())}


def _start_over(plan: Plan, names: list[str], progress: Progress) -> None:
    for builder in [plan.builder(plan.step(name)) for name in names]:
        if builder.work.exists():
            shutil.rmtree(builder.work)
            progress.say(f"{builder.path.name}: its interrupted work is deleted")
        else:
            progress.say(f"{builder.path.name}: has no interrupted work, nothing is deleted")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process; ArtifactError if another one works on it. Freed by the system if the process dies."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing to lock with
        yield
        return
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{folder}: another simlm process works on this run; wait for it, or stop it first") from None
        yield
    finally:
        os.close(descriptor)


def _explained(error: OSError, builder: ArtifactBuilder) -> OSError | SimlmError:
    """What an OSError of a stage means: a full disk, a folder that cannot be written, a file that cannot be read; else the error itself."""
    ours = error.filename is None or Path(str(error.filename)).is_relative_to(builder.work)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or (error.errno in (errno.EACCES, errno.EPERM) and ours):
        return disk_error(error, builder.work)
    if error.filename is not None and not ours:
        return DataError(f"{error.filename}: cannot be read ({error.strerror}); check that it is there and may be read")
    return error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise disk_error(error, folder) from error


def _read_digests(folder: Path) -> dict[str, str]:
    try:
        cache: dict[str, str] = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache


def _why_stale(step: Step, manifest: Manifest) -> str:
    if manifest.stage != step.stage:
        return f"was made by {manifest.stage}"
    if manifest.code_version != step.version:
        return f"made by version {manifest.code_version} of the stage, now {step.version}"
    settings = step.settings.model_dump(mode="json")
    changed = sorted(key for key in settings.keys() | manifest.settings.keys() if settings.get(key) != manifest.settings.get(key))
    if changed:
        return "changed: " + ", ".join(changed)
    outside = sorted(key for key, value in step.outside.items() if manifest.inputs.get(key) != value)
    if outside:
        return "changed outside: " + ", ".join(outside)
    return "an input is new"


def _basis(stage: str, settings: BaseModel, seed: int, inputs: dict[str, str], outside: dict[str, Any]) -> dict[str, Any]:
    """Everything that a step's result depends on; inputs: role -> fingerprint."""
    return {
        "stage": stage,
        "version": STAGES[stage].version,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "inputs": inputs,
        "outside": outside,
    }


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Each setting that differs with both values; digests, which tell a reader nothing, by name alone."""
    if not old:
        return "not known, as an older version of simlm left it"
    changes = []
    for part, words in (("settings", ""), ("inputs", "the input "), ("outside", "outside, ")):
        before, after = _flat(old.get(part, {})), _flat(new[part])
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                values = f" {_shown(before, key)} -> {_shown(after, key)}" if part == "settings" else ""
                changes.append(f"{words}{key}{values}")
    changes += [f"{key} {old.get(key)} -> {new[key]}" for key in ("seed", "version") if old.get(key) != new[key]]
    return ", ".join(changes)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "(not set)"


class _Planner:
    """Builds the steps of the SimLM pipeline; one method a part, in the order of the paper's figure 2."""

    def __init__(self, recipe: Recipe, digests: dict[str, str]) -> None:
        self.recipe = recipe
        self.digests = digests
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.splits: list[Split] = []
        self.seeds: dict[str, int] = {}
        """Stage -> seed, where it is not the recipe's."""

    def build(self) -> None:
        self._check_names()
        recipe, skip = self.recipe, {str(part) for part in self.recipe.skip}
        self.splits = self._find_splits()
        searched: list[Split] = [split for split in ("dev", "test") if split in self.splits]
        self._prepare()
        runs: dict[str, str] = {}
        has_train = "train" in self.splits

        self._add("bm25", "build_index", recipe.bm25, {"store": "store"})
        if searched:
            runs["bm25"] = self._search("bm25_run", "bm25", None, searched)
        if "start" not in skip and recipe.model.start != "scratch":
            self._dense("start", None, searched, runs)

        groups = ""
        if has_train:
            # Before pre-training: what is wrong with queries and judgements shows here, not after days.
            groups = self._mine("bm25", self._search("bm25_train_run", "bm25", None, ["train"], depth=recipe.mining.depth))
        pretrained = "" if "pretrain" in skip else self._pretrain()
        if not has_train:
            self.notes.append(
                "the data set has no training queries: no retriever or re-ranker is trained. "
                "BM25, pre-training and the indexes work; add queries and qrels for `train`, then run the same command again"
            )
            if pretrained:
                self._dense("pretrained_encoder", pretrained, [], runs)
        else:
            self._supervised(groups, pretrained, searched, runs, skip)
        if not searched:
            self.notes.append("the data set has no dev or test queries: nothing is measured, the report says so")
        self._evaluate(runs)

    def build_retriever1(self, splits: list[Split], pretrain_on: DataSettings | None) -> None:
        """The steps of `retriever1_steps`."""
        self._prepare()
        self._add("bm25", "build_index", self.recipe.bm25, {"store": "store"})
        groups = self._mine("bm25", self._search("bm25_train_run", "bm25", None, ["train"], depth=self.recipe.mining.depth))
        store = "store" if pretrain_on is None else self._other_store(pretrain_on)
        pretrained = self._pretrain(store)
        self._retriever("retriever1", self.recipe.retriever1, groups, pretrained)
        self._dense("retriever1", "retriever1", splits, {})

    def _other_store(self, data: DataSettings) -> str:
        """A corpus other than the recipe's, with the tokenizer of the recipe's store."""
        from simlm.data.datasets import signature

        (store,) = (step for step in self.steps if step.name == "store")
        tokenizer = run_folder(self.recipe).resolve() / "store" / "tokenizer"
        settings = store.settings.model_copy(update={"data": data, "tokenizer": "", "train_vocabulary": None})
        outside = {"data": json_digest(signature(data, self.digests)), "tokenizer": store.fingerprint}
        self._add("other_store", "prepare", settings, {}, outside)
        # The fingerprint does not hold the tokenizer's place, as the folder of a run may be moved.
        self.steps[-1] = replace(self.steps[-1], settings=settings.model_copy(update={"tokenizer": str(tokenizer)}))
        return "other_store"

    def _supervised(self, groups: str, pretrained: str, searched: list[Split], runs: dict[str, str], skip: set[str]) -> None:
        recipe = self.recipe
        self._retriever("retriever1", recipe.retriever1, groups, pretrained)
        dense = self._dense("retriever1", "retriever1", searched, runs)
        best = "retriever1"
        if "retriever2" not in skip:
            groups = self._mine("retriever1", self._search_train("retriever1", dense))
            self._retriever("retriever2", recipe.retriever2, groups, pretrained)
            dense = self._dense("retriever2", "retriever2", searched, runs)
            best = "retriever2"
        teacher = ""
        if "reranker" not in skip:
            groups = self._mine(best, self._search_train(best, dense))
            teacher = self._reranker(groups, runs.get(best, ""), pretrained)
        if teacher and "distilled" not in skip:
            self._add("teacher_scores", "rerank", self._pairs(recipe.teacher), {"store": "store", "model": teacher, "groups": groups})
            self._distill(groups, pretrained)
            self._dense("distilled", "distilled", searched, runs)
            best = "distilled"
        if searched and "hybrid" not in skip:
            self._add("hybrid_run", "fuse", recipe.hybrid, {"store": "store", "dense": runs[best], "bm25": runs["bm25"]})
            runs["hybrid"] = "hybrid_run"
        if searched and teacher:
            self._rerank_best(runs, teacher)

    def _check_names(self) -> None:
        """Names that only a late step looks up, checked before any work: measures and options of the index."""
        from simlm.evaluation.measures import parse_measure
        from simlm.index import check_options

        for name in (*self.recipe.evaluate.measures, self.recipe.evaluate.main):
            if not re.fullmatch(r"Answer@\d+", name):
                parse_measure(name)
        check_options(self.recipe.index.type, self.recipe.index.options)
        check_options(self.recipe.bm25.type, self.recipe.bm25.options)
        if self.recipe.bm25.type != "bm25":
            raise RecipeError(f'bm25.type is {self.recipe.bm25.type!r}; the baseline is always "bm25", vector indexes are set in [index]')

    def _find_splits(self) -> list[Split]:
        from simlm.data.datasets import find_splits

        return find_splits(self.recipe.data)

    def _prepare(self) -> None:
        from simlm.data.datasets import signature

        tokenizer = self.recipe.model.start
        given = self.recipe.prepare
        if "tokenizer" in given.model_fields_set:
            tokenizer = given.tokenizer
        elif tokenizer == "scratch":
            if given.train_vocabulary is None:
                raise RecipeError(
                    'model.start is "scratch", which has no tokenizer: set prepare.tokenizer to a checkpoint, '
                    "or prepare.train_vocabulary to a size"
                )
            tokenizer = ""
        if given.train_vocabulary is not None and self.recipe.model.start != "scratch":
            raise RecipeError(
                f"prepare.train_vocabulary makes a new vocabulary, but model.start {self.recipe.model.start!r} has its own; "
                'set model.start = "scratch" or leave prepare.train_vocabulary out'
            )
        settings = given.model_copy(update={"data": self.recipe.data, "tokenizer": tokenizer})
        outside = {"data": json_digest(signature(self.recipe.data, self.digests))}
        if tokenizer:
            outside |= self._outside_model(tokenizer, None)
        self._add("store", "prepare", settings, {}, outside)

    def _pretrain(self, store: str = "store") -> str:
        recipe = self.recipe
        inputs = {"store": store}
        if recipe.pretrain.needs_generator:
            source = recipe.generator.source
            outside = {} if source in ("train", "random") else self._outside_model(source, None)
            self._add("generator", "train_generator", recipe.generator, {"store": store}, outside)
            inputs["generator"] = "generator"
        settings, outside = self._with_model(recipe.pretrain, recipe.pretrain.initial)
        self._add("pretrained", "pretrain", settings, inputs, outside)
        return "pretrained"

    def _retriever(
        self, name: str, section: BaseModel, groups: str, pretrained: str, stage: str = "train_retriever", **inputs: str
    ) -> None:
        initial = section.initial  # type: ignore[attr-defined]
        if initial == "pretrained" and pretrained:
            inputs["model"] = pretrained
        elif initial == "pretrained":
            initial = "start"
            section = section.model_copy(update={"initial": "start"})
        settings, outside = self._with_model(section, initial)
        self._add(name, stage, settings, {"store": "store", "groups": groups} | inputs, outside)

    def _distill(self, groups: str, pretrained: str) -> None:
        self._retriever("distilled", self.recipe.distilled, groups, pretrained, stage="distill", teacher="teacher_scores")

    def _reranker(self, groups: str, dev_run: str, pretrained: str) -> str:
        inputs = {"dev_run": dev_run} if dev_run and "dev" in self.splits else {}
        self._retriever("reranker", self.recipe.reranker, groups, pretrained, stage="train_reranker", **inputs)
        return "reranker"

    def _rerank_best(self, runs: dict[str, str], teacher: str) -> None:
        settings = self._pairs(self.recipe.rerank).model_copy(update={"splits": self._reported_splits()})
        inputs = {f"run.{name}": step for name, step in runs.items() if name != "start"}
        chosen_by = self.recipe.evaluate
        if chosen_by.main.startswith("Answer@"):
            chosen_by = chosen_by.model_copy(update={"main": "RR@10"})
        self._add("best_run", "select_run", chosen_by, {"store": "store"} | inputs)
        self._add("reranker_run", "rerank", settings, {"store": "store", "model": teacher, "run": "best_run"})
        runs["reranker"] = "reranker_run"

    def _reported_splits(self) -> list[Split]:
        """The split of the report, as far as there are queries; dev where there is no other."""
        wanted = self.recipe.evaluate.split
        return [wanted] if wanted in self.splits else ["dev"]

    def _pairs(self, settings: BaseModel) -> BaseModel:
        """Re-ranking settings with the pair length that the re-ranker was trained with, unless the recipe says otherwise."""
        if "max_pair_tokens" in settings.model_fields_set:
            return settings
        return settings.model_copy(update={"max_pair_tokens": self.recipe.reranker.max_pair_tokens})

    def _dense(self, name: str, model: str | None, searched: list[Split], runs: dict[str, str]) -> str:
        """Encode, index and search with one model; the name of the index step."""
        inputs = {"model": model} if model else {}
        settings, outside = self._with_model(self.recipe.encode, "start" if model is None else "")
        self._add(f"{name}_embeddings", "encode", settings, {"store": "store"} | inputs, outside)
        self._add(f"{name}_index", "build_index", self.recipe.index, {"store": "store", "embeddings": f"{name}_embeddings"})
        if searched:
            runs[name] = self._search(f"{name}_run", f"{name}_index", model, searched)
        return f"{name}_index"

    def _search_train(self, model: str, index: str) -> str:
        return self._search(f"{model}_train_run", index, model, ["train"], depth=self.recipe.mining.depth)

    def _search(self, name: str, index: str, model: str | None, splits: list[Split], depth: int | None = None) -> str:
        inputs = {"model": model} if model else {}
        settings, outside = self._with_model(self.recipe.search, "start" if model is None and index != "bm25" else "")
        changes: dict[str, Any] = {"splits": splits}
        if depth is not None:
            changes["depth"] = depth
        self._add(name, "search", settings.model_copy(update=changes), {"store": "store", "index": index} | inputs, outside)
        return name

    def _mine(self, name: str, run: str) -> str:
        self._add(f"{name}_groups", "mine_negatives", self.recipe.mining, {"store": "store", "run": run})
        return f"{name}_groups"

    def _evaluate(self, runs: dict[str, str]) -> None:
        order = ("bm25", "start", "retriever1", "retriever2", "reranker", "distilled", "hybrid")
        inputs = {"store": "store"} | {f"run.{name}": runs[name] for name in order if name in runs}
        inputs |= {f"step.{step.name}": step.name for step in self.steps}
        settings = self.recipe.evaluate
        if settings.split not in self.splits and "dev" in self.splits:
            self.notes.append(
                f"no {settings.split!r} queries: the report is on the dev queries, which the training has seen as its dev measure"
            )
            settings = settings.model_copy(update={"split": "dev"})
        self._add("report", "evaluate", settings, inputs)

    def _with_model(self, section: Any, initial: str) -> tuple[Any, dict[str, Any]]:
        """The section with [model] filled in where it does not have its own, and the digests of checkpoints outside."""
        model: ModelSettings = self.recipe.model
        if "model" in section.model_fields_set:
            model = model.model_copy(update={name: getattr(section.model, name) for name in section.model.model_fields_set})
        outside: dict[str, Any] = {}
        if initial == "start":
            outside = self._outside_model(model.start, model.revision)
        elif initial not in ("", "pretrained"):
            outside = self._outside_model(initial, None)
        return section.model_copy(update={"model": model}), outside

    def _outside_model(self, reference: str, revision: str | None) -> dict[str, Any]:
        from simlm.data.datasets import cached_digest

        path = expand_path(reference)
        if reference == "scratch" or not path.is_dir():
            return {f"model {reference}": revision or ""}
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".txt", ".model"))
        return {f"model {reference}": json_digest({file.name: cached_digest(file, self.digests) for file in files})}

    def _add(self, name: str, stage: str, settings: BaseModel, inputs: dict[str, str], outside: dict[str, Any] | None = None) -> None:
        outside = outside or {}
        known = {step.name: step.fingerprint for step in self.steps}
        prints = {role: known[step] for role, step in inputs.items()}
        seed = self.seeds.get(stage, self.recipe.seed)
        fingerprint = json_digest(_basis(stage, settings, seed, prints, outside))
        self.steps.append(Step(name, stage, settings, inputs, outside, fingerprint, seed))


__all__ = ["Plan", "Step", "held_folder", "make_plan", "retriever1_steps", "run_folder", "run_recipe", "run_step"]
