"""Ask a finished run: dense, BM25 or hybrid search over its corpus, and re-ranking, from its artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simlm.artifacts import open_artifact, read_manifest
from simlm.errors import ArtifactError, SimlmError, nearest
from simlm.types import ScoredPassage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from simlm.data.store import Store
    from simlm.models.precision import Precision

    Allowed = NDArray[np.bool_]

Mode = Literal["dense", "bm25", "hybrid"]
ListName = Literal["bm25", "dense", "hybrid", "rerank"]
"""A ranked list that a query can have: of a first stage, of the two fused, or of the re-ranker over the searcher's first stage."""
LIST_NAMES: tuple[ListName, ...] = ("bm25", "dense", "hybrid", "rerank")
RETRIEVERS = {
    "distilled": "distilled",
    "retriever2": "retriever2",
    "retriever1": "retriever1",
    "start": "",
    "pretrained_encoder": "pretrained",
}
"""Name -> model folder in the run ("" = the starting model as it is); best first: the order in which they are looked for. Later rounds of
retriever 2 (retriever2_round2 ...) come before it, the last first."""
CHOSEN = "_chosen_index"
"""Ending of the folder of an index that was chosen for a budget."""
CANDIDATES = 200
"""Passages fetched from each part before fusing (the paper's depth)."""
RERANKED = 50
"""Passages re-ranked at least; more where more are shown."""


@dataclass(frozen=True)
class Question:
    """One query and what is wanted of it.

    depth: passages shown. lists: those wanted; what they are made from comes with them.
    allowed: bool [N], the passage rows that may be found; none = all.
    """

    query: str
    depth: int
    lists: tuple[ListName, ...]
    allowed: Allowed | None = None


@dataclass(frozen=True)
class Ranking:
    """Passage rows, best first, with their scores; not cut at the depth that is shown."""

    rows: list[int]
    scores: list[float]


Rankings = dict[ListName, Ranking]


def open_run(
    folder: str | Path,
    *,
    retriever: str | None = None,
    mode: Mode = "dense",
    rerank: bool = False,
    query_precision: Precision | None = None,
) -> Searcher:
    """A searcher over the corpus of a run; loads only what `mode` and `rerank` need.

    retriever: a name of RETRIEVERS; none = the first of these that the run has.
    query_precision: of the model that encodes queries; none = "fast" where the passages were encoded so, else "fp32".
    Raises ArtifactError if the run lacks what is asked for.
    """
    return Searcher(Path(folder), retriever=retriever, mode=mode, rerank=rerank, query_precision=query_precision)


class Searcher:
    """Models and indexes of a run, loaded once."""

    def __init__(self, folder: Path, *, retriever: str | None, mode: Mode, rerank: bool, query_precision: Precision | None = None) -> None:
        from simlm.additions import Additions
        from simlm.data.store import Store

        if not (folder / "store").is_dir():
            raise ArtifactError(
                f"{folder}: holds no finished `store`, so this is not the folder of a run; give runs/NAME, made by `simlm run`"
            )
        self.folder = folder
        self.mode = mode
        self._query_precision = query_precision
        self.store: Store = Store.open(folder / "store")
        self.additions = Additions.open(folder)
        self.additions.extend_store(self.store)
        self.retriever = ""
        """Name of the retriever that was opened; empty where the mode needs none."""
        self.dense: tuple[Any, Any] | None = self._open_dense(retriever) if mode != "bm25" else None
        self.bm25: Any = self.additions.extend_index("bm25", self._open_index("bm25")) if mode != "dense" else None
        self.dense_weight, self.constant, self.method = self._fusion()
        self.reranker: Any = self._open_reranker() if rerank else None

    def search(self, query: str, *, depth: int = 10) -> list[ScoredPassage]:
        """The best `depth` passages, best first. Scores: cosine, BM25, the two fused, or the re-ranker's logits."""
        if depth < 1:
            raise SimlmError(f"depth {depth}: at least 1 was expected")
        wanted: ListName = "rerank" if self.reranker is not None else self.mode
        ranking = self.ask([Question(query, depth, (wanted,))])[0][wanted]
        table = self.store.passages
        return [
            ScoredPassage(table.ids[row], score, rank, table.title(row), table.text(row))
            for rank, (row, score) in enumerate(zip(ranking.rows[:depth], ranking.scores[:depth], strict=True), start=1)
        ]

    @property
    def lists(self) -> tuple[ListName, ...]:
        """The lists that a question may ask for."""
        there = {
            "bm25": self.bm25 is not None,
            "dense": self.dense is not None,
            "hybrid": self.mode == "hybrid",
            "rerank": self.reranker is not None,
        }
        return tuple(name for name in LIST_NAMES if there[name])

    def ask(self, questions: Sequence[Question]) -> list[Rankings]:
        """The lists of each question, and those that they are made from.

        Queries are encoded together, and those that want the same of an index go through it together. A list is the same whatever else
        is asked at the same time, but for the last bits of vectors. SimlmError for a list that this searcher does not have.
        """
        wanted = [self._with_sources(question.lists) for question in questions]
        answers: list[Rankings] = [{} for _ in questions]
        depths = [self._fetched(question, lists) for question, lists in zip(questions, wanted, strict=True)]
        self._search_dense(questions, wanted, depths, answers)
        self._search_bm25(questions, wanted, depths, answers)
        for question, lists, depth, answer in zip(questions, wanted, depths, answers, strict=True):
            if "hybrid" in lists:
                answer["hybrid"] = self._fused(answer, depth)
            if "rerank" in lists:
                answer["rerank"] = self._reranked(question, answer[self.mode])
        return answers

    def _with_sources(self, lists: tuple[ListName, ...]) -> set[ListName]:
        """The lists and those that they are made from."""
        known = self.lists
        for name in lists:
            if name not in known:
                raise SimlmError(f"{self.folder}: {name!r} was asked for; this searcher has {', '.join(known)}")
        needed = set(lists)
        if "rerank" in needed:
            needed.add(self.mode)
        if "hybrid" in needed:
            needed |= {"bm25", "dense"}
        return needed

    def _fetched(self, question: Question, lists: set[ListName]) -> int:
        """Passages taken from each part: enough to show, to fuse and to re-rank."""
        fetched = max(question.depth, CANDIDATES if "hybrid" in lists else 0, RERANKED if "rerank" in lists else 0)
        return min(fetched, len(self.store.passages))

    def _search_dense(self, questions: Sequence[Question], wanted: list[set[ListName]], depths: list[int], answers: list[Rankings]) -> None:
        places = [place for place, lists in enumerate(wanted) if "dense" in lists]
        if not places or self.dense is None:
            return
        retriever, index = self.dense
        vectors_QD = retriever.encode_queries([questions[place].query for place in places])
        # An approximate index may find other passages at another depth: only equal depths are searched together.
        alike: dict[tuple[int, int], list[int]] = {}
        for position, place in enumerate(places):
            alike.setdefault((id(questions[place].allowed), depths[place]), []).append(position)
        for (_, depth), positions in alike.items():
            found = _search(index, vectors_QD[positions], depth, questions[places[positions[0]]].allowed)
            for position, ranking in zip(positions, found, strict=True):
                answers[places[position]]["dense"] = ranking

    def _search_bm25(self, questions: Sequence[Question], wanted: list[set[ListName]], depths: list[int], answers: list[Rankings]) -> None:
        for question, lists, depth, answer in zip(questions, wanted, depths, answers, strict=True):
            if "bm25" in lists:
                (answer["bm25"],) = _search(self.bm25, [question.query], depth, question.allowed)

    def _fused(self, answer: Rankings, depth: int) -> Ranking:
        from simlm.index.hybrid import fuse_lists

        dense, bm25 = ((answer[name].rows, answer[name].scores) for name in ("dense", "bm25"))
        fusion = {"dense_weight": self.dense_weight, "constant": self.constant, "method": self.method}
        rows, scores = fuse_lists(dense, bm25, depth=depth, **fusion)
        return Ranking(rows.tolist(), scores.tolist())

    def _reranked(self, question: Question, first_stage: Ranking) -> Ranking:
        rows = first_stage.rows[: max(question.depth, RERANKED)]
        if not rows or self.reranker is None:
            return Ranking([], [])
        table = self.store.passages
        scores = self.reranker.score(question.query, [(table.title(row), table.text(row)) for row in rows])
        order = sorted(range(len(rows)), key=lambda position: (-scores[position], rows[position]))
        return Ranking([rows[position] for position in order], [float(scores[position]) for position in order])

    def _open_dense(self, retriever: str | None) -> tuple[Any, Any]:
        from simlm.models.retriever import load_retriever
        from simlm.recipe import ModelSettings

        name, place = find_retriever(self.folder, retriever)
        encoded = read_manifest(self.folder / f"{name}_embeddings", "embeddings")
        opened = opened_index(self.folder, name).name
        built = read_manifest(self.folder / opened, "index")
        self._check_same(opened, built.inputs.get("embeddings"), f"{name}_embeddings", encoded.fingerprint)
        index = self.additions.extend_index(f"{name}_index", self._open_index(opened))
        self.retriever = name
        # Of a run whose recipe wants speed, on whatever machine it is asked now.
        followed: Precision = "fast" if encoded.settings.get("precision") in ("int8", "fast") else "fp32"
        precision = self._query_precision or followed
        if place is None:
            model = ModelSettings.model_validate(encoded.settings["model"])
            return load_retriever(model, precision=precision, max_query_tokens=int(self.store.info["max_query_tokens"])), index
        folder = open_artifact(place, "model")
        self._check_same(f"{name}_embeddings", encoded.inputs.get("model"), place.name, folder.manifest.fingerprint)
        if name == "pretrained_encoder":
            settings = ModelSettings.model_validate(encoded.settings["model"])
            return load_retriever(settings.model_copy(update={"start": str(folder.path)}), precision=precision), index
        return load_retriever(folder.path, precision=precision), index

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
            again = "run the recipe again"
            if name.endswith(CHOSEN):
                again = f"choose it again (simlm build-index {self.folder} --budget ...), or delete the folder to use the recipe's index"
            raise ArtifactError(f"{self.folder / name}: was made from an earlier {source!r} than the one that is there now; {again}")

    def _open_reranker(self) -> Any:
        from simlm.models.reranker import load_reranker

        if not (self.folder / "reranker").is_dir():
            raise ArtifactError(f"{self.folder}: no finished re-ranker; run the recipe to its end, or search without --rerank")
        trained = open_artifact(self.folder / "reranker", "model").manifest
        # A re-ranker reads texts, so it would go on working after a new prepare; but it was trained on, and measured on, other passages.
        self._check_same("reranker", trained.inputs.get("store"), "store", read_manifest(self.folder / "store", "store").fingerprint)
        return load_reranker(self.folder / "reranker")

    def _fusion(self) -> tuple[float, float, Any]:
        """Weight, constant and method that the run's hybrid step settled on; equal weights where there is none."""
        if (self.folder / "hybrid_run").is_dir():
            manifest = read_manifest(self.folder / "hybrid_run", "run")
            weight, constant = float(manifest.facts.get("dense_weight", 0.5)), float(manifest.settings.get("constant", 60.0))
            return weight, constant, manifest.settings.get("method", "rank")
        return 0.5, 60.0, "score"


def opened_index(folder: Path, retriever: str) -> Path:
    """Folder of the index that searches with a retriever open: the one chosen for a budget where there is one, else the recipe's."""
    chosen = folder / f"{retriever}{CHOSEN}"
    return chosen if chosen.is_dir() else folder / f"{retriever}_index"


def find_retriever(folder: Path, retriever: str | None = None) -> tuple[str, Path | None]:
    """Name of a retriever that the run has an index of, and the folder of its model (none: the starting model as it is).

    retriever: its name; none = the one that searches open. SimlmError for an unknown name, ArtifactError if the run has no index of it.
    """
    known = retrievers_of(folder)
    if retriever is not None and retriever not in known:
        raise SimlmError(f"no retriever {retriever!r}{nearest(retriever, known)}; a run may have: {', '.join(known)}")
    have = [name for name in known if (folder / f"{name}_index").is_dir()]
    for name in have:
        if retriever in (None, name):
            return name, folder / known[name] if known[name] else None
    raise ArtifactError(
        f"{folder}: no finished index of {retriever or 'any retriever'} (finished here: {', '.join(have) or 'none'}); "
        "run the recipe to its end (searching by BM25 alone, --bm25, needs none)"
    )


def open_everything(folder: str | Path, *, retriever: str | None = None, query_precision: Precision | None = None) -> Searcher:
    """A searcher with all that a run has: both first stages or the one there is, and the re-ranker where there is one.

    retriever, query_precision: as for `open_run`.
    Raises ArtifactError if the run has neither index, or one that does not fit what lies beside it.
    """
    folder = Path(folder)
    dense = any((folder / f"{name}_index").is_dir() for name in retrievers_of(folder))
    bm25 = (folder / "bm25").is_dir()
    mode: Mode = "hybrid" if dense and bm25 else "bm25" if bm25 and retriever is None else "dense"
    return Searcher(folder, retriever=retriever, mode=mode, rerank=(folder / "reranker").is_dir(), query_precision=query_precision)


def _search(index: Any, queries: Any, depth: int, allowed: Allowed | None) -> list[Ranking]:
    """What an index finds, a ranking for each query."""
    restricted = {} if allowed is None else {"allowed": allowed}
    scores_QK, rows_QK = index.search(queries, depth, **restricted)
    found_QK = rows_QK >= 0
    return [Ranking(rows[found].tolist(), scores[found].tolist()) for scores, rows, found in zip(scores_QK, rows_QK, found_QK, strict=True)]


def retrievers_of(folder: Path) -> dict[str, str]:
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
