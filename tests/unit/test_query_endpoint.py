"""Queries from an endpoint, against a small HTTP server: what is sent, kept, tried again, and refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from simlm.data.query_endpoint import ANSWERS, PROMPTS, Endpoint, Request, query_in
from simlm.errors import EndpointError
from simlm.recipe import ENDPOINT_QUERY_KINDS, EndpointSettings

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """An endpoint that answers by `reply`; keeps what it was asked, and how many requests were under way at most."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.reply: Callable[[int, dict[str, Any]], Answer] = lambda number, body: good(f"query {number}")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.bodies.append(body)
                    outer.paths.append(self.path)
                    outer.keys.append(self.headers.get("Authorization"))
                    number = len(outer.bodies)
                status, headers, content = outer.reply(number, body)
                with outer.lock:
                    outer.now -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def good(text: str) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def requests(count: int, kind: str = "ask_question") -> list[Request]:
    return [Request(kind, f"p{number}", f"Title {number}", f"text of passage {number}") for number in range(count)]


def endpoint(server: Server, folder: Path, waits: list[float] | None = None, **changes: Any) -> Endpoint:
    settings = EndpointSettings.model_validate({"url": server.url, "model": "m", "max_parallel": 3, **changes})
    return Endpoint(settings, folder, seed=7, sleep=(waits if waits is not None else []).append)


def test_the_recipe_knows_the_prompts() -> None:
    assert set(ENDPOINT_QUERY_KINDS) == PROMPTS.keys()


def test_each_answer_goes_to_its_request_with_bounded_parallel_requests(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    hold = threading.Barrier(3, timeout=5)

    def reply(number: int, body: dict[str, Any]) -> Answer:
        hold.wait()
        return good(f"about {body['messages'][1]['content'].split()[-1]}")

    server.reply = reply
    asker = endpoint(server, tmp_path, api_key_env="MY_KEY", temperature=0.3, max_tokens=20)
    assert asker.ask(requests(9)) == [f"about {number}" for number in range(9)]
    assert server.most == 3
    assert set(server.paths) == {"/v1/chat/completions"}
    assert set(server.keys) == {"Bearer secret"}
    body = next(body for body in server.bodies if "passage 4" in body["messages"][1]["content"])
    assert body["messages"][1]["content"] == f"{PROMPTS['ask_question']}\n\nPassage:\nTitle 4\ntext of passage 4"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 20)
    assert len({body["seed"] for body in server.bodies}) == 9
    assert "secret" not in "".join(file.read_text(encoding="utf-8") for file in tmp_path.rglob("*") if file.is_file())


def test_answers_are_kept_and_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    first = endpoint(server, tmp_path)
    answers = first.ask(requests(4))
    assert first.num_asked == 4
    again = endpoint(server, tmp_path, url=server.url + "/", max_parallel=1)
    assert again.ask(requests(4)) == answers
    assert again.num_asked == 0
    # One more passage costs one request; another kind, number, or model is another query.
    assert again.ask(requests(5))[:4] == answers
    assert again.num_asked == 1
    again.ask(
        [Request("ask_claim", "p0", "Title 0", "text of passage 0"), Request("ask_question", "p0", "Title 0", "text of passage 0", 1)]
    )
    assert again.num_asked == 3
    other = endpoint(server, tmp_path, model="n")
    other.ask(requests(1))
    assert other.num_asked == 1


def test_kept_answers_need_no_server(server: Server, tmp_path: Path) -> None:
    answers = endpoint(server, tmp_path).ask(requests(2))
    server.http.shutdown()
    server.http.server_close()
    gone = endpoint(server, tmp_path)
    assert gone.ask(requests(2)) == answers
    with pytest.raises(EndpointError, match=r"nothing answers at http://127.0.0.1:\d+/v1"):
        gone.ask(requests(3))


def test_a_torn_last_line_costs_one_answer_and_a_broken_one_is_named(server: Server, tmp_path: Path) -> None:
    endpoint(server, tmp_path, max_parallel=1).ask(requests(3))
    (file,) = tmp_path.rglob(ANSWERS)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    again = endpoint(server, tmp_path, max_parallel=1)
    again.ask(requests(3))
    assert again.num_asked == 1
    lines = file.read_bytes().splitlines()
    assert len(lines) == 3
    assert all(json.loads(line)["answer"] for line in lines)
    file.write_bytes(lines[0] + b"\nnot json\n")
    with pytest.raises(EndpointError, match=r"answers.jsonl:2: not a kept answer"):
        endpoint(server, tmp_path)


def test_what_may_pass_is_tried_again_with_growing_pauses(server: Server, tmp_path: Path) -> None:
    failures: list[Answer] = [(503, {}, b"busy"), (429, {"Retry-After": "7"}, b"slow down"), (500, {}, b"oops")]
    server.reply = lambda number, body: failures[number - 1] if number <= 3 else good("fine at last")
    waits: list[float] = []
    assert endpoint(server, tmp_path, waits).ask(requests(1)) == ["fine at last"]
    assert waits == [1.0, 7.0, 4.0]


def test_what_fails_to_the_end_says_so_and_what_was_answered_stays(server: Server, tmp_path: Path) -> None:
    server.reply = lambda number, body: (502, {}, b"bad gateway") if "passage 3" in body["messages"][1]["content"] else good("fine")
    waits: list[float] = []
    with pytest.raises(EndpointError, match=r"no answer after 4 tries, the last failed with status 502: bad gateway"):
        endpoint(server, tmp_path, waits, max_tries=4, max_parallel=1).ask(requests(6))
    assert waits == [1.0, 2.0, 4.0]
    server.reply = lambda number, body: good("fine")
    again = endpoint(server, tmp_path)
    assert again.ask(requests(6)) == ["fine"] * 6
    assert again.num_asked == 3


def test_requests_under_way_when_one_is_refused_are_kept(server: Server, tmp_path: Path) -> None:
    refused = threading.Event()

    def reply(number: int, body: dict[str, Any]) -> Answer:
        if "passage 0" in body["messages"][1]["content"]:
            refused.set()
            return 401, {}, b"no such key"
        refused.wait(5)
        return good("paid for")

    server.reply = reply
    with pytest.raises(EndpointError, match=r"refuses the request with status 401: no such key"):
        endpoint(server, tmp_path).ask(requests(3))
    server.reply = lambda number, body: good("later")
    assert endpoint(server, tmp_path).ask(requests(3)) == ["later", "paid for", "paid for"]


def test_an_answer_of_another_protocol_is_refused_at_once(server: Server, tmp_path: Path) -> None:
    server.reply = lambda number, body: (200, {}, b"<html>hello</html>")
    with pytest.raises(EndpointError, match=r"not one of an OpenAI-compatible endpoint.*<html>"):
        endpoint(server, tmp_path).ask(requests(1))
    assert len(server.bodies) == 1


def test_a_key_that_is_not_set(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EndpointError, match="NO_SUCH_KEY is not set"):
        endpoint(server, tmp_path, api_key_env="NO_SUCH_KEY")


def test_long_passages_are_cut(server: Server, tmp_path: Path) -> None:
    endpoint(server, tmp_path, passage_words=3).ask([Request("ask_claim", "p", "", "one two three four five")])
    assert server.bodies[0]["messages"][1]["content"].endswith("Passage:\none two three")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("what is rain", "what is rain"),
        ('\n  "What is rain?"\nA second line', "What is rain?"),
        ("<think>They want\na query</think>\nQuery: rain in  May", "rain in May"),
        ("<think>never ends", None),
        ("1. **Keywords:** copper violin", "copper violin"),
        ("3.14 is pi", "3.14 is pi"),
        ("claim : rain is wet", "rain is wet"),
        ("- copper violin", "copper violin"),
        ("", None),
        ("...\n?", None),
        (" ".join(["word"] * 41), None),
        ("2024 in music", "2024 in music"),
    ],
)
def test_the_query_in_an_answer(answer: str, expected: str | None) -> None:
    assert query_in(answer) == expected
