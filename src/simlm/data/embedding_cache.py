"""Vectors that a model has made before, found by the tokens they were made from; what is new is encoded, nothing else.

    CACHE/KEY/about.json                 what made the vectors: digest of the weights, and every setting that changes a vector
    CACHE/KEY/SEGMENT/vectors.npy        [rows, D], memory-mapped; a hard link to the file of a step's artifact where the disk can link
    CACHE/KEY/SEGMENT/part-*.npy         uint64 [3, n]: two halves of each passage's digest, sorted, and the row of its vector

KEY is the digest of about.json, so other weights, prompts, lengths or precisions never meet. A segment grows by whole parts, each renamed
into place after its vectors are on disk: a kill loses the part that was being written. As vectors are linked, not copied, the cache
takes 24 bytes a passage while the artifact it was made with is there; of a model that has been replaced it keeps the vectors of one
predecessor. A segment that a newer one covers is deleted, one that is covered by more than half is copied without what is covered.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import json_digest, sync, write_json
from simlm.data.store import Table
from simlm.errors import ArtifactError

Keys = NDArray[np.uint64]
"""[n, 2], the halves of a 128-bit digest."""
Vectors = NDArray[np.floating[Any]]

ABOUT = "about.json"
VECTORS = "vectors.npy"
ALL = "part-all.npy"
KEPT_MODELS = 2
"""The model of the last run of a step, and the one before it."""
BLOCK_ROWS = 65536
"""Looked up or copied at a time."""


def passage_keys(table: Table, start: int, stop: int) -> Keys:
    """Digest of the kept tokens of each row in start..stop-1, title and text apart; uint64 [n, 2]."""
    offsets = np.asarray(table.token_offsets[start : stop + 1], dtype=np.int64)
    begin = int(offsets[0])
    tokens = np.asarray(table.tokens[begin : int(offsets[-1])]).astype("<u4").tobytes()
    bounds = ((offsets - begin) * 4).tolist()
    titles = np.asarray(table.title_tokens[start:stop]).astype("<u4").tobytes()
    digests = b"".join(
        hashlib.blake2b(titles[4 * row : 4 * row + 4] + tokens[bounds[row] : bounds[row + 1]], digest_size=16).digest()
        for row in range(stop - start)
    )
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64)


class EmbeddingCache:
    """The cache of one step, for one model and its settings.

    about: JSON, everything besides its tokens that a vector depends on. segment: name of what this try of the step adds (`new_segment`),
    the same when it goes on after a kill; it is never looked up, so the kill changes no vector. dim, dtype: of the vectors.
    """

    def __init__(self, folder: Path, about: dict[str, Any], *, segment: str, dim: int, dtype: np.dtype[Any]) -> None:
        self.folder = folder / json_digest(about)[:32]
        self.about = about
        self._own = self.folder / segment
        self._shape = (dim, np.dtype(dtype))
        self._others: list[_Segment] | None = None

    def begin(self, vectors: Path) -> None:
        """Make the folder and link the file that vectors are going to be written to. Called before any `find` or `add`.

        Where the disk cannot link, the vectors are copied in `finish`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / ABOUT, self.about)
        for unfinished in (entry for entry in self.folder.glob(".*") if entry.is_dir()):
            shutil.rmtree(unfinished)
        self._own.mkdir(exist_ok=True)
        if not (self._own / VECTORS).exists():
            _link(vectors, self._own / VECTORS)

    @classmethod
    def new_segment(cls, folder: Path, about: dict[str, Any]) -> str:
        """A name that no segment has yet."""
        taken = {entry.name.split("+")[0] for entry in (folder / json_digest(about)[:32]).glob("*")}
        return next(name for name in map("{:06d}".format, itertools.count()) if name not in taken)

    def find(self, keys: Keys, results: Vectors) -> NDArray[np.bool_]:
        """Which of the keys were found, bool [n]; their vectors are put into `results` [n, D] at the same places.

        Raises ArtifactError if a segment is damaged.
        """
        if self._others is None:
            names = sorted(entry.name for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
            self._others = [_Segment.open(self.folder / name, *self._shape) for name in names if name != self._own.name]
        found = np.zeros(len(keys), dtype=bool)
        for segment in self._others:
            open_places = np.flatnonzero(~found)
            rows = segment.rows(keys[open_places])
            places, rows = open_places[rows >= 0], rows[rows >= 0]
            vectors = np.asarray(segment.vectors[rows])
            # Every vector is of unit length; a row that is not was never written.
            whole = np.abs(np.linalg.norm(vectors.astype(np.float32), axis=1) - 1) < 0.01
            results[places[whole]] = vectors[whole]
            found[places[whole]] = True
        return found

    def add(self, first_row: int, keys: Keys) -> None:
        """Let vectors count that are on disk by now: rows first_row, first_row + 1, ... of the file given to `begin`."""
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        _write_part(self._own / f"part-{first_row:012d}.npy", keys[order], order.astype(np.uint64) + np.uint64(first_row))

    def finish(self, vectors: Path) -> int:
        """Tidy up when all vectors are there; bytes of disk that the cache takes besides the artifact's own file.

        The parts become one, segments that this one covers go, and so do models before the last two.
        """
        self._others = None
        own = self._own / VECTORS
        if not own.exists():
            _copy(vectors, own)
        parts = sorted(self._own.glob("part-*.npy"))
        if len(parts) > 1:
            # 24 bytes a passage, a few times over.
            whole = np.concatenate([np.load(part, allow_pickle=False) for part in parts], axis=1)
            whole = whole[:, np.lexsort(whole[::-1])]
            again = np.zeros(whole.shape[1], dtype=bool)
            again[1:] = (whole[:, 1:] == whole[:, :-1]).all(axis=0)  # of a kill between the next two lines
            _write_part(self._own / ALL, whole[:2, ~again].T, whole[2, ~again])
            for part in parts:
                if part.name != ALL:
                    part.unlink()
        covering = _Segment.open(self._own, *self._shape)
        for entry in sorted(self.folder.iterdir()):
            if entry.is_dir() and entry != self._own:
                self._reduce(_Segment.open(entry, *self._shape), covering)
        self._drop_models()
        return sum(
            file.stat().st_size
            for file in self.folder.parent.rglob("*")
            if file.is_file() and not (file.name == VECTORS and file.samefile(vectors))
        )

    def _reduce(self, segment: _Segment, covering: _Segment) -> None:
        """Delete what `covering` has too, as far as it pays."""
        live = [part[:, covering.rows(part[:2].T) < 0] for part in segment.parts]
        count = sum(part.shape[1] for part in live)
        if count > len(segment.vectors) // 2:
            return
        if count:
            keys = np.concatenate(live, axis=1)
            keys = keys[:, np.lexsort((keys[1], keys[0]))]
            rest = hashlib.blake2b(np.ascontiguousarray(keys[:2]).tobytes(), digest_size=4).hexdigest()
            target = self.folder / f"{segment.folder.name.split('+')[0]}+{rest}"
            building = self.folder / f".{target.name}"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            dim, dtype = self._shape
            copy = np.lib.format.open_memmap(building / VECTORS, mode="w+", dtype=dtype, shape=(count, dim))
            for start in range(0, count, BLOCK_ROWS):
                copy[start : start + BLOCK_ROWS] = segment.vectors[keys[2, start : start + BLOCK_ROWS].astype(np.int64)]
            copy.flush()
            sync(building / VECTORS)
            _write_part(building / ALL, np.ascontiguousarray(keys[:2].T), np.arange(count, dtype=np.uint64))
            shutil.rmtree(target, ignore_errors=True)
            os.rename(building, target)
        shutil.rmtree(segment.folder)

    def _drop_models(self) -> None:
        """Keep the vectors of this model and of the one before it."""
        models = [entry for entry in self.folder.parent.iterdir() if (entry / ABOUT).is_file() and entry != self.folder]
        models.sort(key=lambda entry: (entry / ABOUT).stat().st_mtime_ns, reverse=True)
        for old in models[KEPT_MODELS - 1 :]:
            shutil.rmtree(old)


@dataclass(frozen=True)
class _Segment:
    """vectors [rows, D] and parts uint64 [3, n], all memory-mapped."""

    folder: Path
    vectors: Vectors
    parts: list[Keys]

    @classmethod
    def open(cls, folder: Path, dim: int, dtype: np.dtype[Any]) -> _Segment:
        try:
            files = sorted(folder.glob("part-*.npy"))
            if not files or not (folder / VECTORS).exists():  # the first is new, the second was interrupted on a disk without links
                return cls(folder, np.empty((0, dim), dtype=dtype), [])
            vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
            fits = vectors.ndim == 2 and vectors.shape[1] == dim and vectors.dtype == dtype
            if not fits or any(part.ndim != 2 or len(part) != 3 or int(part[2].max(initial=0)) >= len(vectors) for part in parts):
                raise ValueError(f"{vectors.dtype} vectors of shape {vectors.shape} where {dtype} of width {dim} were expected")
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{folder}: this part of the embedding cache is damaged ({error}); delete the folder, its passages are encoded again"
            ) from None
        return cls(folder, vectors, parts)

    def rows(self, keys: Keys) -> NDArray[np.int64]:
        """Row of the vector of each key, int64 [n], -1 where there is none; no more than BLOCK_ROWS are looked up at a time."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for start in range(0, len(keys), BLOCK_ROWS):
            block = keys[start : start + BLOCK_ROWS]
            for high, low, rows in self.parts:
                # Two digests with one equal half are a miss, not an error; they are one in 2^64 pairs.
                place = np.minimum(np.searchsorted(high, block[:, 0]), len(high) - 1)
                hit = (high[place] == block[:, 0]) & (low[place] == block[:, 1])
                found[start : start + BLOCK_ROWS][hit] = rows[place[hit]].astype(np.int64)
        return found


def _write_part(file: Path, keys: Keys, rows: Keys) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "wb") as output:
        np.save(output, np.ascontiguousarray(np.stack([keys[:, 0], keys[:, 1], rows])), allow_pickle=False)
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, file)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    sync(temporary)
    os.replace(temporary, target)
