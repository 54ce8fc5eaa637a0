"""The README.md of an exported model: what it is, what it was trained on and how, how good it is, how to use it, what is not known.

Everything in it comes from the run's artifacts. Places on the machine that trained it do not: of a path its last part is all that is shown.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from simlm.artifacts import Manifest
from simlm.evaluation.report.results import SIGNIFICANT, comparison, row_label, row_of
from simlm.evaluation.report.verdicts import p_text
from simlm.export.finished_run import FinishedRun

Role = Literal["retriever", "reranker"]

UNKNOWN = "unknown: the run does not say; find it out before you pass the model on"
PUBLIC_LOADERS = ("hub", "ir_datasets", "python-docs")
"""Data sets that are named by an id, not by a place on a disk."""
PACKAGED = "packaged:all-MiniLM-L6-v2"
PIPELINES: dict[Role, str] = {"retriever": "sentence-similarity", "reranker": "text-ranking"}


def model_card(run: FinishedRun, role: Role, usage: str) -> str:
    """Markdown with a header that model hubs read. usage: the section on how to use the files that lie beside the card."""
    manifest = _manifest(run, role)
    parts = [
        _header(run, role),
        f"# {run.name}: {_what(run, role)}",
        _summary(run, role),
        usage.strip(),
        "## Measures\n\n" + _measures(run, role),
        "## Data\n\n" + _data(run),
        "## Training\n\n" + _training(run, manifest),
        "## Licence\n\n" + _licences(run, role),
    ]
    return "\n\n".join(parts) + "\n"


def without_places(value: Any) -> Any:
    """A JSON value in which a path on a disk is its last part alone; ids of a hub and all else stay."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and _is_place(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _is_place(text: str) -> bool:
    if re.match(r"([A-Za-z]:)?[/\\]|[~$.]+[\w{}]*[/\\]|\.\.?$", text):
        return True
    return text.count("/") > 1 or ("/" in text and Path(text).exists())


def _manifest(run: FinishedRun, role: Role) -> Manifest | None:
    model = run.chosen.model if role == "retriever" else run.reranker
    return model.manifest if model is not None else None


def _header(run: FinishedRun, role: Role) -> str:
    lines = ["---", "library_name: sentence-transformers", f"pipeline_tag: {PIPELINES[role]}"]
    start = _start(run, role)
    if start == PACKAGED:
        lines.append("base_model: sentence-transformers/all-MiniLM-L6-v2")
    elif start.count("/") == 1 and not _is_place(start):
        lines.append(f"base_model: {json.dumps(start)}")
    language = _source(run).get("lang")
    if language:
        lines.append(f"language: {json.dumps(language)}")
    lines += ["tags:", "- simlm", "- sentence-transformers", f"- {'dense-retrieval' if role == 'retriever' else 'reranking'}", "---"]
    return "\n".join(lines)


def _what(run: FinishedRun, role: Role) -> str:
    return "re-ranker" if role == "reranker" else row_label(run.chosen.name).lower()


def _summary(run: FinishedRun, role: Role) -> str:
    if role == "reranker":
        limit = json.loads((run.folder / "reranker" / "simlm.json").read_text(encoding="utf-8"))["max_pair_tokens"]
        return (
            "A cross-encoder: a query and a passage in, one raw score out (not a probability; comparable within a query only). Pairs are "
            f"cut at {limit} tokens. Made by [simlm](https://arxiv.org/abs/2207.02578) from the corpus that is described below."
        )
    info = json.loads(run.chosen.embeddings.file("embeddings.json").read_text(encoding="utf-8"))
    return (
        f"Maps queries and passages to vectors of {info['dim']} numbers and unit length, whose inner product (cosine) says how well a "
        "passage answers a query. Made by [simlm](https://arxiv.org/abs/2207.02578) for the corpus that is described below; on other texts "
        "it was not measured."
    )


def _measures(run: FinishedRun, role: Role) -> str:
    name = run.chosen.name if role == "retriever" else "reranker"
    metrics = run.metrics
    if metrics is None:
        return "Not measured: the run has no report."
    row = row_of(metrics, name) if run.measured(name) else None
    if row is None:
        return f"Not measured: the run's report has no row of this model ({name})."
    others = [other for other in ("bm25", "start") if other != name and row_of(metrics, other)]
    rows = [*(row_of(metrics, other) for other in others), row]
    names = list(row["measures"])
    table = [f"| | {' | '.join(names)} | {metrics['main']} against BM25 |", f"|---|{'--:|' * len(names)}---|"]
    for shown in rows:
        assert shown is not None
        values = " | ".join(f"{shown['measures'][measure]:.4f}" for measure in names)
        table.append(f"| {row_label(shown['name'])} | {values} | {_against_bm25(metrics, shown['name'])} |")
    test = metrics["significance"]
    kind = {"randomization": f"paired randomisation test, {test['num_samples']:,} samples"}.get(test["test"], f"paired {test['test']}")
    lines = [
        f"On {metrics['num_queries']:,} judged {metrics['split']} queries over {metrics['num_passages']:,} passages. p: {kind}, "
        f"corrected for the rows of the run by {test['correction']}'s method.",
        "\n".join(table),
    ]
    if role == "reranker":
        lines.append("The re-ranker's row is that of the passages which the run's first stage found, put in its order.")
    lines.append(_outcome(metrics, name))
    own = [note for note in metrics["notes"] if row_label(name) in note]
    if own:
        lines.append("\n".join(f"- {note}" for note in own))
    return "\n\n".join(lines)


def _against_bm25(metrics: dict[str, Any], name: str) -> str:
    found = comparison(metrics, name, "bm25")
    if found is None:
        return ""
    wins = f"{found['wins']:,} queries better, {found['losses']:,} worse"
    return f"{found['difference']:+.4f}, {p_text(found['p_value_holm'])}; {wins}"


def _outcome(metrics: dict[str, Any], name: str) -> str:
    """Whether the model is better than BM25, in one sentence."""
    found = comparison(metrics, name, "bm25")
    if found is None:
        return "BM25 was not measured in this run, so there is nothing to compare with."
    if found["p_value_holm"] is None or found["p_value_holm"] >= SIGNIFICANT:
        return "On these queries no difference from BM25 can be told from chance."
    return f"On these queries it is {'better' if found['difference'] > 0 else 'worse'} than BM25."


def _source(run: FinishedRun) -> dict[str, Any]:
    source: dict[str, Any] = run.store.info.get("source", {})
    return source


def _data(run: FinishedRun) -> str:
    source = _source(run)
    dataset, path = source.get("dataset", ""), str(source.get("path", ""))
    name = source.get("name") or ((path or dataset) if dataset in PUBLIC_LOADERS else without_places(path)) or "not named"
    lines = [f"- Data set: {name} (read as {dataset or 'unknown'})"]
    if source.get("source"):
        lines.append(f"- Source: {source['source']}")
    counts = ", ".join(f"{len(run.store.queries(split)):,} {split}" for split in run.store.splits) or "none"
    lines.append(f"- Passages: {len(run.store.passages):,}; queries: {counts}")
    lines.append("- Passages are read up to {max_passage_tokens} tokens, queries up to {max_query_tokens}.".format(**run.store.info))
    return "\n".join(lines)


def _training(run: FinishedRun, manifest: Manifest | None) -> str:
    if manifest is None:
        return "Not trained in this run: this is its starting model as it came."
    table = ["| model of the run | stage | starts from | steps | learning rate | seed | minutes |", "|---|---|---|--:|--:|--:|--:|"]
    for name, made in run.training():
        options = made.settings["training"]
        cells = [
            name + (" (this model)" if made.fingerprint == manifest.fingerprint else ""),
            made.stage,
            str(without_places(_initial(made))),
            f"{made.facts.get('num_steps', ''):,}" if made.facts.get("num_steps") else "",
            f"{options.get('learning_rate', '')}",
            str(made.seed),
            f"{made.seconds / 60:.1f}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    settings = json.dumps(without_places(manifest.settings), indent=2, ensure_ascii=False)
    return "\n\n".join(
        [
            "\n".join(table),
            f"Made {manifest.created} with {versions}.",
            f"<details><summary>All settings of the step that made this model ({manifest.stage})</summary>",
            f"```json\n{settings}\n```",
            "</details>",
        ]
    )


def _initial(manifest: Manifest) -> str:
    """The checkpoint that a training began with."""
    if manifest.stage == "train_generator":
        source = str(manifest.settings.get("source", "train"))
        return "scratch" if source in ("train", "random") else source
    initial = str(manifest.settings.get("initial", "start"))
    model = manifest.settings.get("model") or {}
    return str(model.get("start", initial)) if initial == "start" else initial


def _start(run: FinishedRun, role: Role) -> str:
    """The checkpoint that the run's training goes back to."""
    manifest = _manifest(run, role)
    if manifest is None:
        return run.chosen.settings.start
    initial = str(manifest.settings.get("initial", "start"))
    if initial in ("start", "pretrained") or (run.folder / initial).is_dir():
        return str(manifest.settings["model"]["start"])
    return initial


def _licences(run: FinishedRun, role: Role) -> str:
    start = _start(run, role)
    source = _source(run)
    data = source.get("licence") or source.get("license")
    if not data and source.get("dataset") == "python-docs":
        data = "of Python's own documentation: PSF-2.0; of other installed packages: each its own"
    return "\n".join(
        [
            f"- Starting model ({without_places(start)}): {_licence_of_start(start)}",
            f"- Data: {data or UNKNOWN}",
            "- This model: what its owner decides, within the two above; the export does not choose one.",
        ]
    )


def _licence_of_start(start: str) -> str:
    if start == "scratch":
        return "none, the weights were drawn at random"
    if start == PACKAGED:
        return "Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)"
    card = _local_card(start)
    found = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    licence = re.search(r"^license:\s*(\S.*)$", found[1], re.MULTILINE) if found else None
    return f"{licence[1].strip()} (its model card says)" if licence else UNKNOWN


def _local_card(start: str) -> str:
    """README.md of a model folder or of a hub model that has been downloaded; empty where there is none here."""
    from huggingface_hub import try_to_load_from_cache

    place = Path(start) / "README.md"
    if not place.is_file() and start.count("/") == 1 and not _is_place(start):
        cached = try_to_load_from_cache(start, "README.md")
        place = Path(cached) if isinstance(cached, str) else place
    return place.read_text(encoding="utf-8", errors="replace") if place.is_file() else ""
