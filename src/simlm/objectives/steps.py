"""Which passages a pre-training step holds, and how they reach the model: everything a function of (seed, step).

Steps walk through one endless row of shuffled epochs, so each passage is seen exactly once an epoch whatever the step's size. Within a
step passages are sorted by length and cut into micro-batches of bounded padded size; the loss is normalised by counts of the whole
step, so neither the cut nor the number of processes changes it.
Shapes: S passages of a step, B passages of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simlm.data.batches import collate, length_batches
from simlm.data.store import Table
from simlm.errors import RecipeError
from simlm.objectives import Views
from simlm.objectives.contrast import Contrast
from simlm.objectives.masking import DEV_EPOCH, Draws
from simlm.progress import Progress

Ints = NDArray[np.int64]
MicroBatch = dict[str, Any]

_SPLIT_STREAM, _ORDER_STREAM = 101, 102
"""Keep the generators of the split and of the order apart from each other."""


@dataclass(frozen=True)
class Feeding:
    """How passages become micro-batches. token_types: whether the model tells first from second segments."""

    table: Table
    views: Views
    micro_batch_tokens: int
    token_types: bool
    seed: int

    def micro_batches(self, rows_S: Ints, epochs_S: Ints, rank: int = 0, num_ranks: int = 1) -> list[MicroBatch]:
        """This rank's share of the passages `rows_S`, longest first; see `Pretraining.forward` for the entries.

        Passages are dealt out to the ranks in order of length, so all have the same work.
        """
        draws_S, tokens_S = Draws(self.seed, epochs_S, rows_S), token_counts(self.table, rows_S)
        lengths_S, num_sequences = self.views.lengths(self.table.lengths[rows_S], tokens_S, draws_S, self.table.template)
        own = np.argsort(-lengths_S.astype(np.int64), kind="stable")[rank::num_ranks]
        counts = {**self.views.step_counts(tokens_S, draws_S), "step_passages": float(len(rows_S))}
        groups = length_batches(lengths_S[own], self.micro_batch_tokens // num_sequences)
        return [self._micro_batch(rows_S[own[group]], epochs_S[own[group]]) | counts for group in groups]

    def _micro_batch(self, rows_B: Ints, epochs_B: Ints) -> MicroBatch:
        batch, draws = self.views.sequences(collate(self.table, rows_B), Draws(self.seed, epochs_B, rows_B), self.table.template)
        entries: MicroBatch = {
            "input_ids": torch.from_numpy(batch.input_ids),
            "scored": torch.from_numpy(np.flatnonzero(~batch.special)),
        }
        # Told by absence, so that nobody has to look into a tensor on the device to find out that there is no padding.
        if not batch.attention_mask.all():
            entries["attention_mask"] = torch.from_numpy(batch.attention_mask)
        if self.token_types and batch.token_type_ids is not None:
            entries["token_type_ids"] = torch.from_numpy(batch.token_type_ids)
        return entries | self.views(batch, draws)


class PassageSteps:
    """`simlm.training.trainer.StepBatches` over the training passages of a store."""

    def __init__(self, feeding: Feeding, rows: Ints, *, passages_per_step: int, num_steps: int) -> None:
        """rows: the training passages. passages_per_step: at most as many as there are."""
        assert 1 <= passages_per_step <= len(rows)
        self.feeding = feeding
        self.rows = rows
        self.passages_per_step = passages_per_step
        self.num_steps = num_steps
        self._orders: dict[int, Ints] = {}

    def load(self, step: int, rank: int, num_ranks: int) -> list[MicroBatch]:
        """Micro-batches of one rank, each with its `step`."""
        micro_batches = self.feeding.micro_batches(*self.passages(step), rank, num_ranks)
        return [micro_batch | {"step": step} for micro_batch in micro_batches]

    def passages(self, step: int) -> tuple[Ints, Ints]:
        """(rows_S, epochs_S) of a step; one that lies across the end of an epoch has passages of both."""
        start = step * self.passages_per_step
        places_S = np.arange(start, start + self.passages_per_step, dtype=np.int64)
        epochs_S, inside_S = np.divmod(places_S, len(self.rows))
        rows_S = np.empty_like(places_S)
        for epoch in np.unique(epochs_S).tolist():
            chosen = epochs_S == epoch
            rows_S[chosen] = self.rows[self._order(epoch)[inside_S[chosen]]]
        return rows_S, epochs_S

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}

    def _order(self, epoch: int) -> Ints:
        if epoch not in self._orders:
            order = np.random.default_rng([self.feeding.seed, _ORDER_STREAM, epoch]).permutation(len(self.rows))
            self._orders = {kept: self._orders[kept] for kept in self._orders if kept == epoch - 1} | {epoch: order}
        return self._orders[epoch]


def split_passages(num_passages: int, num_held_out: int, seed: int) -> tuple[Ints, Ints]:
    """(training rows, held-out rows), both ascending; at most a tenth is held out, so a tiny corpus keeps all its passages."""
    held_out = min(num_held_out, num_passages // 10)
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(num_passages)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def step_size(wanted: int, num_passages: int, num_ranks: int, progress: Progress) -> int:
    """Passages of a step: `wanted`, or all there are where that is fewer, which is said.

    Raises RecipeError if there are fewer than processes.
    """
    size = min(wanted, num_passages)
    if size < num_ranks:
        raise RecipeError(
            f"{size} passages a step cannot be shared among {num_ranks} processes; raise passages_per_step or use at most {size}"
        )
    if size < wanted:
        progress.say(
            f"the corpus has {num_passages:,} passages to train on, fewer than passages_per_step {wanted:,}: each step takes all of them"
        )
    return size


def token_counts(table: Table, rows: Ints) -> Ints:
    """Tokens of passages that are not special, from the store's lengths alone."""
    special = np.where(table.title_tokens[rows] > 0, table.template.num_pair, table.template.num_single)
    counts: Ints = table.lengths[rows].astype(np.int64) - special
    return np.maximum(counts, 0)


class Measured(Protocol):
    """The part of an objective that dev measures need."""

    def measure(self, *args: Any, **micro_batch: Any) -> dict[str, tuple[Tensor, Tensor]]: ...

    def total(self, measures: dict[str, float]) -> float: ...

    @property
    def contrast(self) -> Contrast | None: ...

    def vectors(self, batch: dict[str, Any]) -> Tensor: ...


def held_out_measures(
    objective: Measured, feeding: Feeding, rows: Ints, autocast: Callable[[], Any], device: torch.device
) -> Callable[[], dict[str, float]] | None:
    """A function that measures the objective as it is on held-out passages, always with the same masks and samples.

    None if nothing is held out. A measure without any case (accuracy at replaced positions where none was replaced) is left out.
    """
    if len(rows) == 0:
        return None

    def measure() -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), autocast():
            for micro_batch in feeding.micro_batches(rows, np.full(len(rows), DEV_EPOCH, dtype=np.int64)):
                on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in micro_batch.items()}
                for name, (total, count) in objective.measure(**on_device).items():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + total.double().cpu()
                    counts[name] = counts.get(name, torch.zeros((), dtype=torch.float64)) + count.double().cpu()
                if objective.contrast is not None:
                    first, second = objective.vectors(on_device).chunk(2)
                    pairs.append((first, second))
        means = {name: float(sums[name] / counts[name]) for name in sorted(sums) if counts[name] > 0}
        if objective.contrast is not None:
            # Passages come in order of length whatever the micro-batches are.
            means["contrast_loss"] = objective.contrast.measure(torch.cat([one for one, _ in pairs]), torch.cat([two for _, two in pairs]))
        return {"loss": objective.total(means)} | means

    return measure
