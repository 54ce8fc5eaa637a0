"""The re-ranker: (query, passage) -> one raw logit, the higher the more relevant; comparable within a query only.

The same scores as the rerank stage makes from the token store, and as sentence-transformers' CrossEncoder(folder) predicts.
Shapes: P passages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from simlm.errors import DataError
from simlm.models.backbone import load_tokenizer, max_positions, resolve_model
from simlm.models.biencoder import read_simlm
from simlm.models.crossencoder import CrossEncoder
from simlm.models.inference import Floats, Inference
from simlm.models.precision import Precision
from simlm.models.retriever import BATCH_TOKENS, CHUNK_TEXTS, checked_passages
from simlm.models.text_batches import Text, TextTokenizer, batches, checked_texts
from simlm.types import Passage


def load_reranker(
    path: str | Path, *, precision: Precision = "fp32", device: str | None = None, batch_tokens: int = BATCH_TOKENS
) -> Reranker:
    """The re-ranker in a folder of a train_reranker step, or another one-label cross-encoder (a folder or hub id).

    precision: "auto" = bf16 where the processor has it. Raises ModelError if the folder is another role's, or damaged.
    """
    model = CrossEncoder.load(path)
    tokenizer = load_tokenizer(str(path))
    longest = min(max_positions(model.classifier) or 512, int(tokenizer.model_max_length))
    own = read_simlm(Path(resolve_model(str(path)))).get("max_pair_tokens", longest)
    return Reranker(
        TextTokenizer(tokenizer),
        max_pair_tokens=min(int(own), longest),
        inference=Inference(model, precision=precision, device=device),
        batch_tokens=batch_tokens,
    )


class Reranker:
    """A cross-encoder with its tokenizer. max_pair_tokens: where pairs are cut, special tokens included."""

    def __init__(self, tokenizer: TextTokenizer, *, max_pair_tokens: int, inference: Inference, batch_tokens: int = BATCH_TOKENS) -> None:
        self.tokenizer = tokenizer
        self.max_pair_tokens = max_pair_tokens
        self.inference = inference
        self.batch_tokens = batch_tokens

    def score(self, query: str, passages: Iterable[str | tuple[str, str] | Passage]) -> Floats:
        """float32 [P] raw logits of one query's passages, in the order given.

        passages: texts, (title, text) pairs (read as "title text"), or Passage. DataError if query or passage is something else.
        """
        if not isinstance(query, str):
            raise DataError(f"query: {type(query).__name__} was given, a string was expected")
        return self._score([(query, joined(passage)) for passage in checked_passages(passages, "passages")])

    def score_pairs(self, pairs: Sequence[tuple[str, str | tuple[str, str] | Passage]]) -> Floats:
        """float32 [P] raw logits of (query, passage) pairs, in the order given; passages as for `score`."""
        for position, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(f"pairs[{position}]: {type(pair).__name__} was given, a (query, passage) pair was expected")
        queries = checked_texts([query for query, _ in pairs], "queries")
        passages = checked_passages([passage for _, passage in pairs], "passages")
        return self._score([(query, joined(passage)) for query, passage in zip(queries, passages, strict=True)])

    def _score(self, pairs: list[tuple[str, str]]) -> Floats:
        logits_P = np.empty(len(pairs), dtype=np.float32)
        for start in range(0, len(pairs), CHUNK_TEXTS):
            chunk = pairs[start : start + CHUNK_TEXTS]
            sequences = self.tokenizer.encode(cast("list[Text]", chunk), self.max_pair_tokens)
            parts = ((rows, sequences.tensors(rows)) for rows in batches(sequences.lengths(), self.batch_tokens))
            self.inference.run(parts, logits_P[start : start + len(chunk)], name=lambda row, start=start: f"pair {start + row}")  # type: ignore[misc]
        return logits_P


def joined(passage: Text) -> str:
    """A passage as a cross-encoder reads it: title and text with a space between."""
    return passage if isinstance(passage, str) else f"{passage[0]} {passage[1]}"
