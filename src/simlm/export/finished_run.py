"""A run as an export sees it: the retriever that is exported, and what lies around it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simlm.additions import Additions
from simlm.artifacts import Artifact, Manifest, open_artifact, read_manifest
from simlm.data.store import Store, passages_fingerprint
from simlm.errors import ArtifactError, DataError, nearest
from simlm.index import open_index
from simlm.recipe import ModelSettings
from simlm.searcher import opened_index, retrievers_of

if TYPE_CHECKING:
    from simlm.models.retriever import Retriever


@dataclass(frozen=True)
class Chosen:
    """The retriever that is exported. model: None = the starting model as it is, which `settings` names."""

    name: str
    model: Artifact | None
    settings: ModelSettings
    embeddings: Artifact

    @property
    def source(self) -> ModelSettings:
        """What `load_retriever` takes."""
        if self.model is None:
            return self.settings
        return self.settings.model_copy(update={"start": str(self.model.path), "revision": None})


class FinishedRun:
    """The folder of a run. Raises ArtifactError if it is none, or what is asked of it is not finished or does not belong together."""

    def __init__(self, folder: Path, retriever: str | None = None) -> None:
        if not (folder / "store").is_dir():
            raise ArtifactError(
                f"{folder}: holds no finished `store`, so this is not the folder of a run; give runs/NAME, made by `simlm run`"
            )
        self.folder = folder
        self.name = folder.resolve().name
        self.store = Store.open(folder / "store")
        self.additions = Additions.open(folder)
        self.additions.extend_store(self.store)
        self._wanted = retriever
        known = retrievers_of(folder)
        if retriever is not None and retriever not in known:
            raise DataError(f"no retriever {retriever!r}{nearest(retriever, known)}; a run may have: {', '.join(known)}")

    @cached_property
    def chosen(self) -> Chosen:
        """The wanted retriever, or the last that a finished run made."""
        known = retrievers_of(self.folder)
        have = [name for name in known if (self.folder / f"{name}_embeddings").is_dir()]
        if self._wanted is None and self.metrics is None:
            raise ArtifactError(
                f"{self.folder}: this run has no finished report, so a better retriever may still be on its way; run the recipe to its "
                f"end, or name one with --retriever (finished here: {', '.join(have) or 'none'})"
            )
        name = self._wanted or next(iter(have), "")
        if name not in have:
            raise ArtifactError(
                f"{self.folder}: no finished embeddings of {name or 'any retriever'} (finished here: {', '.join(have) or 'none'}); "
                "run the recipe to its end"
            )
        embeddings = open_artifact(self.folder / f"{name}_embeddings", "embeddings")
        model = open_artifact(self.folder / known[name], "model") if known[name] else None
        if model is not None and embeddings.manifest.inputs.get("model") != model.manifest.fingerprint:
            raise ArtifactError(
                f"{embeddings.path}: was made by an earlier {known[name]!r} than the one that is there; run the recipe again"
            )
        return Chosen(name, model, ModelSettings.model_validate(embeddings.manifest.settings["model"]), embeddings)

    @cached_property
    def index(self) -> Artifact:
        """The index that searches with the chosen retriever open; ArtifactError if it is absent or of another corpus."""
        path = opened_index(self.folder, self.chosen.name)
        if not path.is_dir():
            raise ArtifactError(f"{self.folder}: no finished index {path.name!r}; run the recipe to its end")
        index = open_artifact(path, "index")
        info = json.loads(index.file("index.json").read_text(encoding="utf-8"))
        if info["store_fingerprint"] != passages_fingerprint(self.folder / "store"):
            raise ArtifactError(f"{path}: was made from an earlier 'store' than the one that is there now; run the recipe again")
        return index

    def vectors(self) -> list[NDArray[np.floating[Any]]]:
        """Vectors [N, D] of the corpus, and of what was added to it, memory-mapped: row after row those of the passages.

        Raises ArtifactError unless there is one for each passage, made by the same model.
        """
        folders = [self.chosen.embeddings.path]
        if self.additions:
            self.additions.extend_index(f"{self.chosen.name}_index", open_index(self.index.path))
            folders += [open_artifact(segment / folders[0].name, "embeddings").path for segment in self.additions.segments]
        found = [np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False) for folder in folders]
        count, expected = sum(map(len, found)), len(self.store.passages)
        if count != expected:
            raise ArtifactError(f"{folders[0]}: {count:,} vectors for a corpus of {expected:,} passages; run the encode step again")
        return found

    @cached_property
    def metrics(self) -> dict[str, Any] | None:
        """metrics.json of the run's report; None if there is no finished report."""
        if not (self.folder / "report").is_dir():
            return None
        report = open_artifact(self.folder / "report", "report", verify="sizes")
        metrics: dict[str, Any] = json.loads(report.file("metrics.json").read_text(encoding="utf-8"))
        return metrics

    @cached_property
    def reranker(self) -> Artifact | None:
        """The run's re-ranker; None if it has none."""
        return open_artifact(self.folder / "reranker", "model") if (self.folder / "reranker").is_dir() else None

    def load_retriever(self) -> Retriever:
        """The chosen retriever on the CPU in fp32, with the lengths that its passages were encoded with."""
        from simlm.models.retriever import load_retriever

        lengths: dict[str, Any] = {}
        if self.chosen.model is None:
            lengths = {f"max_{kind}_tokens": int(self.store.info[f"max_{kind}_tokens"]) for kind in ("query", "passage")}
        return load_retriever(self.chosen.source, precision="fp32", device="cpu", **lengths)

    def measured(self, name: str) -> bool:
        """Whether the report's row `name` is of what lies in the run now, not of an earlier try."""
        if self.metrics is None or not (self.folder / f"{name}_run").is_dir():
            return False
        search = read_manifest(self.folder / f"{name}_run", "run")
        report = read_manifest(self.folder / "report", "report")
        if report.inputs.get(f"run.{name}") != search.fingerprint:
            return False
        model = self.chosen.model if name == self.chosen.name else self.reranker if name == "reranker" else None
        return model is None or search.inputs.get("model") == model.manifest.fingerprint

    def training(self) -> list[tuple[str, Manifest]]:
        """The run's trained models, in the order in which they were made."""
        found = []
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and (path / "manifest.json").is_file():
                manifest = read_manifest(path)
                if manifest.kind == "model" and "training" in manifest.settings:
                    found.append((path.name, manifest))
        return sorted(found, key=lambda item: (item[1].created, item[0]))
