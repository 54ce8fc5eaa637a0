"""Passages and queries with the same text: what answers one query under another id is no negative of it.

Texts are compared as `normalised` leaves them, titles do not count; each is kept as a digest of 64 bits.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from simlm.data.store import Table
from simlm.rankings import Groups, Ints

Digests = NDArray[np.uint64]


class Duplicates:
    """Digests of the passages that groups and judgements name, and the training queries that ask the same in the same words.

    passages, queries: tables of the store. judged: query row -> {passage row: grade}. All texts are read here, once.
    """

    def __init__(self, passages: Table, queries: Table, groups: Groups, judged: Mapping[int, Mapping[int, int]] | None = None) -> None:
        judged = judged or {}
        self._passages = passages
        self._rows = _named_rows(len(passages), groups, judged)
        self._digests = text_digests(passages, self._rows.tolist())
        self._twins_positives = _twins_positives(queries, groups, judged)

    def facts(self) -> dict[str, int]:
        """For the manifest: how many passages, and how many training queries, have a text that another of them has too."""
        _, counts = np.unique(self._digests, return_counts=True)
        return {"num_passages_with_a_twin": int(counts[counts > 1].sum()), "num_queries_with_a_twin": len(self._twins_positives)}

    def digests(self, rows: Ints) -> Digests:
        """uint64, one a passage row. Passages that no group names (random negatives) are read now."""
        rows = np.asarray(rows)
        if len(self._rows) == 0:
            return text_digests(self._passages, rows.tolist())
        places = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        found = self._digests[places]
        unknown = np.flatnonzero(self._rows[places] != rows)
        found[unknown] = text_digests(self._passages, rows[unknown].tolist())
        return found

    def positives_of_twins(self, query_row: int) -> Ints:
        """int64, sorted: passages relevant to any training query with the text of this one, itself included; empty if it is alone."""
        return self._twins_positives.get(query_row, np.empty(0, dtype=np.int64))


def _named_rows(num_passages: int, groups: Groups, judged: Mapping[int, Mapping[int, int]], block: int = 1 << 20) -> Ints:
    """int64, sorted, each once. Block by block, as the lists may be more than fit in memory."""
    named = np.zeros(num_passages, dtype=np.bool_)
    for rows in (groups.positive_rows, groups.negative_rows):
        for start in range(0, len(rows), block):
            named[rows[start : start + block]] = True
    for grades in judged.values():
        named[list(grades)] = True
    return np.flatnonzero(named)


def _twins_positives(queries: Table, groups: Groups, judged: Mapping[int, Mapping[int, int]]) -> dict[int, Ints]:
    positions = {int(row): position for position, row in enumerate(groups.query_rows)}
    rows = np.array(sorted(positions.keys() | judged.keys()), dtype=np.int64)
    digests = text_digests(queries, rows.tolist())
    order = np.argsort(digests, kind="stable")
    ends = np.flatnonzero(np.diff(digests[order])) + 1
    found: dict[int, Ints] = {}
    for twins in np.split(rows[order], ends):
        if len(twins) < 2:
            continue
        relevant = {passage for row in twins for passage, grade in judged.get(int(row), {}).items() if grade > 0}
        for row in twins:
            if int(row) in positions:
                relevant.update(groups.positives(positions[int(row)])[0].tolist())
        shared = np.array(sorted(relevant), dtype=np.int64)
        found.update({int(row): shared for row in twins})
    return found


def text_digests(table: Table, rows: Iterable[int]) -> Digests:
    """uint64, one a row: equal for equal normalised texts."""
    return np.fromiter((int.from_bytes(text_digest(table.text(row)), "little") for row in rows), dtype=np.uint64)


def text_digest(text: str) -> bytes:
    """8 bytes, equal for equal normalised texts."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=8).digest()


def normalised(text: str) -> str:
    """Text as duplicates are told by: Unicode NFKC, case folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
