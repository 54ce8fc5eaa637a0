"""Milvus: passage vectors in a collection. Milvus Lite in a folder of the index by default, a server or cluster where `uri` names one.

Both go through the same client and the same calls. What the index keeps itself is `milvus.json`: the name of the collection, which comes
from the digest of the vectors and the options, and how many passages have been taken over. So a build that was killed goes on where it was,
and vectors that are in a collection already are not sent again. A token comes from the environment (SIMLM_MILVUS_TOKEN), never from a
recipe, and is not written anywhere. After filling, the count and the recall against exact search are checked.
Shapes: Q queries, N passages, D embedding dim, K depth, P passages of a block.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import file_digest, json_digest, write_json
from simlm.errors import ArtifactError, RecipeError, SimlmError, require_extra
from simlm.index.results import NO_ROW, Results, no_results
from simlm.index.vectors import CUT, Option, SourceVectors, checked_mask, checked_queries, filled_options, ordered, padded
from simlm.rankings import Floats, Ints

DATABASE = "milvus.db"
STATE = "milvus.json"
TOKEN = "SIMLM_MILVUS_TOKEN"
"""Environment variable: `user:password` or an API key of the server."""
ROW, VECTOR = "row", "vector"
TIMEOUT_SECONDS = 20.0
"""To reach a server."""
BATCH_BYTES = 8 * 2**20
"""Of vectors, sent at once; a message may be 64 MiB."""
QUERIES_AT_ONCE = 256
MOST_RESULTS = 16_384
"""Of one query: Milvus's own limit."""
NAMED_ROWS = 10_000
"""As many are named in a filter; where there are more, results that are not allowed are left out afterwards."""
CHECKED_DEPTH = 10
OF_KIND: dict[str, tuple[str, ...]] = {
    "FLAT": (),
    "HNSW": ("hnsw_neighbours", "ef_construction", "ef_search"),
    "IVF_FLAT": ("num_lists", "num_probes"),
    "IVF_SQ8": ("num_lists", "num_probes"),
    "AUTOINDEX": (),
}
"""Index types that Milvus Lite and a cluster both have, with the options that each one takes."""


class MilvusIndex:
    """Queries are float32 [Q, D] of unit length."""

    takes: ClassVar[Literal["vectors"]] = "vectors"
    OPTIONS: ClassVar[dict[str, Option]] = {
        **CUT,
        "uri": ("", None),
        "milvus_index": ("FLAT", tuple(OF_KIND)),
        "hnsw_neighbours": (32, 2),
        "ef_construction": (200, 1),
        "ef_search": (128, 1),
        "num_lists": (0, 0),
        "num_probes": (0, 0),
        "check_queries": (100, 0),
        "min_recall_percent": (90, 0),
    }
    """uri: "" = Milvus Lite; num_lists, num_probes: 0 = as an ivf index; check_queries: vectors that recall is measured with."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self._client, close = _open_for_search(folder, str(info["uri"]))
        self._close = weakref.finalize(self, close)
        with _told(str(info["uri"])):
            if not self._client.has_collection(info["collection"]):
                raise ArtifactError(
                    f"{folder}: there is no collection {info['collection']!r} in {_place(info['uri'])}; run the build_index step again"
                )
            self._client.load_collection(info["collection"])
            _check_count(self._client, info)

    def __len__(self) -> int:
        return int(self.info["count"])

    def close(self) -> None:
        """Let the connection go; done by itself when the index is no longer used."""
        self._close()

    def search(self, queries_QD: Floats, depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results:
        """(scores float32 [Q, K], passage rows int64 [Q, K]), best first, ties by row; -inf and -1 past the end.

        allowed: bool [N], the passages that may be results; none = all. SimlmError for more results than Milvus gives.
        """
        queries_QD = checked_queries(queries_QD, int(self.info["dim"]), int(self.info["cut"]))
        if allowed is not None:
            allowed = checked_mask(allowed, len(self))
        there = len(self) if allowed is None else int(np.count_nonzero(allowed))
        wanted = min(depth, there)
        if wanted > MOST_RESULTS:
            raise SimlmError(f"depth {depth:,}: Milvus gives at most {MOST_RESULTS:,} results a query; ask for fewer")
        if wanted == 0 or len(queries_QD) == 0:
            return no_results(len(queries_QD), depth)
        with _told(str(self.info["uri"])):
            parts = [
                self._search(queries_QD[start : start + QUERIES_AT_ONCE], wanted, allowed)
                for start in range(0, len(queries_QD), QUERIES_AT_ONCE)
            ]
        scores_QK, rows_QK = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return padded(*ordered(scores_QK, rows_QK), depth)

    def _search(self, queries_QD: Floats, depth: int, allowed: NDArray[np.bool_] | None) -> Results:
        if allowed is None or allowed.all():
            return _ask(self._client, self.info, queries_QD, depth)
        share = float(allowed.mean())
        if self.info["milvus_index"] != "FLAT" and share * len(allowed) <= NAMED_ROWS:
            # A graph, or the nearest lists, may lead to none of so few.
            return _compared(self._client, self.info, queries_QD, depth, only=_filter(allowed))
        if min(share, 1 - share) * len(allowed) > NAMED_ROWS:
            fetched = min(int(2 * depth / share) + 64, MOST_RESULTS, len(self))
            scores_QK, rows_QK = _only(allowed, *_ask(self._client, self.info, queries_QD, fetched))
            if (rows_QK[:, depth - 1] != NO_ROW).all():
                return scores_QK[:, :depth], rows_QK[:, :depth]
        return _ask(self._client, self.info, queries_QD, depth, only=_filter(allowed))

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """RecipeError for an option that the chosen type does not take, or an address that is none or has a password.

        MissingExtraError where the library is absent, before any work.
        """
        _require_libraries(checked_options(options)["uri"])

    @classmethod
    def build(cls, vectors: Path, folder: Path, *, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Fill a collection, in batches, and check it; seed: of the vectors that recall is measured with.

        Raises ArtifactError if the collection holds another number of passages in the end, or finds too few of the best.
        """
        chosen = checked_options(options)
        source = SourceVectors(vectors, chosen["dim"])
        if chosen["num_lists"] > len(source):
            raise RecipeError(f"index.options.num_lists: {chosen['num_lists']:,} lists for {len(source):,} passages; at most one a passage")
        kind = _kind(chosen, len(source))
        name = f"simlm_{json_digest([file_digest(vectors), source.dim, kind])[:20]}"
        info = source.facts() | {"uri": chosen["uri"], "collection": name} | kind
        with _connected(folder, chosen["uri"]) as client:
            _fill(client, source, info, folder / STATE)
            _check_count(client, info)
            recall = _recall(client, source, info, chosen["check_queries"], seed)
        if recall is not None:
            info["recall_at_10"] = round(recall, 4)
            if recall < chosen["min_recall_percent"] / 100:
                raise ArtifactError(
                    f"{_place(chosen['uri'])}: collection {name} finds {recall:.1%} of the exact best {CHECKED_DEPTH}, "
                    f"{chosen['min_recall_percent']}% were asked for (index.options.min_recall_percent); search more of it "
                    "(ef_search, num_probes), or take milvus_index FLAT"
                )
        database = folder / DATABASE
        resident = sum(file.stat().st_size for file in database.rglob("*") if file.is_file()) if database.is_dir() else 0
        return info | {"resident_bytes": resident}


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options with defaults filled in; RecipeError for one that the chosen type does not take, or a password in the address."""
    chosen = filled_options("milvus", options, MilvusIndex.OPTIONS)
    takes = OF_KIND[chosen["milvus_index"]]
    for name in options:
        if any(name in names for names in OF_KIND.values()) and name not in takes:
            raise RecipeError(f"index.options.{name}: has no effect on milvus_index {chosen['milvus_index']}; leave it out")
    if chosen["uri"]:
        address = urlsplit(chosen["uri"])
        if address.scheme not in ("http", "https") or not address.hostname:
            raise RecipeError(f'index.options.uri: found {chosen["uri"]!r}; an address was expected, such as "http://localhost:19530"')
        if address.username or address.password:
            raise RecipeError(f"index.options.uri: an address with a password would be kept in manifests; put it into {TOKEN} instead")
    return chosen


def _kind(chosen: dict[str, Any], count: int) -> dict[str, Any]:
    """The type of Milvus's index with its options, sizes filled in."""
    kind = {"milvus_index": chosen["milvus_index"]} | {name: chosen[name] for name in OF_KIND[chosen["milvus_index"]]}
    if "num_lists" in kind:
        kind["num_lists"] = kind["num_lists"] or max(min(int(4 * count**0.5), count // 39), 1)
        kind["num_probes"] = kind["num_probes"] or min(max(kind["num_lists"] // 8, 8), kind["num_lists"])
    return kind


# --- connections


def _open_for_search(folder: Path, uri: str) -> tuple[Any, Any]:
    """A client, and what closes it.

    Milvus Lite lets one process at a time into a database and may write to it. So each opened index has a database of its own, in a
    temporary folder, that borrows the collections of the artifact, which stays as it is.
    """
    if uri:
        client = _client(uri, uri)
        return client, client.close
    collections = folder / DATABASE / "collections"
    if not collections.is_dir():
        raise ArtifactError(f"{collections}: absent, so this index holds no Milvus Lite collection; run the build_index step again")
    borrowed = Path(tempfile.mkdtemp(prefix="simlm-milvus-"))
    database = borrowed / DATABASE
    database.mkdir()
    (database / "collections").symlink_to(collections.resolve())
    try:
        client = _client(str(database), uri)
    except BaseException:
        shutil.rmtree(borrowed, ignore_errors=True)
        raise

    def close() -> None:
        _close_lite(client, database)
        shutil.rmtree(borrowed, ignore_errors=True)

    return client, close


@contextlib.contextmanager
def _connected(folder: Path, uri: str) -> Iterator[Any]:
    """A client that may write, for the time of a build."""
    database = folder / DATABASE
    client = _client(uri or str(database), uri)
    try:
        with _told(uri):
            yield client
    finally:
        if uri:
            client.close()
        else:
            _close_lite(client, database)


def _client(address: str, uri: str) -> Any:
    _require_libraries(uri)
    from pymilvus import MilvusClient

    with _told(uri):
        return MilvusClient(address, token=os.environ.get(TOKEN, "") if uri else "", timeout=TIMEOUT_SECONDS, dedicated=True)


def _require_libraries(uri: str) -> None:
    for library in ("pymilvus",) if uri else ("pymilvus", "milvus_lite"):
        require_extra(library, "milvus", "a milvus index")


def _close_lite(client: Any, database: Path) -> None:
    """Close the client and the server in this process, so that all of the collection is in its files."""
    from milvus_lite.server_manager import server_manager_instance

    client.close()
    server_manager_instance.release_server(str(database))


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    """What Milvus reports, as an error that says where."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        advice = "check that it runs and that the address is right" if uri else "run the build_index step again"
        if "auth" in str(error).lower() or "denied" in str(error).lower():
            advice = f"give its token in the environment variable {TOKEN}"
        raise SimlmError(f"{_place(uri)}: {str(error).strip()}; {advice}") from None


def _place(uri: str) -> str:
    return f"Milvus at {uri}" if uri else "Milvus Lite"


# --- building


def _fill(client: Any, source: SourceVectors, info: dict[str, Any], state: Path) -> None:
    """Bring every passage into the collection that is not there yet."""
    name = info["collection"]
    if not client.has_collection(name):
        _create(client, info)
    client.load_collection(name)
    start = _taken_over(client, info, state)
    size = max(BATCH_BYTES // (4 * source.dim), 1)
    resumed = start
    for first in range(start, len(source), size):
        block_PD = source.block(first, min(first + size, len(source)))
        rows = [{ROW: first + place, VECTOR: vector} for place, vector in enumerate(block_PD)]
        # Of the first batch of a resumed build some may be there already; of a database whose state is lost, any.
        put = client.upsert if first == resumed or not state.exists() else client.insert
        put(name, rows)
        write_json(state, {"collection": name, "rows": first + len(rows)})
    client.flush(name)
    client.load_collection(name)


def _create(client: Any, info: dict[str, Any]) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(ROW, DataType.INT64, is_primary=True)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=info["cut"])
    index = client.prepare_index_params()
    # One level deeper than the client's own form, which Milvus Lite 3.2 does not read; a server takes both.
    index.add_index(VECTOR, index_type=info["milvus_index"], metric_type="IP", params={"params": _build_params(info)})
    client.create_collection(info["collection"], schema=schema, index_params=index, consistency_level="Strong")


def _build_params(info: dict[str, Any]) -> dict[str, int]:
    if "hnsw_neighbours" in info:
        return {"M": info["hnsw_neighbours"], "efConstruction": info["ef_construction"]}
    return {"nlist": info["num_lists"]} if "num_lists" in info else {}


def _taken_over(client: Any, info: dict[str, Any], state: Path) -> int:
    """Passages, from the first on, that need not be sent again."""
    count = _count(client, info["collection"])
    if count == info["count"]:
        return count
    try:
        noted = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    done = int(noted["rows"]) if noted.get("collection") == info["collection"] else 0
    if done > count:
        # The database has lost what it had confirmed: all of it again.
        state.unlink()
        return 0
    return done


def _count(client: Any, name: str) -> int:
    (row,) = client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(row["count(*)"])


def _check_count(client: Any, info: dict[str, Any]) -> None:
    found = _count(client, info["collection"])
    if found != info["count"]:
        raise ArtifactError(
            f"{_place(info['uri'])}: collection {info['collection']} holds {found:,} passages, {info['count']:,} were expected; "
            "drop the collection and run the build_index step again"
        )


def _recall(client: Any, source: SourceVectors, info: dict[str, Any], num_queries: int, seed: int) -> float | None:
    """Share of the exact best 10 that the collection finds, for a sample of the passages as queries; None without queries.

    A passage counts if its exact score is that of the tenth best or higher: which of several equal ones comes is of no interest.
    """
    if num_queries == 0:
        return None
    queries_QD = source.sample(num_queries, np.random.default_rng([seed, 21]))
    depth = min(CHECKED_DEPTH, len(source))
    best_QK = np.full((len(queries_QD), depth), -np.inf, dtype=np.float32)
    for block_PD in source.blocks():
        both = np.concatenate([best_QK, queries_QD @ block_PD.T], axis=1)
        best_QK = -np.partition(-both, depth - 1, axis=1)[:, :depth]
    _, rows_QK = _ask(client, info, queries_QD, depth)
    found = 0
    for query_D, rows_K, worst in zip(queries_QD, rows_QK, best_QK.min(axis=1), strict=True):
        vectors_KD = np.concatenate([source.block(int(row), int(row) + 1) for row in rows_K if row != NO_ROW] or [query_D[None] * 0])
        found += int(np.count_nonzero(vectors_KD @ query_D >= worst - 1e-5))
    return found / best_QK.size


# --- searching


def _ask(client: Any, info: dict[str, Any], queries_QD: Floats, depth: int, *, only: str = "") -> Results:
    params: dict[str, int] = {}
    if "ef_search" in info:
        params = {"ef": max(info["ef_search"], depth)}
    elif "num_probes" in info:
        params = {"nprobe": info["num_probes"]}
    found = client.search(
        info["collection"],
        data=list(queries_QD),
        anns_field=VECTOR,
        limit=depth,
        filter=only,
        search_params={"metric_type": "IP", "params": params},
        output_fields=[ROW],
        consistency_level="Strong",
    )
    scores_QK, rows_QK = no_results(len(queries_QD), depth)
    for place, hits in enumerate(found):
        for rank, hit in enumerate(hits):
            rows_QK[place, rank], scores_QK[place, rank] = hit[ROW], hit["distance"]
    return scores_QK, rows_QK


def _compared(client: Any, info: dict[str, Any], queries_QD: Floats, depth: int, *, only: str) -> Results:
    """The best of a few passages, at least `depth`, whose vectors are fetched and compared here."""
    found = client.query(info["collection"], filter=only, output_fields=[ROW, VECTOR], consistency_level="Strong", limit=MOST_RESULTS)
    rows_P = np.array([hit[ROW] for hit in found], dtype=np.int64)
    vectors_PD = np.array([hit[VECTOR] for hit in found], dtype=np.float32)
    scores_QP, rows_QP = ordered(queries_QD @ vectors_PD.T, np.broadcast_to(rows_P, (len(queries_QD), len(rows_P))))
    return scores_QP[:, :depth], rows_QP[:, :depth]


def _only(allowed: NDArray[np.bool_], scores_QK: Floats, rows_QK: Ints) -> Results:
    """The same results without those that are not allowed; what is missing moves to the end."""
    left_out = (rows_QK == NO_ROW) | ~allowed[rows_QK]
    return ordered(np.where(left_out, -np.inf, scores_QK).astype(np.float32), np.where(left_out, NO_ROW, rows_QK))


def _filter(allowed: NDArray[np.bool_]) -> str:
    """An expression for the allowed rows that names the fewer: these, or the others."""
    few = np.count_nonzero(allowed) * 2 <= len(allowed)
    rows = np.flatnonzero(allowed if few else ~allowed)
    return f"{ROW} {'in' if few else 'not in'} [{','.join(map(str, rows.tolist()))}]"
