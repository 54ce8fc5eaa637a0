"""Choose the run that the re-ranker is put on top of: the best by the main measure on the dev queries.

Equal values: the later run (the pipeline gives them in the order in which they are trained). Without dev queries the last run given is
taken, and the artifact says so. The test queries are never looked at.
"""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.data.store import Store
from simlm.errors import ArtifactError
from simlm.evaluation.measures import measure_run
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings
from simlm.stages import Context
from simlm.types import SPLITS, Split


def run(settings: EvaluateSettings, inputs: dict[str, Path], context: Context) -> None:
    """Copy the best of the inputs `run.<name>` into the artifact; facts: selected, split, measure, values by name."""
    candidates = {role.removeprefix("run."): open_artifact(path, "run") for role, path in inputs.items() if role.startswith("run.")}
    assert candidates, "the pipeline gives at least one run"
    values: dict[str, float] = {}
    selected = list(candidates)[-1]
    if all((artifact.path / "dev").is_dir() for artifact in candidates.values()):
        store = Store.open(inputs["store"])
        qrels = store.qrels("dev")
        for name, artifact in candidates.items():
            values[name] = measure_run(Run.load(artifact.path, "dev"), qrels, [settings.main])[settings.main]
        selected = max(reversed(values), key=values.__getitem__)
    artifact = candidates[selected]
    splits: list[Split] = [split for split in SPLITS if (artifact.path / split).is_dir()]
    if not splits:
        raise ArtifactError(f"{artifact.path}: holds no run of any split; run the step that makes it again")
    for split in splits:
        Run.load(artifact.path, split).save(context.work)
    context.record(
        **artifact.manifest.facts | {"selected": selected, "selected_by": settings.main if values else None, "dev_values": values}
    )
    context.progress.say(
        f"re-ranking on top of {selected}" + (f" (dev {settings.main} {values[selected]:.3f})" if values else " (no dev queries)")
    )
