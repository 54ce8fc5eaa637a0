"""Export to TREC: every run of the run folder, whole, and the judgements: what trec_eval and ir_measures read."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simlm.artifacts import open_artifact
from simlm.errors import ArtifactError
from simlm.evaluation.measures import write_trec_qrels, write_trec_run
from simlm.export.finished_run import FinishedRun
from simlm.progress import Progress
from simlm.rankings import Run
from simlm.types import SPLITS, Split

CACHED_IDS = 200_000


def write(run: FinishedRun, folder: Path, progress: Progress) -> dict[str, Any]:
    """STEP.SPLIT.trec and SPLIT.qrels. Facts: runs (file -> number of queries). ArtifactError if there is no run to export."""
    counts: dict[str, int] = {}
    for place in sorted(run.folder.glob("*_run")):
        if not (place / "manifest.json").is_file():
            continue
        artifact = open_artifact(place, "run")
        if artifact.manifest.inputs.get("store") not in (None, _store(run)):
            raise ArtifactError(f"{place}: was made from an earlier 'store' than the one that is there now; run the recipe again")
        for split in SPLITS:
            if (place / split).is_dir():
                ranked = Run.load(place, split)
                name = f"{place.name.removesuffix('_run')}.{split}.trec"
                write_trec_run(folder / name, _lines(run, ranked), tag=f"simlm-{place.name.removesuffix('_run')}")
                counts[name] = len(ranked)
    if not counts:
        raise ArtifactError(
            f"{run.folder}: no finished search in this run, so there is nothing to write as TREC; run the recipe to its end"
        )
    for split in run.store.splits:
        write_trec_qrels(folder / f"{split}.qrels", _judged(run, split))
    return {"runs": counts}


def _store(run: FinishedRun) -> str:
    return open_artifact(run.folder / "store", "store", verify="sizes").manifest.fingerprint


def _lines(run: FinishedRun, ranked: Run) -> Iterator[tuple[str, list[str], list[float]]]:
    queries = run.store.queries(ranked.split)
    passage_id = functools.lru_cache(CACHED_IDS)(run.store.passages.ids.__getitem__)
    for query, rows, scores in ranked:
        yield queries.ids[query], [passage_id(row) for row in rows.tolist()], scores.tolist()


def _judged(run: FinishedRun, split: Split) -> Iterator[tuple[str, str, int]]:
    queries, passages = run.store.queries(split), run.store.passages
    for query, grades in run.store.qrels(split).items():
        for passage, grade in grades.items():
            yield queries.ids[query], passages.ids[passage], grade
