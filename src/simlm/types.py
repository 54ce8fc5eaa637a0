"""The nouns that every layer shares: passages, queries, judgements, results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

Scalar = str | int | float | bool
"""What a field of a passage's metadata may hold."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable unit of the corpus; `title` is empty where the source has none.

    metadata: what else is known of it (year, source ...), by field name; searches filter on it, no model reads it.
    """

    passage_id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Scalar] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Query:
    """One query; `answers` are answer strings where the data set has them (Natural Questions, SQuAD)."""

    query_id: str
    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Qrel:
    """One relevance judgement; grade 0 means judged not relevant."""

    query_id: str
    passage_id: str
    grade: int = 1


@dataclass(frozen=True, slots=True)
class ScoredPassage:
    """One search result; `rank` starts at 1."""

    passage_id: str
    score: float
    rank: int
    title: str
    text: str
