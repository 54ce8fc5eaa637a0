"""Measure every run of the pipeline on one split and write the report: metrics.json, report.md, report.html, TREC files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from simlm.artifacts import Artifact, open_artifact, write_json
from simlm.data.store import Store
from simlm.evaluation.measures import write_trec_qrels, write_trec_run
from simlm.evaluation.report import Row, measure_rows, write_pages
from simlm.evaluation.report.steps import StepRecord, read_steps
from simlm.rankings import Run
from simlm.recipe import EvaluateSettings
from simlm.stages import Context

# A TREC file holds at most this many lines where it can and still have _TREC_DEPTH passages a query: all of TREC DL's 1000 x 200, and
# 12 MB a row. The Run artifacts hold everything.
_TREC_LINES = 250_000
_TREC_DEPTH = 100
_CACHED_IDS = 200_000


def run(settings: EvaluateSettings, inputs: dict[str, Path], context: Context) -> None:
    """Inputs: store, `run.<row name>` in the order of the rows, `step.<step name>` of every finished step.

    A row whose run has nothing for the split is left out and named; without judgements the report says what is missing.
    Facts: num_queries, main, and the main measure of each row.
    """
    store = Store.open(inputs["store"])
    steps = read_steps({role.removeprefix("step."): path for role, path in inputs.items() if role.startswith("step.")})
    artifacts = {role.removeprefix("run."): open_artifact(path, "run") for role, path in inputs.items() if role.startswith("run.")}
    rows, missing = [], []
    for name, artifact in artifacts.items():
        if (artifact.path / settings.split).is_dir():
            parts = _parts(artifact, artifacts, steps)
            rows.append(Row(name, Run.load(artifact.path, settings.split), artifact.manifest.facts, parts))
        else:
            missing.append(f"{name} was not searched for the {settings.split} queries, so it has no row.")
    if "train" not in store.splits:
        missing.append(
            "There are no training queries, so no retriever was trained: add queries and judgements for train and run the recipe again."
        )
    context.progress.say(f"measuring {len(rows)} runs on the {settings.split} queries")
    run_folder = context.builder.path.resolve().parent
    teaching = next((step.manifest.facts for step in steps if step.manifest.stage == "check_teacher"), None)
    results = measure_rows(rows, store, settings, name=run_folder.name, seed=context.seed, missing=missing, teaching=teaching)
    trec_depth = _write_trec(context.work, rows, store, settings, len(results.query_rows))
    if trec_depth:
        results.metrics["notes"].append(
            f"The TREC run files hold the first {trec_depth:,} passages of each query; the runs themselves hold all."
        )
    write_json(context.work / "metrics.json", results.metrics)
    write_pages(context.work, results, store, steps, split=settings.split, examples=settings.examples)
    main = results.metrics["main"]
    context.record(
        num_queries=results.metrics["num_queries"],
        main=main,
        values={row["name"]: row["measures"][main] for row in results.metrics["rows"]},
    )


def _parts(artifact: Artifact, artifacts: Mapping[str, Artifact], steps: list[StepRecord]) -> tuple[str, ...]:
    """Rows that a run was made from: by the fingerprints of its inputs, and by what a select_run step chose."""
    of_fingerprint = {other.manifest.fingerprint: name for name, other in artifacts.items()}
    for step in steps:
        selected = step.manifest.facts.get("selected")
        if isinstance(selected, str) and selected in artifacts:
            of_fingerprint.setdefault(step.manifest.fingerprint, selected)
    return tuple(of_fingerprint[digest] for digest in artifact.manifest.inputs.values() if digest in of_fingerprint)


def _write_trec(folder: Path, rows: list[Row], store: Store, settings: EvaluateSettings, num_queries: int) -> int | None:
    """Write qrels.trec and runs/ROW.trec; the depth they are cut at, None if they hold everything."""
    if settings.split not in store.splits:
        return None
    queries, passages, split = store.queries(settings.split), store.passages, settings.split
    write_trec_qrels(
        folder / "qrels.trec",
        (
            (queries.ids[query], passages.ids[passage], grade)
            for query, grades in store.qrels(split).items()
            for passage, grade in grades.items()
        ),
    )
    passage_id = functools.lru_cache(_CACHED_IDS)(passages.ids.__getitem__)
    (folder / "runs").mkdir(exist_ok=True)
    depth = max(_TREC_DEPTH, _TREC_LINES // max(1, num_queries))
    cut = False
    for row in rows:

        def lines(ranked: Run = row.run) -> Iterator[tuple[str, list[str], list[float]]]:
            for query, passage_rows, scores in ranked:
                yield queries.ids[query], [passage_id(row) for row in passage_rows[:depth].tolist()], scores[:depth].tolist()

        write_trec_run(folder / "runs" / f"{row.name}.trec", lines(), tag=f"simlm-{row.name}")
        cut = cut or any(len(passage_rows) > depth for _, passage_rows, _ in row.run)
    return depth if cut else None
