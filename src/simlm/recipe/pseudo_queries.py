"""Sections for a corpus without labels: queries made from its passages, and the filter that they go through."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from simlm.errors import nearest
from simlm.recipe.section import Fraction, PositiveInt, Section

PSEUDO_QUERY_KINDS = ("title", "title_keywords", "first_sentence", "crop", "keywords", "cloze")
"""The kinds of simlm.data.pseudo_queries (a test compares them)."""

ENDPOINT_QUERY_KINDS = ("ask_question", "ask_keywords", "ask_claim")
"""The prompts of simlm.data.query_endpoint (a test compares them)."""


class EndpointSettings(Section):
    """A language model behind an OpenAI-compatible HTTP endpoint (vLLM, llama.cpp, Ollama, a provider), asked for queries."""

    url: str
    """Up to and with the version: "http://127.0.0.1:8000/v1"; `/chat/completions` is added."""
    model: str
    """Name by which the endpoint knows the model."""
    api_key_env: str | None = None
    """Environment variable that holds the key; none = no key is sent. The key itself is never written anywhere."""
    max_parallel: PositiveInt = 8
    """Requests under way at the same time."""
    max_tries: PositiveInt = 6
    """Of one request; between them 1, 2, 4 ... seconds pass, or what the answer's Retry-After says."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of the language model's sampling; Promptagator's (arXiv 2209.11755)."""
    max_tokens: PositiveInt = 64
    """Of an answer."""
    passage_words: PositiveInt = 300
    """Words of a passage that are sent."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not re.match(r"https?://[^/\s]+", url):
            raise ValueError('an address like "http://127.0.0.1:8000/v1" was expected')
        return url.rstrip("/")


Between = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class PseudoQuerySettings(Section):
    """Queries made from the passages themselves, for a corpus without labels; real training and dev queries are then not read."""

    kinds: dict[str, float] = Field(
        default_factory=lambda: {"title_keywords": 1.0, "keywords": 1.0, "first_sentence": 1.0, "crop": 1.0, "cloze": 1.0, "title": 0.5}
    )
    """Kind -> share of the queries (only the ratio counts); a kind that the corpus has too little of leaves its share to the others. Kinds:
    title, title_keywords, first_sentence, crop, keywords, cloze; from the endpoint: ask_question, ask_keywords, ask_claim."""
    num_queries: PositiveInt = 20_000
    """At most, of all kinds together, before the consistency filter."""
    queries_per_passage: PositiveInt = 2
    """Of one kind, at most, where a passage can give several; the second ones are taken when every passage has given its first."""
    dev_fraction: Fraction = 0.05
    """Share of the passages whose queries become the dev split."""
    words: Between = Field(default_factory=lambda: [5, 14])
    """Shortest and longest crop, sentence and cloze."""
    keywords: Between = Field(default_factory=lambda: [3, 7])
    title_keywords: Between = Field(default_factory=lambda: [1, 3])
    """Fewest and most words of a keyword query, and beside a title."""
    drop_words: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the words of crops and first sentences left out at random, so that no query is a verbatim part of its passage."""
    max_positives: PositiveInt = 3
    """A query that more passages than this give (a title of many sections) says too little and is left out."""
    endpoint: EndpointSettings | None = None
    """Where the ask_ kinds come from."""

    @field_validator("kinds", mode="before")
    @classmethod
    def _shares_are_numbers(cls, kinds: Any) -> Any:
        return {name: float(share) if type(share) is int else share for name, share in kinds.items()} if isinstance(kinds, dict) else kinds

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: dict[str, float]) -> dict[str, float]:
        known = (*PSEUDO_QUERY_KINDS, *ENDPOINT_QUERY_KINDS)
        if not kinds:
            raise ValueError("no kind of query; name one, for example { keywords = 1, crop = 1 }")
        for name, share in kinds.items():
            if name not in known:
                raise ValueError(f"unknown kind {name!r}{nearest(name, known)} (known: {', '.join(known)})")
            if not 0 < share < math.inf:
                raise ValueError(f"the share of {name!r} is {share}, a number above 0 was expected; leave the kind out instead")
        return kinds

    @model_validator(mode="after")
    def _limits_fit(self) -> PseudoQuerySettings:
        for name in ("words", "keywords", "title_keywords"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"{name} = [{least}, {most}]: fewest first, then most")
        asked = [kind for kind in self.kinds if kind in ENDPOINT_QUERY_KINDS]
        if asked and self.endpoint is None:
            raise ValueError(f"kinds {', '.join(asked)} come from an endpoint; set endpoint, or leave them out")
        if self.endpoint is not None and not asked:
            raise ValueError(f"the endpoint is not asked for anything; name kinds of {', '.join(ENDPOINT_QUERY_KINDS)}, or leave it out")
        if self.dev_fraction == 1:
            raise ValueError("dev_fraction = 1 leaves no training queries")
        return self


class ConsistencySettings(Section):
    """Round trip: a pseudo query stays if its passage is among the first `within` it finds (arXiv 2209.11755, InPars 2301.01820)."""

    by: Literal["bm25", "start", "hybrid", "reranker", "none"] = "hybrid"
    """Who searches: BM25, the starting model, both fused by score with equal weights, a cross-encoder over BM25's first `depth`, nobody."""
    within: PositiveInt = 10
    depth: PositiveInt = 100
    """Searched; of "reranker", pairs scored a query."""
    reranker: str | None = None
    """Path or hub id of the cross-encoder for by = "reranker", such as `runs/NAME/reranker` of an earlier run."""
    trivial_share: Fraction = 1.0
    """At most this share of the queries kept may be found by words alone: BM25 has their passage first, with `trivial_margin` to spare."""
    trivial_margin: Annotated[float, Field(ge=0)] = 0.5
    """How far BM25's score of the second is below that of the first, as a share of the first."""

    @model_validator(mode="after")
    def _reranker_fits(self) -> ConsistencySettings:
        if (self.by == "reranker") != (self.reranker is not None):
            raise ValueError('`reranker` names the cross-encoder of by = "reranker"; set both or neither')
        if self.by != "none" and self.within > self.depth:
            raise ValueError(f"within = {self.within} is more than depth = {self.depth}, so it would keep what was not found")
        return self
