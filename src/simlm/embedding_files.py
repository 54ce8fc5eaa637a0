"""Parquet files of passage vectors: passage_id (string) and vector (a list of D float32 or float16), written block by block.

Shapes: P passages of a block, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


def embedding_schema(dim: int, dtype: np.dtype[Any]) -> pa.Schema:
    """Columns of a file of vectors of `dim` numbers, float32 or float16."""
    return pa.schema([("passage_id", pa.string()), ("vector", pa.list_(pa.from_numpy_dtype(dtype), dim))])


class EmbeddingWriter:
    """Writes one file; use as a context. A block becomes a row group, so memory is that of a block."""

    def __init__(self, file: Path | BinaryIO | Any, dim: int, dtype: np.dtype[Any] | type) -> None:
        self._dtype = np.dtype(dtype)
        self._schema = embedding_schema(dim, self._dtype)
        # Vectors do not shrink: compressing and looking for repeated values would cost time for nothing.
        self._writer = pq.ParquetWriter(file, self._schema, compression={"passage_id": "zstd"}, use_dictionary=False)

    def __enter__(self) -> EmbeddingWriter:
        return self

    def write(self, ids: Sequence[str], vectors_PD: NDArray[np.floating[Any]]) -> None:
        """The next passages, in this order."""
        flat = pa.array(np.ascontiguousarray(vectors_PD, dtype=self._dtype).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("vector").type)
        self._writer.write_table(pa.table([pa.array(ids, pa.string()), vectors], schema=self._schema))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
