"""Pieces one after another, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from simlm.corpus_encoding.pieces import Corpus, Piece
from simlm.corpus_encoding.worker import Encoder, Job


def run(job: Job, corpus: Corpus, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
    """A report of each piece when it is done."""
    encoder = Encoder(job)
    for piece in pieces:
        yield encoder(piece, corpus)
