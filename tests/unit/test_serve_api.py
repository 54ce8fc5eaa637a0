"""The server's API inside one process: every route, every refusal, and OpenAI's client."""

from __future__ import annotations

import base64
import concurrent.futures
import gc
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

import simlm
from simlm.additions import add_passages, delete_passages
from simlm.artifacts import read_manifest
from simlm.errors import ArtifactError, DataError
from simlm.models.precision import Precision, has_half_weights, has_int8
from simlm.searcher import open_run
from simlm.serve import engine as engine_module
from simlm.serve.app import create_app
from simlm.serve.engine import Engine, EngineSettings
from simlm.serve.guard import GuardSettings
from simlm.serve.logs import JsonLines
from simlm.serve.schemas import SearchRequest
from simlm.serve.served_run import ServedRun
from tests.toy.served import HARMFUL, make_served_run

QUERY = "which material is the granite kettle made of"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def engine(served_run: Path) -> Iterator[Engine]:
    engine = Engine(served_run, EngineSettings(batch_milliseconds=0.0))
    engine.open()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def app(engine: Engine) -> FastAPI:
    return create_app(engine)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    # Not as a context manager: the application does not start or stop the engine that other tests share.
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("precision", ["fp32", "int8", None])
def test_queries_are_encoded_in_the_precision_that_was_asked_for(served_run: Path, precision: Precision | None) -> None:
    computed = precision or ("fp16" if has_half_weights("cpu") else "fp32")
    if computed == "int8" and not has_int8("cpu"):
        pytest.skip("this processor has no products in 8-bit integers")
    other = Engine(served_run, EngineSettings(precision=precision))
    other.open()
    try:
        assert other.run.retriever().precision == computed
        exact = open_run(served_run).dense
        assert exact is not None
        difference = np.abs(other.run.retriever().encode_queries([QUERY]) - exact[0].encode_queries([QUERY])).max()
        assert difference == 0 if computed == "fp32" else 0 < difference < {"fp16": 1e-3, "int8": 5e-2}[computed]
    finally:
        other.close()


def search(client: TestClient, **body: Any) -> Any:
    response = client.post("/search", json={"query": QUERY} | body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    """The error, which must be of the shape that all have."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"type", "message", "param", "code"}
    assert error["code"] == code, error
    assert isinstance(error["type"], str)
    assert isinstance(error["message"], str)
    return dict(error)


# --- search


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
def test_search_answers_what_the_command_line_does(client: TestClient, served_run: Path, mode: Any) -> None:
    hits = search(client, mode=mode, k=7)["hits"]
    expected = simlm.open_run(served_run, mode=mode).search(QUERY, depth=7)
    assert [(hit["passage_id"], hit["rank"], hit["title"], hit["text"]) for hit in hits] == [
        (one.passage_id, one.rank, one.title, one.text) for one in expected
    ]
    assert [hit["score"] for hit in hits] == pytest.approx([one.score for one in expected], abs=1e-5)


def test_reranked_hits_are_in_the_order_of_the_cross_encoder(client: TestClient, served_run: Path) -> None:
    hits = search(client, mode="rerank", k=5)["hits"]
    expected = simlm.open_run(served_run, mode="hybrid", rerank=True).search(QUERY, depth=5)
    assert [hit["passage_id"] for hit in hits] == [one.passage_id for one in expected]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)


def test_a_hit_has_its_rank_and_score_in_every_list_that_was_made(client: TestClient) -> None:
    answer = search(client, compare=True, k=50)
    lists = answer["lists"]
    assert set(lists) == {"bm25", "dense", "hybrid", "rerank"}
    assert answer["mode"] == "hybrid"
    assert answer["hits"] == lists["hybrid"]
    places = {name: {hit["passage_id"]: (hit["rank"], hit["score"]) for hit in hits} for name, hits in lists.items()}
    for hit in lists["hybrid"][:5]:
        for name in lists:
            expected = places[name].get(hit["passage_id"])
            if expected is not None:
                assert (hit["ranks"][name], hit["scores"][name]) == expected
            else:
                assert hit["ranks"][name] is None or hit["ranks"][name] > 50


def test_lists_that_were_not_made_are_null(client: TestClient) -> None:
    (hit,) = search(client, mode="bm25", k=1)["hits"]
    assert hit["ranks"] == {"bm25": 1, "dense": None, "hybrid": None, "rerank": None}
    assert hit["scores"]["bm25"] == hit["score"]
    assert search(client, mode="bm25").get("lists") is None


def test_highlights_are_spans_of_text_and_title(client: TestClient) -> None:
    (hit,) = search(client, query="granite kettles repairing", mode="bm25", k=1, filters={"aspect": "made"})["hits"]
    assert [hit["text"][start:end] for start, end in hit["highlights"]] == ["repairs"]
    assert [hit["title"][start:end] for start, end in hit["title_highlights"]] == ["Granite", "Kettle"]


def test_filters_restrict_every_list_and_metadata_is_shown(client: TestClient) -> None:
    answer = search(client, compare=True, k=20, filters={"aspect": ["where", "made"], "even": True})
    for hits in answer["lists"].values():
        assert hits
        for hit in hits:
            assert hit["metadata"]["aspect"] in ("where", "made")
            assert hit["metadata"]["even"] is True
    assert [hit["rank"] for hit in answer["hits"]] == list(range(1, len(answer["hits"]) + 1))


def test_a_filter_that_fits_nothing_finds_nothing(client: TestClient) -> None:
    answer = search(client, filters={"aspect": "none has this"}, compare=True)
    assert answer["hits"] == []
    assert all(hits == [] for hits in answer["lists"].values())


def test_markup_in_a_passage_stays_text(client: TestClient) -> None:
    response = client.post("/search", json={"query": "alert teapot", "mode": "bm25", "k": 1})
    (hit,) = response.json()["hits"]
    assert (hit["text"], hit["title"]) == (HARMFUL["text"], HARMFUL["title"])
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_more_is_asked_for_than_there_is(client: TestClient) -> None:
    assert len(search(client, mode="dense", k=100)["hits"]) == 61


QUERIES = {
    "one character": "a",
    "as long as may be": "kettle " * 1428 + "xyz",
    "control characters": "\x00\x01\x1b[31mkettle\x7f\u202e",
    "emoji and marks": "\U0001fad6 e\u0301\u0301\u0301 \u200d \ufeff",
    "no letters": "?!...",
    "unknown words": "zzzzqqqq xxyyzz",
    "special tokens": "[CLS] [SEP] [MASK] kettle",
    "one word without an end": "x" * 10_000,
    "Chinese": "東京" * 3000,
    "markup": "<script>alert('x')</script> '; DROP TABLE passages; --",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid", "rerank"])
def test_any_text_can_be_searched_for(client: TestClient, query: str, mode: str) -> None:
    answer = search(client, query=query, mode=mode, k=3)
    assert answer["query"] == query
    for hit in answer["hits"]:
        assert math.isfinite(hit["score"])


# --- refusals


BAD_BODIES: dict[str, tuple[Any, int, str]] = {
    "empty query": ({"query": ""}, 422, "string_too_short"),
    "blank query": ({"query": " \n\t\u3000"}, 422, "string_pattern_mismatch"),
    "no query": ({}, 422, "missing"),
    "query of 100k tokens": ({"query": "kettle " * 100_000}, 422, "string_too_long"),
    "query that is no text": ({"query": 7}, 422, "string_type"),
    "k of 0": ({"query": "x", "k": 0}, 422, "greater_than_equal"),
    "k below 0": ({"query": "x", "k": -5}, 422, "greater_than_equal"),
    "k of a million": ({"query": "x", "k": 1_000_000}, 422, "less_than_equal"),
    "k of a half": ({"query": "x", "k": 1.5}, 422, "int_type"),
    "k as text": ({"query": "x", "k": "5"}, 422, "int_type"),
    "k as truth": ({"query": "x", "k": True}, 422, "int_type"),
    "truth as a number": ({"query": "x", "compare": 1}, 422, "bool_type"),
    "unknown field": ({"query": "x", "path": "/etc/passwd"}, 422, "extra_forbidden"),
    "unknown mode": ({"query": "x", "mode": "magic"}, 422, "literal_error"),
    "unknown filter": ({"query": "x", "filters": {"nobody": 1}}, 422, "unknown_filter"),
    "filter without values": ({"query": "x", "filters": {"aspect": []}}, 422, "too_short"),
    "nested filter": ({"query": "x", "filters": {"aspect": {"a": 1}}}, 422, "string_type"),
    "a list": ([1, 2], 422, "model_attributes_type"),
    "a text": ("x", 422, "model_attributes_type"),
    "nothing": (None, 422, "missing"),
}


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_wrong_search_is_refused_with_a_typed_error(client: TestClient, body: Any, status: int, code: str) -> None:
    error = refused(client.post("/search", json=body), status, code)
    assert "kettle kettle" not in error["message"]
    if code not in ("model_attributes_type", "unknown_filter") and body is not None:
        wrong = next((name for name in body if name != "query"), "query")
        assert str(error["param"]).partition("[")[0] == wrong
        assert error["message"].startswith(f"{error['param']}: ")


BAD_BYTES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "not UTF-8": (b'{"query": "caf\xe9"}', {}, 400, "invalid_body"),
    "half of JSON": (b'{"query": "x"', {}, 422, "json_invalid"),
    "half of a character": (b'{"query": "\\ud83d"}', {}, 422, "string_unicode"),
    "half of a character as a field": (b'{"query": "x", "filters": {"\\ud800": "y"}}', {}, 422, "unknown_filter"),
    "half of a character as an unknown key": (b'{"query": "x", "\\ud800": 1}', {}, 422, "string_unicode"),
    "deeply nested": (b"[" * 100_000, {}, 400, "invalid_body"),
    "a number of 10,000 digits": (b'{"query": "x", "k": ' + b"9" * 10_000 + b"}", {}, 400, "invalid_body"),
    "not a number": (b'{"query": "x", "k": NaN}', {}, 422, "int_type"),
    "a form": (b"query=x", {"content-type": "application/x-www-form-urlencoded"}, 415, "not_json"),
    "plain text": (b'{"query": "x"}', {"content-type": "text/plain"}, 415, "not_json"),
    "no type": (b'{"query": "x"}', {"content-type": ""}, 415, "not_json"),
    "compressed": (b"\x1f\x8b", {"content-encoding": "gzip"}, 415, "encoded_body"),
    "too large": (b'{"query": "' + b"x" * (5 * 2**20) + b'"}', {}, 413, "body_too_large"),
    "nothing": (b"", {}, 422, "missing"),
}


@pytest.mark.parametrize(("body", "headers", "status", "code"), BAD_BYTES.values(), ids=BAD_BYTES)
def test_a_body_that_is_no_json_is_refused(client: TestClient, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    response = client.post("/search", content=body, headers={"content-type": "application/json"} | headers)
    refused(response, status, code)


def test_a_body_in_pieces_is_measured_as_it_comes(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"query": "'
        for _ in range(50):
            yield b"x" * 100_000

    refused(client.post("/search", content=pieces(), headers={"content-type": "application/json"}), 413, "body_too_large")


@pytest.mark.parametrize(("method", "path"), [("GET", "/search"), ("POST", "/info"), ("DELETE", "/passages/x"), ("PUT", "/rerank")])
def test_other_methods_are_refused(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path)
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/page/../app.py", "/page/app.py", "/page/%2e%2e%2fapp.py", "/report/x", "/v1", "//etc/passwd"]
)
def test_unknown_paths_are_refused(client: TestClient, path: str) -> None:
    assert client.get(path).json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("name", ["nobody", "..%2fstore.json", "..%2f..%2fstore%2fstore.json", "/etc/passwd", "%00", "x" * 5000])
def test_a_passage_id_is_no_path(client: TestClient, name: str) -> None:
    refused(client.get(f"/passages/{name}"), 404, "passage_not_found")


# --- passages, info, report, page


@pytest.mark.parametrize(
    ("path", "passage_id"),
    [
        ("granite-kettle/where", "granite-kettle/where"),
        ("granite-kettle%2Fwhere", "granite-kettle/where"),
        ("odd%2F%3Cscript%3E%26%3F%23", HARMFUL["_id"]),
    ],
)
def test_a_passage_by_its_id(client: TestClient, path: str, passage_id: str) -> None:
    response = client.get(f"/passages/{path}")
    assert response.status_code == 200
    assert response.json()["passage_id"] == passage_id
    assert set(response.json()) == {"passage_id", "title", "text", "metadata"}


def test_info_says_what_can_be_asked(client: TestClient) -> None:
    info = client.get("/info").json()
    assert info | {"filter_fields": {}} == {
        "name": "tiny",
        "passages": 61,
        "modes": ["bm25", "dense", "hybrid", "rerank"],
        "default_mode": "hybrid",
        "retriever": "distilled",
        "example_query": "what do you need to keep the granite kettle working",
        "filter_fields": {},
        "has_report": True,
        "max_k": 100,
        "max_query_characters": 10_000,
    }
    fields = info["filter_fields"]
    assert list(fields) == ["subject", "aspect", "number", "even"]
    assert fields["aspect"] == ["made", "needs", "origin", "what", "where", "<script>&?#"]
    assert fields["even"] == ["true", "false"]
    assert len(fields["number"]) == 50


def test_the_report_is_data_and_a_page_with_its_own_policy(client: TestClient, served_run: Path) -> None:
    report = client.get("/report").json()
    assert report["html"] is True
    assert report["metrics"] == json.loads((served_run / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in report["steps"]] == ["store", "bm25", "distilled", "bm25_run", "distilled_run"]
    assert {"step": "distilled", "kind": "train", "measure": "loss", "points": [[1.0, 2.0], [2.0, 1.0], [3.0, 2.0 / 3]]} in report["curves"]
    assert report["losses"][0]["values"]["bm25"] > report["losses"][0]["values"]["final"]
    page = client.get("/report.html")
    assert page.content == (served_run / "report" / "report.html").read_bytes()
    assert page.headers["content-security-policy"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"


def test_a_report_from_before_there_was_report_json(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    manifest = json.loads((run / "report" / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["report.json"]
    (run / "report" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (run / "report" / "report.json").unlink()
    old, new = ServedRun(run).report, ServedRun(served_run).report
    assert old is not None
    assert new is not None
    assert (old.data["wins"], old.data["losses"]) == (None, None)
    for name in ("metrics", "verdicts", "curves", "versions", "html"):
        assert old.data[name] == new.data[name], name
    assert sorted(step["name"] for step in old.data["steps"]) == sorted(step["name"] for step in new.data["steps"])


def test_a_run_without_report_and_reranker(tmp_path: Path) -> None:
    run = ServedRun(make_served_run(tmp_path / "bare", report=False, reranker=False))
    assert (run.modes, run.default_mode, run.info["has_report"]) == (("bm25", "dense", "hybrid"), "hybrid", False)
    engine = Engine(tmp_path / "bare")
    engine.open()
    client = TestClient(create_app(engine))
    refused(client.post("/search", json={"query": "x", "mode": "rerank"}), 422, "mode_not_available")
    refused(client.post("/rerank", json={"query": "x", "documents": ["y"]}), 404, "no_reranker")
    refused(client.get("/report"), 404, "no_report")
    refused(client.get("/report.html"), 404, "no_report")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["distilled"]
    engine.close()


def test_a_run_of_bm25_alone(served_run: Path, tmp_path: Path) -> None:
    for name in ("store", "bm25"):
        shutil.copytree(served_run / name, tmp_path / "run" / name)
    engine = Engine(tmp_path / "run")
    engine.open()
    client = TestClient(create_app(engine))
    info = client.get("/info").json()
    assert (info["modes"], info["default_mode"], info["retriever"], info["has_report"]) == (["bm25"], "bm25", None, False)
    assert search(client)["mode"] == "bm25"
    refused(client.post("/v1/embeddings", json={"input": "x", "model": "distilled"}), 404, "no_retriever")
    engine.close()


def test_the_page_has_a_strict_policy(client: TestClient) -> None:
    response = client.get("/")
    if response.status_code == 404:
        refused(response, 404, "no_page")
        return
    assert response.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert client.get("/page/page.js").headers["content-type"].startswith("text/javascript")


# --- health, metrics, logs


def test_health_ready_and_metrics(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    for number in range(3):
        client.get(f"/nothing/{number}")
        client.get(f"/passages/{number}")
    text = client.get("/metrics").text
    assert 'simlm_requests_total{method="GET",path="/passages/{passage_id:path}",status="404"}' in text
    assert "/nothing/" not in text
    assert "simlm_passages 61.0" in text
    assert 'simlm_waiting{lane="search"} 0.0' in text


def test_logs_are_json_lines_without_what_was_searched_for(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="simlm.serve"):
        search(client, query="a secret illness", k=3)
    (record,) = caplog.records
    line = json.loads(JsonLines().format(record))
    assert line["event"] == "request"
    assert (line["path"], line["status"], line["k"], line["mode"]) == ("/search", 200, 3, "hybrid")
    assert "secret" not in json.dumps(line)


def test_queries_are_logged_where_that_is_asked_for(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(create_app(engine, GuardSettings(log_queries=True)))
    with caplog.at_level(logging.INFO, logger="simlm.serve"):
        search(client, query="a secret illness")
    assert json.loads(JsonLines().format(caplog.records[0]))["query"] == "a secret illness"


def test_a_request_keeps_its_own_id_if_it_is_a_plain_one(client: TestClient) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/health", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


def test_a_fault_of_the_server_is_typed_and_says_nothing_of_itself(
    engine: Engine, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("/home/somebody/secret")

    monkeypatch.setattr(engine.run, "passage", broken)
    response = client.get("/passages/x")
    error = refused(response, 500, "internal")
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert "ZeroDivisionError" in caplog.text


# --- tokens, hosts, origins


@pytest.fixture(scope="module")
def guarded(engine: Engine) -> TestClient:
    return TestClient(create_app(engine, GuardSettings(token="open sesame")))


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic open sesame", "bearer open sesam", "open sesame"])
def test_without_the_token_only_the_page_and_the_sign_of_life_answer(guarded: TestClient, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in ("/info", "/ready", "/metrics", "/passages/x", "/report", "/report.html", "/openapi.json", "/nothing", "/v1/models"):
        response = guarded.get(path, headers=headers)
        refused(response, 401, "invalid_token")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/search", "/v1/embeddings", "/rerank", "/admin/reload"):
        refused(guarded.post(path, json={"query": "x"}, headers=headers), 401, "invalid_token")
    assert guarded.get("/health", headers=headers).status_code == 200
    assert guarded.get("/", headers=headers).status_code in (200, 404)


def test_with_the_token_all_answer(guarded: TestClient) -> None:
    headers = {"authorization": "Bearer open sesame"}
    assert guarded.get("/info", headers=headers).status_code == 200
    assert guarded.post("/search", json={"query": "kettle"}, headers=headers | {"authorization": "bearer open sesame"}).status_code == 200
    assert guarded.post("/admin/reload", headers=headers).json()["status"] == "reloaded"


@pytest.mark.parametrize("origin", ["http://[", "null", ""])
def test_an_origin_that_is_no_address_is_another_origin(engine: Engine, origin: str) -> None:
    client = TestClient(create_app(engine, GuardSettings(token="open sesame")), raise_server_exceptions=False)
    refused(client.get("/health", headers={"origin": origin}), 403, "origin_not_allowed")
    assert client.get("/health", headers={"origin": "http://testserver"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_what_watches_a_server_may_ask_for_the_headers_alone(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == 200


def test_a_run_that_cannot_be_opened_for_any_reason_is_told(served_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine_module, "ServedRun", out_of_memory)
    told: list[Exception | None] = []
    with TestClient(create_app(Engine(served_run), on_opened=told.append)):
        deadline = time.monotonic() + 30
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [str(failure) for failure in told] == ["out of memory"]


def test_a_loopback_server_answers_to_its_own_names_only(engine: Engine) -> None:
    app = create_app(engine, GuardSettings(hosts=frozenset({"localhost", "127.0.0.1", "::1"})))
    for host in ("localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "LOCALHOST"):
        assert TestClient(app).get("/info", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8080", "", "[::1", "127.0.0.2"):
        refused(TestClient(app).get("/info", headers={"host": host}), 403, "host_not_allowed")


def test_pages_of_other_origins_are_refused(client: TestClient) -> None:
    body = {"query": "kettle"}
    assert client.post("/search", json=body, headers={"origin": "http://testserver"}).status_code == 200
    for origin in ("http://evil.example", "null", "http://testserver.evil.example"):
        refused(client.post("/search", json=body, headers={"origin": origin}), 403, "origin_not_allowed")
    assert "access-control-allow-origin" not in client.get("/info").headers


def test_without_a_token_a_reload_is_for_this_machine_only(app: FastAPI) -> None:
    refused(TestClient(app, client=("192.0.2.1", 1)).post("/admin/reload"), 403, "not_local")
    assert TestClient(app, client=("127.0.0.1", 1)).post("/admin/reload").json()["passages"] == 61


# --- OpenAI's, Cohere's and Jina's clients


def test_the_openai_client_works_unchanged(app: FastAPI, served_run: Path) -> None:
    import httpx2
    import openai

    http = TestClient(app, base_url="http://testserver")
    assert isinstance(http, httpx2.Client)
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http)
    texts = ["the granite kettle", "a paper lighthouse folds its lamp", ""]
    expected = simlm.load_retriever(served_run / "distilled").encode_passages(texts)
    for wanted in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="distilled", input=texts, **wanted)
        vectors = [
            np.frombuffer(base64.b64decode(one.embedding), "<f4") if isinstance(one.embedding, str) else np.array(one.embedding)
            for one in answer.data
        ]
        np.testing.assert_allclose(np.array(vectors), expected, atol=1e-5)
        assert [one.index for one in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(texts)
    assert client.embeddings.create(model="distilled", input="one text").data[0].object == "embedding"
    assert {model.id for model in client.models.list()} == {"distilled", "reranker"}
    with pytest.raises(openai.NotFoundError, match="is called 'distilled'"):
        client.embeddings.create(model="text-embedding-3-small", input="x")
    with pytest.raises(openai.UnprocessableEntityError, match="lists of token numbers"):
        client.embeddings.create(model="distilled", input=[[1, 2, 3]])


def test_embeddings_of_queries_and_of_fewer_dimensions(client: TestClient, served_run: Path) -> None:
    retriever = simlm.load_retriever(served_run / "distilled")

    def vectors(**body: Any) -> Any:
        response = client.post("/v1/embeddings", json={"model": "distilled", "input": [QUERY], **body})
        assert response.status_code == 200, response.text
        return np.array([one["embedding"] for one in response.json()["data"]])

    np.testing.assert_allclose(vectors(input_type="query"), retriever.encode_queries([QUERY]), atol=1e-5)
    cut = retriever.encode_passages([QUERY])[:, :16]
    np.testing.assert_allclose(vectors(dimensions=16), cut / np.linalg.norm(cut), atol=1e-5)
    assert vectors(dimensions=32).shape == (1, 32)
    error = refused(
        client.post("/v1/embeddings", json={"model": "distilled", "input": "x", "dimensions": 20}), 422, "dimensions_not_available"
    )
    assert error["message"] == "dimensions 20: this model's vectors have 8, 16, 32"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ([], "too_short"),
        ([1, 2], "token_lists_not_supported"),
        ([["a"]], "token_lists_not_supported"),
        ({}, "string_type"),
        (None, "string_type"),
    ],
)
def test_wrong_inputs_for_embeddings(client: TestClient, given: Any, code: str) -> None:
    refused(client.post("/v1/embeddings", json={"model": "distilled", "input": given}), 422, code)


def test_embeddings_are_the_same_whatever_else_is_asked_at_the_same_time(client: TestClient, served_run: Path) -> None:
    texts = [f"{word} {number} " * (number % 7 + 1) for number, word in enumerate(["kettle", "lamp", "bridge", "drum"] * 20)]
    expected = simlm.load_retriever(served_run / "distilled").encode_passages(texts)

    def one(number: int) -> list[float]:
        response = client.post("/v1/embeddings", json={"model": "distilled", "input": texts[number]})
        assert response.status_code == 200, response.text
        return list(response.json()["data"][0]["embedding"])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        np.testing.assert_allclose(np.array(list(pool.map(one, range(len(texts))))), expected, atol=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_orders_documents_by_the_logits(client: TestClient, served_run: Path, path: str) -> None:
    documents = [f"{word} and the granite kettle" for word in ("stone", "water", "lamp", "goose")]
    logits = simlm.load_reranker(served_run / "reranker").score(QUERY, documents)
    order = sorted(range(4), key=lambda index: -logits[index])
    mixed = [documents[0], {"text": documents[1]}, documents[2], documents[3]]
    answer = client.post(path, json={"query": QUERY, "documents": mixed, "top_n": 3, "return_documents": True, "model": "reranker"}).json()
    assert [result["index"] for result in answer["results"]] == order[:3]
    assert [result["document"]["text"] for result in answer["results"]] == [documents[index] for index in order[:3]]
    scores = [1 / (1 + math.exp(-float(logits[index]))) for index in order[:3]]
    assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(scores, abs=1e-5)
    plain = client.post(path, json={"query": QUERY, "documents": documents}).json()
    assert len(plain["results"]) == 4
    assert set(plain["results"][0]) == {"index", "relevance_score"}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"query": "x", "documents": []}, 422, "too_short"),
        ({"query": "x", "documents": ["y"] * 1001}, 422, "too_long"),
        ({"query": "x", "documents": ["y"], "top_n": 0}, 422, "greater_than_equal"),
        ({"query": "x", "documents": ["y"], "top_n": True}, 422, "int_type"),
        ({"query": "", "documents": ["y"]}, 422, "string_too_short"),
        ({"query": "x", "documents": ["y"], "model": "rerank-v3.5"}, 404, "model_not_found"),
        ({"query": "x", "documents": [{"body": "y"}]}, 422, "missing"),
    ],
)
def test_wrong_requests_to_rerank(client: TestClient, body: Any, status: int, code: str) -> None:
    refused(client.post("/rerank", json=body), status, code)


# --- busy, late, stopping


def test_a_full_queue_answers_429_and_loses_nothing(served_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(served_run, EngineSettings(max_waiting=2, max_batch=1, batch_milliseconds=0.0, search_threads=1))
    engine.open()
    go = threading.Event()
    answers = engine.run.answers
    monkeypatch.setattr(engine.run, "answers", lambda asked: go.wait(30) and answers(asked))
    client = TestClient(create_app(engine))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(client.post, "/search", json={"query": f"kettle {number}"}) for number in range(8)]
        done, _ = concurrent.futures.wait(futures, timeout=20, return_when=concurrent.futures.FIRST_COMPLETED)
        while len([future for future in futures if future.done()]) < 5:
            time.sleep(0.01)
        go.set()
        responses = [future.result(30) for future in futures]
    refusals = [response for response in responses if response.status_code == 429]
    assert len(done) >= 1
    assert len(refusals) == 5
    assert sum(response.status_code == 200 for response in responses) == 3
    for response in refusals:
        refused(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
    assert 'simlm_refused_total{lane="search"} 5.0' in client.get("/metrics").text
    engine.close()


def test_a_late_answer_is_504_and_the_work_is_given_up(served_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(served_run, EngineSettings(timeout_seconds=0.2))
    engine.open()
    retriever = engine.run.retriever()
    encoded: list[int] = []
    encode = retriever.encode_passages

    def slow(texts: list[str]) -> Any:
        encoded.append(len(texts))
        time.sleep(0.3)
        return encode(texts)

    monkeypatch.setattr(retriever, "encode_passages", slow)
    client = TestClient(create_app(engine))
    refused(client.post("/v1/embeddings", json={"model": "distilled", "input": ["x"] * 200}), 504, "timeout")
    engine.close()
    assert encoded == [engine_module.CHUNK]


def test_while_it_loads_only_health_answers(served_run: Path) -> None:
    engine = Engine(served_run)
    client = TestClient(create_app(engine))
    assert client.get("/health").status_code == 200
    response = client.get("/ready")
    assert (response.status_code, response.json()) == (503, {"status": "loading"})
    response = client.post("/search", json={"query": "x"})
    refused(response, 503, "loading")
    assert int(response.headers["retry-after"]) >= 1
    engine.close()


def test_the_application_opens_and_closes_its_engine(served_run: Path) -> None:
    engine = Engine(served_run)
    with TestClient(create_app(engine)) as client:
        deadline = time.monotonic() + 60
        while client.get("/ready").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert search(client)["hits"]
    assert engine.status == "stopping"
    client = TestClient(create_app(engine))
    refused(client.post("/search", json={"query": "x"}), 503, "stopping")
    assert client.get("/ready").json() == {"status": "stopping"}


# --- reload, damage, parts that do not fit


def test_a_reload_answers_from_the_new_state_and_loses_no_request(tmp_path: Path) -> None:
    run = make_served_run(tmp_path / "run", report=False, reranker=False)
    other = make_served_run(tmp_path / "other", seed=8, report=False, reranker=False)
    engine = Engine(run, EngineSettings(max_waiting=1000))
    engine.open()
    assert gc.get_freeze_count() > 0
    client = TestClient(create_app(engine), client=("127.0.0.1", 1))
    before = search(client, mode="dense")["hits"]
    stop = threading.Event()
    statuses: list[int] = []

    def keep_asking() -> None:
        while not stop.is_set():
            statuses.append(client.post("/search", json={"query": QUERY}).status_code)

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ("distilled", "distilled_embeddings", "distilled_index"):
        shutil.rmtree(run / name)
        shutil.copytree(other / name, run / name)
    # Its store is the same in all but the time it was made, which is not in the fingerprint.
    assert client.post("/admin/reload").json()["status"] == "reloaded"
    stop.set()
    for thread in threads:
        thread.join()
    after = search(client, mode="dense")["hits"]
    assert [hit["score"] for hit in after] != [hit["score"] for hit in before]
    assert len(statuses) > 3
    assert set(statuses) == {200}
    engine.close()
    assert gc.get_freeze_count() == 0


def test_a_reload_that_fails_leaves_the_old_state(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    engine = Engine(run)
    engine.open()
    client = TestClient(create_app(engine), client=("127.0.0.1", 1))
    shutil.rmtree(run / "distilled_embeddings")
    response = client.post("/admin/reload")
    refused(response, 409, "reload_failed")
    assert str(tmp_path) not in response.text
    assert search(client)["hits"]
    engine.close()


def test_a_changed_index_file_is_refused_at_start(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    (file,) = (run / "distilled_index").glob("vectors*")
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="its SHA-256 is not the one in the manifest"):
        Engine(run).open()


@pytest.mark.parametrize("name", ["distilled", "distilled_embeddings", "reranker"])
def test_parts_of_another_run_are_refused_at_start(served_run: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    manifest = json.loads((run / name / "manifest.json").read_text(encoding="utf-8"))
    if name == "reranker":
        manifest["inputs"]["store"] = "of another corpus"
    else:
        manifest["fingerprint"] = "of another run"
    (run / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError, match="was made from an earlier"):
        Engine(run).open()
    assert read_manifest(run / name).kind


# --- block list


def test_a_blocked_passage_is_shown_nowhere(served_run: Path, tmp_path: Path) -> None:
    harmful = "granite-kettle/made"
    (tmp_path / "blocked").write_text(
        "\n".join([harmful, json.dumps({"regex": "(?i)<SCRIPT>"}), json.dumps({"field": "subject", "equals": "silent-drum"})]),
        encoding="utf-8",
    )
    engine = Engine(served_run, EngineSettings(block_list=tmp_path / "blocked"))
    engine.open()
    client = TestClient(create_app(engine))
    blocked = {harmful, HARMFUL["_id"], *(f"silent-drum/{aspect}" for aspect in ("where", "what", "made", "origin", "needs"))}
    for query in (QUERY, "silent drum temple", "alert teapot"):
        for filters in ({}, {"subject": ["granite-kettle", "silent-drum", "odd"]}):
            answer = search(client, query=query, compare=True, k=100, filters=filters)
            shown = {hit["passage_id"] for hits in (answer["hits"], *answer["lists"].values()) for hit in hits}
            assert shown
            assert not shown & blocked
            assert [hit["rank"] for hit in answer["lists"]["dense"]] == list(range(1, len(answer["lists"]["dense"]) + 1))
    for passage_id in blocked:
        refused(client.get("/passages/" + quote(passage_id, safe="")), 404, "passage_not_found")
    info = client.get("/info").json()
    assert info["passages"] == 61 - len(blocked)
    assert "silent-drum" not in info["filter_fields"]["subject"]
    refused(client.get("/report.html"), 404, "no_report_page")
    report = client.get("/report")
    assert report.json()["html"] is False
    assert "felt and cedar wood" not in report.text
    assert "patient fingers" not in report.text
    engine.close()


def test_a_block_list_with_a_bad_rule_stops_the_start(served_run: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text('{"regex": "("}', encoding="utf-8")
    with pytest.raises(DataError, match="blocked:1"):
        Engine(served_run, EngineSettings(block_list=tmp_path / "blocked")).open()


# --- passages that were added and deleted


def test_the_report_quotes_no_deleted_passage(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    quoted = TestClient(create_app(opened(run))).get("/report").json()["losses"][0]["positive"]
    delete_passages(run, [quoted["passage_id"]])
    client = TestClient(create_app(opened(run)))
    report = client.get("/report")
    assert report.json()["losses"][0]["positive"]["passage_id"] == quoted["passage_id"]
    assert len(quoted["text"]) > 10
    assert quoted["text"] not in report.text
    refused(client.get("/report.html"), 404, "no_report_page")


def test_the_report_does_not_quote_the_text_that_was_replaced(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    quoted = TestClient(create_app(opened(run))).get("/report").json()["losses"][0]["positive"]
    (tmp_path / "new.jsonl").write_text(json.dumps({"_id": quoted["passage_id"], "text": "Another text."}), encoding="utf-8")
    add_passages(run, tmp_path / "new.jsonl", replace=True)
    assert quoted["text"] not in TestClient(create_app(opened(run))).get("/report").text


def opened(run: Path) -> Engine:
    engine = Engine(run)
    engine.open()
    return engine


def test_added_passages_are_found_and_deleted_ones_are_not(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    added = {"_id": "new/owl", "title": "Porcelain Owl", "text": "A porcelain owl never blinks.", "metadata": {"aspect": "new"}}
    (tmp_path / "new.jsonl").write_text(json.dumps(added), encoding="utf-8")
    engine = Engine(run)
    engine.open()
    client = TestClient(create_app(engine), client=("127.0.0.1", 1))
    add_passages(run, tmp_path / "new.jsonl")
    delete_passages(run, ["granite-kettle/made"])
    assert client.get("/passages/granite-kettle/made").status_code == 200
    assert client.post("/admin/reload").json()["passages"] == 61
    refused(client.get("/passages/granite-kettle/made"), 404, "passage_not_found")
    (hit,) = search(client, query="porcelain owl", mode="hybrid", filters={"aspect": "new"})["hits"]
    assert (hit["passage_id"], hit["metadata"], hit["title_highlights"]) == ("new/owl", {"aspect": "new"}, [[0, 9], [10, 13]])
    shown = {hit["passage_id"] for hits in search(client, compare=True, k=100)["lists"].values() for hit in hits}
    assert "granite-kettle/made" not in shown
    assert client.get("/info").json()["filter_fields"]["aspect"].count("new") == 1
    engine.close()


# --- batches


def test_searches_that_come_together_go_through_the_model_together(served_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(served_run, EngineSettings(batch_milliseconds=200.0, max_batch=8, search_threads=1))
    engine.open()
    retriever = engine.run.retriever()
    sizes: list[int] = []
    encode = retriever.encode_queries

    def watched(queries: list[str]) -> Any:
        sizes.append(len(queries))
        return encode(queries)

    monkeypatch.setattr(retriever, "encode_queries", watched)
    client = TestClient(create_app(engine))
    bodies = [
        {"query": f"{QUERY} {number}", "k": number + 1, "mode": mode} for number, mode in enumerate(["dense", "hybrid", "dense", "hybrid"])
    ]
    alone = [engine.run.answers([engine.run.asked(SearchRequest(**body))])[0] for body in bodies]
    sizes.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = [response.json() for response in pool.map(lambda body: client.post("/search", json=body), bodies)]
    assert max(sizes) > 1
    for one, other in zip(alone, together, strict=True):
        assert [hit["passage_id"] for hit in one["hits"]] == [hit["passage_id"] for hit in other["hits"]]
    engine.close()


# --- the OpenAPI document


def test_the_openapi_document_names_the_errors_of_every_path(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"200", "401", "403", "405", "500"} <= set(operation["responses"]), path
    assert document["components"]["schemas"]["SearchRequest"]["additionalProperties"] is False
    assert {"429", "504"} <= set(document["paths"]["/search"]["post"]["responses"])
