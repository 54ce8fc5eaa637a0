"""The nouns that every layer shares: passages, queries, judgements, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable unit of the corpus; `title` is empty where the source has none."""

    passage_id: str
    text: str
    title: str = ""


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
