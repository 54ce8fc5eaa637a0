"""The retriever of Python users: texts in, vectors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from simlm.errors import DataError, ModelError
from simlm.models.backbone import load_tokenizer, max_positions
from simlm.models.biencoder import BiEncoder, check_positions
from simlm.models.inference import Floats, Inference, Ints
from simlm.models.model_folder import prompts_of, read_model_folder
from simlm.models.precision import Precision
from simlm.models.text_batches import Text, TextTokenizer, batches, checked_texts
from simlm.models.weights import model_digest
from simlm.progress import Progress
from simlm.recipe import EncodeSettings, ModelSettings
from simlm.types import Passage

CHUNK = 8192
"""Texts tokenised at a time, and sorted by length among themselves."""
CPU_BATCH_TOKENS = 2048
"""Most tokens at once on a CPU: more leave the cache, and 16,384 take 7% (fp32) to 10% (int8) more processor time (6 x 384, one thread)."""
DEFAULT_TOKENS = 512
"""Longest text where neither folder nor configuration names a limit."""


def load_retriever(
    path: str | Path | ModelSettings,
    *,
    precision: Precision = "fp32",
    device: str | torch.device | None = None,
    max_query_tokens: int | None = None,
    max_passage_tokens: int | None = None,
    batch_tokens: int | None = None,
    digest: bool = False,
) -> Retriever:
    """A retriever to encode queries and passages with.

    path: a retriever made by simlm, a sentence-transformers folder of one encoder, or a bare encoder; a folder, a hub id or
    "packaged:all-MiniLM-L6-v2"; or the model section of a recipe.
    precision: "fp32" gives the vectors that SentenceTransformer(path) gives; "auto" computes in bf16 where the processor has it.
    "int8" is near fp32 and quicker (x86 processors); "fast" = bf16 where the processor has it, else int8 where it has that, else fp32.
    "fp16" has weights of 16 bits (x86 processors): vectors as fp32's to about 1e-4, and half the time for a query alone.
    max_query_tokens, max_passage_tokens: None = what the model was trained with. batch_tokens: padded tokens encoded at once
    (on a CPU 2,048 at most).
    Prompts are the model's own, or those of the settings where it has none. digest: let `Retriever.digest` tell the weights apart.
    Raises ModelError if there is no model, or it is a re-ranker or generator.
    """
    settings = path if isinstance(path, ModelSettings) else ModelSettings(start=str(path))
    found = read_model_folder(settings.start, settings.revision)
    if found.role == "reranker":
        raise ModelError(f"{settings.start}: this is a re-ranker, which scores pairs and makes no vectors; use load_reranker")
    model = BiEncoder.load(settings)
    positions = max_positions(model.encoder) or DEFAULT_TOKENS
    lengths = [
        wanted or min(own or positions, positions)
        for wanted, own in ((max_query_tokens, found.max_query_tokens), (max_passage_tokens, found.max_passage_tokens))
    ]
    check_positions(model.encoder, max(lengths), settings.start)
    query_prompt, passage_prompt = prompts_of(settings)
    # Now, as other precisions put other weights in their place.
    whole = model_digest(model) if digest else ""
    retriever = Retriever(
        model,
        load_tokenizer(settings.start, settings.revision),
        max_query_tokens=lengths[0],
        max_passage_tokens=lengths[1],
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
        precision=precision,
        device=device,
        batch_tokens=batch_tokens,
    )
    retriever.digest = whole
    retriever.matryoshka = found.matryoshka
    return retriever


class Retriever:
    """Encodes queries and passages into vectors of unit length, whose inner product is the similarity (cosine).

    digest: of the model's weights and configuration as they were loaded; empty unless `load_retriever` was asked for it.
    matryoshka: sizes to which its vectors may be cut; empty = none.
    """

    digest: str = ""
    matryoshka: tuple[int, ...] = ()

    def __init__(
        self,
        model: BiEncoder,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_query_tokens: int,
        max_passage_tokens: int,
        query_prompt: str = "",
        passage_prompt: str = "",
        precision: Precision = "fp32",
        device: str | torch.device | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.inference = Inference(model, precision=precision, device=device)
        self.dim = model.dim
        self.max_query_tokens = max_query_tokens
        self.max_passage_tokens = max_passage_tokens
        self.batch_tokens = batch_tokens or EncodeSettings().batch_tokens
        if self.inference.device.type == "cpu":
            self.batch_tokens = min(self.batch_tokens, CPU_BATCH_TOKENS)
        self._tokenizer = TextTokenizer(tokenizer)
        self.query_prompt = self._checked_prompt("query_prompt", query_prompt, max_query_tokens)
        self.passage_prompt = self._checked_prompt("passage_prompt", passage_prompt, max_passage_tokens)

    @property
    def precision(self) -> Precision:
        """What "auto" or "fast" came to: fp32, fp16, bf16 or int8."""
        return self.inference.precision

    def encode_queries(self, queries: Sequence[str], *, progress: bool = False) -> Floats:
        """float32 [Q, D], unit length, in the order of `queries`; an empty query has a vector too (that of no words).

        Longer queries are cut at `max_query_tokens`. Raises DataError naming the first item that is not a string.
        """
        return self._encode(with_prompt(self.query_prompt, checked_texts(queries, "queries")), self.max_query_tokens, progress)

    def encode_passages(self, passages: Sequence[str | tuple[str, str] | Passage], *, progress: bool = False) -> Floats:
        """float32 [P, D], unit length, in the order of `passages`.

        A passage is its text, (title, text), or a `Passage`; one with a title is read as `[CLS] title [SEP] text [SEP]`, cut at
        `max_passage_tokens`. Raises DataError naming the first item that is none of these.
        """
        return self._encode(with_prompt(self.passage_prompt, passage_texts(passages)), self.max_passage_tokens, progress)

    def num_tokens(self, texts: Sequence[str], *, query: bool) -> int:
        """Tokens that the model reads of these texts, as queries or as passages, with prompts and special tokens."""
        prompt, most = (self.query_prompt, self.max_query_tokens) if query else (self.passage_prompt, self.max_passage_tokens)
        return int(self._tokenizer.encode(with_prompt(prompt, texts), most).lengths().sum())

    def _checked_prompt(self, name: str, prompt: str, max_tokens: int) -> str:
        """The prompt; ModelError if it leaves no room for a text."""
        if prompt and not self._tokenizer.leaves_room(prompt, max_tokens):
            raise ModelError(
                f"{name} {prompt!r} and the special tokens fill all of the {max_tokens} tokens of a sequence, so that no text fits; "
                "allow more tokens, or train with a shorter prompt"
            )
        return prompt

    def _encode(self, texts: list[Text], max_tokens: int, progress: bool) -> Floats:
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        starts = range(0, len(texts), CHUNK)
        for start in Progress(quiet=not progress).track(starts, "encode", total=len(starts), unit="chunk"):
            chunk = texts[start : start + CHUNK]
            self.inference.run(self._batches(chunk, max_tokens), vectors[start : start + CHUNK])
        return vectors

    def _batches(self, texts: list[Text], max_tokens: int) -> Iterator[tuple[Ints, dict[str, Tensor]]]:
        sequences = self._tokenizer.encode(texts, max_tokens)
        for positions in batches(sequences.lengths(), self.batch_tokens):
            yield positions, sequences.tensors(positions)


def with_prompt(prompt: str, texts: Sequence[Text]) -> list[Text]:
    """Each text behind the prompt; of a pair the first part (the title) is."""
    if not prompt:
        return list(texts)
    return [(prompt + text[0], text[1]) if isinstance(text, tuple) else prompt + text for text in texts]


def passage_texts(passages: Sequence[str | tuple[str, str] | Passage]) -> list[Text]:
    """Each passage as the tokenizer takes it: a pair where it has a title, else its text."""
    if isinstance(passages, str | Passage):
        raise DataError(f"passages: one {type(passages).__name__} was given, a list was expected; write [passage]")
    texts: list[Text] = []
    for position, passage in enumerate(passages):
        parts = (passage.title, passage.text) if isinstance(passage, Passage) else passage
        if isinstance(parts, str):
            texts.append(parts)
        elif isinstance(parts, tuple | list) and len(parts) == 2 and all(isinstance(part, str) for part in parts):
            # A blank title leaves no tokens: such a passage is its text alone, in the store too.
            texts.append((parts[0], parts[1]) if parts[0].strip() else parts[1])
        else:
            raise DataError(
                f"passages[{position}]: {type(passage).__name__} was given; "
                "a string, a pair of strings (title, text) or a simlm.Passage was expected"
            )
    return texts
