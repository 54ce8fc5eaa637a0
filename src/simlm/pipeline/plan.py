"""The plan: the steps of a recipe in order, the state of each, and what stands in the way of doing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simlm.artifacts import ArtifactBuilder, open_artifact
from simlm.errors import ArtifactError, RecipeError, nearest
from simlm.pipeline.changes import what_changed, why_stale
from simlm.pipeline.steps import Step, step_basis
from simlm.recipe import Recipe
from simlm.stages import STAGES

State = Literal["done", "stale", "to do"]


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
        return "stale", why_stale(step, manifest)

    def builder(self, step: Step) -> ArtifactBuilder:
        """The work folder of a step."""
        row = STAGES[step.stage]
        return ArtifactBuilder(
            self.path(step.name), kind=row.kind, stage=step.stage, code_version=row.version, fingerprint=step.fingerprint
        )

    def basis(self, step: Step) -> dict[str, Any]:
        """What the fingerprint of a step is the digest of."""
        inputs = {role: self.step(name).fingerprint for role, name in step.inputs.items()}
        return step_basis(step.stage, step.settings, step.seed, inputs, step.outside)

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
        changed = what_changed(builder.interrupted_basis(), self.basis(step))
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
