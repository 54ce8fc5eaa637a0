"""The retriever: texts -> vectors of unit length, whose inner product is the cosine that search ranks by.

The same vectors as the encode stage makes from the token store, and as SentenceTransformer(folder) makes of the texts (a passage with a
title is the pair (title, text) there). Shapes: Q queries, P passages, D embedding dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simlm.errors import DataError
from simlm.models.backbone import load_tokenizer, max_positions, resolve_model
from simlm.models.biencoder import BiEncoder, read_simlm
from simlm.models.inference import Floats, Inference
from simlm.models.precision import Precision
from simlm.models.text_batches import Text, TextTokenizer, batches, checked_texts
from simlm.recipe import ModelSettings
from simlm.types import Passage

BATCH_TOKENS = 8192
"""Padded tokens encoded at once."""
CHUNK_TEXTS = 8192
"""Texts tokenised and sorted by length at once: memory does not grow with their number."""


def load_retriever(
    path: str | Path | ModelSettings, *, precision: Precision = "fp32", device: str | None = None, batch_tokens: int = BATCH_TOKENS
) -> Retriever:
    """The retriever in a folder of a train_retriever or distill step, a sentence-transformers folder, or a bare encoder's.

    path: a folder, a hub id, or "packaged:all-MiniLM-L6-v2". precision: "auto" = bf16 where the processor has it.
    Raises ModelError if the folder is another role's, or damaged.
    """
    settings = path if isinstance(path, ModelSettings) else ModelSettings(start=str(path))
    model = BiEncoder.load(settings)
    tokenizer = load_tokenizer(settings.start, settings.revision)
    longest = _longest(model, tokenizer.model_max_length)
    folder = Path(resolve_model(settings.start))
    facts = read_simlm(folder)
    own = _own_maximum(folder) or longest
    return Retriever(
        model,
        TextTokenizer(tokenizer),
        max_query_tokens=min(int(facts.get("max_query_tokens", own)), longest),
        max_passage_tokens=min(int(facts.get("max_passage_tokens", own)), longest),
        inference=Inference(model, precision=precision, device=device),
        batch_tokens=batch_tokens,
    )


class Retriever:
    """A bi-encoder with its tokenizer. max_query_tokens, max_passage_tokens: where texts are cut, special tokens included."""

    def __init__(
        self,
        model: BiEncoder,
        tokenizer: TextTokenizer,
        *,
        max_query_tokens: int,
        max_passage_tokens: int,
        inference: Inference,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.dim = model.dim
        self.tokenizer = tokenizer
        self.max_query_tokens = max_query_tokens
        self.max_passage_tokens = max_passage_tokens
        self.inference = inference
        self.batch_tokens = batch_tokens

    def encode_queries(self, queries: Iterable[str]) -> Floats:
        """float32 [Q, D], unit length, in the order given. DataError if one is not a string."""
        return self._encode(checked_texts(queries, "queries"), self.max_query_tokens)

    def encode_passages(self, passages: Iterable[str | tuple[str, str] | Passage]) -> Floats:
        """float32 [P, D], unit length, in the order given.

        passages: texts, (title, text) pairs, or Passage; an empty title counts as none. DataError if one is something else.
        """
        return self._encode(checked_passages(passages, "passages"), self.max_passage_tokens)

    def _encode(self, texts: list[Text], max_tokens: int) -> Floats:
        vectors_ND = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), CHUNK_TEXTS):
            chunk = texts[start : start + CHUNK_TEXTS]
            sequences = self.tokenizer.encode(chunk, max_tokens)
            parts = ((rows, sequences.tensors(rows)) for rows in batches(sequences.lengths(), self.batch_tokens))
            self.inference.run(parts, vectors_ND[start : start + len(chunk)], name=lambda row, start=start: f"text {start + row}")  # type: ignore[misc]
        return vectors_ND


def checked_passages(passages: Iterable[str | tuple[str, str] | Passage], name: str) -> list[Text]:
    """Texts, and (title, text) where there is a title; DataError naming the first that is neither text, pair nor Passage."""
    if isinstance(passages, str | Passage):
        raise DataError(f"{name}: one passage was given, a list of passages was expected; write [passage]")
    found: list[Text] = []
    for position, passage in enumerate(passages):
        title, text = _parts(passage)
        if not isinstance(title, str) or not isinstance(text, str):
            raise DataError(
                f"{name}[{position}]: {_shape(passage)} was given, a string, a (title, text) pair of strings or a Passage was expected; "
                "leave out or convert missing texts"
            )
        found.append((title, text) if title else text)
    return found


def _parts(passage: object) -> tuple[object, object]:
    if isinstance(passage, Passage):
        return passage.title, passage.text
    if isinstance(passage, tuple | list) and len(passage) == 2:
        return passage[0], passage[1]
    return "", passage


def _shape(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(type(part).__name__ for part in value[:4])})"
    return type(value).__name__


def _longest(model: BiEncoder, model_max_length: int) -> int:
    """Tokens that the encoder takes: its positions, and what the tokenizer says of itself (a huge number where it says nothing)."""
    return min(max_positions(model.encoder) or 512, int(model_max_length))


def _own_maximum(folder: Path) -> int | None:
    """max_seq_length of a sentence-transformers folder that simlm did not write; None where there is none."""
    file = folder / "sentence_bert_config.json"
    if not file.is_file():
        return None
    limit = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length")
    return int(limit) if limit else None
