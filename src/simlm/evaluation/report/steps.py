"""What the finished steps say of themselves: time, memory, settings, versions, and the curves of their logs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simlm.artifacts import Manifest, read_manifest

Point = tuple[float, float]


@dataclass(frozen=True)
class StepRecord:
    """One finished step. curves: (kind, measure) -> (step, value) points of its log; kind is train or dev."""

    name: str
    manifest: Manifest
    curves: dict[tuple[str, str], list[Point]]

    @property
    def num_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest.files.values())


def read_steps(folders: Mapping[str, Path]) -> list[StepRecord]:
    """The steps of a run by name, in the order given; ArtifactError for a folder that is not a finished artifact."""
    return [StepRecord(name, read_manifest(path), read_curves(path / "log.jsonl")) for name, path in folders.items()]


def read_curves(log: Path) -> dict[tuple[str, str], list[Point]]:
    """(kind, measure) -> points of a training log; unreadable lines and values that are not finite are left out."""
    curves: dict[tuple[str, str], list[Point]] = {}
    if not log.exists():
        return curves
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        for measure, value in (record.get("measures") or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault((str(record.get("kind", "train")), str(measure)), []).append((float(record["step"]), float(value)))
    return curves


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(key, value) of nested settings as a recipe writes them: `training.learning_rate`, JSON values; empty ones left out."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += flat_settings(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            found.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return found


def versions(steps: list[StepRecord]) -> list[tuple[str, str]]:
    """(library, version); several versions where the steps do not agree."""
    found: dict[str, dict[str, None]] = {}
    for step in steps:
        for library, version in step.manifest.versions.items():
            found.setdefault(library, {})[version] = None
    return [(library, ", ".join(of_library)) for library, of_library in found.items()]


def hardware(steps: list[StepRecord]) -> list[str]:
    """A line for each different machine that the steps ran on."""
    return list(dict.fromkeys(_machine(step.manifest.hardware) for step in steps))


def _machine(facts: Mapping[str, Any]) -> str:
    parts = [str(facts[key]) for key in ("processor", "machine", "system") if facts.get(key)]
    if facts.get("cores"):
        parts.append("1 core" if facts["cores"] == 1 else f"{facts['cores']} cores")
    if facts.get("memory_bytes"):
        parts.append(f"{facts['memory_bytes'] / 2**30:.0f} GiB of memory")
    accelerators = [str(name) for name in facts.get("accelerators", [])]
    parts += [f"{accelerators.count(name)} x {name}" for name in dict.fromkeys(accelerators)]
    return ", ".join(parts)


__all__ = ["StepRecord", "flat_settings", "hardware", "read_curves", "read_steps", "versions"]
