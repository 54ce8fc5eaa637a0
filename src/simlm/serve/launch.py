"""The server as a process: addresses, signals, slow and silent clients, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from simlm.errors import SimlmError
from simlm.serve.app import create_app
from simlm.serve.engine import Engine, EngineSettings, compute_on_few_threads
from simlm.serve.faults import Fault
from simlm.serve.guard import GuardSettings
from simlm.serve.logs import log_json_lines

HEADER_SECONDS = 10.0
"""For the headers of a request to arrive, from the opening of the connection or the first byte after the last request."""
BODY_SECONDS = 10.0
"""For the body to arrive, from the end of the headers."""
KEEP_ALIVE_SECONDS = 30
WRITE_SECONDS = 30.0
"""For a client to take an answer that has been written; then the connection is cut."""
MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 32 * 1024
TOKEN_ENV = "SIMLM_TOKEN"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

log = logging.getLogger("simlm.serve")


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve. token_file: none = the environment variable SIMLM_TOKEN, or no token."""

    host: str = "127.0.0.1"
    port: int = 8080
    token_file: Path | None = None
    mcp_http: bool = False
    log_level: str = "info"
    log_queries: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)


def serve_http(folder: Path, options: ServeOptions, *, announce: Callable[[str], None]) -> None:
    """Answer requests over HTTP until SIGTERM or SIGINT; then finish what was accepted and return.

    announce: given lines for people. SIGHUP opens the run again. Raises SimlmError if the run cannot be opened, the token cannot be read
    or the address is taken.
    """
    log_json_lines(options.log_level)
    token = read_token(options.token_file)
    if not is_loopback(options.host) and token is None:
        announce(
            f"WARNING: {options.host} can be reached from other machines and there is no token: anyone there can read the whole corpus. "
            f"Set one with --token-file or {TOKEN_ENV}, or leave out --host."
        )
    compute_on_few_threads()
    engine = Engine(folder, options.engine)
    hosts = LOOPBACK_NAMES | {options.host} if token is None and is_loopback(options.host) else None
    failures: list[Exception] = []
    guard = GuardSettings(token=token, hosts=hosts, body_seconds=BODY_SECONDS, log_queries=options.log_queries)

    def opened(failure: Exception | None) -> None:
        if failure is None:
            announce(f"serving {folder} (stop with Ctrl+C)")
        else:
            failures.append(failure)
            server.should_exit = True

    app = create_app(engine, guard, on_opened=opened, mcp=options.mcp_http)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(options.engine.timeout_seconds + BODY_SECONDS) + 1,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    server = _Server(config, engine, announce)
    server.run(sockets=[bound_socket(options.host, options.port)])
    if failures:
        raise failures[0]


def serve_tools(folder: Path, settings: EngineSettings, *, log_level: str = "warning") -> None:
    """Answer by the Model Context Protocol on standard input and output until the input ends. Raises SimlmError as `serve_http` does."""
    from simlm.serve.tools import tool_server

    log_json_lines(log_level)
    compute_on_few_threads()
    engine = Engine(folder, settings)
    tools = tool_server(engine)
    engine.open()
    try:
        tools.run("stdio")
    finally:
        engine.close()


def read_token(file: Path | None) -> str | None:
    """The bearer token of a file, else of the environment; None = neither is there. SimlmError if what is there is no usable token."""
    if file is None:
        given = os.environ.get(TOKEN_ENV)
        return None if given is None else _checked_token(given, f"the environment variable {TOKEN_ENV}")
    try:
        return _checked_token(file.read_text(encoding="utf-8-sig"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SimlmError(f"{file}: the token cannot be read ({error}); a text file with one line was expected") from None


def _checked_token(text: str, where: str) -> str:
    token = text.strip()
    if not token or any(not "!" <= character <= "~" for character in token):
        raise SimlmError(f"{where}: no token in it that a header can hold; one line of letters, digits and signs was expected")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on that address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        import ipaddress

        return ipaddress.ip_address(host).is_loopback
    return False


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening address of our own; SimlmError if it is taken, or is not one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it each answer waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise SimlmError(f"{host}:{port}: cannot listen there ({error.strerror or error}); choose another --port or --host") from None
    return listening


class _Server(uvicorn.Server):
    """uvicorn's server, which also reloads on SIGHUP, says that it is stopping, and returns after a signal instead of dying of it."""

    def __init__(self, config: uvicorn.Config, engine: Engine, announce: Callable[[str], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._announce(f"http://{shown}:{port} is loading {self._engine.folder}")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Callable[[int, FrameType | None], Any]] = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._handle_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.stopping = True
        super().handle_exit(sig, frame)

    def _handle_hangup(self, _sig: int, _frame: FrameType | None) -> None:
        threading.Thread(target=self._reload, daemon=True).start()

    def _reload(self) -> None:
        try:
            seconds = self._engine.reload()
            log.info("reloaded", extra={"fields": {"seconds": round(seconds, 3)}})
        except (SimlmError, Fault) as error:
            log.error("reload failed, the run as it was goes on: %s", error)
        except Exception:
            log.exception("reload failed, the run as it was goes on")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with an end to patience: for headers that do not come, answers that are not taken, and connections beyond MAX_CONNECTIONS.

    What uvicorn answers by itself has the shape of our errors here too.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(Fault(503, "too_many_connections", "too many connections are open", retry_seconds=5))
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
        elif before is None or before.response_complete:
            self._wait_for_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            self._refuse(Fault(400, "invalid_http", "this is not HTTP/1.1"))
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def _refuse(self, fault: Fault) -> None:
        body = json.dumps(fault.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"} | fault.headers()
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        for event in (h11.Response(status_code=fault.status, headers=pairs), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._out_of_patience)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _out_of_patience(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()


__all__ = ["EngineSettings", "PatientProtocol", "ServeOptions", "bound_socket", "is_loopback", "read_token", "serve_http", "serve_tools"]
