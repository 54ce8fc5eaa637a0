"""Filters on the metadata of passages: which rows have one of the wanted values in every named field.

A field is kept as one number a passage, so that a filter is a comparison of arrays. Values are compared by how they are written: 2019 and
"2019" are one value, since a page's list of choices has only text.
Shapes: N corpus rows.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simlm.data.joined import JoinedTable
from simlm.errors import DataError, nearest
from simlm.types import Scalar

if TYPE_CHECKING:
    from simlm.data.store import Table

Filters = Mapping[str, Scalar | Sequence[Scalar]]
Mask = NDArray[np.bool_]

LISTED_VALUES = 50
"""Of each field, the most frequent ones, as choices."""
MOST_VALUES = 100_000
"""Different values of a field that can be filtered on; one with more is an id or a text, and its values would fill the memory."""
MOST_FIELDS = 64
"""Fields that can be filtered on, the first that are seen."""
MASK_BYTES = 64 * 2**20
"""Of masks that are kept for the next request with the same filters."""
NO_VALUE = -1


@dataclass(frozen=True)
class _Field:
    """numbers: text of a value -> its number. of_row: int32 [N], NO_VALUE where a passage lacks the field."""

    numbers: dict[str, int]
    of_row: NDArray[np.int32]


class MetadataFilters:
    """Masks of the passages that a request's filters let through.

    blocked: bool [N], passages that are never let through; none = all may be.
    """

    def __init__(self, table: Table, blocked: Mask | None = None) -> None:
        self._num_rows = len(table)
        self._fields, self._too_many = _read_fields(table)
        self._open = None if blocked is None else ~blocked
        self._masks: OrderedDict[tuple[tuple[str, tuple[str, ...]], ...], Mask] = OrderedDict()

    def choices(self, counted: Mask) -> dict[str, list[str]]:
        """Field -> its most frequent values as text, most frequent first, equal ones in order. counted: bool [N], passages that count."""
        found = {}
        for name, field in self._fields.items():
            numbers = field.of_row[counted]
            counts = np.bincount(numbers[numbers >= 0], minlength=len(field.numbers))
            ranked = Counter({value: int(counts[number]) for value, number in field.numbers.items() if counts[number]})
            found[name] = [value for value, _ in sorted(ranked.items(), key=lambda item: (-item[1], item[0]))[:LISTED_VALUES]]
        return found

    def mask(self, filters: Filters) -> Mask | None:
        """bool [N]: passages that are not blocked and have, in every field, one of its values; None if that is all passages.

        The same filters give the same array again. DataError for a field that no passage has, or that has too many values.
        """
        wanted = tuple(sorted((name, tuple(sorted({value_text(value) for value in listed(values)}))) for name, values in filters.items()))
        if not wanted:
            return self._open
        mask = self._masks.get(wanted)
        if mask is None:
            mask = self._computed(wanted)
            self._remember(wanted, mask)
        else:
            self._masks.move_to_end(wanted)
        return mask

    def _computed(self, wanted: tuple[tuple[str, tuple[str, ...]], ...]) -> Mask:
        mask = np.ones(self._num_rows, dtype=np.bool_) if self._open is None else self._open.copy()
        for name, values in wanted:
            field = self._fields.get(name)
            if name in self._too_many:
                raise DataError(f"filters.{name}: has more than {MOST_VALUES:,} different values, so it cannot be filtered on")
            if field is None:
                known = ", ".join(self._fields) or "none: the passages have no metadata"
                raise DataError(f"filters.{name}: no passage has this field{nearest(name, self._fields)} (fields: {known})")
            numbers = [field.numbers[value] for value in values if value in field.numbers]
            mask &= np.isin(field.of_row, np.asarray(numbers, dtype=np.int32))
        return mask

    def _remember(self, wanted: tuple[tuple[str, tuple[str, ...]], ...], mask: Mask) -> None:
        self._masks[wanted] = mask
        while len(self._masks) > 1 and len(self._masks) * self._num_rows > MASK_BYTES:
            self._masks.popitem(last=False)


def listed(values: Scalar | Sequence[Scalar]) -> Sequence[Scalar]:
    """One value, or several, as a sequence."""
    return [values] if isinstance(values, str | int | float) else values


def value_text(value: Scalar) -> str:
    """A value as it is compared: true, false, 2019, 2.5 or the text itself."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _read_fields(table: Table) -> tuple[dict[str, _Field], set[str]]:
    """The fields that can be filtered on, in the order in which they are first seen, and the names of those with too many values."""
    fields: dict[str, _Field] = {}
    full: set[str] = set()
    tables = table.tables if isinstance(table, JoinedTable) else [table]
    if not any(part.info["metadata"] for part in tables):
        return fields, full
    for row in range(len(table)):
        for name, value in table.metadata(row).items():
            if name in full:
                continue
            if name not in fields:
                if len(fields) >= MOST_FIELDS:
                    continue
                fields[name] = _Field({}, np.full(len(table), NO_VALUE, dtype=np.int32))
            field = fields[name]
            field.of_row[row] = field.numbers.setdefault(value_text(value), len(field.numbers))
            if len(field.numbers) > MOST_VALUES:
                full.add(name)
                del fields[name]
    return fields, full


__all__ = ["Filters", "Mask", "MetadataFilters", "listed", "value_text"]
