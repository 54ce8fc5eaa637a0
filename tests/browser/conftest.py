"""A browser, and the real server over a tiny run for it to look at.

Everything is made once for the one module of browser tests, and torn down with it: Playwright's loop would be in the way of tests that run
a loop of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from simlm.pipeline import run_recipe
from simlm.recipe import load_recipe
from tests.conftest import tiny_passages, tiny_qrels, tiny_queries, write_beir
from tests.toy.corpus import TINY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from simlm.serve.engine import Engine

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NEEDED = "SIMLM_NEEDS_BROWSER"
"""Set where a missing browser is a failure and no reason to leave the tests out (.ci/run)."""
RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"

SCRIPT = '<script>window.wasRun = true</script><img src=x onerror="window.wasRun = true">'
ODD_PASSAGES: list[dict[str, Any]] = [
    {
        "_id": "odd/script",
        "title": f"Zzyzx {SCRIPT}",
        "text": f"The zzyzx road {SCRIPT} leads to a dry lake.",
        "metadata": {"note": SCRIPT},
    },
    # Characters that are two units long in JavaScript stand before the match.
    {"_id": "odd/astral", "title": "🦉🦉 owlery", "text": "🦉🦉🦉 The owlery 🦉 is open at night."},
    {"_id": "odd/long", "title": "", "text": "Sand and more sand. " * 120 + "Here the gramophone plays. " + "Dust and more dust. " * 80},
    {"_id": "odd/unbroken", "title": "Unbroken", "text": "unbreakable " + "x" * 400},
]


def passages() -> list[dict[str, Any]]:
    """The tiny corpus with metadata: where a thing is found, and in which hundred years."""
    found: list[dict[str, Any]] = []
    for number, passage in enumerate(tiny_passages()):
        topic, aspect = passage["_id"].split("/")
        found.append(passage | {"metadata": {"aspect": aspect, "topic": topic, "century": 17 + number % 3}})
    return [*found, *ODD_PASSAGES]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of tiny models: BM25, a retriever, a re-ranker, hybrid search, a report."""
    folder = tmp_path_factory.mktemp("browser")
    data = write_beir(folder / "data", passages(), tiny_queries(), {split: tiny_qrels(split) for split in ("train", "dev", "test")})
    changes = [
        *TINY,
        f"output={json.dumps(str(folder / 'kettles'))}",
        f"data.path={json.dumps(str(data))}",
        'skip=["pretrain", "retriever2", "distilled"]',
        "retriever1.training.max_steps=2",
        "reranker.training.max_steps=2",
    ]
    return run_recipe(load_recipe(RECIPE, changes), quiet=True)


@pytest.fixture(scope="module")
def engine(run_folder: Path) -> Engine:
    from simlm.serve.engine import Engine, EngineSettings

    opened = Engine(run_folder, EngineSettings())
    opened.open()
    return opened


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[str]:
    """Address of the running server."""
    with serving(engine) as address:
        yield address


class serving:  # noqa: N801 - read as `with serving(engine) as address`
    """A server on a free port of this machine, in a thread. token: what it asks for."""

    def __init__(self, engine: Engine, *, token: str | None = None) -> None:
        import uvicorn

        from simlm.serve.app import create_app
        from simlm.serve.guard import GuardSettings

        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        app = create_app(engine, GuardSettings(token=token))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        message = "no chromium on the path (Debian: apt-get install chromium)"
        if os.environ.get(NEEDED):
            pytest.fail(f"{message}, and {NEEDED} is set")
        pytest.skip(message)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=15_000)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


Open = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser, server: str) -> Iterator[Open]:
    """Opens a path of the page in a browser of its own: `open_page("/?q=x", width=360, dark=True)`.

    At the end nothing may have been refused by the content security policy, no script may have failed, and no request may have left the
    server; `forgive` names what the test itself provokes.
    """
    contexts, seen, forgiven = [], [], list[str]()

    def opened(
        path: str = "/",
        *,
        width: int = 1280,
        height: int = 800,
        dark: bool = False,
        address: str = server,
        forgive: str = "",
        wait: bool = True,
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) => console.error('policy: ' + event.violatedDirective))"
        )
        forgiven.extend([forgive] if forgive else [])
        page.on("console", lambda message: seen.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(f"script: {error}"))
        page.on(
            "request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else seen.append(f"left: {request.url}")
        )
        page.goto(address + path)
        if wait:
            page.locator("#modes input").first.wait_for(state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in seen if not any(part in line for part in forgiven)] == []
