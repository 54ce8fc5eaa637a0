"""Several indexes searched as one: that of a corpus, and those of the passages that were added to it later.

Rows of an index follow those of the one before it. Deleted passages stay in their index and are masked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from simlm.index.results import NO_ROW, Results
from simlm.index.vectors import Option, checked_mask, ordered


class _Part(Protocol):
    folder: Path
    info: dict[str, Any]

    def __len__(self) -> int: ...

    def search(self, queries: Any, /, depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results: ...


class SegmentedIndex:
    """Parts of one kind, whose scores can be compared. takes, folder and info are those of the first.

    alive: bool [N], passages that are not deleted; none = all are there.
    """

    takes: Literal["vectors", "text"]
    OPTIONS: ClassVar[dict[str, Option]] = {}

    def __init__(self, parts: Sequence[_Part], takes: Literal["vectors", "text"], alive: NDArray[np.bool_] | None) -> None:
        self.parts = list(parts)
        self.takes = takes
        self.folder = parts[0].folder
        self.info = parts[0].info
        self._starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self.alive = None if alive is None else checked_mask(alive, len(self))

    def __len__(self) -> int:
        """Rows of all parts, deleted ones too."""
        return int(self._starts[-1])

    def search(self, queries: Any, depth: int, *, allowed: NDArray[np.bool_] | None = None) -> Results:
        """(scores float32 [Q, depth], passage rows int64 [Q, depth]), best first, ties by row; -inf and -1 past the end.

        allowed: bool [N], the passages that may be results; none = all. Deleted ones never are.
        """
        if allowed is not None:
            allowed = checked_mask(allowed, len(self))
        mask = self.alive if allowed is None else allowed if self.alive is None else allowed & self.alive
        found = []
        for part, start in zip(self.parts, self._starts, strict=False):
            own = None if mask is None else mask[start : start + len(part)]
            scores_QK, rows_QK = part.search(queries, depth, allowed=None if own is None or own.all() else own)
            found.append((scores_QK, np.where(rows_QK == NO_ROW, NO_ROW, rows_QK + start)))
        scores_QC, rows_QC = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        scores_QC, rows_QC = ordered(scores_QC, rows_QC)
        return scores_QC[:, :depth], rows_QC[:, :depth]
