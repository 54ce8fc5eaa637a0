"""Running a recipe: the steps that are not done, one after the other, each put in place when it is whole."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from pathlib import Path

from simlm.artifacts import ArtifactBuilder, disk_error, open_artifact, peak_memory_bytes, reset_peak_memory, sweep
from simlm.errors import DataError, DiskError, RecipeError, SimlmError
from simlm.pipeline.folder import held_folder
from simlm.pipeline.plan import Plan
from simlm.pipeline.planning import make_plan
from simlm.pipeline.steps import Step
from simlm.progress import Progress
from simlm.recipe import Recipe, load_recipe
from simlm.runtime import Ranks, join_processes, release_memory
from simlm.stages import STAGES, Context


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


def _explained(error: OSError, builder: ArtifactBuilder) -> OSError | SimlmError:
    """What an OSError of a stage means: a full disk, a folder that cannot be written, a file that cannot be read; else the error itself."""
    ours = error.filename is None or Path(str(error.filename)).is_relative_to(builder.work)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or (error.errno in (errno.EACCES, errno.EPERM) and ours):
        return disk_error(error, builder.work)
    if error.filename is not None and not ours:
        return DataError(f"{error.filename}: cannot be read ({error.strerror}); check that it is there and may be read")
    return error
