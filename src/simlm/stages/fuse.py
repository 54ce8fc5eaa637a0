"""Hybrid search: the dense run and the BM25 run fused by rank or by score, the weight fixed or chosen on the dev queries."""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.data.store import Store
from simlm.errors import ArtifactError
from simlm.index.hybrid import EQUAL_WEIGHT, fuse_runs, tune_weight
from simlm.rankings import Run
from simlm.recipe import FuseSettings
from simlm.stages import Context
from simlm.types import SPLITS, Split


def run(settings: FuseSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, dense, bm25 (runs). Writes every split that both hold.

    Facts: dense_weight, chosen_on ("settings", "dev" or "default"), dev_curve (weight -> RR@10), milliseconds_per_query and
    bytes_per_passage (the sums of the parts'), num_queries, depth, index_type.
    """
    store = Store.open(inputs["store"])
    dense, bm25 = open_artifact(inputs["dense"], "run"), open_artifact(inputs["bm25"], "run")
    splits: list[Split] = [split for split in SPLITS if (dense.path / split).is_dir() and (bm25.path / split).is_dir()]
    if not splits:
        raise ArtifactError(f"{dense.path} and {bm25.path} have no split in common; search the same splits in both")
    weight, chosen_on = EQUAL_WEIGHT, "default"
    curve: dict[float, float] = {}
    if settings.dense_weight != "dev":
        weight, chosen_on = settings.dense_weight, "settings"
    elif "dev" in splits and any(grade > 0 for grades in store.qrels("dev").values() for grade in grades.values()):
        runs = Run.load(dense.path, "dev"), Run.load(bm25.path, "dev")
        weight, curve = tune_weight(*runs, store.qrels("dev"), constant=settings.constant, method=settings.method)
        chosen_on = "dev"
    num_queries = 0
    for split in splits:
        fused = fuse_runs(
            Run.load(dense.path, split),
            Run.load(bm25.path, split),
            dense_weight=weight,
            constant=settings.constant,
            depth=settings.depth,
            method=settings.method,
        )
        fused.save(context.work)
        num_queries += len(fused)
    sums = {
        name: _sum([part.manifest.facts.get(name) for part in (dense, bm25)]) for name in ("milliseconds_per_query", "bytes_per_passage")
    }
    context.record(
        dense_weight=weight,
        chosen_on=chosen_on,
        dev_curve={f"{tried:.2f}": round(value, 6) for tried, value in curve.items()},
        num_queries=num_queries,
        depth=settings.depth,
        index_type="hybrid",
        **sums,
    )
    context.progress.say(f"hybrid: dense weight {weight:.2f} ({chosen_on})")


def _sum(values: list[float | None]) -> float | None:
    """The sum, or None where a part does not say."""
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if len(known) == len(values) else None
