"""score_groups: BM25 and a dense retriever together as a teacher of training groups, without labels.

Inputs: "store", "groups", "index" (BM25; not needed with dense_weight = 1), "embeddings" (of the dense retriever), and "model" where that
is not the starting model.
Output: a run of split train with a score for every positive and the first `depth` negatives of each group, as a re-ranker's.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import open_artifact
from simlm.data.store import Store
from simlm.errors import ArtifactError
from simlm.index import open_index
from simlm.index.bm25 import BM25Index
from simlm.rankings import Floats, Groups, Ints, Run
from simlm.recipe import HybridTeacherSettings
from simlm.stages import Context

QUERIES_AT_ONCE = 2048


def run(settings: HybridTeacherSettings, inputs: dict[str, Path], context: Context) -> None:
    """Facts: num_queries, num_pairs, dense_weight, and with BM25 agreement (share of groups in which both have the same passage first)."""
    from simlm.models.retriever import load_retriever

    store = Store.open(inputs["store"])
    groups = Groups.load(open_artifact(inputs["groups"], "groups").path)
    index = cast("BM25Index", open_index(inputs["index"])) if "index" in inputs else None
    assert index is not None or settings.dense_weight == 1, "BM25's share needs its index"
    vectors_ND = np.load(open_artifact(inputs["embeddings"], "embeddings").file("vectors.npy"), mmap_mode="r", allow_pickle=False)
    if len(vectors_ND) != len(store.passages):
        raise ArtifactError(
            f"{inputs['embeddings']}: {len(vectors_ND):,} vectors for a corpus of {len(store.passages):,} passages; "
            "run the encode step again"
        )
    if "model" in inputs:
        retriever = load_retriever(open_artifact(inputs["model"], "model").path)
    else:
        retriever = load_retriever(settings.model, max_query_tokens=int(store.info["max_query_tokens"]))
    table = store.queries("train")
    ranked: list[tuple[Ints, Floats]] = []
    agreed = 0
    starts = range(0, len(groups), QUERIES_AT_ONCE)
    for start in context.progress.track(starts, "score groups", total=len(starts), unit="part"):
        positions = range(start, min(start + QUERIES_AT_ONCE, len(groups)))
        texts = [table.text(int(groups.query_rows[position])) for position in positions]
        for position, text, query_D in zip(positions, texts, retriever.encode_queries(texts), strict=True):
            rows = np.concatenate([groups.positives(position)[0], groups.negatives(position)[0][: settings.depth]]).astype(np.int64)
            dense = np.asarray(vectors_ND[rows], dtype=np.float32) @ query_D
            bm25 = np.zeros_like(dense) if index is None else index.scores_of(text, rows)
            agreed += int(dense.argmax() == bm25.argmax())
            ranked.append((rows, fused(dense, bm25, dense_weight=settings.dense_weight, temperature=settings.temperature)))
    teacher = Run.from_lists("train", np.asarray(groups.query_rows).tolist(), [(rows.tolist(), scores.tolist()) for rows, scores in ranked])
    teacher.save(context.work)
    context.record(
        num_queries=len(teacher),
        num_pairs=len(teacher.passage_rows),
        dense_weight=settings.dense_weight,
        **({} if index is None else {"agreement": round(agreed / max(len(groups), 1), 4)}),
    )


def fused(dense_K: Floats, bm25_K: Floats, *, dense_weight: float, temperature: float) -> Floats:
    """float32 [K]: both standardised over the list and summed by weight, times the dense scores' standard deviation / temperature.

    A list whose scores are all equal says nothing and adds nothing; where the dense scores are, BM25's order is not passed on either.
    """
    spread = float(dense_K.std())
    standard = dense_weight * _standardised(dense_K) + (1.0 - dense_weight) * _standardised(bm25_K)
    scores: Floats = (standard * spread / temperature).astype(np.float32)
    return scores


def _standardised(scores_K: Floats) -> NDArray[np.float64]:
    spread = float(scores_K.std())
    centred: NDArray[np.float64] = scores_K.astype(np.float64) - float(scores_K.mean())
    if spread == 0:
        return np.zeros_like(centred)
    standard: NDArray[np.float64] = centred / spread
    return standard
