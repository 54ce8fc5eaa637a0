r"""Passages that a server never shows: named by id, or found by rules when the run is opened.

One entry a line: a passage id, or a rule as a JSON object. Blank lines and lines that begin with # are left out.
    {"id": "#1"}                             a passage whose id begins with # or {
    {"regex": "(?i)\\bsecret\\b"}           passages whose title or text matches anywhere
    {"field": "source", "equals": "draft"}   passages with this value in their metadata
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlm.errors import DataError
from simlm.serve.filters import Mask, value_text

if TYPE_CHECKING:
    import regex

    from simlm.data.store import Table

LONGEST_PATTERN = 1000
"""Characters of a regular expression."""
SECONDS_A_PASSAGE = 1.0
"""A pattern that needs longer for one passage backtracks without end; the whole corpus would take days."""


@dataclass(frozen=True)
class BlockList:
    """lines: of the file, for messages. patterns: (line, pattern); equals: (line, field, text of the value)."""

    path: Path
    ids: dict[str, int]
    patterns: list[tuple[int, regex.Pattern[str]]]
    equals: list[tuple[int, str, str]]

    def mask(self, table: Table) -> tuple[Mask, list[str]]:
        """(bool [N], the passages that are blocked; ids that no passage of the corpus has).

        Raises DataError for a pattern that does not come to an end on some passage.
        """
        blocked = np.zeros(len(table), dtype=np.bool_)
        unknown = []
        for name in self.ids:
            row = table.ids.find(name)
            if row is None:
                unknown.append(name)
            else:
                blocked[row] = True
        if self.patterns or self.equals:
            for row in range(len(table)):
                blocked[row] |= self._is_named(table, row)
        return blocked, unknown

    def _is_named(self, table: Table, row: int) -> bool:
        """Whether a rule names the passage."""
        if self.equals:
            metadata = table.metadata(row)
            if any(field in metadata and value_text(metadata[field]) == value for _, field, value in self.equals):
                return True
        if not self.patterns:
            return False
        parts = table.title(row), table.text(row)
        for line, pattern in self.patterns:
            try:
                if any(pattern.search(part, timeout=SECONDS_A_PASSAGE) for part in parts):
                    return True
            except TimeoutError:
                raise DataError(
                    f"{self.path}:{line}: the regular expression takes over {SECONDS_A_PASSAGE:g} s on passage {table.ids[row]!r}; "
                    "write it without repetitions inside repetitions, such as (a+)+"
                ) from None
        return False


def read_block_list(path: Path) -> BlockList:
    """The entries of a file; DataError with path:line for one that cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: the block list cannot be read ({error.strerror}); a file with one passage id or rule a line was expected"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the block list as UTF-8") from None
    found = BlockList(path, {}, [], [])
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if entry.startswith("{"):
            _add_rule(found, number, _parsed(path, number, entry))
        elif entry and not entry.startswith("#"):
            found.ids.setdefault(entry, number)
    return found


def _parsed(path: Path, number: int, entry: str) -> dict[str, Any]:
    try:
        rule = json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}:{number}: not a JSON object ({error}); an id that begins with {{ is written {{"id": "..."}}') from None
    if not isinstance(rule, dict):
        raise DataError(f"{path}:{number}: a JSON object was expected, found {type(rule).__name__}")
    return rule


def _add_rule(found: BlockList, number: int, rule: dict[str, Any]) -> None:
    where = f"{found.path}:{number}"
    if set(rule) == {"id"} and isinstance(rule["id"], str):
        found.ids.setdefault(rule["id"], number)
    elif set(rule) == {"regex"} and isinstance(rule["regex"], str):
        found.patterns.append((number, _compiled(where, rule["regex"])))
    elif set(rule) == {"field", "equals"} and isinstance(rule["field"], str) and isinstance(rule["equals"], str | int | float):
        found.equals.append((number, rule["field"], value_text(rule["equals"])))
    else:
        raise DataError(f'{where}: unknown rule; {{"id": ...}}, {{"regex": ...}} or {{"field": ..., "equals": ...}} was expected')


def _compiled(where: str, pattern: str) -> regex.Pattern[str]:
    import regex

    if len(pattern) > LONGEST_PATTERN:
        raise DataError(f"{where}: a regular expression of {len(pattern):,} characters; at most {LONGEST_PATTERN:,} were expected")
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise DataError(f"{where}: not a regular expression ({error})") from None


__all__ = ["BlockList", "read_block_list"]
