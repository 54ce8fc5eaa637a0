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
from simlm.errors import ArtifactError, DataError, DiskError, RecipeError, SimlmError, nearest, require_extra
from simlm.progress import Progress
from simlm.recipe import (
    CheckTeacherSettings,
    ConsistencySettings,
    DataSettings,
    FuseSettings,
    HybridTeacherSettings,
    MiningPart,
    MiningSettings,
    ModelSettings,
    OutsideRerankSettings,
    Recipe,
    RerankerSettings,
    RerankSettings,
    SampledRerankSettings,
    expand_path,
    initialisation_name,
    load_recipe,
)
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


def store_splits(recipe: Recipe) -> list[Split]:
    """Splits of the store that training reads, with the pseudo queries' where the recipe makes them."""
    return _Planner(recipe, {}).find_splits()


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


def _compared(initial: str) -> str:
    """The step, and the row of the report, of a re-ranker that is there to be compared."""
    return f"reranker_from_{initialisation_name(initial)}"


def _teacher_roles(steps: list[str], role: str = "teacher") -> dict[str, str]:
    """The roles of several teachers' runs: "teacher", "teacher.2" ..."""
    return {f"{role}.{number}" if number > 1 else role: step for number, step in enumerate(steps, start=1)}


def _check_outside_reranker(checkpoint: str) -> None:
    """RecipeError if a checkpoint on this machine cannot score pairs: found here, not hours later; one of a hub is checked by its step."""
    path = expand_path(checkpoint)
    if not path.is_dir():
        if path.is_absolute() or checkpoint.startswith((".", "~", "$")) or checkpoint.count("/") > 1:
            raise RecipeError(f"{checkpoint}: no such folder; give the folder or hub id of a finished cross-encoder")
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RecipeError(f"{checkpoint}: no readable config.json here, so this is no checkpoint; give a finished cross-encoder") from None
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        raise RecipeError(f"{checkpoint}: an encoder without a head that scores pairs; give a finished cross-encoder")
    # Without names of labels transformers counts two.
    labels = len(config.get("id2label") or {}) or int(config.get("num_labels", 2))
    if labels != 1:
        raise RecipeError(f"{checkpoint}: a classifier of {labels} labels, a teacher has 1; give a cross-encoder trained to score pairs")


class _Planner:
    """Builds the steps of the SimLM pipeline; one method a part, in the order of the paper's figure 2."""

    def __init__(self, recipe: Recipe, digests: dict[str, str]) -> None:
        self.recipe = recipe
        self.digests = digests
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.splits: list[Split] = []
        self.corpus = "store"
        """The step that prepares the passages: of the store that training reads, or of the one that its queries are made from."""
        self.seeds: dict[str, int] = {}
        """Stage -> seed, where it is not the recipe's."""

    def build(self) -> None:
        self._check_names()
        recipe, skip = self.recipe, {str(part) for part in self.recipe.skip}
        self.splits = self.find_splits()
        searched: list[Split] = [split for split in ("dev", "test") if split in self.splits]
        self._store()
        runs: dict[str, str] = {}
        has_train = "train" in self.splits

        if searched:
            runs["bm25"] = self._search("bm25_run", "bm25", None, searched)
        if "start" not in skip and recipe.model.start != "scratch":
            self._dense("start", None, searched, runs)

        groups = ""
        if has_train:
            # Before pre-training: what is wrong with queries and judgements shows here, not after days.
            groups = self._mine("retriever1", "bm25", "bm25")
        pretrained = "" if "pretrain" in skip else self._pretrain()
        if not has_train:
            self.notes.append(
                "the data set has no training queries: no retriever or re-ranker is trained. "
                "BM25, pre-training and the indexes work; add queries and qrels for `train`, or a section [pseudo_queries] to make queries "
                "from the passages, then run the same command again"
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
        self._store()
        groups = self._mine("retriever1", "bm25", "bm25")
        store = "store" if pretrain_on is None else self._other_store(pretrain_on)
        pretrained = self._pretrain(store)
        self._retriever("retriever1", self.recipe.retriever1, groups, pretrained, **self._scores_for("retriever1", groups))
        self._dense("retriever1", "retriever1", splits, {})

    def _other_store(self, data: DataSettings) -> str:
        """A corpus other than the recipe's, with the tokenizer of the recipe's store."""
        from simlm.data.datasets import signature

        (store,) = (step for step in self.steps if step.name == self.corpus)
        tokenizer = run_folder(self.recipe).resolve() / self.corpus / "tokenizer"
        settings = store.settings.model_copy(update={"data": data, "tokenizer": "", "train_vocabulary": None})
        outside = {"data": json_digest(signature(data, self.digests)), "tokenizer": store.fingerprint}
        self._add("other_store", "prepare", settings, {}, outside)
        # The fingerprint does not hold the tokenizer's place, as the folder of a run may be moved.
        self.steps[-1] = replace(self.steps[-1], settings=settings.model_copy(update={"tokenizer": str(tokenizer)}))
        return "other_store"

    def _supervised(self, groups: str, pretrained: str, searched: list[Split], runs: dict[str, str], skip: set[str]) -> None:
        recipe = self.recipe
        self._retriever("retriever1", recipe.retriever1, groups, pretrained, **self._scores_for("retriever1", groups))
        dense = self._dense("retriever1", "retriever1", searched, runs)
        best = "retriever1"
        if "retriever2" not in skip:
            for number in range(1, recipe.rounds + 1):
                groups = self._mine("retriever2", best, dense)
                best = "retriever2" if number == 1 else f"retriever2_round{number}"
                self._retriever(best, recipe.retriever2, groups, pretrained, **self._scores_for("retriever2", groups))
                dense = self._dense(best, best, searched, runs)
        teacher = ""
        if "reranker" not in skip or recipe.teacher.extra or recipe.hybrid_teacher:
            groups = self._mine("reranker", best, dense)
        if "reranker" not in skip:
            teacher = self._reranker(groups, runs.get(best, ""), pretrained)
        hybrid = recipe.hybrid_teacher
        teachers = [] if "distilled" in skip or (hybrid and hybrid.alone) else self._teachers(groups, teacher)
        checked = bool(teachers)
        if hybrid is not None:
            teachers.append(self._hybrid_teacher(hybrid, groups, best))
        if teachers:
            # On what the teacher has scored, before [distilled_mining] leaves some of it out: a changed filter compares nothing again.
            inputs = self._check_teacher(groups, teachers, best, runs.get(best, ""), teacher) if checked else {}
            if recipe.distilled_mining.model_fields_set:
                groups = self._mine_scored(best, dense, teacher)
            self._distill(groups, pretrained, best, teachers, inputs)
            self._dense("distilled", "distilled", searched, runs)
            best = "distilled"
        if searched and "hybrid" not in skip:
            self._add("hybrid_run", "fuse", recipe.hybrid, {"store": "store", "dense": runs[best], "bm25": runs["bm25"]})
            runs["hybrid"] = "hybrid_run"
        if searched and teacher:
            self._rerank_best(runs, teacher)

    def _check_names(self) -> None:
        """What only a late step looks up, checked before any work: measures, options of the index, an optional library."""
        from simlm.evaluation.measures import parse_measure
        from simlm.index import check_options

        for name in (*self.recipe.evaluate.measures, self.recipe.evaluate.main):
            if not re.fullmatch(r"Answer@\d+", name):
                parse_measure(name)
        check_options(self.recipe.index.type, self.recipe.index.options)
        check_options(self.recipe.bm25.type, self.recipe.bm25.options)
        for name in Recipe.model_fields:
            if getattr(getattr(self.recipe, name), "lora", None) is not None and name not in self.recipe.skip:
                require_extra("peft", "lora", f"[{name}] lora")
        if self.recipe.bm25.type != "bm25":
            raise RecipeError(f'bm25.type is {self.recipe.bm25.type!r}; the baseline is always "bm25", vector indexes are set in [index]')

    def find_splits(self) -> list[Split]:
        from simlm.data.datasets import find_splits

        found = find_splits(self._data())
        pseudo = self.recipe.pseudo_queries
        if pseudo is None:
            return found
        made: list[Split] = ["train", "dev"] if pseudo.dev_fraction else ["train"]
        return [*made, *found]

    def _data(self) -> DataSettings:
        """[data]; where queries are made, without the training and dev queries that the data set may have."""
        data = self.recipe.data
        if self.recipe.pseudo_queries is None:
            return data
        return data.model_copy(update={"splits": ["test"] if data.splits is None else data.splits})

    def _store(self) -> None:
        """The store that training reads, and BM25 over its passages; where queries are made, from the store of the corpus alone."""
        pseudo = self.recipe.pseudo_queries
        self.corpus = "store" if pseudo is None else "corpus"
        self._prepare()
        self._add("bm25", "build_index", self.recipe.bm25, {"store": self.corpus})
        if pseudo is not None:
            self._add("pseudo_queries", "make_queries", pseudo, {"store": self.corpus, "index": "bm25"})
            self._filter(self.recipe.consistency, ["train", "dev"] if pseudo.dev_fraction else ["train"])

    def _filter(self, settings: ConsistencySettings, splits: list[Split]) -> None:
        """Search the pseudo queries as the consistency filter wants it, and keep those that find their passage."""
        inputs = {"store": "pseudo_queries"}
        by_words = settings.by in ("bm25", "hybrid", "reranker") or settings.trivial_share < 1
        if by_words:
            self._search_pseudo("bm25", "bm25", splits)
        if settings.by in ("start", "hybrid"):
            self._dense("start", None, [], {})
            self._search_pseudo("start", "start_index", splits)
        if settings.by == "hybrid":
            equal = FuseSettings(method="score", dense_weight=0.5, depth=settings.depth)
            parts = {"dense": "pseudo_start_run", "bm25": "pseudo_bm25_run"}
            self._add("pseudo_hybrid_run", "fuse", equal, inputs | parts)
        if settings.reranker is not None:
            scoring = self._teacher_scoring().model_copy(update={"depth": settings.depth, "splits": splits})
            self._rerank_outside("pseudo_reranker_run", scoring, settings.reranker, store="pseudo_queries", run="pseudo_bm25_run")
        if settings.by != "none":
            inputs["run"] = f"pseudo_{settings.by}_run"
        if settings.trivial_share < 1:
            inputs["bm25"] = "pseudo_bm25_run"
        self._add("store", "filter_queries", settings, inputs)

    def _search_pseudo(self, name: str, index: str, splits: list[Split]) -> None:
        self._search(f"pseudo_{name}_run", index, None, splits, depth=self.recipe.consistency.depth, store="pseudo_queries")

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
        data = self._data()
        settings = given.model_copy(update={"data": data, "tokenizer": tokenizer})
        outside = {"data": json_digest(signature(data, self.digests))}
        if tokenizer:
            outside |= self._outside_model(tokenizer, None)
        self._add(self.corpus, "prepare", settings, {}, outside)

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

    def _teachers(self, groups: str, reranker: str) -> list[str]:
        """Score the groups with the recipe's own re-ranker, if there is one, and with each further teacher; the steps that do."""
        sample = {"num_queries": self.recipe.teacher.num_queries}
        settings = SampledRerankSettings.model_validate(self._teacher_scoring().model_dump() | sample)
        steps = []
        if reranker:
            self._add("teacher_scores", "rerank", settings, {"store": "store", "model": reranker, "groups": groups})
            steps.append("teacher_scores")
        for checkpoint in self.recipe.teacher.extra:
            name = f"teacher_scores_{initialisation_name(checkpoint)}"
            self._rerank_outside(name, settings, checkpoint, groups=groups)
            steps.append(name)
        return steps

    def _check_teacher(self, groups: str, teachers: list[str], student: str, student_run: str, reranker: str) -> dict[str, str]:
        """Compare what teaches with the last retriever, on dev where all that teach can score its run; the further inputs of distill."""
        section = self.recipe.teacher
        inputs = {"store": "store", "groups": groups} | _teacher_roles(teachers)
        scoring = HybridTeacherSettings(
            dense="best", dense_weight=1.0, temperature=self.recipe.distilled.student_temperature, depth=section.depth
        )
        scored = {"store": "store", "groups": groups, "embeddings": f"{student}_embeddings", "model": student}
        self._add("student_scores", "score_groups", self._with_model(scoring, "")[0], scored)
        inputs["student_scores"] = "student_scores"
        if student_run and "dev" in self.splits and section.check_queries and "hybrid_teacher_scores" not in teachers:
            inputs |= {"dev_student": student_run} | _teacher_roles(self._dev_teachers(student_run, reranker), "dev_teacher")
        settings = CheckTeacherSettings(
            depth=section.check_depth,
            interpolate=section.interpolate,
            if_worse=section.if_worse,
            student_temperature=self.recipe.distilled.student_temperature,
            student=student,
        )
        self._add("teacher_check", "check_teacher", settings, inputs)
        return {"check": "teacher_check", "student": student, "student_scores": "student_scores"}

    def _dev_teachers(self, student_run: str, reranker: str) -> list[str]:
        """Re-rank the student's first passages for some dev queries with everyone who teaches; the steps that do."""
        section = self.recipe.teacher
        sample: dict[str, Any] = {"splits": ["dev"], "depth": section.check_depth, "num_queries": section.check_queries}
        settings = SampledRerankSettings.model_validate(self._teacher_scoring().model_dump() | sample)
        steps = []
        if reranker:
            self._add("dev_teacher_scores", "rerank", settings, {"store": "store", "model": reranker, "run": student_run})
            steps.append("dev_teacher_scores")
        for checkpoint in section.extra:
            name = f"dev_teacher_scores_{initialisation_name(checkpoint)}"
            self._rerank_outside(name, settings, checkpoint, run=student_run)
            steps.append(name)
        return steps

    def _hybrid_teacher(self, section: HybridTeacherSettings, groups: str, best: str) -> str:
        """Score the groups with BM25 and a dense retriever together; the step that does."""
        inputs = {"store": "store", "groups": groups, "index": "bm25"}
        if section.dense == "best":
            inputs |= {"embeddings": f"{best}_embeddings", "model": best}
        else:
            self._dense("start", None, [], {})
            inputs["embeddings"] = "start_embeddings"
        settings, outside = self._with_model(section, "start" if section.dense == "start" else "")
        self._add("hybrid_teacher_scores", "score_groups", settings, inputs, outside)
        return "hybrid_teacher_scores"

    def _teacher_scoring(self) -> RerankSettings:
        """How teachers score: what [teacher] says, without the names of further teachers."""
        section = self._pairs(self.recipe.teacher)
        return RerankSettings.model_validate({name: getattr(section, name) for name in RerankSettings.model_fields})

    def _rerank_outside(self, name: str, settings: RerankSettings, checkpoint: str, **scored: str) -> None:
        """A rerank step with a cross-encoder that no step makes. scored: groups=STEP or run=STEP, and store=STEP if it is not "store"."""
        _check_outside_reranker(checkpoint)
        outside = OutsideRerankSettings.model_validate(settings.model_dump() | {"checkpoint": checkpoint})
        self._add(name, "rerank", outside, {"store": "store"} | scored, self._outside_model(checkpoint, None))

    def _distill(self, groups: str, pretrained: str, before: str, teachers: list[str], inputs: dict[str, str]) -> None:
        if self.recipe.distilled.initial == "retriever2":
            inputs = inputs | {"model": before}
        self._retriever("distilled", self.recipe.distilled, groups, pretrained, stage="distill", **_teacher_roles(teachers), **inputs)

    def _reranker(self, groups: str, dev_run: str, pretrained: str) -> str:
        inputs = {"dev_run": dev_run} if dev_run and "dev" in self.splits else {}
        section = self.recipe.reranker
        given = section.model_fields_set & RerankerSettings.model_fields.keys()
        settings = RerankerSettings.model_validate({name: getattr(section, name) for name in given})
        self._retriever("reranker", settings, groups, pretrained, stage="train_reranker", **inputs)
        for initial in section.compare:
            if initial == "pretrained" and not pretrained:
                raise RecipeError('reranker.compare names "pretrained", but `skip` leaves pre-training out; drop one of the two')
            other = settings.model_copy(update={"initial": initial})
            self._retriever(_compared(initial), other, groups, pretrained, stage="train_reranker", **inputs)
        return "reranker"

    def _rerank_best(self, runs: dict[str, str], teacher: str) -> None:
        settings = self._pairs(self.recipe.rerank).model_copy(update={"splits": self._reported_splits()})
        inputs = {f"run.{name}": step for name, step in runs.items() if name != "start"}
        chosen_by = self.recipe.evaluate
        if chosen_by.main.startswith("Answer@"):
            chosen_by = chosen_by.model_copy(update={"main": "RR@10"})
        self._add("best_run", "select_run", chosen_by, {"store": "store"} | inputs)
        for name in (teacher, *(_compared(initial) for initial in self.recipe.reranker.compare)):
            self._add(f"{name}_run", "rerank", settings, {"store": "store", "model": name, "run": "best_run"})
            runs[name] = f"{name}_run"

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
        """Encode, index and search with one model, as far as that is not planned already; the name of the index step."""
        if f"{name}_index" not in {step.name for step in self.steps}:
            inputs = {"model": model} if model else {}
            # The starting model's vectors are there before the pseudo queries are.
            store = "store" if model else self.corpus
            settings, outside = self._with_model(self.recipe.encode, "start" if model is None else "")
            self._add(f"{name}_embeddings", "encode", settings, {"store": store} | inputs, outside)
            self._add(f"{name}_index", "build_index", self.recipe.index, {"store": store, "embeddings": f"{name}_embeddings"})
        if searched:
            runs[name] = self._search(f"{name}_run", f"{name}_index", model, searched)
        return f"{name}_index"

    def _search(self, name: str, index: str, model: str | None, splits: list[Split], depth: int | None = None, store: str = "store") -> str:
        inputs = {"model": model} if model else {}
        settings, outside = self._with_model(self.recipe.search, "start" if model is None and index != "bm25" else "")
        changes: dict[str, Any] = {"splits": splits}
        if depth is not None:
            changes["depth"] = depth
        self._add(name, "search", settings.model_copy(update=changes), {"store": store, "index": index} | inputs, outside)
        return name

    def _mine(self, part: MiningPart, name: str, index: str) -> str:
        """Groups that a part is trained on, from what `name` ("bm25", or the retriever before) finds with its index, or from its mix.

        With a teacher the groups are mined twice: all candidates, to be scored, then those that its scores leave.
        """
        settings = self.recipe.mining_of(part)
        inputs = {"store": "store"} | self._mined_runs(part, name, index)
        if settings.teacher is not None:
            filters = {key: MiningSettings.model_fields[key].default for key in ("teacher", "teacher_margin", "teacher_unscored")}
            self._add(f"{name}_candidates", "mine_negatives", settings.model_copy(update=filters), inputs)
            scoring = self._teacher_scoring().model_copy(update={"depth": settings.num_negatives})
            self._rerank_outside(f"{name}_candidate_scores", scoring, settings.teacher, groups=f"{name}_candidates")
            inputs["teacher"] = f"{name}_candidate_scores"
        self._add(f"{name}_groups", "mine_negatives", settings, inputs)
        return f"{name}_groups"

    def _scores_for(self, part: Literal["retriever1", "retriever2"], groups: str) -> dict[str, str]:
        """Input of a retriever whose loss compares a teacher's scores: those that its groups were filtered by."""
        section = self.recipe.retriever1 if part == "retriever1" else self.recipe.retriever2
        if section.teacher_margin is None:
            return {}
        if self.recipe.mining_of(part).teacher is None:
            raise RecipeError(
                f"{part}.teacher_margin compares a teacher's scores, and its negatives have none: "
                f"set {part}_mining.teacher to a cross-encoder, and {part}_mining.teacher_margin"
            )
        return {"teacher": f"{groups.removesuffix('_groups')}_candidate_scores"}

    def _mine_scored(self, name: str, index: str, reranker: str) -> str:
        """Groups of the distilled retriever, of what the recipe's own re-ranker has scored."""
        if not reranker:
            raise RecipeError(
                '[distilled_mining] reads scores of the re-ranker, which `skip` leaves out; drop "reranker" there, or the section'
            )
        inputs = {"store": "store"} | self._mined_runs("distilled", name, index) | {"teacher": "teacher_scores"}
        self._add("distilled_groups", "mine_negatives", self.recipe.mining_of("distilled"), inputs)
        return "distilled_groups"

    def _mined_runs(self, part: MiningPart, name: str, index: str) -> dict[str, str]:
        """Role -> run over the training queries, one for each name of the part's mix; searched where no other part has done so."""
        mix = self.recipe.mining_of(part).mix
        if not mix:
            return {"run": self._search_train(name, index)}
        of_source = {"bm25": ("bm25", "bm25"), "start": ("start", "start_index"), "dense": (name, index)}
        return {f"run.{source}": self._search_train(*of_source[source]) for source in mix}

    def _search_train(self, name: str, index: str) -> str:
        run = f"{name}_train_run"
        have = {step.name for step in self.steps}
        if run in have:
            return run
        if name == "start" and index not in have:
            self._dense("start", None, [], {})
        model = None if name in ("bm25", "start") else name
        return self._search(run, index, model, ["train"], depth=self._train_depth(name))

    def _train_depth(self, name: str) -> int:
        """How deep the training queries are searched with a retriever: as the parts need that mine from it."""
        recipe = self.recipe
        last = "retriever1" if "retriever2" in recipe.skip else "retriever2" if recipe.rounds == 1 else f"retriever2_round{recipe.rounds}"
        parts: list[MiningPart] = ["retriever1"]
        parts += ["retriever2"] if "retriever2" not in recipe.skip else []
        parts += ["reranker"] if "reranker" not in recipe.skip or recipe.teacher.extra or recipe.hybrid_teacher else []
        parts += ["distilled"] if recipe.distilled_mining.model_fields_set and "distilled" not in recipe.skip else []
        if name in ("bm25", "start"):
            users = [part for part in parts if name in recipe.mining_of(part).mix]
            users += ["retriever1"] if name == "bm25" and not recipe.mining_of("retriever1").mix else []
        elif name == last:
            users = [part for part in parts if part in ("reranker", "distilled")]
        else:
            users = ["retriever2"]
        return max(recipe.mining_of(part).depth for part in users)

    def _evaluate(self, runs: dict[str, str]) -> None:
        compared = [_compared(initial) for initial in self.recipe.reranker.compare]
        rounds = [f"retriever2_round{number}" for number in range(2, self.recipe.rounds + 1)]
        order = ("bm25", "start", "retriever1", "retriever2", *rounds, "reranker", *compared, "distilled", "hybrid")
        inputs = {"store": "store"} | {f"run.{name}": runs[name] for name in order if name in runs}
        inputs |= {f"step.{step.name}": step.name for step in self.steps}
        settings = self.recipe.evaluate
        if settings.split not in self.splits and "dev" in self.splits:
            self.notes.append(
                f"no {settings.split!r} queries: the report is on the dev queries, which the training has seen as its dev measure"
                + (" and which are made from passages as the training queries are" if self.recipe.pseudo_queries else "")
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
        elif initial not in ("", "pretrained", "retriever2"):
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


__all__ = ["Plan", "Step", "held_folder", "make_plan", "retriever1_steps", "run_folder", "run_recipe", "run_step", "store_splits"]
