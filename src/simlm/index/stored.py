"""Vectors as an index keeps them on disk: float32, float16, or int8 with a scale of its own for each vector.

Files in the folder: vectors.npy [N, D] and, for int8, scales.npy float32 [N]. A stored vector stands for
`vectors.npy[row] * scales.npy[row]`; scores are those of that vector, computed in float32.
Rounding to int8: the greatest absolute number of a vector is 127 steps, so a step is at most 1/127 and needs no pass over the corpus.
Nothing is loaded on opening. Blocks go through a memory mapping; single rows are read from the file, because the system maps up to 2 MiB
around each row of a mapping, and all of that would count as memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simlm.errors import ArtifactError
from simlm.index.vectors import SourceVectors
from simlm.rankings import Floats, Ints

VECTORS = "vectors.npy"
SCALES = "scales.npy"
LEVELS = 127
"""Steps of int8 on each side of 0 (symmetric: -128 is not used), as in losses.compression."""
DTYPES = ("float32", "float16", "int8")


class StoredVectors:
    """Vectors [N, D] of a folder. Raises ArtifactError if its files are not those of `count` vectors of dimension `dim`."""

    def __init__(self, folder: Path, count: int | None, dim: int) -> None:
        self.folder = folder
        self._vectors_ND = _mapped(folder / VECTORS)
        self.dtype = str(self._vectors_ND.dtype)
        shape = self._vectors_ND.shape
        if self.dtype not in DTYPES or len(shape) != 2 or shape[1] != dim or (count is not None and shape[0] != count):
            raise ArtifactError(
                f"{folder / VECTORS}: {self.dtype} of shape {shape}; {count if count is not None else 'any number of'} vectors of "
                f"dimension {dim} were expected; run the build_index step again"
            )
        self._scales_N: Floats | None = None
        if self.dtype == "int8":
            self._scales_N = _mapped(folder / SCALES)
            if self._scales_N.dtype != np.float32 or self._scales_N.shape != (len(self),):
                raise ArtifactError(f"{folder / SCALES}: not one float32 for each of {len(self):,} vectors; run the build_index step again")

        self._file = os.open(folder / VECTORS, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return int(self._vectors_ND.shape[0])

    def block(self, start: int, stop: int) -> Floats:
        """float32 [stop - start, D], not to be written to: the file itself where that is float32."""
        vectors: Floats = np.asarray(self._vectors_ND[start:stop], dtype=np.float32)
        if self._scales_N is not None:
            vectors *= self._scales_N[start:stop, None]
        return vectors

    def scores(self, query_D: Floats, rows: Ints) -> Floats:
        """float32 [len(rows)]: inner products with one query; each is computed alone, so equal vectors have equal scores."""
        scores: Floats = np.vecdot(self._read(rows).astype(np.float32), query_D)
        return scores if self._scales_N is None else scores * self._scales_N[rows]

    def _read(self, rows: Ints) -> NDArray[Any]:
        """Stored vectors of single rows, [len(rows), D]. All are announced first, so that a disk fetches them side by side."""
        stored = np.empty((len(rows), self._vectors_ND.shape[1]), dtype=self._vectors_ND.dtype)
        size, start = stored.itemsize * stored.shape[1], self._vectors_ND.offset
        places = [start + row * size for row in rows.tolist()]
        if hasattr(os, "posix_fadvise"):
            for place in places:
                os.posix_fadvise(self._file, place, size, os.POSIX_FADV_WILLNEED)
        buffer = stored.reshape(-1).view(np.uint8).data
        for number, place in enumerate(places):
            if os.preadv(self._file, [buffer[number * size : (number + 1) * size]], place) != size:
                raise ArtifactError(f"{self.folder / VECTORS}: shorter than it was when it was opened; run the build_index step again")
        return stored


def store_vectors(source: SourceVectors, folder: Path, dtype: str) -> None:
    """Write the vectors into `folder`, a block at a time; linked where the file is as it is wanted and the file system can link."""
    folder.mkdir(exist_ok=True)
    place = folder / VECTORS
    place.unlink(missing_ok=True)
    if source.stored_ND.dtype == np.dtype(dtype) and source.dim == source.whole_dim:
        try:
            os.link(source.file, place)
        except OSError:
            shutil.copyfile(source.file, place)
        return
    with contextlib.ExitStack() as files:
        vectors = files.enter_context(open(place, "wb"))
        _write_header(vectors, np.dtype(dtype), (len(source), source.dim))
        scales = None
        if dtype == "int8":
            scales = files.enter_context(open(folder / SCALES, "wb"))
            _write_header(scales, np.dtype(np.float32), (len(source),))
        for block_PD in source.blocks():
            if scales is None:
                vectors.write(block_PD.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                continue
            codes_PD, scales_P = rounded(block_PD)
            vectors.write(codes_PD.tobytes())
            scales.write(scales_P.astype("<f4").tobytes())


def rounded(vectors_PD: Floats) -> tuple[NDArray[np.int8], Floats]:
    """(codes int8 [P, D], scales float32 [P]) with vectors ~ codes * scales; a vector of zeros has scale 0."""
    scales_P: Floats = np.abs(vectors_PD).max(axis=1, initial=0.0).astype(np.float32) / np.float32(LEVELS)
    steps_P1 = np.where(scales_P > 0, scales_P, np.float32(1))[:, None]
    return np.rint(vectors_PD / steps_P1).astype(np.int8), scales_P


def _write_header(file: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype.newbyteorder("<")), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _mapped(file: Path) -> np.memmap[Any, Any]:
    """The array of a .npy file; ArtifactError if it is none."""
    try:
        # "c": torch warns of arrays that cannot be written to; nothing is, and nothing would reach the file.
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{file}: not readable as an array ({error}); run the build_index step again") from None
    assert isinstance(array, np.memmap)
    return array
