"""What every request passes before the application sees it, and what is noted of it afterwards.

Before: the host it names, the page it comes from, the token, the type and size of its body, and how long the body may take. After: the
metrics and a line in the log. What the application raises ends here as an answer in the shape of all errors.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.routing import Route

from simlm.serve.faults import Fault
from simlm.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")
OPEN_PREFIX = "/page/"
"""Answered without a token: the page itself, which asks for one, and the sign of life."""
WATCHED_PATHS = ("/health", "/ready", "/metrics")
"""Asked every few seconds by what watches the server; logged at level debug."""
DRAINED = 8
"""A body up to so many times the limit is read to its end and thrown away, so that the refusal arrives; a longer one is cut off."""
CLIENT_GONE = 499
"""Status in log and metrics (as nginx has it) of a request whose client went away before the answer."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("simlm.serve")


@dataclass(frozen=True)
class GuardSettings:
    """token: what `Authorization: Bearer` must hold; none = no token is asked for.

    hosts: names that the Host header may have, so that a page elsewhere cannot reach a server on loopback by a name of its own; none = any.
    """

    token: str | None = None
    hosts: frozenset[str] | None = None
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 10.0
    log_queries: bool = False


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, settings: GuardSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, _request_id(scope))
        scope.setdefault("state", {})["request_id"] = answer.request_id
        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            await self._guarded(scope, receive, answer)
        except Fault as fault:
            scope["state"]["code"] = fault.code
            await answer.fault(fault)
        except Exception:
            log.exception("a request failed", extra={"fields": {"request_id": answer.request_id}})
            scope["state"]["code"] = "internal"
            await answer.fault(Fault(500, "internal", f"this is a fault of the server; its log names it {answer.request_id}"))
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, answer, time.perf_counter() - started)

    async def _guarded(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers = _headers(scope)
        self._check_origin(headers)
        self._check_token(scope, headers)
        body = await self._body(headers, receive)
        _check_type(headers, body)
        await self._app(scope, _replayed(body, receive), answer.send)

    def _check_origin(self, headers: dict[str, str]) -> None:
        """Refuse what a page elsewhere in the user's browser sends: it could search, and change, what only this machine may see."""
        host = headers.get("host", "")
        hosts = self._settings.hosts
        if hosts is not None and _name_of(host) not in hosts:
            raise Fault(
                403,
                "host_not_allowed",
                "this server answers to its loopback names only; to reach it by another name, start it with a token",
            )
        origin = headers.get("origin")
        if origin is not None and _netloc_of(origin) != host.lower():
            raise Fault(
                403,
                "origin_not_allowed",
                "requests from pages of other origins are refused; a proxy must pass the Host header on as the browser sent it",
            )

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        token, path = self._settings.token, scope["path"]
        if token is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise Fault(401, "invalid_token", "a valid token is needed: Authorization: Bearer TOKEN")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body; 408 and 413 faults."""
        limit = self._settings.max_body_bytes
        if int(headers["content-length"]) > DRAINED * limit if headers.get("content-length", "").isdecimal() else False:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Fault(CLIENT_GONE, "client_gone", "the client has gone")
                    more = bool(message.get("more_body", False))
                    size += len(message.get("body", b""))
                    if size > DRAINED * limit:
                        raise self._too_large()
                    if size <= limit:
                        parts.append(message.get("body", b""))
        except TimeoutError:
            raise Fault(408, "slow_body", f"the body did not arrive within {self._settings.body_seconds:g} s") from None
        if size > limit:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> Fault:
        return Fault(413, "body_too_large", f"a body of at most {self._settings.max_body_bytes:,} bytes was expected")

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        path = _route_of(scope)
        self._metrics.requests.labels(_known_method(scope["method"]), path, str(answer.status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        state = scope["state"]
        fields = {
            "request_id": answer.request_id,
            "method": scope["method"],
            "path": path,
            "status": answer.status,
            "milliseconds": round(seconds * 1000, 1),
            "client": scope["client"][0] if scope.get("client") else None,
        }
        fields |= {name: state[name] for name in ("code", "mode", "k") if name in state}
        if self._settings.log_queries and "query" in state:
            fields["query"] = state["query"]
        log.log(logging.DEBUG if path in WATCHED_PATHS else logging.INFO, "request", extra={"fields": fields})


class _Answer:
    """The way out: adds the headers that all answers have, and knows what has been sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = CLIENT_GONE

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message["headers"]}
            added = {
                b"x-request-id": self.request_id.encode(),
                b"x-content-type-options": b"nosniff",
                b"referrer-policy": b"no-referrer",
                b"cache-control": b"no-store",
                b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
            }
            message["headers"] = [*message["headers"], *((name, value) for name, value in added.items() if name not in given)]
        await self._send(message)

    async def fault(self, fault: Fault) -> None:
        """Send a fault, unless an answer has begun or the client has gone."""
        if self.status != CLIENT_GONE or fault.status == CLIENT_GONE:
            return
        body = json.dumps(fault.body(), ensure_ascii=False).encode("utf-8", "backslashreplace")
        headers = {"content-type": "application/json", "content-length": str(len(body))} | fault.headers()
        if fault.status in (408, 413):
            # What is left of the body is not read as the next request.
            headers["connection"] = "close"
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": fault.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})


def _check_type(headers: dict[str, str], body: bytes) -> None:
    if not body:
        return
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Fault(415, "encoded_body", "the body is compressed; send it as it is")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Fault(415, "not_json", "Content-Type: application/json was expected")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, then what comes after it (the client's leaving)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _name_of(host: str) -> str:
    """The name or address of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc_of(origin: str) -> str | None:
    """Name and port of an Origin header; None if it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _route_of(scope: Scope) -> str:
    """The path as its route has it ("/passages/{passage_id}"), "other" where there is none: metrics must not grow with what is asked."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else scope["path"] if scope["path"] == "/mcp" else "other"


def _known_method(method: str) -> str:
    return method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else "other"


def _request_id(scope: Scope) -> str:
    """The client's own id where it is a plain one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return secrets.token_hex(8)


__all__ = ["CLIENT_GONE", "Guard", "GuardSettings"]
