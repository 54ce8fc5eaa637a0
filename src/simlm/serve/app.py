"""The HTTP application: routes to an engine, and errors of one shape."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import logging
import math
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from simlm.errors import SimlmError
from simlm.index.vectors import shortened
from simlm.serve import schemas
from simlm.serve.engine import Engine
from simlm.serve.faults import Fault
from simlm.serve.guard import CLIENT_GONE, Guard, GuardSettings
from simlm.serve.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from simlm.serve.served_run import ServedRun

Value = TypeVar("Value")

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
RERANKER = "reranker"
"""Id of the re-ranker in /v1/models."""

log = logging.getLogger("simlm.serve")


def create_app(
    engine: Engine,
    settings: GuardSettings | None = None,
    *,
    on_opened: Callable[[Exception | None], None] | None = None,
    mcp: bool = False,
) -> FastAPI:
    """The application of an engine; it opens the engine on starting, unless that is open already, and closes it on stopping.

    on_opened: told when the run is open, or why it cannot be opened. mcp: also answer at /mcp. Raises MissingExtraError for `mcp`
    without the SDK.
    """
    settings = settings or GuardSettings()
    tools = _mcp_app(engine) if mcp else None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if engine.status == "loading":
            threading.Thread(target=_open, args=(engine, on_opened), daemon=True).start()
        async with contextlib.AsyncExitStack() as stack:
            if tools is not None:
                await stack.enter_async_context(tools.running())
            yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="simlm",
        description="Search over the corpus of a finished run. Every error has the shape of ErrorResponse.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_error_responses(400, 401, 403, 405, 408, 413, 415, 422, 500, 503),
    )
    app.add_middleware(Guard, settings=settings, metrics=engine.metrics)
    for kind, handler in {Fault: _on_fault, RequestValidationError: _on_invalid, HTTPException: _on_http}.items():
        app.add_exception_handler(kind, handler)
    _add_state_routes(app, engine, settings)
    _add_search_routes(app, engine)
    _add_model_routes(app, engine)
    _add_page_routes(app, engine)
    if tools is not None:
        app.router.routes.extend(tools.routes)
    return app


def _open(engine: Engine, on_opened: Callable[[Exception | None], None] | None) -> None:
    failure = None
    try:
        engine.open()
    except Exception as error:  # Whatever it is: a server that stays "loading" for ever helps nobody.
        failure = error
    if on_opened is not None:
        on_opened(failure)


# --- is it alive, what is it


def _add_state_routes(app: FastAPI, engine: Engine, settings: GuardSettings) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=schemas.HealthResponse, summary="The process is alive")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready",
        response_model=schemas.ReadyResponse,
        responses={503: {"model": schemas.ReadyResponse, "description": "Loading or stopping"}},
        summary="Requests can be answered",
    )
    async def ready() -> Response:
        status = engine.status
        return _json({"status": status}) if status == "ready" else _json({"status": status}, 503, {"retry-after": "2"})

    @app.get("/metrics", response_class=Response, responses=_text_response("text/plain"), summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/info", response_model=schemas.InfoResponse, summary="What can be asked")
    async def info() -> Response:
        return _json(engine.run.info)

    @app.post(
        "/admin/reload",
        response_model=schemas.ReloadResponse,
        responses=_error_responses(409),
        summary="Open the run again and answer from its new state",
    )
    async def reload(request: Request) -> Response:
        if settings.token is None and not _is_loopback(request):
            raise Fault(403, "not_local", "without a token, a reload can be asked for from this machine only")
        try:
            seconds = await asyncio.to_thread(engine.reload)
        except SimlmError as error:
            # It may name folders of this machine, which is for the log.
            log.error("reload failed, the run as it was goes on: %s", error)
            raise Fault(409, "reload_failed", "the run cannot be opened; the server goes on as it was, its log says why") from None
        return _json({"status": "reloaded", "passages": engine.run.info["passages"], "seconds": round(seconds, 3)})


# --- search


def _add_search_routes(app: FastAPI, engine: Engine) -> None:
    @app.post("/search", response_model=schemas.SearchResponse, responses=_error_responses(429, 504), summary="Search the corpus")
    async def search(body: schemas.SearchRequest, request: Request) -> Response:
        request.scope["state"] |= {"query": body.query, "k": body.k, "mode": body.mode or engine.run.default_mode}
        return _json(await _while_wanted(request, engine.search(body)))

    @app.get("/passages/{passage_id:path}", response_model=schemas.PassageResponse, responses=_error_responses(404), summary="One passage")
    async def passage(passage_id: str) -> Response:
        return _json(engine.run.passage(passage_id))


# --- the models, in the shapes that other clients use


def _add_model_routes(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models", response_model=schemas.ModelsResponse, summary="The models of the run")
    async def models() -> Response:
        run = engine.run
        ids = [*([run.searcher.retriever] if run.searcher.retriever else []), *([RERANKER] if "rerank" in run.modes else [])]
        listed = [{"id": name, "object": "model", "created": run.created, "owned_by": "simlm"} for name in ids]
        return _json({"object": "list", "data": listed})

    @app.post(
        "/v1/embeddings",
        response_model=schemas.EmbeddingsResponse,
        responses=_error_responses(404, 429, 504),
        summary="Vectors of texts, as OpenAI's client asks for them",
    )
    async def embeddings(body: schemas.EmbeddingsRequest, request: Request) -> Response:
        run = engine.run
        retriever = run.retriever()
        _check_model(body.model, run.searcher.retriever)
        dim = _dimensions(body.dimensions, retriever.dim, retriever.matryoshka)
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors_ND = await _while_wanted(request, engine.encode(retriever, texts, body.input_type))

        def answer() -> Response:
            num_tokens = retriever.num_tokens(texts, query=body.input_type == "query")
            return _json(_embeddings(shortened(vectors_ND, dim), body, num_tokens))

        # Thousands of vectors are megabytes of text; other requests do not wait for that.
        return await asyncio.to_thread(answer)

    @app.post(
        "/rerank",
        response_model=schemas.RerankResponse,
        response_model_exclude_none=True,
        responses=_error_responses(404, 429, 504),
        summary="Documents in order of relevance, as Cohere's and Jina's clients ask for it",
    )
    async def rerank(body: schemas.RerankRequest, request: Request) -> Response:
        reranker = engine.run.reranker()
        if body.model is not None:
            _check_model(body.model, RERANKER)
        documents = [document if isinstance(document, str) else document.text for document in body.documents]
        scores = await _while_wanted(request, engine.rerank(reranker, body.query, documents))
        return _json(_reranked(body, documents, scores.tolist()))

    for path in ("/v1/rerank", "/v2/rerank"):
        app.add_api_route(
            path,
            rerank,
            methods=["POST"],
            response_model=schemas.RerankResponse,
            responses=_error_responses(404, 429, 504),
            summary="The same as /rerank",
        )


def _check_model(wanted: str, known: str) -> None:
    if wanted != known:
        raise Fault(404, "model_not_found", f"the model {wanted[:100]!r} does not exist here; it is called {known!r}", param="model")


def _dimensions(wanted: int | None, dim: int, sizes: tuple[int, ...]) -> int:
    """How many numbers of each vector are given."""
    if wanted is None or wanted == dim or wanted in sizes:
        return wanted or dim
    known = ", ".join(str(size) for size in sorted({*sizes, dim}))
    raise Fault(422, "dimensions_not_available", f"dimensions {wanted}: this model's vectors have {known}", param="dimensions")


def _embeddings(vectors_ND: np.ndarray[Any, np.dtype[np.float32]], body: schemas.EmbeddingsRequest, num_tokens: int) -> dict[str, Any]:
    encoded: list[Any]
    if body.encoding_format == "base64":
        encoded = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors_ND]
    else:
        encoded = vectors_ND.tolist()
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(encoded)],
        "model": body.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _reranked(body: schemas.RerankRequest, documents: list[str], logits: list[float]) -> dict[str, Any]:
    order = sorted(range(len(documents)), key=lambda index: (-logits[index], index))[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": _logistic(logits[index])} for index in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    return {"id": secrets.token_hex(16), "model": RERANKER, "results": results, "meta": {"api_version": {"version": "2"}}}


def _logistic(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


# --- the page and the report


def _add_page_routes(app: FastAPI, engine: Engine) -> None:
    # Read once, by names that are known now: no path of a request reaches the file system.
    files = {file.name: file.read_bytes() for file in sorted(PAGE.glob("*")) if file.suffix in PAGE_TYPES} if PAGE.is_dir() else {}
    index = (PAGE / "index.html").read_bytes() if (PAGE / "index.html").is_file() else None

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=Response, responses=_text_response("text/html") | _error_responses(404), summary="The page")
    async def page() -> Response:
        if index is None:
            raise Fault(404, "no_page", "this installation has no page; POST /search answers all the same")
        headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
        return Response(index, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/page/{name}", response_class=Response, responses=_text_response("text/css", "text/javascript") | _error_responses(404))
    async def page_file(name: str) -> Response:
        if name not in files:
            raise Fault(404, "not_found", "no such file of the page", param="name")
        return Response(files[name], media_type=PAGE_TYPES[Path(name).suffix], headers={"cache-control": "no-cache"})

    @app.get("/report", response_model=schemas.ReportResponse, responses=_error_responses(404), summary="What the run measured")
    async def report() -> Response:
        return _json(_report(engine.run).data)

    @app.get(
        "/report.html", response_class=Response, responses=_text_response("text/html") | _error_responses(404), summary="The report's page"
    )
    async def report_page() -> Response:
        html = _report(engine.run).html
        if html is None:
            raise Fault(404, "no_report_page", "no report page is shown here: the run has none, or a block list is in force")
        return Response(html, media_type="text/html; charset=utf-8", headers={"content-security-policy": REPORT_POLICY})


def _report(run: ServedRun) -> Any:
    if run.report is None:
        raise Fault(404, "no_report", "this run has no finished report")
    return run.report


# --- requests that nobody waits for, and errors


async def _while_wanted(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """What the work gives; it is given up when the client goes away, as a page does whose user types on."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Fault(CLIENT_GONE, "client_gone", "the client has gone")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _on_fault(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, Fault)
    request.scope["state"]["code"] = fault.code
    return _json(fault.body(), fault.status, fault.headers())


def _on_invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a request; what it held is not sent back."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # Of a field with several types each that does not fit is an error; the one that fits and has a wrong value says more.
    of_field = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    first = next((one for one in of_field if not one["type"].endswith("_type")), errors[0])
    # The field, and which of a list; what follows are pydantic's names for the types it tried.
    where = () if first["type"] == "json_invalid" else first["loc"][1:]
    inner = next((f"[{part}]" for part in where[1:] if isinstance(part, int)), "")
    param = f"{str(where[0])[:100]}{inner}" if where else None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    code = "token_lists_not_supported" if _is_token_list(request, error) else str(first["type"])
    if code == "token_lists_not_supported":
        message = "input: lists of token numbers are of another tokenizer; send the texts themselves"
    return _on_fault(request, Fault(422, code, message, param=param))


def _is_token_list(request: Request, error: RequestValidationError) -> bool:
    given = error.body.get("input") if isinstance(error.body, dict) else None
    numbers = isinstance(given, list) and bool(given) and isinstance(given[0], int | list)
    return request.url.path == "/v1/embeddings" and numbers


def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    named = {
        400: ("invalid_body", "the body is not JSON in UTF-8"),
        404: ("not_found", "there is nothing at this path"),
        405: ("method_not_allowed", "this path has other methods"),
    }
    code, message = named.get(error.status_code, ("http_error", str(error.detail)))
    response = _on_fault(request, Fault(error.status_code, code, message))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # A half of a surrogate pair has no UTF-8; its escape is JSON.
    body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
    return Response(body, status, headers, media_type="application/json")


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    told = {
        400: "The body is not JSON in UTF-8",
        401: "A token is needed",
        403: "Not from there",
        404: "Not there",
        405: "Other methods only",
        408: "The body came too slowly",
        409: "Not now",
        413: "The body is too large",
        415: "The body is not JSON",
        422: "A field is wrong",
        429: "Too many requests wait; see Retry-After",
        500: "A fault of the server",
        503: "Loading or stopping; see Retry-After",
        504: "Not answered in time",
    }
    return {status: {"model": schemas.ErrorResponse, "description": told[status]} for status in statuses}


def _text_response(*kinds: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": {"type": "string"}} for kind in kinds}, "description": "As it is"}}


def _mcp_app(engine: Engine) -> Any:
    from simlm.serve.tools import HttpTools

    return HttpTools(engine)


__all__ = ["create_app"]
