"""A step: one stage with its settings and its inputs, and the fingerprint of all that its result depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from simlm.stages import STAGES


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


def step_basis(stage: str, settings: BaseModel, seed: int, inputs: dict[str, str], outside: dict[str, Any]) -> dict[str, Any]:
    """Everything that a step's result depends on; inputs: role -> fingerprint."""
    return {
        "stage": stage,
        "version": STAGES[stage].version,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "inputs": inputs,
        "outside": outside,
    }
