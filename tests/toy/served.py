"""A finished run for tests of the server: small models that were never trained, real indexes, a report; made in a few seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from simlm.artifacts import ArtifactBuilder, Kind, json_digest, read_manifest
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.progress import Progress
from simlm.recipe import EncodeSettings, EvaluateSettings, IndexSettings, ModelSettings, SearchSettings
from simlm.stages import Context, build_index, encode, evaluate, search
from tests.conftest import build_store, build_wordpiece, tiny_passages, tiny_qrels, tiny_queries, tiny_texts

CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
HARMFUL = {"_id": "odd/<script>&?#", "title": "<b>Bold</b>", "text": "The <script>alert(1)</script> kettle & the 🫖 teapot sing."}


def served_passages() -> list[dict[str, Any]]:
    """The tiny corpus with metadata (subject, aspect, number), and one passage of markup."""
    passages: list[dict[str, Any]] = [*tiny_passages(), HARMFUL]
    for number, passage in enumerate(passages):
        subject, _, aspect = passage["_id"].partition("/")
        passage["metadata"] = {"subject": subject, "aspect": aspect, "number": number, "even": number % 2 == 0}
    return passages


def make_served_run(run: Path, *, seed: int = 3, report: bool = True, reranker: bool = True) -> Path:
    """Write the run into a new folder, and return it. seed: of the models' weights."""
    run.mkdir(parents=True)
    tokenizer = build_wordpiece(tiny_texts())
    qrels = {split: tiny_qrels(split) for split in ("train", "dev", "test")}
    store = build_store(run / "store", tokenizer, served_passages(), tiny_queries(), qrels)
    settings = ModelSettings(start="scratch", config=CONFIG)
    _model(run / "distilled", {"store": store.path}, seed).save_with(
        BiEncoder(load_encoder(settings, tokenizer=tokenizer, seed=seed), "mean"),
        tokenizer,
        max_query_tokens=24,
        max_passage_tokens=64,
        matryoshka=(16, 8),
    )
    if reranker:
        scorer = CrossEncoder.from_encoder(settings, seed=seed, tokenizer=tokenizer)
        _model(run / "reranker", {"store": store.path}, seed).save_with(scorer, tokenizer, max_pair_tokens=96)
    artifact(run / "bm25", "index", build_index, IndexSettings(type="bm25"), {"store": run / "store"})
    inputs = {"store": run / "store", "model": run / "distilled"}
    artifact(run / "distilled_embeddings", "embeddings", encode, EncodeSettings(precision="fp32"), inputs)
    inputs = {"store": run / "store", "embeddings": run / "distilled_embeddings"}
    artifact(run / "distilled_index", "index", build_index, IndexSettings(), inputs)
    if report:
        searching = SearchSettings(splits=["test"], depth=20)
        artifact(run / "bm25_run", "run", search, searching, {"store": run / "store", "index": run / "bm25"})
        inputs = {"store": run / "store", "index": run / "distilled_index", "model": run / "distilled"}
        artifact(run / "distilled_run", "run", search, searching, inputs)
        runs = {"run.bm25": run / "bm25_run", "run.distilled": run / "distilled_run"}
        steps = {f"step.{name}": run / name for name in ("store", "bm25", "distilled", "bm25_run", "distilled_run")}
        artifact(run / "report", "report", evaluate, EvaluateSettings(num_samples=50), {"store": run / "store"} | runs | steps)
    return run


def artifact(path: Path, kind: Kind, stage: ModuleType, settings: BaseModel, inputs: dict[str, Path]) -> None:
    """One step as the pipeline does it: the inputs' fingerprints are in the manifest."""
    given = settings.model_dump()
    fingerprints = {role: read_manifest(place).fingerprint for role, place in inputs.items()}
    builder = ArtifactBuilder(path, kind=kind, stage=path.name, code_version=1, fingerprint=json_digest([path.name, given, fingerprints]))
    builder.begin()
    stage.run(settings, inputs, Context(builder, 0, Progress(quiet=True)))
    builder.finish(settings=given, inputs=fingerprints, seed=0, seconds=0.0, peak_memory_bytes=0)


class _model:  # noqa: N801 - reads as a verb
    """A model artifact; with a training log, so that the report has curves."""

    def __init__(self, path: Path, inputs: dict[str, Path], seed: int) -> None:
        self.inputs = {role: read_manifest(place).fingerprint for role, place in inputs.items()}
        self.builder = ArtifactBuilder(path, kind="model", stage="train", code_version=1, fingerprint=f"{path.name} {seed}")

    def save_with(self, model: Any, tokenizer: Any, **lengths: Any) -> None:
        self.builder.begin()
        model.save(self.builder.work, tokenizer, **lengths)
        lines = [json.dumps({"step": step, "kind": "train", "measures": {"loss": 2.0 / step}}) for step in (1, 2, 3)]
        (self.builder.work / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
        self.builder.finish(settings={}, inputs=self.inputs, seed=0, seconds=0.0, peak_memory_bytes=0)
