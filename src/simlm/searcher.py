"""Ask a finished run: dense, BM25 or hybrid search over its corpus, and re-ranking, from its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simlm.artifacts import open_artifact, read_manifest
from simlm.errors import ArtifactError, SimlmError, nearest
from simlm.types import ScoredPassage

if TYPE_CHECKING:
    from simlm.data.store import Store
    from simlm.models.precision import Precision

Mode = Literal["dense", "bm25", "hybrid"]
RETRIEVERS = {
    "distilled": "distilled",
    "retriever2": "retriever2",
    "retriever1": "retriever1",
    "start": "",
    "pretrained_encoder": "pretrained",
}
"""Name -> model folder in the run ("" = the starting model as it is); best first: the order in which they are looked for. Later rounds of
retriever 2 (retriever2_round2 ...) come before it, the last first."""
CANDIDATES = 200
"""Passages fetched from each part before fusing (the paper's depth)."""
RERANKED = 50
"""Passages re-ranked at least; more where more are shown."""


def open_run(folder: str | Path, *, retriever: str | None = None, mode: Mode = "dense", rerank: bool = False) -> Searcher:
    """A searcher over the corpus of a run; loads only what `mode` and `rerank` need.

    retriever: a name of RETRIEVERS; none = the first of these that the run has.
    Raises ArtifactError if the run lacks what is asked for.
    """
    return Searcher(Path(folder), retriever=retriever, mode=mode, rerank=rerank)


class Searcher:
    """Models and indexes of a run, loaded once."""

    def __init__(self, folder: Path, *, retriever: str | None, mode: Mode, rerank: bool) -> None:
        from simlm.data.store import Store

        if not (folder / "store").is_dir():
            raise ArtifactError(
                f"{folder}: holds no finished `store`, so this is not the folder of a run; give runs/NAME, made by `simlm run`"
            )
        self.folder = folder
        self.mode = mode
        self.store: Store = Store.open(folder / "store")
        self.dense: tuple[Any, Any] | None = self._open_dense(retriever) if mode != "bm25" else None
        self.bm25: Any = self._open_index("bm25") if mode != "dense" else None
        self.dense_weight, self.constant, self.method = self._fusion()
        self.reranker: Any = self._open_reranker() if rerank else None

    def search(self, query: str, *, depth: int = 10) -> list[ScoredPassage]:
        """The best `depth` passages, best first. Scores: cosine, BM25, the two fused, or the re-ranker's logits."""
        if depth < 1:
            raise SimlmError(f"depth {depth}: at least 1 was expected")
        fetched = max(depth, CANDIDATES if self.mode == "hybrid" else 0, RERANKED if self.reranker else 0)
        fetched = min(fetched, len(self.store.passages))
        rows, scores = self._first_stage(query, fetched)
        if self.reranker is not None and len(rows):
            rows, scores = self._rerank(query, rows[: max(depth, RERANKED)])
        table = self.store.passages
        return [
            ScoredPassage(table.ids[row], float(score), rank, table.title(row), table.text(row))
            for rank, (row, score) in enumerate(zip(rows[:depth], scores[:depth], strict=True), start=1)
        ]

    def _first_stage(self, query: str, depth: int) -> tuple[list[int], list[float]]:
        from simlm.index.hybrid import fuse_lists

        found: dict[str, tuple[Any, Any]] = {}
        if self.dense is not None:
            model, index = self.dense
            found["dense"] = index.search(model.encode_queries([query]), depth)
        if self.bm25 is not None:
            found["bm25"] = self.bm25.search([query], depth)
        lists = {
            name: ([int(row) for row in rows[0] if row >= 0], [float(s) for s, row in zip(scores[0], rows[0], strict=True) if row >= 0])
            for name, (scores, rows) in found.items()
        }
        if self.mode != "hybrid":
            return lists[self.mode]
        fusion = {"dense_weight": self.dense_weight, "constant": self.constant, "method": self.method}
        rows, scores = fuse_lists(lists["dense"], lists["bm25"], depth=depth, **fusion)
        return [int(row) for row in rows], [float(score) for score in scores]

    def _rerank(self, query: str, rows: list[int]) -> tuple[list[int], list[float]]:
        table = self.store.passages
        scores = self.reranker.score(query, [(table.title(row), table.text(row)) for row in rows])
        order = sorted(range(len(rows)), key=lambda position: (-scores[position], rows[position]))
        return [rows[position] for position in order], [float(scores[position]) for position in order]

    def _open_dense(self, retriever: str | None) -> tuple[Any, Any]:
        from simlm.models.retriever import load_retriever
        from simlm.recipe import ModelSettings

        known = _retrievers(self.folder)
        if retriever is not None and retriever not in known:
            raise SimlmError(f"no retriever {retriever!r}{nearest(retriever, known)}; a run may have: {', '.join(known)}")
        names = [retriever] if retriever else list(known)
        have = [name for name in known if (self.folder / f"{name}_index").is_dir()]
        for name in names:
            if name not in have:
                continue
            index = self._open_index(f"{name}_index")
            encoded = read_manifest(self.folder / f"{name}_embeddings", "embeddings")
            # Of a run whose recipe wants speed, on whatever machine it is asked now.
            precision: Precision = "fast" if encoded.settings.get("precision") in ("int8", "fast") else "fp32"
            if not known[name]:
                model = ModelSettings.model_validate(encoded.settings["model"])
                return load_retriever(model, precision=precision, max_query_tokens=int(self.store.info["max_query_tokens"])), index
            folder = open_artifact(self.folder / known[name], "model")
            self._check_same(f"{name}_embeddings", encoded.inputs.get("model"), known[name], folder.manifest.fingerprint)
            if name == "pretrained_encoder":
                settings = ModelSettings.model_validate(encoded.settings["model"])
                return load_retriever(settings.model_copy(update={"start": str(folder.path)}), precision=precision), index
            return load_retriever(folder.path, precision=precision), index
        raise ArtifactError(
            f"{self.folder}: no finished index of {' or '.join(names)} (finished here: {', '.join(have) or 'none'}); "
            "run the recipe to its end, or use --bm25"
        )

    def _open_index(self, name: str) -> Any:
        from simlm.data.store import passages_fingerprint
        from simlm.index import open_index

        if not (self.folder / name).is_dir():
            raise ArtifactError(f"{self.folder}: no finished index {name!r}; run the recipe again, finished steps are skipped")
        index = open_index(self.folder / name)
        self._check_same(name, index.info["store_fingerprint"], "store", passages_fingerprint(self.folder / "store"))
        return index

    def _check_same(self, name: str, made_from: str | None, source: str, fingerprint: str) -> None:
        """Refuse an artifact that was made from an earlier version of what lies beside it: its rows would mean other passages."""
        if made_from != fingerprint:
            raise ArtifactError(
                f"{self.folder / name}: was made from an earlier {source!r} than the one that is there now; run the recipe again"
            )

    def _open_reranker(self) -> Any:
        from simlm.models.reranker import load_reranker

        if not (self.folder / "reranker").is_dir():
            raise ArtifactError(f"{self.folder}: no finished re-ranker; run the recipe to its end, or search without --rerank")
        open_artifact(self.folder / "reranker", "model")
        return load_reranker(self.folder / "reranker")

    def _fusion(self) -> tuple[float, float, Any]:
        """Weight, constant and method that the run's hybrid step settled on; equal weights where there is none."""
        if (self.folder / "hybrid_run").is_dir():
            manifest = read_manifest(self.folder / "hybrid_run", "run")
            weight, constant = float(manifest.facts.get("dense_weight", 0.5)), float(manifest.settings.get("constant", 60.0))
            return weight, constant, manifest.settings.get("method", "rank")
        return 0.5, 60.0, "rank"


def _retrievers(folder: Path) -> dict[str, str]:
    """RETRIEVERS with the rounds that a run has."""
    numbers = (path.name.removeprefix("retriever2_round").removesuffix("_index") for path in folder.glob("retriever2_round*_index"))
    rounds = [f"retriever2_round{number}" for number in sorted((int(text) for text in numbers if text.isdigit()), reverse=True)]
    return {"distilled": RETRIEVERS["distilled"]} | {name: name for name in rounds} | RETRIEVERS


def example_query(folder: Path) -> str:
    """A query of the run's own to try: the first test (or dev, or train) query; a plain word where there is none."""
    from simlm.data.store import Store

    store = Store.open(Path(folder) / "store")
    for split in ("test", "dev", "train"):
        if split in store.splits and len(store.queries(split)):
            return store.queries(split).text(0)
    return "example"
