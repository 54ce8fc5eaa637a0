"""Passages of several stores as one table: rows of a store follow those of the one before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from simlm.data.store import IdColumn, Table
from simlm.types import Scalar


class JoinedTable(Table):
    """Texts, titles, metadata and ids of tables one after the other. Tokens are asked of the tables themselves: `tables`, `place`.

    alive: bool [N], rows whose passage is still there; none = all. Deleted rows keep their place, their ids are not found any more.
    """

    def __init__(self, tables: Sequence[Table], alive: NDArray[np.bool_] | None) -> None:
        self.tables = list(tables)
        self.starts = np.cumsum([0, *(len(table) for table in tables)]).tolist()
        self.alive = alive
        self.max_tokens = tables[0].max_tokens
        self.ids = _JoinedIds(self)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, row: int) -> tuple[Table, int]:
        """The table that a row is of, and its row there. IndexError if there is no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        number = bisect_right(self.starts, row) - 1
        return self.tables[number], row - self.starts[number]

    def text(self, row: int) -> str:
        table, own = self.place(row)
        return table.text(own)

    def title(self, row: int) -> str:
        table, own = self.place(row)
        return table.title(own)

    def metadata(self, row: int) -> dict[str, Scalar]:
        table, own = self.place(row)
        return table.metadata(own)


class _JoinedIds(IdColumn):
    def __init__(self, joined: JoinedTable) -> None:
        self._joined = joined

    def __len__(self) -> int:
        return len(self._joined)

    def __getitem__(self, row: int) -> str:
        table, own = self._joined.place(int(row))
        return table.ids[own]

    def __iter__(self) -> Iterator[str]:
        for table in self._joined.tables:
            yield from table.ids

    def find(self, name: str) -> int | None:
        """Row of the passage that has this id and is there; None if there is none."""
        for table, start in zip(self._joined.tables, self._joined.starts, strict=False):
            own = table.ids.find(name)
            if own is not None and (self._joined.alive is None or self._joined.alive[start + own]):
                return int(start + own)
        return None
