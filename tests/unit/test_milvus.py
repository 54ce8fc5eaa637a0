"""The Milvus index: on Milvus Lite in its folder, and on a server by address (Milvus Lite's own, over the same calls as a cluster)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simlm import artifacts
from simlm.artifacts import build_artifact, open_artifact, write_json
from simlm.errors import ArtifactError, MissingExtraError, RecipeError, SimlmError
from simlm.index import INFO, build_vectors, check_options, load_index, milvus, open_index
from tests.contracts import test_indexes as contract
from tests.contracts.test_indexes import build, vectors_of

pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")

__all__ = ["build"]
Build = Callable[..., Any]

PROMISES = [
    contract.test_recall_of_the_exact_best,
    contract.test_scores_are_those_of_the_vectors_that_are_kept,
    contract.test_opened_elsewhere_it_finds_the_same,
    contract.test_built_again_it_finds_the_same,
    contract.test_one_query_at_a_time_finds_the_same,
    contract.test_depth_beyond_the_corpus,
    contract.test_one_passage,
    contract.test_equal_passages_are_ordered_by_row,
    contract.test_no_queries,
    contract.test_queries_of_another_dimension,
    contract.test_half_precision_vectors,
    contract.test_a_mask_of_another_corpus_is_refused,
]


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type as a row of the contract."""
    monkeypatch.setitem(contract.ROWS, "milvus", contract.Row("milvus", 1.0))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Milvus server on loopback."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    running, database, port = start_server_in_thread(str(tmp_path_factory.mktemp("server") / "data"), host="127.0.0.1", port=0)
    yield f"http://127.0.0.1:{port}"
    running.stop(grace=1)
    database.close()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__.removeprefix("test_"))
def test_what_every_index_promises(build: Build, tmp_path: Path, promise: Callable[..., None]) -> None:
    places = {"tmp_path": tmp_path} if "tmp_path" in promise.__code__.co_varnames[: promise.__code__.co_argcount] else {}
    promise(build, "milvus", **places)


@pytest.mark.parametrize("kind", ["FLAT", "HNSW"])
def test_only_what_is_allowed_is_found(build: Build, kind: str) -> None:
    passages, queries = vectors_of(300, 1), vectors_of(20, 2)
    index = build("milvus", passages, milvus_index=kind)
    for allowed in contract.masks(300).values():
        wanted = min(12, int(allowed.sum()))
        scores, rows = index.search(queries, 12, allowed=allowed)
        contract.assert_well_formed(scores, rows, (20, 12), 300)
        assert allowed[rows[rows >= 0]].all()
        assert ((rows >= 0).sum(axis=1) == wanted).all()
        if wanted:
            assert contract.recall_of(rows, np.where(allowed, queries @ passages.T, -np.inf), wanted) >= 0.95


def test_many_that_are_not_allowed_are_left_out_afterwards(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, queries = vectors_of(300, 1), vectors_of(20, 2)
    index = build("milvus", passages)
    allowed = np.random.default_rng(3).random(300) < 0.5
    named = index.search(queries, 10, allowed=allowed)
    monkeypatch.setattr(milvus, "NAMED_ROWS", 5)
    monkeypatch.setattr(milvus, "_filter", lambda _: pytest.fail("a filter was written"))
    scores, rows = index.search(queries, 10, allowed=allowed)
    np.testing.assert_array_equal(rows, named[1])
    np.testing.assert_allclose(scores, named[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["HNSW", "IVF_FLAT", "IVF_SQ8", "AUTOINDEX"])
def test_the_other_types_of_milvus_are_good_enough(build: Build, kind: str) -> None:
    passages, queries = vectors_of(300, 1), vectors_of(20, 2)
    options = {"num_lists": 4, "num_probes": 4} if kind.startswith("IVF") else {}
    index = build("milvus", passages, milvus_index=kind, **options)
    scores, rows = index.search(queries, 10)
    contract.assert_well_formed(scores, rows, (20, 10), 300)
    assert contract.recall_of(rows, queries @ passages.T) >= 0.9
    assert 0.9 <= index.info["recall_at_10"] <= 1


def test_searching_leaves_the_artifact_as_it_is_and_lets_others_in(build: Build, tmp_path: Path) -> None:
    first = build("milvus", vectors_of(40, 1))
    second = open_index(tmp_path / "index")
    for index in (first, second):
        assert index.search(vectors_of(3, 2), 5)[1].shape == (3, 5)
    first.close()
    second.close()
    artifacts._verified.clear()
    open_artifact(tmp_path / "index", "index")


def test_memory_is_what_lies_in_the_database(build: Build) -> None:
    index = build("milvus", vectors_of(300, 1))
    assert index.info["resident_bytes"] > 300 * contract.DIM * 4


def build_on(folder: Path, vectors: np.ndarray[Any, Any], **options: Any) -> dict[str, Any]:
    """Build an index artifact, as the stage does."""
    np.save(folder.with_suffix(".npy"), vectors)
    with build_artifact(folder, kind="index", settings={"rows": len(vectors)}) as builder:
        info = build_vectors("milvus", folder.with_suffix(".npy"), builder.work, options=options, seed=3)
        write_json(builder.work / INFO, info | {"type": "milvus", "store_fingerprint": "s"})
    return info


def test_the_same_by_address_and_without_a_token_on_the_disk(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(milvus.TOKEN, "root:a-secret")
    passages, queries = vectors_of(300, 4), vectors_of(20, 5)
    info = build_on(tmp_path / "index", passages, uri=server)
    assert info["recall_at_10"] == 1.0
    assert not (tmp_path / "index" / milvus.DATABASE).exists()
    index = load_index(tmp_path / "index")
    build_on(tmp_path / "lite", passages)
    for left, right in zip(index.search(queries, 10), load_index(tmp_path / "lite").search(queries, 10), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
    for file in (tmp_path / "index").iterdir():
        assert b"a-secret" not in file.read_bytes()


def test_what_is_in_the_collection_is_not_sent_again(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = vectors_of(50, 6)
    build_on(tmp_path / "first", passages, uri=server)
    from pymilvus import MilvusClient

    monkeypatch.setattr(MilvusClient, "insert", lambda *_, **__: pytest.fail("sent again"))
    monkeypatch.setattr(MilvusClient, "upsert", lambda *_, **__: pytest.fail("sent again"))
    info = build_on(tmp_path / "second", passages, uri=server)
    assert info["count"] == 50


@pytest.mark.parametrize("where", ["lite", "server"])
def test_a_build_that_stopped_goes_on_where_it_was(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from pymilvus import MilvusClient

    options = {"uri": server} if where == "server" else {}
    passages = vectors_of(100, 7)
    monkeypatch.setattr(milvus, "BATCH_BYTES", 20 * contract.DIM * 4)
    sent: list[int] = []
    insert, upsert = MilvusClient.insert, MilvusClient.upsert

    def counted(put: Any) -> Any:
        def send(self: Any, name: str, data: Any, **given: Any) -> Any:
            if len(sent) == 3 and not given.pop("after", False):
                sent.append(-1)
                # The batch arrives, the note of it does not.
                put(self, name, data, **given)
                raise KeyboardInterrupt
            sent.append(data[0]["row"])
            return put(self, name, data, **given)

        return send

    monkeypatch.setattr(MilvusClient, "insert", counted(insert))
    monkeypatch.setattr(MilvusClient, "upsert", counted(upsert))
    with pytest.raises(KeyboardInterrupt):
        build_on(tmp_path / "index", passages, **options)
    assert sent == [0, 20, 40, -1]
    assert json.loads((tmp_path / ".index.work" / milvus.STATE).read_text(encoding="utf-8"))["rows"] == 60
    info = build_on(tmp_path / "index", passages, **options)
    assert sent[4:] == [60, 80]
    assert info["count"] == 100
    scores, rows = load_index(tmp_path / "index").search(passages[:100], 1)
    assert rows[:, 0].tolist() == list(range(100))
    np.testing.assert_allclose(scores, 1, rtol=1e-5)


def test_a_lost_database_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymilvus import MilvusClient

    passages = vectors_of(100, 8)
    monkeypatch.setattr(milvus, "BATCH_BYTES", 20 * contract.DIM * 4)
    flush = MilvusClient.flush
    monkeypatch.setattr(MilvusClient, "flush", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_on(tmp_path / "index", passages)
    shutil.rmtree(tmp_path / ".index.work" / milvus.DATABASE)
    monkeypatch.setattr(MilvusClient, "flush", flush)
    assert build_on(tmp_path / "index", passages)["recall_at_10"] == 1.0


def test_passages_too_few_are_noticed_when_it_is_opened(tmp_path: Path, server: str) -> None:
    from pymilvus import MilvusClient

    info = build_on(tmp_path / "index", vectors_of(30, 9), uri=server)
    client = MilvusClient(server)
    client.delete(info["collection"], ids=[3])
    with pytest.raises(ArtifactError, match=r"holds 29 passages, 30 were expected; drop"):
        load_index(tmp_path / "index")
    client.drop_collection(info["collection"])
    with pytest.raises(ArtifactError, match=r"there is no collection 'simlm_.*' in Milvus at http"):
        load_index(tmp_path / "index")
    client.close()


def test_poor_recall_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Milvus Lite may search a fresh collection exactly, whatever its index: what it finds is cut in half here.
    ask = milvus._ask

    def half(*given: Any, **more: Any) -> Any:
        scores_QK, rows_QK = ask(*given, **more)
        rows_QK[:, rows_QK.shape[1] // 2 :] = -1
        return scores_QK, rows_QK

    monkeypatch.setattr(milvus, "_ask", half)
    options = {"milvus_index": "IVF_FLAT", "num_lists": 50, "num_probes": 1}
    with pytest.raises(ArtifactError, match=r"of the exact best 10, 90% were asked for .*num_probes"):
        build_on(tmp_path / "index", vectors_of(300, 1), **options)
    info = build_on(tmp_path / "index", vectors_of(300, 1), min_recall_percent=0, **options)
    assert 0.1 <= info["recall_at_10"] < 0.9
    assert "recall_at_10" not in build_on(tmp_path / "unchecked", vectors_of(300, 1), check_queries=0, **options)


def test_more_results_than_milvus_gives(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "MOST_RESULTS", 20)
    index = build("milvus", vectors_of(30, 1))
    assert index.search(vectors_of(2, 2), 20)[1].shape == (2, 20)
    with pytest.raises(SimlmError, match=r"depth 21: Milvus gives at most 20"):
        index.search(vectors_of(2, 2), 21)


def test_no_server_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(SimlmError, match=r"Milvus at http://127\.0\.0\.1:9: .*; check that it runs"):
        build_on(tmp_path / "index", vectors_of(5, 1), uri="http://127.0.0.1:9")


def test_an_index_without_its_database(build: Build, tmp_path: Path) -> None:
    index = build("milvus", vectors_of(5, 1))
    shutil.rmtree(tmp_path / "index" / milvus.DATABASE)
    with pytest.raises(ArtifactError, match=r"collections: absent.*build_index"):
        milvus.MilvusIndex(tmp_path / "index", index.info)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milvus_index": "HNWS"}, r"milvus_index: found 'HNWS'; did you mean 'HNSW'"),
        ({"ef_search": 64}, r"ef_search: has no effect on milvus_index FLAT"),
        ({"milvus_index": "HNSW", "num_probes": 3}, r"num_probes: has no effect on milvus_index HNSW"),
        ({"uri": 5}, r"uri: found 5; a text was expected"),
        ({"uri": "milvus.example"}, r"uri: found 'milvus\.example'; an address was expected"),
        ({"uri": "https://root:word@milvus.example"}, r"uri: .*SIMLM_MILVUS_TOKEN"),
        ({"check_queries": -1}, r"check_queries: found -1; a whole number"),
        ({"urii": ""}, r"urii: unknown option .*did you mean 'uri'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_options("milvus", options)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"a milvus index needs the library 'pymilvus'.*simlm\[milvus\]"):
        check_options("milvus", {})


def test_more_lists_than_passages(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"num_lists: 10 lists for 5 passages"):
        build_on(tmp_path / "index", vectors_of(5, 1), milvus_index="IVF_FLAT", num_lists=10)
