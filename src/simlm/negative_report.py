"""The negatives of a finished run: found in its folder, measured with what was made of them, and written as JSON and as a page.

The mine_negatives step writes such a report too, before anything is trained. This one knows more: the scores of a teacher, and the
temperature and group size of the trainings that read the groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simlm.artifacts import MANIFEST, Artifact, Manifest, open_artifact, read_manifest
from simlm.data.duplicates import text_digests
from simlm.data.store import Store
from simlm.errors import ArtifactError, nearest
from simlm.evaluation.negatives import TEMPERATURES, MinedRun, measure_negatives
from simlm.evaluation.report.negatives import write_negatives
from simlm.pipeline import run_folder
from simlm.rankings import Groups, Run
from simlm.recipe import load_recipe
from simlm.stages.mine_negatives import is_cosine

FOLDER = "negatives"
"""Of the run: where the reports are written."""


@dataclass(frozen=True)
class NegativeReport:
    """path: without suffix, PATH.json and PATH.html. content: of the JSON."""

    path: Path
    content: dict[str, Any]


def negative_reports(run_or_recipe: str | Path, steps: list[str] | None = None) -> list[NegativeReport]:
    """A report for each groups artifact of a run (or for those named), in the order in which they were made.

    Raises ArtifactError if the run has none, or lacks the store or a run that they were mined from.
    """
    folder = Path(run_or_recipe)
    if folder.suffix == ".toml":
        folder = run_folder(load_recipe(folder))
    found = _Found(folder)
    names = [name for name, manifest in found.manifests.items() if manifest.kind == "groups"]
    for name in steps or []:
        if name not in names:
            raise ArtifactError(f"{folder}: no finished groups {name!r}{nearest(name, names)}; there are: {', '.join(names) or 'none'}")
    if not names:
        raise ArtifactError(f"{folder}: holds no mined groups; give the folder of a run (runs/NAME) whose mine_negatives steps are done")
    return [found.report(name) for name in steps or names]


class _Found:
    """The finished artifacts of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
        manifests = [(path.name, read_manifest(path)) for path in paths]
        self.manifests: dict[str, Manifest] = dict(sorted(manifests, key=lambda item: (item[1].created, item[0])))

    def report(self, name: str) -> NegativeReport:
        manifest = self.manifests[name]
        store = Store.open(self._made_of(name, "store").path)
        groups = Groups.load(open_artifact(self.folder / name, "groups").path)
        roles = [role for role in manifest.inputs if role == "run" or role.startswith("run.")]
        shares: dict[str, float] = manifest.settings.get("mix") or {}
        # In the order of the mix, as the groups number them.
        order = list(shares) or ["run"]
        runs = []
        for role in sorted(roles, key=lambda role: order.index(role.removeprefix("run."))):
            artifact = self._made_of(name, role)
            source = role.removeprefix("run.")
            runs.append(MinedRun(source, Run.load(artifact.path, "train"), shares.get(source), cosine=is_cosine(artifact)))
        trained = [other for other in self.manifests.values() if other.inputs.get("groups") == manifest.fingerprint]
        temperatures = {other.settings["temperature"] for other in trained if "temperature" in other.settings}
        sizes = {other.settings["group_size"] for other in trained if "group_size" in other.settings}
        rows = np.unique(groups.negative_rows)
        digests = text_digests(store.passages, rows.tolist())
        content = measure_negatives(
            groups,
            runs,
            store,
            name=name,
            digests=lambda wanted: digests[np.searchsorted(rows, wanted)],
            facts=manifest.facts,
            seed=manifest.seed,
            teacher=self._teacher(manifest),
            temperatures=sorted(temperatures) or TEMPERATURES,
            group_sizes=sorted(sizes),
        )
        path = self.folder / FOLDER / name
        write_negatives(path, content)
        return NegativeReport(path, content)

    def _teacher(self, manifest: Manifest) -> Run | None:
        """Scores that the groups were filtered by, or that were made for them."""
        for name, other in self.manifests.items():
            filtered = other.fingerprint == manifest.inputs.get("teacher")
            if filtered or (other.stage == "rerank" and other.inputs.get("groups") == manifest.fingerprint):
                return Run.load(open_artifact(self.folder / name, "run").path, "train")
        return None

    def _made_of(self, name: str, role: str) -> Artifact:
        wanted = self.manifests[name].inputs.get(role)
        for other, manifest in self.manifests.items():
            if manifest.fingerprint == wanted:
                return open_artifact(self.folder / other)
        raise ArtifactError(f"{self.folder / name}: its {role!r} is no longer in {self.folder}; run the recipe again, then ask again")


__all__ = ["NegativeReport", "negative_reports"]
