"""What teachers said of pairs, kept for good: (query, passage, teacher) -> raw logit.

Layout of a run's `pair_scores/` (integers little-endian):
    KEY/teacher.json                what KEY is the digest of: weights, tokens, precision and the store whose rows are counted
    KEY/00000008-00000015.scores    a segment, here of the appends 8 to 15 merged: header, uint64 [n] keys ascending, float32 [n] logits
A key is split (2 bits), query row (30) and passage row (32), so a pair takes 12 bytes. Segments are only ever added: each is written under
a temporary name, synced and renamed. What a kill or a full disk leaves behind is a segment whose size or checksum is wrong: it is dropped,
and its pairs are scored again. FANOUT segments of one span are merged into one of the next, so there are a few dozen at most.
Shapes: N pairs.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import disk_error, json_digest, sync, write_json
from simlm.errors import ArtifactError, DataError, ShapeError
from simlm.rankings import Floats, Ints
from simlm.types import SPLITS, Split

FORMAT = 1
FANOUT = 8
BLOCK_PAIRS = 1 << 18
"""Pairs that merging and checking hold at once."""
SAMPLED = 1_000_000
"""Scores that quantiles are taken from, evenly spaced; all of them where there are fewer."""

_MAGIC = b"SIMLMPS1"
_HEADER_BYTES = 24
_NAME = re.compile(r"(\d{8})-(\d{8})\.scores")
_QUERY_BITS, _PASSAGE_BITS = 30, 32

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Teacher:
    """What a score depends on besides the pair. name: for people, no part of the key.

    weights: digest of the model's weights and configuration. tokenizer: digest of the tokenizer where pairs are made from their texts,
    empty where they are the store's own tokens. store: fingerprint of the store whose rows the pairs are.
    """

    name: str
    weights: str
    tokenizer: str
    max_pair_tokens: int
    precision: str
    store: str

    @property
    def key(self) -> str:
        """32 hex digits."""
        return json_digest({"format": FORMAT, **{name: value for name, value in asdict(self).items() if name != "name"}})[:32]


class TeacherScores:
    """Scores of one teacher, memory-mapped. `open` it to add some; the constructor only reads.

    dropped: names of damaged segments that were found, whose pairs count as not scored.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ArtifactError if `folder` holds no teacher's scores."""
        self.folder = Path(folder)
        self.teacher = _read_teacher(self.folder)
        self.dropped: list[str] = []
        self._segments: list[_Segment] = []
        for path in sorted(self.folder.glob("*.scores")):
            segment = _Segment.read(path)
            if segment is None:
                self.dropped.append(path.name)
            else:
                self._segments.append(segment)
        # Killed between a merge and the removal of what was merged: both are there.
        self._segments = [segment for segment in self._segments if not any(other.covers(segment) for other in self._segments)]

    @classmethod
    def open(cls, root: Path, teacher: Teacher) -> TeacherScores:
        """The scores of `teacher` under `root`, to read and to add to; the folder is made if need be, and damaged files are removed.

        One process at a time may do so. Raises DiskError if the folder cannot be written.
        """
        folder = Path(root) / teacher.key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The name is that of the last use: a model may have moved.
            write_json(folder / "teacher.json", asdict(teacher))
            scores = cls(folder)
            kept = {segment.path.name for segment in scores._segments}
            for path in folder.iterdir():
                if path.name != "teacher.json" and path.name not in kept:
                    path.unlink()
        except OSError as error:
            raise disk_error(error, folder) from error
        return scores

    def __len__(self) -> int:
        return sum(len(segment.keys) for segment in self._segments)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    def find(self, split: Split, query_rows: Ints, passage_rows: Ints) -> Floats:
        """float32 [N]: the logit of each pair, NaN where it is not known."""
        keys = pair_keys(split, query_rows, passage_rows)
        found = np.full(len(keys), np.nan, dtype=np.float32)
        order = np.argsort(keys, kind="stable")
        wanted = keys[order]
        for segment in self._segments:
            begin, end = np.searchsorted(wanted, segment.bounds[0], "left"), np.searchsorted(wanted, segment.bounds[1], "right")
            places = np.minimum(np.searchsorted(segment.keys, wanted[begin:end]), len(segment.keys) - 1)
            hits = segment.keys[places] == wanted[begin:end]
            found[order[begin:end][hits]] = segment.scores[places[hits]]
        return found

    def append(self, split: Split, query_rows: Ints, passage_rows: Ints, scores: Floats) -> int:
        """Keep the logits of pairs that are not there yet (of a pair given twice the first); how many those were.

        They are on disk when this returns. Raises DataError naming the first score that is not finite, before anything is written;
        ShapeError if there are not as many scores as pairs; DiskError if they cannot be written.
        """
        if len(scores) != len(query_rows):
            raise ShapeError(f"{len(scores)} scores for {len(query_rows)} pairs; one score a pair is needed")
        broken = np.flatnonzero(~np.isfinite(scores))
        if len(broken):
            first = int(broken[0])
            raise DataError(
                f"{len(broken):,} teacher scores are not finite numbers, the first is of {split} query row {query_rows[first]} "
                f'with passage row {passage_rows[first]}; score with precision = "fp32", else the weights are damaged: train it again'
            )
        unknown = np.isnan(self.find(split, query_rows, passage_rows))
        keys, first_of = np.unique(pair_keys(split, query_rows, passage_rows)[unknown], return_index=True)
        if len(keys):
            number = self._segments[-1].last + 1 if self._segments else 0
            try:
                self._segments.append(_write_segment(self.folder, number, number, len(keys), [(keys, scores[unknown][first_of])]))
                self._merge()
            except OSError as error:
                raise disk_error(error, self.folder) from error
        return len(keys)

    def num_queries(self) -> dict[Split, int]:
        """Queries of each split that have a score."""
        seen: NDArray[np.uint64] = np.empty(0, np.uint64)
        for segment in self._segments:
            for begin in range(0, len(segment.keys), BLOCK_PAIRS):
                seen = np.union1d(seen, segment.keys[begin : begin + BLOCK_PAIRS] >> np.uint64(_PASSAGE_BITS))
        counts = np.bincount((seen >> np.uint64(_QUERY_BITS)).astype(np.int64), minlength=len(SPLITS)).tolist()
        return {split: count for split, count in zip(SPLITS, counts, strict=False) if count}

    def quantiles(self, shares: list[float]) -> list[float]:
        """The score below which each share of the scores lies; empty if there are none."""
        if not len(self):
            return []
        stride = max(len(self) // SAMPLED, 1)
        sample = np.concatenate([segment.scores[::stride] for segment in self._segments])
        return [float(value) for value in np.quantile(sample, shares)]

    def _merge(self) -> None:
        """Merge the last FANOUT segments while they span as many appends each."""
        while len(self._segments) >= FANOUT and len({segment.span for segment in self._segments[-FANOUT:]}) == 1:
            parts = self._segments[-FANOUT:]
            count = sum(len(part.keys) for part in parts)
            merged = _write_segment(self.folder, parts[0].first, parts[-1].last, count, _merged(parts))
            for part in parts:
                part.path.unlink()
            self._segments[-FANOUT:] = [merged]


def teachers_of(root: Path) -> list[TeacherScores]:
    """The scores of every teacher under `root`, by name; ArtifactError if there are none."""
    folders = sorted(path.parent for path in Path(root).glob("*/teacher.json"))
    if not folders:
        raise ArtifactError(f"{root}: holds no teacher's scores yet; run a step that re-ranks, `simlm rerank RECIPE`")
    return sorted((TeacherScores(folder) for folder in folders), key=lambda scores: (scores.teacher.name, scores.folder.name))


def pair_keys(split: Split, query_rows: Ints, passage_rows: Ints) -> Keys:
    """uint64 [N], ordered as (split, query row, passage row); ShapeError if the rows do not fit."""
    queries, passages = np.asarray(query_rows, dtype=np.int64), np.asarray(passage_rows, dtype=np.int64)
    if queries.shape != passages.shape or queries.ndim != 1:
        raise ShapeError(f"query rows of shape {queries.shape} with passage rows of shape {passages.shape}; one passage a query is needed")
    for name, rows, bits in (("query", queries, _QUERY_BITS), ("passage", passages, _PASSAGE_BITS)):
        if len(rows) and (rows.min() < 0 or rows.max() >= 1 << bits):
            raise ShapeError(f"{name} rows {rows.min()}..{rows.max()} given, scores can be kept of rows 0..{(1 << bits) - 1}")
    head = np.uint64(SPLITS.index(split)) << np.uint64(_QUERY_BITS + _PASSAGE_BITS)
    keys: Keys = head | queries.astype(np.uint64) << np.uint64(_PASSAGE_BITS) | passages.astype(np.uint64)
    return keys


# --- segments


@dataclass(frozen=True)
class _Segment:
    path: Path
    first: int
    last: int
    keys: Keys
    scores: Floats
    bounds: tuple[np.uint64, np.uint64]

    @property
    def span(self) -> int:
        return self.last - self.first + 1

    def covers(self, other: _Segment) -> bool:
        return other is not self and self.first <= other.first and other.last <= self.last

    @classmethod
    def read(cls, path: Path) -> _Segment | None:
        """Checked and mapped; None if the file is not whole."""
        name = _NAME.fullmatch(path.name)
        count = _checked_count(path) if name else 0
        if name is None or count == 0:
            return None
        return cls.map(path, int(name[1]), int(name[2]), count)

    @classmethod
    def map(cls, path: Path, first: int, last: int, count: int) -> _Segment:
        keys = np.asarray(np.memmap(path, dtype="<u8", mode="r", offset=_HEADER_BYTES, shape=(count,)))
        scores = np.asarray(np.memmap(path, dtype="<f4", mode="r", offset=_HEADER_BYTES + 8 * count, shape=(count,)))
        return cls(path, first, last, keys, scores, (keys[0], keys[-1]))


def _checked_count(path: Path) -> int:
    """Pairs of a segment file; 0 if it is cut off, longer than it says, or does not have its checksums."""
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or header[:8] != _MAGIC:
            return 0
        count = int.from_bytes(header[8:16], "little")
        if os.fstat(file.fileno()).st_size != _HEADER_BYTES + 12 * count:
            return 0
        # Read, not mapped: pages that are only checked do not count as this process's memory.
        checksums = _read_checksum(file, 8 * count, zlib.crc32(header[8:16])), _read_checksum(file, 4 * count, 0)
    return count if header[16:] == _packed(*checksums) else 0


def _read_checksum(file: BinaryIO, num_bytes: int, checksum: int) -> int:
    while num_bytes:
        block = file.read(min(num_bytes, 1 << 20))
        checksum = zlib.crc32(block, checksum)
        num_bytes -= len(block)
    return checksum


def _packed(keys_checksum: int, scores_checksum: int) -> bytes:
    return keys_checksum.to_bytes(4, "little") + scores_checksum.to_bytes(4, "little")


def _write_segment(folder: Path, first: int, last: int, count: int, blocks: Iterable[tuple[Keys, Floats]]) -> _Segment:
    """Write `count` pairs that come in blocks, keys ascending, and put the file in its place."""
    path = folder / f"{first:08d}-{last:08d}.scores"
    temporary = path.with_suffix(".tmp")
    size = count.to_bytes(8, "little")
    checksums = [zlib.crc32(size), 0]
    with open(temporary, "wb") as keys_file, open(temporary, "r+b") as scores_file:
        keys_file.seek(_HEADER_BYTES)
        scores_file.seek(_HEADER_BYTES + 8 * count)
        for keys, scores in blocks:
            parts = keys.astype("<u8", copy=False).tobytes(), scores.astype("<f4", copy=False).tobytes()
            checksums = [zlib.crc32(part, checksum) for part, checksum in zip(parts, checksums, strict=True)]
            keys_file.write(parts[0])
            scores_file.write(parts[1])
        scores_file.flush()
        keys_file.seek(0)
        keys_file.write(_MAGIC + size + _packed(*checksums))
        keys_file.flush()
        os.fsync(keys_file.fileno())
    temporary.replace(path)
    sync(folder)
    segment = _Segment.map(path, first, last, count)
    assert path.stat().st_size == _HEADER_BYTES + 12 * count, "the blocks make up the segment"
    return segment


def _merged(parts: list[_Segment]) -> Iterator[tuple[Keys, Floats]]:
    """The pairs of segments that have none in common, in the order of their keys, block by block."""
    places = [0] * len(parts)
    while any(place < len(part.keys) for place, part in zip(places, parts, strict=True)):
        # Everything up to the nearest of the keys that lie a block ahead: no part gives more than a block.
        left = [(place, part.keys) for place, part in zip(places, parts, strict=True) if place < len(part.keys)]
        limit = min(keys[min(place + BLOCK_PAIRS, len(keys)) - 1] for place, keys in left)
        ends = [int(np.searchsorted(part.keys, limit, "right")) for part in parts]
        keys = np.concatenate([part.keys[place:end] for part, place, end in zip(parts, places, ends, strict=True)])
        scores = np.concatenate([part.scores[place:end] for part, place, end in zip(parts, places, ends, strict=True)])
        order = np.argsort(keys, kind="stable")
        yield keys[order], scores[order]
        places = [max(place, end) for place, end in zip(places, ends, strict=True)]


def _read_teacher(folder: Path) -> Teacher:
    try:
        raw: dict[str, Any] = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
        return Teacher(**raw)
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no teacher.json here, so these are no teacher's scores; give a folder of RUN/pair_scores") from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{folder / 'teacher.json'}: not readable ({error}); delete {folder}, its pairs are scored again") from None
