"""What happens beside the training loop: the log file, the progress bar, the loggers' view of time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from simlm.progress import Progress

Record = dict[str, Any]


class TrainingLog:
    """`log.jsonl`: one line {"step", "seconds", "kind": "train" | "dev", "measures": {name: float}} for each event, appended as it happens.

    Opening it for a resumed run drops what came after the step that the run goes on from, and a line cut short by a kill.
    `seconds` counts training time over all tries, without what was lost.
    """

    def __init__(self, path: Path, *, resumed_step: int | None, write: bool) -> None:
        """resumed_step: step of the checkpoint to go on from; None = from the start. write: False on ranks above 0."""
        self.path = path
        self.write = write
        self.records: list[Record] = [] if resumed_step is None else [line for line in read_log(path) if line["step"] <= resumed_step]
        self._seconds_before = self.records[-1]["seconds"] if self.records else 0.0
        self._started = time.monotonic()
        if write:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
            temporary.replace(path)

    def seconds(self) -> float:
        """Training time so far."""
        return float(self._seconds_before + time.monotonic() - self._started)

    def append(self, step: int, kind: Literal["train", "dev"], measures: dict[str, float]) -> None:
        """Add one line."""
        record: Record = {"step": step, "seconds": round(self.seconds(), 3), "kind": kind, "measures": measures}
        self.records.append(record)
        if self.write:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def last(self, kind: Literal["train", "dev"], *, having: str | None = None) -> Record | None:
        """The newest line of a kind (with a measure of the name `having`)."""
        lines = (record for record in reversed(self.records) if record["kind"] == kind)
        return next((record for record in lines if having is None or having in record["measures"]), None)


def read_log(path: Path) -> list[Record]:
    """The lines of a log; a last line that a kill has cut short is left out. Empty if there is no file."""
    if not path.exists():
        return []
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class ProgressBar(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """One bar for the whole stage, with the loss."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._description = description
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar = self._progress.bar(self._description, total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LastStep(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs the last step too, and tells loggers the share of the run that is done as their `epoch` (data order knows no epochs here)."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps
        if state.global_step >= state.max_steps:
            control.should_log = True
