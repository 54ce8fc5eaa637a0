"""Approximate search with faiss: a graph (hnsw), clusters (ivf), compressed vectors (pq), or one bit a number (rabitq).

All rank by inner product. What they miss is the price of their speed or size: compare with a flat index. Saved by faiss; graphs and codes
are opened memory-mapped.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from simlm.errors import ArtifactError, RecipeError
from simlm.index.results import NO_ROW, Results, no_results
from simlm.index.vectors import CUT, Option, SourceVectors, checked_mask, checked_queries, filled_options, ordered, padded, rescoring
from simlm.rankings import Floats, Ints

FILE = "index.faiss"
TRAINING_PASSAGES = 65_536
"""A seeded sample that clusters and codes are trained on (or 64 a cluster, if that is more)."""
CODEBOOK = 256
"""Codes of one byte."""
FILTERED_TOGETHER = 128
"""Queries of a filtered search of lists that are looked at together: each has a few numbers for every list."""
ONE_THREAD_PASSAGES = 100_000
"""Up to here a graph is built by one thread: the same graph every time. Above, by all of them, and graphs of two runs differ."""


class _FaissIndex:
    """Queries are float32 [Q, D] of unit length."""

    takes: ClassVar[Literal["vectors"]] = "vectors"
    OPTIONS: ClassVar[dict[str, Option]] = {}

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        faiss = _faiss()
        self.folder = folder
        self.info = info
        # Lists of clusters have a mapping of their own, everything else has the newer one.
        flags = faiss.IO_FLAG_MMAP if info.get("num_lists") else faiss.IO_FLAG_MMAP_IFC
        try:
            self._index = faiss.read_index(str(folder / FILE), flags)
        except RuntimeError as error:
            raise ArtifactError(
                f"{folder / FILE}: faiss {faiss.__version__} cannot read it ({str(error).splitlines()[0]}); run the build_index step again"
            ) from None
        expected = (len(self), int(info.get("cut", info["dim"])))
        if (self._index.ntotal, self._index.d) != expected:
            raise ArtifactError(
                f"{folder / FILE}: {self._index.ntotal:,} vectors of dimension {self._index.d}; {expected[0]:,} of dimension {expected[1]} "
                "were expected; run the build_index step again"
            )

    def __len__(self) -> int:
        return int(self.info["count"])

    def search(self, queries_QD: Floats, depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 past the end.

        allowed: bool [N], the passages that may be results; none = all. As many are found as there are, up to `depth`.
        """
        queries_QD = checked_queries(queries_QD, int(self.info["dim"]), int(self.info.get("cut", 0)))
        count = len(self)
        if allowed is not None:
            allowed = checked_mask(allowed, len(self))
            count = int(np.count_nonzero(allowed))
            allowed = None if count == len(self) else allowed
        # No more than there is: memory and time of the library grow with what is asked for.
        fetched = min(depth, count)
        if fetched == 0:
            return no_results(len(queries_QD), depth)
        scores_QK, rows_QK = self._search(queries_QD, fetched, allowed)
        scores_QK = np.where(rows_QK == NO_ROW, -np.inf, scores_QK).astype(np.float32)
        return padded(*ordered(scores_QK, rows_QK), depth)

    def _search(self, queries_QD: Floats, depth: int, allowed: NDArray[np.bool_] | None) -> tuple[Floats, Ints]:
        """faiss's scores and rows, [Q, depth]. allowed: None, or bool [N] with at least `depth` of them."""
        if allowed is not None and self.info.get("num_lists"):
            parts = [
                self._search_lists(queries_QD[start : start + FILTERED_TOGETHER], depth, allowed)
                for start in range(0, len(queries_QD), FILTERED_TOGETHER)
            ]
            return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])
        given = {} if allowed is None else {"sel": _selector(allowed)}
        scores_QK, rows_QK = self._index.search(queries_QD, depth, params=self._parameters(depth, given))
        return scores_QK, rows_QK

    def _parameters(self, depth: int, given: dict[str, Any], *, probes: int | None = None) -> Any:
        """faiss's search parameters, None for its own. given: those known so far; probes: lists that are searched, none = as built."""
        raise NotImplementedError

    def _search_lists(self, queries_QD: Floats, depth: int, allowed: NDArray[np.bool_]) -> tuple[Floats, Ints]:
        """Compare as many allowed vectors, in as many lists, as a search without a filter does, or all of them if they are fewer.

        Only lists that hold such vectors count: what is allowed may lie far from the query, all of it in a few lists.
        """
        faiss = _faiss()
        num_lists = int(self.info["num_lists"])
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        nearness_QL, lists_QL = self._index.quantizer.search(queries_QD, num_lists)
        sizes_QL = self._sizes_of_lists(allowed)[lists_QL]
        num_probes = int(self.info["num_probes"])
        wanted = max(depth, num_probes * len(self) // num_lists)
        enough_QL = (np.cumsum(sizes_QL, axis=1) - sizes_QL >= wanted) & (np.cumsum(sizes_QL > 0, axis=1) > num_probes)
        probed_QL = (sizes_QL > 0) & ~enough_QL
        width = int(probed_QL.sum(axis=1).max())
        # Those that are probed come first, in their order; faiss passes over lists of number -1.
        order_QP = np.argsort(~probed_QL, axis=1, kind="stable")[:, :width]
        lists_QP = np.where(np.take_along_axis(probed_QL, order_QP, axis=1), np.take_along_axis(lists_QL, order_QP, axis=1), NO_ROW)
        nearness_QP = np.ascontiguousarray(np.take_along_axis(nearness_QL, order_QP, axis=1), dtype=np.float32)
        scores_QK, rows_QK = np.empty((len(queries_QD), depth), np.float32), np.empty((len(queries_QD), depth), np.int64)
        # The method of Python's wrapper takes no parameters.
        self._index.search_preassigned_c(
            len(queries_QD),
            faiss.swig_ptr(queries_QD),
            depth,
            faiss.swig_ptr(lists_QP),
            faiss.swig_ptr(nearness_QP),
            faiss.swig_ptr(scores_QK),
            faiss.swig_ptr(rows_QK),
            False,
            self._parameters(depth, {"sel": _selector(allowed)}, probes=width),
        )
        return scores_QK, rows_QK

    def _sizes_of_lists(self, allowed: NDArray[np.bool_]) -> Ints:
        """int64 [num_lists]: allowed vectors of each; of the two sides the smaller one is counted."""
        num_lists = int(self.info["num_lists"])
        if 2 * np.count_nonzero(allowed) <= len(allowed):
            return np.bincount(self._list_of_row[allowed], minlength=num_lists)
        return self._whole_sizes - np.bincount(self._list_of_row[~allowed], minlength=num_lists)

    @functools.cached_property
    def _whole_sizes(self) -> Ints:
        return np.bincount(self._list_of_row, minlength=int(self.info["num_lists"]))

    @functools.cached_property
    def _list_of_row(self) -> NDArray[np.int32]:
        """int32 [N]: the list that each vector is in; read from the index when it is first filtered."""
        faiss = _faiss()
        found_N = np.empty(len(self), np.int32)
        lists = self._index.invlists
        for number in range(int(self.info["num_lists"])):
            size = lists.list_size(number)
            if size:
                found_N[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
        return found_N


class HNSWIndex(_FaissIndex):
    """A graph of neighbours: fastest, and larger than the vectors. ef_search is raised to the depth that is asked for."""

    OPTIONS: ClassVar[dict[str, Option]] = (
        {"hnsw_neighbours": (32, 2), "ef_construction": (200, 1), "ef_search": (128, 1)} | CUT | rescoring()
    )

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the graph into `folder`; seed is not used, faiss has its own fixed one."""
        faiss = _faiss()
        chosen = filled_options("hnsw", options, cls.OPTIONS)
        source = SourceVectors(vectors, chosen["dim"])
        index = faiss.IndexHNSWFlat(source.dim, chosen["hnsw_neighbours"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = chosen["ef_construction"]
        threads = faiss.omp_get_max_threads()
        try:
            faiss.omp_set_num_threads(1 if len(source) <= ONE_THREAD_PASSAGES else threads)
            _add(index, source)
        finally:
            faiss.omp_set_num_threads(threads)
        faiss.write_index(index, str(folder / FILE))
        return source.facts() | {name: chosen[name] for name in ("hnsw_neighbours", "ef_construction", "ef_search")}

    def _search(self, queries_QD: Floats, depth: int, allowed: NDArray[np.bool_] | None) -> tuple[Floats, Ints]:
        if allowed is None:
            return super()._search(queries_QD, depth, allowed)
        faiss = _faiss()
        count = int(np.count_nonzero(allowed))
        wanted = math.ceil(max(int(self.info["ef_search"]), depth) * len(self) / count)
        # The nearest of all, of which those are kept that are allowed: faiss's own filter fills its list with whatever allowed vectors the
        # walk meets first, near or not. Where that is no less work than to compare all that are allowed, these are compared.
        while wanted * 2 * int(self.info["hnsw_neighbours"]) < count and wanted <= len(self) // 8:
            scores_QK, rows_QK = self._index.search(queries_QD, wanted, params=faiss.SearchParametersHNSW(efSearch=wanted))
            kept_QK = (rows_QK != NO_ROW) & allowed[rows_QK]
            if (kept_QK.sum(axis=1) >= depth).all():
                scores_QK, rows_QK = ordered(np.where(kept_QK, scores_QK, -np.inf), np.where(kept_QK, rows_QK, NO_ROW))
                return scores_QK[:, :depth], rows_QK[:, :depth]
            wanted *= 4
        vectors = faiss.downcast_index(self._index.storage)
        scores_QK, rows_QK = vectors.search(np.ascontiguousarray(queries_QD), depth, params=faiss.SearchParameters(sel=_selector(allowed)))
        return scores_QK, rows_QK

    def _parameters(self, depth: int, given: dict[str, Any], *, probes: int | None = None) -> Any:
        ef_search = max(int(self.info["ef_search"]), depth)
        return _faiss().SearchParametersHNSW(efSearch=min(ef_search, len(self)))


class IVFIndex(_FaissIndex):
    """Clusters of uncompressed vectors, of which the nearest `num_probes` are searched."""

    OPTIONS: ClassVar[dict[str, Option]] = {"num_lists": (0, 0), "num_probes": (0, 0)} | CUT | rescoring()
    """0 = from the size of the corpus, see `_clusters`."""

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the lists into `folder`; seed: of the training sample and of the clustering."""
        faiss = _faiss()
        chosen = filled_options("ivf", options, cls.OPTIONS)
        source = SourceVectors(vectors, chosen["dim"])
        clusters = _clusters(chosen, len(source))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(source.dim), source.dim, clusters["num_lists"], faiss.METRIC_INNER_PRODUCT)
        _train(index, source, clusters["num_lists"], seed)
        _add(index, source)
        faiss.write_index(index, str(folder / FILE))
        return source.facts() | clusters

    def _parameters(self, depth: int, given: dict[str, Any], *, probes: int | None = None) -> Any:
        return _faiss().SearchParametersIVF(nprobe=probes or int(self.info["num_probes"]), **given)


class PQIndex(_FaissIndex):
    """Product-quantised vectors of `code_bytes` bytes each, all compared; with `num_lists` only those of the nearest clusters."""

    OPTIONS: ClassVar[dict[str, Option]] = {"code_bytes": (0, 0), "num_lists": (0, 0), "num_probes": (0, 0)} | CUT | rescoring()
    """code_bytes 0 = an eighth of the dimension (or the next divisor below), num_lists 0 = no clusters."""

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the codes into `folder`; seed: of the training sample and of the clustering."""
        faiss = _faiss()
        chosen = filled_options("pq", options, cls.OPTIONS)
        source = SourceVectors(vectors, chosen["dim"])
        code_bytes = _code_bytes(chosen["code_bytes"], source.dim)
        clusters = _wanted_clusters("pq", chosen, len(source))
        if clusters:
            quantizer = faiss.IndexFlatIP(source.dim)
            index = faiss.IndexIVFPQ(quantizer, source.dim, clusters["num_lists"], code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        else:
            index = faiss.IndexPQ(source.dim, code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        _train(index, source, max(clusters.get("num_lists", 1), CODEBOOK), seed)
        _add(index, source)
        faiss.write_index(index, str(folder / FILE))
        return source.facts() | clusters | {"code_bytes": code_bytes}

    def _parameters(self, depth: int, given: dict[str, Any], *, probes: int | None = None) -> Any:
        if not self.info.get("num_lists"):
            return None
        return _faiss().SearchParametersIVF(nprobe=probes or int(self.info["num_probes"]), **given)

    def _search(self, queries_QD: Floats, depth: int, allowed: NDArray[np.bool_] | None) -> tuple[Floats, Ints]:
        if allowed is None or self.info.get("num_lists"):
            return super()._search(queries_QD, depth, allowed)
        # faiss's plain index of codes takes no selector: ask for more until enough of it is allowed.
        fetched = math.ceil(depth / float(allowed.mean()))
        while True:
            fetched = min(2 * fetched, len(self))
            scores_QC, rows_QC = super()._search(queries_QD, fetched, None)
            found_QC = (rows_QC != NO_ROW) & allowed[rows_QC]
            if fetched == len(self) or (found_QC.sum(axis=1) >= depth).all():
                scores_QC, rows_QC = ordered(np.where(found_QC, scores_QC, -np.inf), np.where(found_QC, rows_QC, NO_ROW))
                return scores_QC[:, :depth], rows_QC[:, :depth]


class RaBitQIndex(_FaissIndex):
    """RaBitQ codes (arXiv 2405.12497): one bit a number and two factors a vector, so 1/27 of fp32 at 384 numbers; more bits on request.

    All codes are compared; with `num_lists` only those of the nearest clusters. The scores are estimates: leave `rescore` on. faiss's codes
    are of vectors as they come, without the random rotation of the paper: a trained encoder's numbers are alike enough.
    """

    OPTIONS: ClassVar[dict[str, Option]] = (
        {"bits": (1, 1), "query_bits": (8, 0), "num_lists": (0, 0), "num_probes": (0, 0)} | CUT | rescoring(4)
    )
    """bits: of each number, up to 9; query_bits: of each number of a query, up to 8, 0 = as it is (slow); num_lists 0 = no clusters."""

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Write the codes into `folder`; seed: of the training sample and of the clustering."""
        faiss = _faiss()
        chosen = filled_options("rabitq", options, cls.OPTIONS)
        for name, most in (("bits", 9), ("query_bits", 8)):
            if chosen[name] > most:
                raise RecipeError(f"index.options.{name}: found {chosen[name]}; {most} at most")
        source = SourceVectors(vectors, chosen["dim"])
        clusters = _wanted_clusters("rabitq", chosen, len(source))
        if clusters:
            quantizer = faiss.IndexFlatIP(source.dim)
            # The fifth: it has lists of its own.
            index = faiss.IndexIVFRaBitQ(quantizer, source.dim, clusters["num_lists"], faiss.METRIC_INNER_PRODUCT, True, chosen["bits"])
        else:
            index = faiss.IndexRaBitQ(source.dim, faiss.METRIC_INNER_PRODUCT, chosen["bits"])
        _train(index, source, clusters.get("num_lists", 1), seed)
        _add(index, source)
        faiss.write_index(index, str(folder / FILE))
        return source.facts() | clusters | {name: chosen[name] for name in ("bits", "query_bits")}

    def _parameters(self, depth: int, given: dict[str, Any], *, probes: int | None = None) -> Any:
        faiss = _faiss()
        # Set one by one: these have no keywords.
        if self.info.get("num_lists"):
            parameters = faiss.IVFRaBitQSearchParameters()
            parameters.nprobe = probes or int(self.info["num_probes"])
        else:
            parameters = faiss.RaBitQSearchParameters()
        parameters.qb = int(self.info["query_bits"])
        if "sel" in given:
            parameters.sel = given["sel"]
        return parameters


def _faiss() -> Any:
    """The library, untyped: its own annotations do not know the Python wrappers' keywords."""
    import faiss

    return faiss


def _selector(allowed: NDArray[np.bool_]) -> Any:
    return _faiss().IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _clusters(options: dict[str, Any], count: int) -> dict[str, int]:
    """num_lists: 4 x the root of the corpus (faiss's guidelines), 39 passages or more each; num_probes: an eighth of them, at least 8."""
    num_lists = options["num_lists"] or max(min(int(4 * math.sqrt(count)), count // 39), 1)
    if num_lists > count:
        raise RecipeError(f"index.options.num_lists: {num_lists:,} lists for a corpus of {count:,} passages; at most one a passage")
    num_probes = options["num_probes"] or min(max(num_lists // 8, 8), num_lists)
    if num_probes > num_lists:
        raise RecipeError(f"index.options.num_probes: {num_probes:,} of {num_lists:,} lists; at most all of them")
    return {"num_lists": num_lists, "num_probes": num_probes}


def _wanted_clusters(name: str, options: dict[str, Any], count: int) -> dict[str, int]:
    """As `_clusters`, empty where no number of lists is given."""
    if options["num_lists"]:
        return _clusters(options, count)
    if options["num_probes"]:
        raise RecipeError(
            f"index.options.num_probes: has no effect on a {name} index without clusters; set num_lists as well, or leave it out"
        )
    return {}


def _code_bytes(wanted: int, dim: int) -> int:
    if wanted == 0:
        return max(size for size in range(1, max(dim // 8, 1) + 1) if dim % size == 0)
    if dim % wanted:
        near = sorted((size for size in range(1, dim + 1) if dim % size == 0), key=lambda size: abs(size - wanted))[:3]
        raise RecipeError(
            f"index.options.code_bytes: {wanted} does not divide the dimension {dim}; try {', '.join(map(str, sorted(near)))}"
        )
    return wanted


def _train(index: Any, source: SourceVectors, num_centroids: int, seed: int) -> None:
    """Train on a seeded sample; a corpus smaller than the number of centroids is repeated, since faiss wants as many points."""
    sample = source.sample(max(TRAINING_PASSAGES, 64 * num_centroids), np.random.default_rng([seed, 20]))
    sample = np.tile(sample, (-(-num_centroids // len(sample)), 1)) if len(sample) < num_centroids else sample
    for part in (index, getattr(index, "pq", None)):
        if part is not None and hasattr(part, "cp"):
            part.cp.seed = seed % (1 << 31)
            part.cp.min_points_per_centroid = 1
    index.train(sample)


def _add(index: Any, source: SourceVectors) -> None:
    for block_PD in source.blocks():
        index.add(block_PD)
