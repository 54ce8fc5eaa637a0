"""The retrieval probe of pre-training: does the pooled vector find a held-out passage by its title, or by its first sentence?

Sources: a passage's own sentence as its query: inverse cloze, arXiv 1906.00300, and body-first selection, arXiv 2002.03932; whitening:
arXiv 2103.15316; shrinkage of its covariance: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
matrices".
Ours: the searched passage is the text without its title, in both cases. In its own title or first sentence a passage would be found
by the words that both contain, and a title mostly gives the first sentence's subject away.
Shapes: Q queries, P passages, N = Q + P texts, B texts of a batch, T tokens, H dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simlm.data.batches import length_batches
from simlm.data.store import Table
from simlm.data.tokens import Template
from simlm.errors import TrainingError
from simlm.recipe import ProbeSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Tokens = NDArray[np.integer[Any]]
Encode = Callable[[dict[str, Tensor]], Tensor]

DEPTH = 10

_SENTENCE_ENDS = frozenset(".?!。？！")  # noqa: RUF001
_MIN_SENTENCE_TOKENS = 4
"""Of a first sentence and of what follows it; an end before that is an abbreviation or a number."""

_TIE = 1e-6
"""Cosines closer than this are equal: equal vectors of different batches differ by rounding."""


@dataclass(frozen=True)
class Probe:
    """Queries and passages as finished batches, and which query asks for which passage.

    query: what the queries are. batches: the model's keyword arguments, and the texts' numbers (queries first, then passages).
    query_of_P: number of the query that asks for each passage. Passages that share a query are all relevant to it.
    """

    query: Literal["title", "first_sentence"]
    num_queries: int
    query_of_P: Ints
    batches: tuple[tuple[dict[str, Tensor], Ints], ...]

    @classmethod
    def build(
        cls,
        table: Table,
        rows: Ints,
        settings: ProbeSettings,
        *,
        seed: int,
        batch_tokens: int,
        tokenizer: PreTrainedTokenizerFast,
        token_types: bool,
    ) -> Probe | None:
        """A probe of up to `settings.num_passages` of the held-out `rows`, drawn by `seed`; None where there is nothing to tell apart.

        That is, where num_passages is 0, or where fewer than two of the passages have what is needed, or all have the same query.
        "auto" chooses titles if at least half of the drawn passages have one and at least half of these titles differ.
        batch_tokens: the most a batch has, padding included, but one text is always taken. token_types: give token_type_ids, all 0.
        """
        if settings.num_passages == 0:
            return None
        shuffled = np.random.default_rng(seed % 2**64).permutation(np.sort(rows))
        query = settings.query
        if query == "auto":
            query = "title" if _have_titles(table, shuffled[: settings.num_passages]) else "first_sentence"
        ends = _sentence_ends(tokenizer) if query == "first_sentence" else None
        pairs: list[tuple[Tokens, Tokens]] = []
        for row in shuffled.tolist():
            # Passages that cannot be used are replaced by further held-out ones.
            if len(pairs) == settings.num_passages:
                break
            pair = table.tokens_of(row) if ends is None else _first_sentence(table, row, ends)
            if pair is not None and len(pair[0]) and len(pair[1]):
                pairs.append(pair)
        numbers: dict[bytes, int] = {}
        query_of_P = np.array([numbers.setdefault(asked.tobytes(), len(numbers)) for asked, _ in pairs], dtype=np.int64)
        if len(numbers) < 2:
            return None
        queries = dict(zip(query_of_P.tolist(), (asked for asked, _ in pairs), strict=True))
        texts = [*(queries[number] for number in range(len(numbers))), *(passage for _, passage in pairs)]
        room = table.max_tokens - table.template.num_single
        batches = _batches([text[:room] for text in texts], table.template, batch_tokens, token_types)
        return cls(query, len(numbers), query_of_P, tuple(batches))

    @property
    def num_passages(self) -> int:
        return len(self.query_of_P)

    def measures(self, encode: Encode) -> dict[str, float]:
        """What `encode` finds, and how its vectors are spread; computed on the CPU.

        probe_RR@10: mean over queries of 1 / rank of the best-ranked relevant passage by cosine, 0 below rank 10. Ties count against
        it, so vectors that are all equal find nothing.
        probe_whitened_RR@10: the same after removing the mean of all vectors and whitening them: what a linear map could find.
        cls_mean_cosine: mean cosine of two passages; 1 = collapsed.
        cls_std: mean over dimensions of the standard deviation of the passages' unit vectors, times sqrt(H); 1 = spread evenly,
        0 = collapsed.
        encode: the model's keyword arguments -> [B, H] pooled vectors, any float type, on any device; without dropout.
        Raises TrainingError if a vector is not finite.
        """
        vectors_NH = self._encode(encode)
        units_PH = _unit(vectors_NH[self.num_queries :])
        count, width = units_PH.shape
        return {
            f"probe_RR@{DEPTH}": self._reciprocal_rank(vectors_NH),
            f"probe_whitened_RR@{DEPTH}": self._reciprocal_rank(whitened(vectors_NH)),
            "cls_mean_cosine": float(((units_PH.sum(0) ** 2).sum() - (units_PH**2).sum()) / (count * (count - 1))),
            "cls_std": float(units_PH.std(0).mean() * np.sqrt(width)),
        }

    @torch.no_grad()
    def _encode(self, encode: Encode) -> Floats:
        """float64 [N, H]. From here on it is numpy: a caller's autocast would take torch's products down to bf16."""
        parts = [encode(batch).detach().float().cpu().numpy() for batch, _ in self.batches]
        vectors_NH = np.empty((self.num_queries + self.num_passages, parts[0].shape[1]))
        for part, (_, numbers) in zip(parts, self.batches, strict=True):
            vectors_NH[numbers] = part
        broken = int((~np.isfinite(vectors_NH).all(1)).sum())
        if broken:
            raise TrainingError(
                f"retrieval probe: {broken} of {len(vectors_NH)} vectors are not finite, so the model's weights are not either; "
                "lower pretrain.training.learning_rate, or train without bf16"
            )
        return vectors_NH

    def _reciprocal_rank(self, vectors_NH: Floats) -> float:
        units_NH = _unit(vectors_NH)
        scores_QP = units_NH[: self.num_queries] @ units_NH[self.num_queries :].T
        relevant_QP = np.arange(self.num_queries)[:, None] == self.query_of_P
        best_Q = np.where(relevant_QP, scores_QP, -np.inf).max(1)
        ranks_Q = 1 + (~relevant_QP & (scores_QP >= best_Q[:, None] - _TIE)).sum(1)
        return float(np.where(ranks_Q <= DEPTH, 1.0 / ranks_Q, 0.0).mean())


def whitened(vectors_NH: Floats) -> Floats:
    """The vectors without their mean, in the axes of their covariance, each axis divided by its standard deviation; [N, H].

    The covariance is first mixed with a multiple of the identity, as Ledoit and Wolf 2004 estimate it: with fewer vectors than
    dimensions it has axes without any variance. Vectors that are all equal give zeros.
    """
    centred_NH = vectors_NH - vectors_NH.mean(0)
    count, width = centred_NH.shape
    covariance_HH = centred_NH.T @ centred_NH / count
    mean_variance = float(np.trace(covariance_HH)) / width
    # Less than rounding leaves of equal vectors: nothing to divide by.
    if mean_variance <= 1e-12 * float((vectors_NH**2).mean()):
        return np.zeros_like(vectors_NH)
    distance = float((covariance_HH**2).sum()) - width * mean_variance**2
    error = (float(((centred_NH**2).sum(1) ** 2).sum()) / count - float((covariance_HH**2).sum())) / count
    share = min(1.0, error / distance) if distance > 0 else 1.0
    variances_H, axes_HH = np.linalg.eigh(covariance_HH)
    mixed_H = (1.0 - share) * np.maximum(variances_H, 0.0) + share * mean_variance
    # Without error (each vector is met twice or so) an axis may still have none.
    scaled_NH: Floats = centred_NH @ axes_HH / np.sqrt(np.maximum(mixed_H, 1e-9 * mean_variance))
    return scaled_NH


def _unit(vectors_NH: Floats) -> Floats:
    """Of length 1; a vector of zeros stays one."""
    lengths_N = np.linalg.norm(vectors_NH, axis=1, keepdims=True)
    return vectors_NH / np.where(lengths_N > 0, lengths_N, 1.0)


def _have_titles(table: Table, rows: Ints) -> bool:
    titles = [title.tobytes() for title, _ in map(table.tokens_of, rows.tolist()) if len(title)]
    return 2 * len(titles) >= len(rows) > 0 and 2 * len(set(titles)) >= len(titles)


def _first_sentence(table: Table, row: int, ends: Ints) -> tuple[Tokens, Tokens] | None:
    """(tokens up to the first sentence's end, the rest), None where either is too short. A word begins after a sentence's end."""
    _, text = table.tokens_of(row)
    places = int(table.token_offsets[row + 1]) - len(text) + np.arange(len(text))
    starts = (table.word_start_bits[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(bool)
    lengths = 1 + np.flatnonzero(np.isin(text[:-1], ends) & starts[1:])
    lengths = lengths[(lengths >= _MIN_SENTENCE_TOKENS) & (len(text) - lengths >= _MIN_SENTENCE_TOKENS)]
    return (text[: lengths[0]], text[lengths[0] :]) if len(lengths) else None


def _sentence_ends(tokenizer: PreTrainedTokenizerFast) -> Ints:
    """Ascending ids of the tokens that are nothing but a mark that ends sentences."""
    from tokenizers import pre_tokenizers

    # Byte-level vocabularies spell a mark by its bytes. Only entries that may be one are decoded, not a whole vocabulary.
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = _SENTENCE_ENDS.union(*(by_bytes.pre_tokenize_str(mark)[0][0] for mark in sorted(_SENTENCE_ENDS)))
    longest = 5  # three bytes of a mark and a sign for what stands before it
    maybe = [number for piece, number in tokenizer.get_vocab().items() if len(piece) <= longest and not characters.isdisjoint(piece)]
    decode = tokenizer.backend_tokenizer.decode
    return np.array(sorted(number for number in maybe if decode([number]).strip() in _SENTENCE_ENDS), dtype=np.int64)


def _batches(texts: list[Tokens], template: Template, batch_tokens: int, token_types: bool) -> list[tuple[dict[str, Tensor], Ints]]:
    """Padded batches of near-equal length and the numbers of their texts; attention_mask only where a text is padded."""
    sequences = [np.array([*template.single_prefix, *text.tolist(), *template.single_suffix], dtype=np.int64) for text in texts]
    lengths_N = np.array([len(sequence) for sequence in sequences])
    batches = []
    for numbers in length_batches(lengths_N, batch_tokens):
        present_BT = np.arange(lengths_N[numbers].max()) < lengths_N[numbers][:, None]
        ids_BT = np.full(present_BT.shape, template.pad, dtype=np.int64)
        ids_BT[present_BT] = np.concatenate([sequences[number] for number in numbers])
        batch = {"input_ids": torch.from_numpy(ids_BT)}
        if not present_BT.all():
            batch["attention_mask"] = torch.from_numpy(present_BT.astype(np.int64))
        if token_types:
            batch["token_type_ids"] = torch.from_numpy(np.zeros_like(ids_BT))
        batches.append((batch, numbers))
    return batches
