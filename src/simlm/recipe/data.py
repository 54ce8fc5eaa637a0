"""Sections about data: where passages, queries and judgements come from, and how they are tokenised into the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from simlm.recipe.section import Fraction, PositiveInt, Section
from simlm.types import Split


class DataSettings(Section):
    """Where passages, queries and judgements come from."""

    dataset: str = "beir"
    """Loader: a name of simlm.data.datasets.DATASETS (beir, msmarco, jsonl, csv, parquet, text, ir_datasets, hub, python-docs)."""
    path: str | None = None
    """Folder or id; `$VARIABLES` and `~` are expanded. `$SIMLM_DATA` falls back to `../shared/data`."""
    corpus: str | None = None
    queries: dict[Split, str] | str | None = None
    qrels: dict[Split, str] | str | None = None
    """Files inside `path` (or absolute), where the loader's own names do not fit."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Field names of JSONL, CSV and Parquet where they differ: passage_id, title, text, query_id, query, grade, answers ..."""
    metadata_fields: list[str] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Columns kept as metadata of the passages, for filters; none = the fields of a record's object "metadata" (JSONL)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the loader itself (python-docs: packages, max_passages ...; hub: name, revision ...)."""
    max_passages: PositiveInt | None = None
    """Keep a seeded sample of this many passages, judged ones first; none = all."""
    max_queries: dict[Split, PositiveInt] = Field(default_factory=dict)
    """Keep a seeded sample of at most this many judged queries of a split."""
    splits: list[Split] | None = None
    """Splits whose queries and judgements are read, the files of others are not opened; none = all, ["test"] with [pseudo_queries]."""
    dev_fraction: Fraction = 0.1
    """Share of the training queries set apart as dev where the data set has no dev queries."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A broken line, missing field, empty passage, duplicate id or unknown id: stop, or leave it out and count it."""


class PrepareSettings(Section):
    """Tokenisation of corpus and queries into the store."""

    data: DataSettings = Field(default_factory=DataSettings)
    tokenizer: str = "packaged:all-MiniLM-L6-v2"
    """Model reference whose tokenizer is used; filled in from [model] by the pipeline."""
    max_passage_tokens: Annotated[int, Field(ge=8)] = 144
    """Longest passage kept, title and special tokens included."""
    max_query_tokens: Annotated[int, Field(ge=4)] = 32
    train_vocabulary: Annotated[int, Field(ge=100)] | None = None
    """Train a new WordPiece vocabulary of this size on the corpus instead of using `tokenizer`'s (only for a fresh model)."""
    lowercase: bool = True
    """Of the new vocabulary."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Tokenising processes; 0 = one a core."""


def expand_path(text: str) -> Path:
    """A path with `~` and environment variables expanded; SIMLM_DATA falls back to ../shared/data where it is not set."""
    if "SIMLM_DATA" in text and "SIMLM_DATA" not in os.environ:
        text = text.replace("${SIMLM_DATA}", "../shared/data").replace("$SIMLM_DATA", "../shared/data")
    return Path(os.path.expandvars(os.path.expanduser(text)))
