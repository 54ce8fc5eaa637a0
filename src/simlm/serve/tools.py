"""Tools for agents by the Model Context Protocol: `search` and `get_passage` over the corpus of a run.

By standard input and output (`simlm serve RUN --mcp`), or at /mcp of the HTTP server (`--mcp-http`). The only module that knows the SDK,
which is the extra simlm[mcp].
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from simlm.errors import require_extra
from simlm.serve.engine import Engine
from simlm.serve.faults import Fault
from simlm.serve.schemas import MAX_K, FilterValue, Metadata, Query, SearchRequest

if TYPE_CHECKING:
    from mcp.server import MCPServer

SHOWN_CHARACTERS = 1500
"""Of each passage among the hits of a search, so that ten of them do not fill an agent's context; get_passage gives the whole."""


class FoundPassage(BaseModel):
    passage_id: str
    title: str
    text: Annotated[str, Field(description="Its beginning; get_passage gives the whole text.")]
    score: float
    metadata: Metadata


class FoundPassages(BaseModel):
    passages: Annotated[list[FoundPassage], Field(description="Best first.")]


class WholePassage(BaseModel):
    passage_id: str
    title: str
    text: str
    metadata: Metadata


def tool_server(engine: Engine) -> MCPServer[Any]:
    """An MCP server with the tools; MissingExtraError without the SDK."""
    require_extra("mcp", "mcp", "answering by the Model Context Protocol")
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import ToolAnnotations

    server: MCPServer[Any] = MCPServer(
        "simlm",
        instructions="Search a corpus of passages. Search with a question or key words, then read what looks right with get_passage.",
        log_level="WARNING",
    )
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    @server.tool(annotations=reads)
    async def search(
        query: Annotated[Query, Field(description="A question or key words.")],
        k: Annotated[int, Field(ge=1, le=MAX_K, description="Passages wanted.")] = 5,
        mode: Annotated[
            Literal["bm25", "dense", "hybrid", "rerank"] | None, Field(description="None = the best quick one; rerank is the most exact.")
        ] = None,
        filters: Annotated[
            dict[str, FilterValue | list[FilterValue]] | None,
            Field(description="Metadata field -> value, or values of which one is wanted."),
        ] = None,
    ) -> FoundPassages:
        """Find the passages of the corpus that answer a query best."""
        try:
            request = SearchRequest(query=query, k=k, mode=mode, filters=filters or {})
            answer = await engine.search(request)
        except (Fault, ValidationError) as error:
            raise ToolError(str(error)) from None
        return FoundPassages(passages=[_shown(hit) for hit in answer["hits"]])

    @server.tool(annotations=reads)
    async def get_passage(passage_id: Annotated[str, Field(description="As search gives it.")]) -> WholePassage:
        """The whole text of one passage."""
        try:
            return WholePassage(**engine.run.passage(passage_id))
        except Fault as error:
            raise ToolError(str(error)) from None

    return server


def _shown(hit: dict[str, Any]) -> FoundPassage:
    text = hit["text"] if len(hit["text"]) <= SHOWN_CHARACTERS else hit["text"][:SHOWN_CHARACTERS] + " ..."
    return FoundPassage(passage_id=hit["passage_id"], title=hit["title"], text=text, score=hit["score"], metadata=hit["metadata"])


class HttpTools:
    """The tools at /mcp, as routes of another application. Host, origin, token and size are checked there, by the guard."""

    def __init__(self, engine: Engine) -> None:
        server = tool_server(engine)
        from mcp.server.transport_security import TransportSecuritySettings

        # Without sessions there is nothing to keep for a client that never comes back.
        application = server.streamable_http_app(
            streamable_http_path="/mcp",
            stateless_http=True,
            json_response=True,
            transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        )
        self.routes = list(application.routes)
        self._server = server

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the time in which requests are answered."""
        async with self._server.session_manager.run():
            yield


__all__ = ["HttpTools", "tool_server"]
