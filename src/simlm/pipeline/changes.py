"""What has changed since a step was finished or interrupted, in words."""

from __future__ import annotations

import json
from typing import Any

from simlm.artifacts import Manifest
from simlm.pipeline.steps import Step


def why_stale(step: Step, manifest: Manifest) -> str:
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


def what_changed(old: dict[str, Any], new: dict[str, Any]) -> str:
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
