"""The re-ranker of Python users: a query and passages in, scores out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from simlm.errors import DataError
from simlm.models.backbone import load_tokenizer, max_positions
from simlm.models.biencoder import check_positions
from simlm.models.crossencoder import CrossEncoder
from simlm.models.inference import Floats, Inference, Ints
from simlm.models.model_folder import read_model_folder
from simlm.models.precision import Precision
from simlm.models.retriever import CHUNK, DEFAULT_TOKENS, passage_texts
from simlm.models.text_batches import Text, TextTokenizer, batches, checked_texts
from simlm.progress import Progress
from simlm.recipe import ModelSettings, RerankSettings
from simlm.types import Passage


def load_reranker(
    path: str | Path | ModelSettings,
    *,
    precision: Precision = "fp32",
    device: str | torch.device | None = None,
    max_pair_tokens: int | None = None,
    batch_tokens: int | None = None,
) -> Reranker:
    """A re-ranker to score query-passage pairs with.

    path: a re-ranker made by simlm or any cross-encoder with one label; a folder or a hub id.
    precision: "fp32" gives the raw logits of sentence_transformers.CrossEncoder(path); "auto" computes in bf16 where the processor
    has it. max_pair_tokens: None = what the model was trained with. batch_tokens: padded tokens scored at once.
    Raises ModelError if there is no model, or it is a retriever, or has another number of labels.
    """
    settings = path if isinstance(path, ModelSettings) else ModelSettings(start=str(path))
    model = CrossEncoder.load(settings)
    positions = max_positions(model.classifier) or DEFAULT_TOKENS
    own = read_model_folder(settings.start, settings.revision).max_pair_tokens
    tokens = max_pair_tokens or min(own or positions, positions)
    check_positions(model.classifier, tokens, settings.start)
    return Reranker(
        model,
        load_tokenizer(settings.start, settings.revision),
        max_pair_tokens=tokens,
        precision=precision,
        device=device,
        batch_tokens=batch_tokens,
    )


class Reranker:
    """Scores pairs: raw logits, the higher the more relevant, comparable within a query."""

    def __init__(
        self,
        model: CrossEncoder,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_pair_tokens: int,
        precision: Precision = "fp32",
        device: str | torch.device | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.inference = Inference(model, precision=precision, device=device)
        self.max_pair_tokens = max_pair_tokens
        self.batch_tokens = batch_tokens or RerankSettings().batch_tokens
        self._tokenizer = TextTokenizer(tokenizer)

    @property
    def precision(self) -> Precision:
        """What "auto" came to: fp32 or bf16."""
        return self.inference.precision

    def score(self, query: str, passages: Sequence[str | tuple[str, str] | Passage], *, progress: bool = False) -> Floats:
        """Raw logits float32 [P] of one query with each passage, in their order.

        A passage is its text, (title, text) or a `Passage`; the pair is `[CLS] query [SEP] title text [SEP]`, cut at
        `max_pair_tokens`. Raises DataError if the query is not a string or a passage is none of these.
        """
        (checked,) = checked_texts([query], "query")
        return self._score([(checked, text) for text in one_string(passages)], progress)

    def score_pairs(self, pairs: Sequence[tuple[str, str | tuple[str, str] | Passage]], *, progress: bool = False) -> Floats:
        """Raw logits float32 [number of pairs] of (query, passage) pairs, in their order; passages and errors as for `score`."""
        for position, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(f"pairs[{position}]: {type(pair).__name__} was given, a pair (query, passage) was expected")
        queries = checked_texts([query for query, _ in pairs], "queries")
        return self._score(list(zip(queries, one_string([passage for _, passage in pairs]), strict=True)), progress)

    def _score(self, pairs: list[Text], progress: bool) -> Floats:
        scores = np.empty(len(pairs), dtype=np.float32)
        starts = range(0, len(pairs), CHUNK)
        for start in Progress(quiet=not progress).track(starts, "score", total=len(starts), unit="chunk"):
            self.inference.run(self.pair_batches(pairs[start : start + CHUNK]), scores[start : start + CHUNK])
        return scores

    def pair_batches(self, pairs: list[Text]) -> Iterator[tuple[Ints, dict[str, Tensor]]]:
        """Batches for `inference.run`, by near-equal length, of (query, passage as one string) pairs."""
        sequences = self._tokenizer.encode(pairs, self.max_pair_tokens)
        for positions in batches(sequences.lengths(), self.batch_tokens):
            yield positions, sequences.tensors(positions)


def one_string(passages: Sequence[str | tuple[str, str] | Passage]) -> list[str]:
    """Each passage as a cross-encoder reads it: "title text" as one string."""
    return [" ".join(text) if isinstance(text, tuple) else text for text in passage_texts(passages)]
