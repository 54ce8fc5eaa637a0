"""Ranked passages (`Run`) and training groups (`Groups`) as flat arrays, and how they are kept on disk.

Both are ragged tables: row q of a table owns the slice `offsets[q]:offsets[q + 1]` of its value arrays. Passages and queries are
rows of the store that the artifact was made from; ids are looked up there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simlm.errors import ArtifactError
from simlm.types import Split

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
_OF_SOURCES = ("negative_sources", "source_positive_scores")


@dataclass(frozen=True)
class Run:
    """Passages ranked for queries of one split, best first (ties: smaller passage row first).

    query_rows: int64 [Q], rows of the store's queries of `split`; offsets: int64 [Q + 1];
    passage_rows: int64 [offsets[-1]]; scores: float32 [offsets[-1]], higher is better, comparable within a query only.
    """

    split: Split
    query_rows: Ints
    offsets: Ints
    passage_rows: Ints
    scores: Floats

    def __len__(self) -> int:
        return len(self.query_rows)

    def ranked(self, position: int) -> tuple[Ints, Floats]:
        """Passage rows and scores of the query at `position` (0..Q-1), best first."""
        start, stop = self.offsets[position], self.offsets[position + 1]
        return self.passage_rows[start:stop], self.scores[start:stop]

    def __iter__(self) -> Iterator[tuple[int, Ints, Floats]]:
        """(query row, passage rows, scores) of each query in turn."""
        for position, query_row in enumerate(self.query_rows):
            yield int(query_row), *self.ranked(position)

    def take(self, positions: Ints, depth: int | None = None) -> Run:
        """The run of the queries at `positions`, in their order; of each the first `depth` passages (all of them where there is none)."""
        offsets, values = _taken(self.offsets, positions, depth)
        return Run(self.split, np.asarray(self.query_rows)[positions], offsets, self.passage_rows[values], self.scores[values])

    @classmethod
    def from_lists(cls, split: Split, query_rows: Sequence[int], ranked: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Run:
        """A run from (passage rows, scores) of each query; sorts each list by score, then by row."""
        rows: list[Ints] = []
        scores: list[Floats] = []
        for query_passages, query_scores in ranked:
            passages = np.asarray(query_passages, dtype=np.int64)
            values = np.asarray(query_scores, dtype=np.float32)
            order = np.lexsort((passages, -values))
            rows.append(passages[order])
            scores.append(values[order])
        return cls(
            split,
            np.asarray(query_rows, dtype=np.int64),
            offsets_of([len(part) for part in rows]),
            np.concatenate(rows) if rows else np.empty(0, np.int64),
            np.concatenate(scores) if scores else np.empty(0, np.float32),
        )

    @classmethod
    def from_matrix(cls, split: Split, query_rows: Ints, passage_rows_QK: Ints, scores_QK: Floats) -> Run:
        """A run from the two matrices an index returns; entries with passage row -1 (no result) are left out."""
        found = passage_rows_QK >= 0
        order = np.lexsort((passage_rows_QK, -scores_QK), axis=-1)
        passage_rows_QK = np.take_along_axis(passage_rows_QK, order, axis=-1)
        scores_QK = np.take_along_axis(scores_QK, order, axis=-1)
        found = np.take_along_axis(found, order, axis=-1)
        return cls(
            split,
            np.asarray(query_rows, dtype=np.int64),
            offsets_of(found.sum(axis=1)),
            passage_rows_QK[found].astype(np.int64),
            scores_QK[found].astype(np.float32),
        )

    def save(self, folder: Path) -> None:
        """Write into `folder/SPLIT/`."""
        _save(folder / self.split, query_rows=self.query_rows, offsets=self.offsets, passage_rows=self.passage_rows, scores=self.scores)

    @classmethod
    def load(cls, folder: Path, split: Split) -> Run:
        """Memory-mapped; ArtifactError if the artifact has no run for this split."""
        arrays = _load(folder, split, ("query_rows", "offsets", "passage_rows", "scores"))
        return cls(split, arrays["query_rows"], arrays["offsets"], arrays["passage_rows"], arrays["scores"])


class RunWriter:
    """Writes a run of known counts query by query, in order, holding none of it: the files are those that `Run.save` writes.

    counts: passages of each query. Use as a context; when it ends without an error all queries must have been written.
    """

    def __init__(self, folder: Path, split: Split, query_rows: Ints, counts: Ints) -> None:
        self._folder = folder / split
        _save(self._folder, query_rows=np.asarray(query_rows, dtype=np.int64), offsets=offsets_of(counts))
        self._left = int(np.sum(counts))
        self._rows = _open_array(self._folder / "passage_rows.npy", np.dtype(np.int64), self._left)
        self._scores = _open_array(self._folder / "scores.npy", np.dtype(np.float32), self._left)

    def __enter__(self) -> RunWriter:
        return self

    def write(self, passage_rows: Ints, scores: Floats) -> None:
        """The lists of the next queries end to end, each best first (ties: smaller passage row first)."""
        self._left -= len(passage_rows)
        self._rows.write(np.asarray(passage_rows, dtype=np.int64).tobytes())
        self._scores.write(np.asarray(scores, dtype=np.float32).tobytes())

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._rows.close()
        self._scores.close()
        assert error is not None or self._left == 0, "every list of the run was written"


@dataclass(frozen=True)
class Groups:
    """For each training query its positives and its negatives, hardest negative first.

    query_rows: int64 [Q]; positive_offsets, negative_offsets: int64 [Q + 1]; *_rows: int64, passage rows of the store;
    *_scores: float32, the miner's score, NaN where the miner did not score that passage.
    Mined from S > 1 runs: negative_sources, int8, for each negative the run (0..S-1) that it and its score are from; and
    source_positive_scores, float32 [S, positives], the score of each positive in each run (positive_scores are those of the first).
    Else both are None.
    """

    split: Split
    query_rows: Ints
    positive_offsets: Ints
    positive_rows: Ints
    positive_scores: Floats
    negative_offsets: Ints
    negative_rows: Ints
    negative_scores: Floats
    negative_sources: NDArray[np.int8] | None = None
    source_positive_scores: Floats | None = None

    def __len__(self) -> int:
        return len(self.query_rows)

    def positives(self, position: int) -> tuple[Ints, Floats]:
        start, stop = self.positive_offsets[position], self.positive_offsets[position + 1]
        return self.positive_rows[start:stop], self.positive_scores[start:stop]

    def negatives(self, position: int) -> tuple[Ints, Floats]:
        start, stop = self.negative_offsets[position], self.negative_offsets[position + 1]
        return self.negative_rows[start:stop], self.negative_scores[start:stop]

    def take(self, positions: Ints) -> Groups:
        """The groups of the queries at `positions`, in their order."""
        positive_offsets, positives = _taken(self.positive_offsets, positions)
        negative_offsets, negatives = _taken(self.negative_offsets, positions)
        return Groups(
            self.split,
            np.asarray(self.query_rows)[positions],
            positive_offsets,
            self.positive_rows[positives],
            self.positive_scores[positives],
            negative_offsets,
            self.negative_rows[negatives],
            self.negative_scores[negatives],
            None if self.negative_sources is None else self.negative_sources[negatives],
            None if self.source_positive_scores is None else self.source_positive_scores[:, positives],
        )

    def by_source(self, position: int) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """For each run: places of its negatives in the list of `negatives`, and its scores of the query's positives."""
        start, stop = self.negative_offsets[position], self.negative_offsets[position + 1]
        if self.negative_sources is None or self.source_positive_scores is None:
            yield np.arange(stop - start), self.positives(position)[1]
            return
        first, last = self.positive_offsets[position], self.positive_offsets[position + 1]
        for source, scores in enumerate(self.source_positive_scores):
            yield np.flatnonzero(self.negative_sources[start:stop] == source), scores[first:last]

    def save(self, folder: Path) -> None:
        """Write into `folder/SPLIT/`."""
        optional = {name: array for name in _OF_SOURCES if (array := getattr(self, name)) is not None}
        _save(
            folder / self.split,
            query_rows=self.query_rows,
            positive_offsets=self.positive_offsets,
            positive_rows=self.positive_rows,
            positive_scores=self.positive_scores,
            negative_offsets=self.negative_offsets,
            negative_rows=self.negative_rows,
            negative_scores=self.negative_scores,
            **optional,
        )

    @classmethod
    def load(cls, folder: Path, split: Split = "train") -> Groups:
        """Memory-mapped; ArtifactError if the artifact has no groups for this split."""
        names = (
            "query_rows",
            "positive_offsets",
            "positive_rows",
            "positive_scores",
            "negative_offsets",
            "negative_rows",
            "negative_scores",
        )
        optional = [name for name in _OF_SOURCES if (folder / split / f"{name}.npy").exists()]
        return cls(split, **_load(folder, split, [*names, *optional]))


def offsets_of(counts: Sequence[int] | NDArray[np.integer]) -> Ints:
    """int64 [len(counts) + 1]: where each row of a ragged table starts, and the total."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(np.asarray(counts, dtype=np.int64), out=offsets[1:])
    return offsets


def _taken(offsets: Ints, positions: Ints, depth: int | None = None) -> tuple[Ints, Ints]:
    """(offsets, places) of the rows at `positions` of a ragged table, of each its first `depth` values."""
    starts = np.asarray(offsets)[positions]
    counts = np.asarray(offsets)[np.asarray(positions) + 1] - starts
    if depth is not None:
        counts = np.minimum(counts, depth)
    own = offsets_of(counts)
    places: Ints = np.arange(own[-1]) + np.repeat(starts - own[:-1], counts)
    return own, places


def _save(folder: Path, **arrays: NDArray[np.generic]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _open_array(path: Path, dtype: np.dtype[Any], length: int) -> BinaryIO:
    """A .npy file whose header is written and whose `length` values are to follow."""
    file = open(path, "wb")  # noqa: SIM115
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _load(folder: Path, split: Split, names: Sequence[str]) -> dict[str, Any]:
    if not (folder / split).is_dir():
        have = sorted(entry.name for entry in Path(folder).iterdir() if entry.is_dir()) if Path(folder).is_dir() else []
        raise ArtifactError(f"{folder}: nothing for split {split!r} here, it holds {have}; search that split first")
    return {name: np.load(folder / split / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
