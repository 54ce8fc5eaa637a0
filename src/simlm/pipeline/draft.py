"""A draft of a plan: its steps so far, how one more is added with its fingerprint, and how a model is searched with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from simlm.artifacts import json_digest
from simlm.pipeline.steps import Step, step_basis
from simlm.recipe import ModelSettings, Recipe, expand_path
from simlm.types import Split


class Draft:
    """The steps of a plan as far as they are drafted. Functions and methods called add_... add one or more."""

    def __init__(self, recipe: Recipe, digests: dict[str, str]) -> None:
        self.recipe = recipe
        self.digests = digests
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.splits: list[Split] = []
        self.corpus = "store"
        """The step that prepares the passages: of the store that training reads, or of the one that its queries are made from."""
        self.seeds: dict[str, int] = {}
        """Stage -> seed, where it is not the recipe's."""

    def add(self, name: str, stage: str, settings: BaseModel, inputs: dict[str, str], outside: dict[str, Any] | None = None) -> None:
        """One more step. inputs: role -> step that is there already; outside: digests of what it reads besides."""
        outside = outside or {}
        known = {step.name: step.fingerprint for step in self.steps}
        prints = {role: known[step] for role, step in inputs.items()}
        seed = self.seeds.get(stage, self.recipe.seed)
        fingerprint = json_digest(step_basis(stage, settings, seed, prints, outside))
        self.steps.append(Step(name, stage, settings, inputs, outside, fingerprint, seed))

    def with_model(self, section: Any, initial: str) -> tuple[Any, dict[str, Any]]:
        """The section with [model] filled in where it does not have its own, and the digests of checkpoints outside."""
        model: ModelSettings = self.recipe.model
        if "model" in section.model_fields_set:
            model = model.model_copy(update={name: getattr(section.model, name) for name in section.model.model_fields_set})
        outside: dict[str, Any] = {}
        if initial == "start":
            outside = self.outside_model(model.start, model.revision)
        elif initial not in ("", "pretrained", "retriever2"):
            outside = self.outside_model(initial, None)
        return section.model_copy(update={"model": model}), outside

    def outside_model(self, reference: str, revision: str | None) -> dict[str, Any]:
        """Digest of a checkpoint that no step makes; of one of a hub its revision."""
        from simlm.data.datasets import cached_digest

        path = expand_path(reference)
        if reference == "scratch" or not path.is_dir():
            return {f"model {reference}": revision or ""}
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".txt", ".model"))
        return {f"model {reference}": json_digest({file.name: cached_digest(file, self.digests) for file in files})}

    def add_dense(self, name: str, model: str | None, searched: list[Split], runs: dict[str, str]) -> str:
        """Encode, index and search with one model, as far as that is not planned already; the name of the index step."""
        if f"{name}_index" not in {step.name for step in self.steps}:
            inputs = {"model": model} if model else {}
            # The starting model's vectors are there before the pseudo queries are.
            store = "store" if model else self.corpus
            settings, outside = self.with_model(self.recipe.encode, "start" if model is None else "")
            self.add(f"{name}_embeddings", "encode", settings, {"store": store} | inputs, outside)
            self.add(f"{name}_index", "build_index", self.recipe.index, {"store": store, "embeddings": f"{name}_embeddings"})
        if searched:
            runs[name] = self.add_search(f"{name}_run", f"{name}_index", model, searched)
        return f"{name}_index"

    def add_search(
        self, name: str, index: str, model: str | None, splits: list[Split], depth: int | None = None, store: str = "store"
    ) -> str:
        """Search the queries of `splits` with one model, or with BM25; the name of the step."""
        inputs = {"model": model} if model else {}
        settings, outside = self.with_model(self.recipe.search, "start" if model is None and index != "bm25" else "")
        changes: dict[str, Any] = {"splits": splits}
        if depth is not None:
            changes["depth"] = depth
        self.add(name, "search", settings.model_copy(update=changes), {"store": store, "index": index} | inputs, outside)
        return name
