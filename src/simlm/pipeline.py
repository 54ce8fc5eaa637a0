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
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from simlm.recipe import ModelSettings, Recipe, expand_path, load_recipe
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
            work = ArtifactBuilder(path, kind="run", stage="", code_version=0, fingerprint=step.fingerprint)
            stamp = work.resume / "fingerprint"
            interrupted = stamp.exists() and stamp.read_text(encoding="utf-8") == step.fingerprint
            return "to do", "interrupted, goes on where it was" if interrupted else ""
        try:
            manifest = open_artifact(path, verify="sizes").manifest
        except ArtifactError as error:
            return "stale", str(error)
        if manifest.fingerprint == step.fingerprint:
            return "done", ""
        return "stale", _why_stale(step, manifest)

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


def run_folder(recipe: Recipe) -> Path:
    """Where the artifacts of a recipe's steps lie."""
    return expand_path(recipe.output) if recipe.output else Path("runs") / recipe.name


def run_recipe(
    recipe: Recipe | str | Path, *, only: list[str] | None = None, overrides: list[str] | None = None, quiet: bool = False
) -> Path:
    """Run a recipe (or, with `only`, the steps named and what they need); the folder of the run.

    Finished steps are skipped, an interrupted one goes on from its last checkpoint. Under torchrun all processes call this.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    ranks = join_processes()
    progress = Progress(quiet=quiet or ranks.rank > 0)
    settled = recipe
    lock = contextlib.nullcontext()
    if ranks.rank == 0:
        _make_folder(run_folder(recipe))
        lock = _locked(run_folder(recipe))  # type: ignore[assignment]
    with lock:
        return _run(settled, only, progress, ranks)


def _run(settled: Recipe, only: list[str] | None, progress: Progress, ranks: Ranks) -> Path:
    for section in (settled.retriever1, settled.retriever2, settled.reranker, settled.distilled):
        if section.queries_per_step % ranks.num_ranks:
            raise RecipeError(
                f"queries_per_step {section.queries_per_step} cannot be shared by {ranks.num_ranks} processes; "
                f"set it to a multiple of {ranks.num_ranks}, or start another number of processes"
            )
    plan = ranks.from_first(lambda: make_plan(settled))
    names = [step.name for step in plan.steps] if only is None else only
    steps = plan.needed(names)
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
    builder = ArtifactBuilder(plan.path(step.name), kind=row.kind, stage=step.stage, code_version=row.version, fingerprint=step.fingerprint)
    ranks.from_first(lambda: _prepare_step(plan, step, inputs, builder))
    earlier = builder.earlier_seconds()
    release_memory()
    reset_peak_memory()
    started = time.monotonic()
    if row.distributed or ranks.rank == 0:
        num_ranks = ranks.num_ranks if row.distributed else 1
        context = Context(builder, plan.recipe.seed, progress, ranks.rank, num_ranks)
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
        try:
            builder.finish(
                settings=step.settings.model_dump(mode="json"),
                inputs={role: plan.step(name).fingerprint for role, name in step.inputs.items()} | step.outside,
                seed=plan.recipe.seed,
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
    builder.begin()


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


class _Planner:
    """Builds the steps of the SimLM pipeline; one method a part, in the order of the paper's figure 2."""

    def __init__(self, recipe: Recipe, digests: dict[str, str]) -> None:
        self.recipe = recipe
        self.digests = digests
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.splits: list[Split] = []

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

    def _pretrain(self) -> str:
        recipe = self.recipe
        outside = {} if recipe.generator.source == "train" else self._outside_model(recipe.generator.source, None)
        self._add("generator", "train_generator", recipe.generator, {"store": "store"}, outside)
        settings, outside = self._with_model(recipe.pretrain, recipe.pretrain.initial)
        self._add("pretrained", "pretrain", settings, {"store": "store", "generator": "generator"}, outside)
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
        fingerprint = json_digest(
            {
                "stage": stage,
                "version": STAGES[stage].version,
                "settings": settings.model_dump(mode="json"),
                "seed": self.recipe.seed,
                "inputs": {role: known[step] for role, step in inputs.items()},
                "outside": outside,
            }
        )
        self.steps.append(Step(name, stage, settings, inputs, outside, fingerprint))


__all__ = ["Plan", "Step", "make_plan", "run_folder", "run_recipe", "run_step"]
