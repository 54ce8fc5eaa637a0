"""The guard against loss spikes: a step whose loss leaps, or is no number, does not move the weights.

Judged on the device: no value is read before the loop stops anyway (log, dev measures, checkpoint).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF_LIFE_STEPS = 50
"""Of the running mean: long enough that one batch does not move it, short enough to follow a falling loss. Ours; no paper gives one."""

FIRST_STEPS = 20
"""Steps that only teach the mean, as the loss of a fresh model falls fastest there."""


@dataclass(frozen=True)
class SpikeGuard:
    """When to skip a step: its loss (over all processes) is not finite, or more than `ratio` times the running mean.

    For losses above 0, as cross-entropies are. A skipped step moves neither weights nor optimiser nor the mean; the learning-rate
    schedule and the data go on. Only a loss that is not finite counts in the first FIRST_STEPS steps.
    max_in_a_row: skipped steps in a row after which training stops. least: a leap is also at least this much above the mean; a loss
    that has come near 0, as contrasts do, doubles from step to step without anything being wrong.
    """

    ratio: float
    max_in_a_row: int
    least: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """A skipped step. step: counted from 1. mean: the running mean it was held against. in_a_row: skipped steps up to this one."""

    step: int
    loss: float
    mean: float
    in_a_row: int


class SpikeWatch:
    """The guard at work: the running mean, and the steps judged since the last `report`."""

    def __init__(self, guard: SpikeGuard, device: torch.device) -> None:
        self.guard = guard
        self.skip = torch.zeros((), device=device)
        """float32: 1 if the step judged last is to be skipped, else 0."""
        self._state = torch.zeros(3, device=device)  # weighted sum of losses, sum of weights, number of losses
        self._in_a_row = 0
        self._judged: list[tuple[int, Tensor]] = []

    def judge(self, step: int, loss: Tensor) -> Tensor:
        """`skip` for a step (counted from 1) with this loss, the same on all processes; the mean takes the loss in if it is kept."""
        total, weight, number = self._state
        mean = total / weight
        leaps = (number >= FIRST_STEPS) & (loss > self.guard.ratio * mean) & (loss > mean + self.guard.least)
        bad = leaps | ~torch.isfinite(loss)
        decay = 0.5 ** (1 / HALF_LIFE_STEPS)
        self._state = torch.where(bad, self._state, torch.stack([total * decay + loss, weight * decay + 1, number + 1]))
        self.skip = bad.float()
        self._judged.append((step, torch.stack([self.skip, loss.float(), mean])))
        return self.skip

    def report(self) -> list[Skipped]:
        """The steps skipped since the last report. Reads from the device, once."""
        if not self._judged:
            return []
        rows = torch.stack([row for _, row in self._judged]).tolist()
        skipped: list[Skipped] = []
        for (step, _), (skip, loss, mean) in zip(self._judged, rows, strict=True):
            self._in_a_row = self._in_a_row + 1 if skip else 0
            if skip:
                skipped.append(Skipped(step, loss, mean, self._in_a_row))
        self._judged = []
        return skipped

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `report`: JSON from which `load` goes on bit for bit."""
        assert not self._judged
        return {"mean": self._state.tolist(), "in_a_row": self._in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._state = torch.tensor(state["mean"], device=self._state.device)
        self._in_a_row = state["in_a_row"]
