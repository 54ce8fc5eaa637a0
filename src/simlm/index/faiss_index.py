"""Approximate search with faiss: a graph (hnsw), clusters (ivf), or compressed vectors (pq). Saved by faiss, opened memory-mapped.

All rank by inner product. What they miss is the price of their speed or size: compare with a flat index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.errors import RecipeError
from simlm.index.results import NO_ROW, Results
from simlm.index.vectors import checked_queries, filled_options, open_vectors, vector_facts
from simlm.rankings import Floats

FILE = "index.faiss"
BLOCK_PASSAGES = 65_536
"""Added at once."""
TRAINING_PASSAGES = 65_536
"""A seeded sample that clusters and codes are trained on (or 64 a cluster, if that is more)."""
CODEBOOK = 256
"""Codes of one byte."""
ONE_THREAD_PASSAGES = 100_000
"""Up to here a graph is built by one thread: the same graph every time. Above, by all of them, and graphs of two runs differ."""


class _FaissIndex:
    """Queries are float32 [Q, D] of unit length."""

    takes: ClassVar[Literal["vectors"]] = "vectors"
    OPTIONS: ClassVar[dict[str, tuple[int, int]]] = {}

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        faiss = _faiss()
        self.folder = folder
        self.info = info
        # Lists of clusters have a mapping of their own, everything else has the newer one.
        self._flags = faiss.IO_FLAG_MMAP if info.get("num_lists") else faiss.IO_FLAG_MMAP_IFC
        self._index = faiss.read_index(str(folder / FILE), self._flags)

    def __len__(self) -> int:
        return int(self.info["count"])

    def search(self, queries_QD: Floats, depth: int) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 past the end."""
        queries_QD = checked_queries(queries_QD, int(self.info["dim"]))
        scores_QK, rows_QK = self._index.search(queries_QD, depth, params=self._parameters(depth))
        scores_QK = np.where(rows_QK == NO_ROW, -np.inf, scores_QK).astype(np.float32)
        order = np.lexsort((rows_QK, -scores_QK), axis=-1)
        return np.take_along_axis(scores_QK, order, axis=-1), np.take_along_axis(rows_QK, order, axis=-1)

    def _parameters(self, depth: int) -> Any:
        """faiss's search parameters."""
        raise NotImplementedError


class HNSWIndex(_FaissIndex):
    """A graph of neighbours: fastest, and larger than the vectors. ef_search is raised to the depth that is asked for."""

    OPTIONS: ClassVar[dict[str, tuple[int, int]]] = {"hnsw_neighbours": (32, 2), "ef_construction": (200, 1), "ef_search": (128, 1)}

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the graph into `folder`; seed is not used, faiss has its own fixed one."""
        faiss = _faiss()
        chosen = filled_options("hnsw", options, cls.OPTIONS)
        vectors_ND = open_vectors(vectors)
        index = faiss.IndexHNSWFlat(vectors_ND.shape[1], chosen["hnsw_neighbours"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = chosen["ef_construction"]
        threads = faiss.omp_get_max_threads()
        try:
            faiss.omp_set_num_threads(1 if len(vectors_ND) <= ONE_THREAD_PASSAGES else threads)
            _add(index, vectors_ND)
        finally:
            faiss.omp_set_num_threads(threads)
        faiss.write_index(index, str(folder / FILE))
        return vector_facts(vectors_ND) | chosen

    def _parameters(self, depth: int) -> Any:
        faiss = _faiss()
        return faiss.SearchParametersHNSW(efSearch=max(int(self.info["ef_search"]), depth))


class IVFIndex(_FaissIndex):
    """Clusters of uncompressed vectors, of which the nearest `num_probes` are searched."""

    OPTIONS: ClassVar[dict[str, tuple[int, int]]] = {"num_lists": (0, 0), "num_probes": (0, 0)}
    """0 = from the size of the corpus, see `_clusters`."""

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the lists into `folder`; seed: of the training sample and of the clustering."""
        faiss = _faiss()
        vectors_ND = open_vectors(vectors)
        clusters = _clusters(filled_options("ivf", options, cls.OPTIONS), len(vectors_ND))
        dim = vectors_ND.shape[1]
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, clusters["num_lists"], faiss.METRIC_INNER_PRODUCT)
        _train(index, vectors_ND, clusters["num_lists"], seed)
        _add(index, vectors_ND)
        faiss.write_index(index, str(folder / FILE))
        return vector_facts(vectors_ND) | clusters

    def _parameters(self, depth: int) -> Any:
        faiss = _faiss()
        return faiss.SearchParametersIVF(nprobe=int(self.info["num_probes"]))


class PQIndex(_FaissIndex):
    """Product-quantised vectors of `code_bytes` bytes each, all compared; with `num_lists` only those of the nearest clusters."""

    OPTIONS: ClassVar[dict[str, tuple[int, int]]] = {"code_bytes": (0, 0), "num_lists": (0, 0), "num_probes": (0, 0)}
    """code_bytes 0 = an eighth of the dimension (or the next divisor below), num_lists 0 = no clusters."""

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the codes into `folder`; seed: of the training sample and of the clustering."""
        faiss = _faiss()
        chosen = filled_options("pq", options, cls.OPTIONS)
        vectors_ND = open_vectors(vectors)
        dim = vectors_ND.shape[1]
        code_bytes = _code_bytes(chosen["code_bytes"], dim)
        if chosen["num_lists"]:
            clusters = _clusters({name: chosen[name] for name in ("num_lists", "num_probes")}, len(vectors_ND))
            quantizer = faiss.IndexFlatIP(dim)
            index = faiss.IndexIVFPQ(quantizer, dim, clusters["num_lists"], code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        else:
            if chosen["num_probes"]:
                raise RecipeError(
                    "index.options.num_probes: has no effect on a pq index without clusters; set num_lists as well, or leave it out"
                )
            clusters = {}
            index = faiss.IndexPQ(dim, code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        _train(index, vectors_ND, max(clusters.get("num_lists", 1), CODEBOOK), seed)
        _add(index, vectors_ND)
        faiss.write_index(index, str(folder / FILE))
        return vector_facts(vectors_ND) | clusters | {"code_bytes": code_bytes}

    def _parameters(self, depth: int) -> Any:
        faiss = _faiss()
        return faiss.SearchParametersIVF(nprobe=int(self.info["num_probes"])) if self.info.get("num_lists") else None


def _faiss() -> Any:
    """The library, untyped: its own annotations do not know the Python wrappers' keywords."""
    import faiss

    return faiss


def _clusters(options: dict[str, int], count: int) -> dict[str, int]:
    """num_lists: 4 x the root of the corpus (faiss's guidelines), 39 passages or more each; num_probes: an eighth of them, at least 8."""
    num_lists = options["num_lists"] or max(min(int(4 * math.sqrt(count)), count // 39), 1)
    if num_lists > count:
        raise RecipeError(f"index.options.num_lists: {num_lists:,} lists for a corpus of {count:,} passages; at most one a passage")
    num_probes = options["num_probes"] or min(max(num_lists // 8, 8), num_lists)
    if num_probes > num_lists:
        raise RecipeError(f"index.options.num_probes: {num_probes:,} of {num_lists:,} lists; at most all of them")
    return {"num_lists": num_lists, "num_probes": num_probes}


def _code_bytes(wanted: int, dim: int) -> int:
    if wanted == 0:
        return max(size for size in range(1, max(dim // 8, 1) + 1) if dim % size == 0)
    if dim % wanted:
        near = sorted((size for size in range(1, dim + 1) if dim % size == 0), key=lambda size: abs(size - wanted))[:3]
        raise RecipeError(
            f"index.options.code_bytes: {wanted} does not divide the dimension {dim}; try {', '.join(map(str, sorted(near)))}"
        )
    return wanted


def _train(index: Any, vectors_ND: NDArray[np.floating[Any]], num_centroids: int, seed: int) -> None:
    """Train on a seeded sample; a corpus smaller than the number of centroids is repeated, since faiss wants as many points."""
    size = min(max(TRAINING_PASSAGES, 64 * num_centroids), len(vectors_ND))
    rows = np.sort(np.random.default_rng([seed, 20]).choice(len(vectors_ND), size, replace=False))
    sample = np.asarray(vectors_ND[rows], dtype=np.float32)
    sample = np.tile(sample, (-(-num_centroids // len(sample)), 1)) if len(sample) < num_centroids else sample
    for part in (index, getattr(index, "pq", None)):
        if part is not None and hasattr(part, "cp"):
            part.cp.seed = seed % (1 << 31)
            part.cp.min_points_per_centroid = 1
    index.train(np.ascontiguousarray(sample))


def _add(index: Any, vectors_ND: NDArray[np.floating[Any]]) -> None:
    for block_PD in _blocks(vectors_ND):
        index.add(block_PD)


def _blocks(vectors_ND: NDArray[np.floating[Any]]) -> Iterator[Floats]:
    for start in range(0, len(vectors_ND), BLOCK_PASSAGES):
        yield np.ascontiguousarray(vectors_ND[start : start + BLOCK_PASSAGES], dtype=np.float32)
