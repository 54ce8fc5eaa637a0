"""The server as a process: start, signals, slow and silent clients, agents; over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from simlm.artifacts import read_manifest
from simlm.serve import launch
from tests.toy.served import HARMFUL

SIMLM = [sys.executable, "-c", "from simlm.cli import main; main()"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "SIMLM_TOKEN"} | {"OMP_NUM_THREADS": "1"}
PATIENCE = """
from simlm.serve import launch
launch.HEADER_SECONDS = launch.BODY_SECONDS = 0.5
launch.MAX_CONNECTIONS = 8
launch.WRITE_SECONDS = 1.0
from simlm.cli import main
main()
"""


class Served:
    """A running server. lines: what it wrote to standard error so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listening.wait(120), self.lines
        self.port = int(next(line for line in self.lines if "http://" in line).split("http://")[1].split()[0].rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "http://" in line:
                self._listening.set()
        self._listening.set()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if httpx2.get(f"{self.url}/ready").status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError("".join(self.lines))

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def served(run: Path, *options: str, command: list[str] = SIMLM, ready: bool = True) -> Iterator[Served]:
    arguments = [*command, "serve", str(run), "--port", "0", *options]
    server = Served(subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT))
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(served_run: Path) -> Iterator[Served]:
    with served(served_run, "--mcp-http", command=[sys.executable, "-c", PATIENCE]) as running:
        yield running


def test_it_answers_on_loopback(server: Served) -> None:
    answer = httpx2.post(f"{server.url}/search", json={"query": "granite kettle", "k": 3}).json()
    assert len(answer["hits"]) == 3
    passage = httpx2.get(f"{server.url}/passages/odd%2F%3Cscript%3E%26%3F%23").json()
    assert passage["passage_id"] == HARMFUL["_id"]
    assert all(json.loads(line)["event"] for line in server.lines if line.startswith("{"))


def test_cohere_client_works_unchanged(server: Served) -> None:
    import cohere
    import httpx

    documents = ["a lamp", "the granite kettle", "a drum"]
    with httpx.Client() as http:
        client = cohere.ClientV2(api_key="any", base_url=server.url, httpx_client=http)
        answer = client.rerank(model="reranker", query="granite kettle", documents=documents, top_n=2)
    assert len(answer.results) == 2
    assert {result.index for result in answer.results} < {0, 1, 2}
    assert answer.results[0].relevance_score >= answer.results[1].relevance_score


# --- slow, silent and broken clients


def connected(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not part:
            return received
        received += part


@pytest.mark.parametrize("sent", [b"", b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-"])
def test_headers_that_do_not_come_end_the_connection(server: Served, sent: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        assert until_closed(connection) == b""
        assert time.monotonic() - started < 15


def test_answers_that_are_not_taken_end_the_connection(server: Served) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 600)
        # Nothing is read. Once the server has given up, what is sent is answered by a reset.
        deadline = time.monotonic() + 20
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b"x")
                time.sleep(0.2)


def test_headers_that_come_drop_by_drop_end_the_connection(server: Served) -> None:
    with connected(server) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        for character in b"GET /health HTTP/1.1\r\nx-slow: " + b"a" * 200:
            connection.sendall(bytes([character]))
            time.sleep(0.1)


def test_a_body_that_does_not_come_is_408(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code": "slow_body"' in answer


def test_what_is_not_http_is_a_typed_400(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(b"\x16\x03\x01\x02 this is not HTTP\r\n\r\n")
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "invalid_http"


def test_headers_without_an_end_are_refused(server: Served) -> None:
    with connected(server) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"x-a: " + b"b" * (launch.MAX_HEADER_BYTES + 1000))
        except (BrokenPipeError, ConnectionResetError):
            return
        assert until_closed(connection).startswith((b"HTTP/1.1 400 ", b""))


def test_more_connections_than_may_be_are_told_503(server: Served) -> None:
    connections: list[socket.socket] = []
    try:
        connections += [connected(server) for _ in range(12)]
        answers = [until_closed(connection) for connection in connections]
        assert any(answer.startswith(b"HTTP/1.1 503 ") and b"retry-after" in answer.lower() for answer in answers)
    finally:
        for connection in connections:
            connection.close()
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_client_that_leaves_costs_no_more_than_its_turn(server: Served) -> None:
    body = json.dumps({"query": "granite kettle", "mode": "rerank"}).encode()
    head = f"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    for _ in range(5):
        with connected(server) as connection:
            connection.sendall(head.encode() + body)
    assert httpx2.post(f"{server.url}/search", json={"query": "granite kettle"}).status_code == 200


# --- agents


def found_by_agent(target: Any) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    from mcp.client import Client

    async def ask() -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
        async with Client(target) as client:
            tools = [tool.name for tool in (await client.list_tools()).tools]
            hits = await client.call_tool(
                "search", {"query": "granite kettle made of", "k": 3, "mode": "bm25", "filters": {"aspect": "made"}}
            )
            whole = await client.call_tool("get_passage", {"passage_id": "granite-kettle/made"})
            wrong = await client.call_tool("get_passage", {"passage_id": "../store"})
            assert wrong.is_error
            assert hits.structured_content is not None
            assert whole.structured_content is not None
            return tools, hits.structured_content, whole.structured_content, str(wrong.content)

    return asyncio.run(asyncio.wait_for(ask(), 120))


def check_tools(found: tuple[list[str], dict[str, Any], dict[str, Any], str]) -> None:
    tools, hits, whole, wrong = found
    assert tools == ["search", "get_passage"]
    assert hits["passages"][0]["passage_id"] == "granite-kettle/made"
    assert all(passage["metadata"]["aspect"] == "made" for passage in hits["passages"])
    assert whole["text"].startswith("It is made of a thick stone wall")
    assert "no passage has this id" in wrong


def test_an_agent_searches_over_http(server: Served) -> None:
    check_tools(found_by_agent(f"{server.url}/mcp"))


def test_an_agent_searches_over_standard_input_and_output(served_run: Path) -> None:
    from mcp.client.stdio import StdioServerParameters, stdio_client

    arguments = [*SIMLM[1:], "serve", str(served_run), "--mcp"]
    check_tools(found_by_agent(stdio_client(StdioServerParameters(command=SIMLM[0], args=arguments, env=dict(ENVIRONMENT)))))


# --- start, reload, stop


def test_a_signal_to_stop_finishes_what_was_accepted(served_run: Path) -> None:
    statuses: list[int] = []
    with served(served_run) as server, httpx2.Client() as warm:
        assert warm.get(f"{server.url}/health").status_code == 200

        def ask(number: int) -> None:
            answer = httpx2.post(f"{server.url}/search", json={"query": f"granite kettle {number}", "mode": "rerank", "k": 50}, timeout=60)
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        while not any("simlm_requests_in_flight 1" in line for line in httpx2.get(f"{server.url}/metrics").text.splitlines()):
            time.sleep(0.01)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            in_flight = float(httpx2.get(f"{server.url}/metrics").text.split("\nsimlm_requests_in_flight ")[1].split()[0])
            if in_flight + len(statuses) >= 13:
                break
        assert server.stop() == 0, "".join(server.lines)
        for thread in threads:
            thread.join(60)
        assert statuses == [200] * 12
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health")


@pytest.mark.slow
def test_hangup_opens_the_run_again(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    blocked = tmp_path / "blocked"
    blocked.write_text("", encoding="utf-8")
    with served(run, "--block-list", str(blocked)) as server:
        url = f"{server.url}/passages/granite-kettle/made"
        assert httpx2.get(url).status_code == 200
        blocked.write_text("granite-kettle/made\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 60
        while httpx2.get(url).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert httpx2.get(url).status_code == 404
        # A state that cannot be opened leaves the old one, and says so in the log.
        blocked.write_text('{"regex": "("}\n', encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        while not any("reload failed" in line for line in server.lines) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any("reload failed" in line and "blocked:1" in line for line in server.lines)
        assert httpx2.get(url).status_code == 404
        assert httpx2.get(f"{server.url}/ready").status_code == 200


@pytest.mark.slow
def test_a_run_that_does_not_fit_together_stops_the_start(served_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    manifest = json.loads((run / "distilled" / "manifest.json").read_text(encoding="utf-8"))
    manifest["fingerprint"] = "of another run"
    (run / "distilled" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert read_manifest(run / "distilled").fingerprint == "of another run"
    done = subprocess.run(
        [*SIMLM, "serve", str(run), "--port", "0"], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 2
    assert "was made from an earlier 'distilled'" in done.stderr


@pytest.mark.slow
def test_another_address_without_a_token_is_warned_of(served_run: Path, tmp_path: Path) -> None:
    with served(served_run, "--host", "0.0.0.0") as server:
        assert any("WARNING" in line and "no token" in line for line in server.lines)
    (tmp_path / "token").write_text("open-sesame\n", encoding="utf-8")
    with served(served_run, "--host", "0.0.0.0", "--token-file", str(tmp_path / "token"), ready=False) as server:
        assert not any("WARNING" in line for line in server.lines)
        assert httpx2.get(f"{server.url}/info").status_code == 401
        assert httpx2.get(f"{server.url}/health", headers={"host": "any.example"}).status_code == 200


@pytest.mark.slow
def test_tools_on_standard_output_and_over_http_exclude_each_other(served_run: Path) -> None:
    command = [*SIMLM, "serve", str(served_run), "--mcp", "--mcp-http"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert "--mcp-http without it" in done.stderr
