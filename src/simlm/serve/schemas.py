"""Bodies of requests and answers: what the OpenAPI document says of them is what is checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_K = 100
MAX_QUERY_CHARACTERS = 10_000
"""Some 2,000 words. A longer one is refused, not cut: no model reads that many as one query."""
MAX_INPUTS = 2048
"""Texts of one request for embeddings, as OpenAI has it."""
MAX_DOCUMENTS = 1000
"""Of one request to re-rank, as Cohere has it."""
MAX_FILTERS, MAX_FILTER_VALUES = 16, 100

ListName = Literal["bm25", "dense", "hybrid", "rerank"]
FilterValue = Annotated[str, Field(max_length=1000)] | bool | int | Annotated[float, Field(allow_inf_nan=False)]
Metadata = dict[str, str | int | float | bool]
Query = Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARACTERS, pattern=r"\S")]
"""At least one character that is not a blank."""
Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class Body(BaseModel):
    """A request: unknown fields are refused, and so is what is only like a number or a truth value ("5", true for 1)."""

    model_config = ConfigDict(extra="forbid")


class SearchRequest(Body):
    query: Query
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_K, description="Passages wanted.")] = 10
    mode: Annotated[ListName | None, Field(description="None = the default_mode of /info.")] = None
    filters: Annotated[
        dict[str, FilterValue | Annotated[list[FilterValue], Field(min_length=1, max_length=MAX_FILTER_VALUES)]],
        Field(
            max_length=MAX_FILTERS, description="Metadata field -> the value, or the values of which one is wanted. All fields must fit."
        ),
    ] = Field(default_factory=dict)
    compare: Annotated[bool, Field(strict=True, description="Also the first k of every list that the run can make.")] = False


class Ranks(BaseModel):
    bm25: int | None
    dense: int | None
    hybrid: int | None
    rerank: int | None


class Scores(BaseModel):
    bm25: float | None
    dense: float | None
    hybrid: float | None
    rerank: float | None


class Hit(BaseModel):
    rank: Annotated[int, Field(ge=1)]
    passage_id: str
    title: str
    text: str
    metadata: Metadata
    score: Annotated[float, Field(description="Of the list that was asked for: comparable within this answer only.")]
    highlights: Annotated[
        list[Span], Field(description="[start, end) in characters (code points) of text: words whose BM25 term the query has.")
    ]
    title_highlights: list[Span]
    ranks: Annotated[Ranks, Field(description="In each list that was made; null where the passage is not in it, or it was not made.")]
    scores: Scores


class SearchResponse(BaseModel):
    query: str
    mode: ListName
    took_milliseconds: float
    hits: list[Hit]
    lists: Annotated[dict[ListName, list[Hit]] | None, Field(description="With compare = true only.")] = None


class PassageResponse(BaseModel):
    passage_id: str
    title: str
    text: str
    metadata: Metadata


class InfoResponse(BaseModel):
    name: str
    passages: int
    modes: list[ListName]
    default_mode: ListName
    retriever: Annotated[str | None, Field(description="Null where the run has BM25 only.")]
    example_query: str
    filter_fields: Annotated[dict[str, list[str]], Field(description="Field -> its most frequent values, as text.")]
    has_report: bool
    max_k: int
    max_query_characters: int


class HealthResponse(BaseModel):
    status: Literal["ok"]


class ReadyResponse(BaseModel):
    status: Literal["ready", "loading", "stopping"]


class ReloadResponse(BaseModel):
    status: Literal["reloaded"]
    passages: int
    seconds: float


class ReportResponse(BaseModel):
    """See docs/serving.md; what the steps and measures hold depends on the recipe."""

    model_config = ConfigDict(extra="allow")

    html: Annotated[bool, Field(description="Whether /report.html is there.")]
    metrics: dict[str, Any]
    steps: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    wins: list[dict[str, Any]] | None
    losses: list[dict[str, Any]] | None


# --- the shapes that other clients use


class EmbeddingsRequest(Body):
    """OpenAI's. Lists of token numbers are refused: they would be those of another tokenizer."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    model: Annotated[str, Field(max_length=200, description="An id of /v1/models.")]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[
        Annotated[int, Field(strict=True, ge=1)] | None, Field(description="For models trained with Matryoshka sizes: one of them.")
    ] = None
    input_type: Annotated[
        Literal["query", "passage"], Field(description="Not OpenAI's: which of the model's two prompts and lengths to use.")
    ] = "passage"
    user: Annotated[str | None, Field(max_length=1000, description="Accepted since clients send it; not used.")] = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, Field(description="base64: little-endian float32.")]


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsResponse(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Document(Body):
    text: str


class RerankRequest(Body):
    """Cohere's and Jina's."""

    query: Query
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    model: Annotated[str | None, Field(max_length=200, description='"reranker", or left out.')] = None
    top_n: Annotated[Annotated[int, Field(strict=True, ge=1)] | None, Field(description="None = all.")] = None
    return_documents: Annotated[bool, Field(strict=True)] = False


class RerankResult(BaseModel):
    index: Annotated[int, Field(ge=0, description="In the documents of the request.")]
    relevance_score: Annotated[float, Field(ge=0, le=1, description="Logistic function of the model's logit.")]
    document: Annotated[Document | None, Field(description="With return_documents = true only.")] = None


class RerankResponse(BaseModel):
    id: str
    model: str
    results: list[RerankResult]
    meta: dict[str, Any]


class ErrorBody(BaseModel):
    type: str
    message: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's shape."""

    error: ErrorBody
