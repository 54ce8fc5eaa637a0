"""Progress bars and one-line messages, in one place so that stages do not care whether anybody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")

_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


class Progress:
    """Shows bars on a terminal and a line every half minute elsewhere; `quiet` shows nothing (ranks above 0, tests)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, message: str) -> None:
        """Print one line, above any bar."""
        if self.quiet:
            return
        if "tqdm" in sys.modules and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def track(self, items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "it") -> Iterator[Item]:
        """Yield `items` with a bar; `total` is their number where `len` does not know it."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        bar = self.bar(description, total=total, unit=unit)
        try:
            for item in items:
                yield item
                bar.update(1)
        finally:
            bar.close()

    def bar(self, description: str, *, total: int | None, unit: str, initial: int = 0) -> Any:
        """A tqdm bar, or something of the same methods (update, set_postfix_str, close) that prints sparse lines."""
        from tqdm import tqdm

        if sys.stderr.isatty():
            return tqdm(desc=description, total=total, initial=initial, unit=unit, disable=self.quiet, mininterval=0.5, dynamic_ncols=True)
        return tqdm(
            desc=description,
            total=total,
            initial=initial,
            unit=unit,
            disable=self.quiet,
            file=_Lines(),
            bar_format=_LINE if total is not None else None,
            mininterval=30.0,
            maxinterval=60.0,
            delay=15.0,
            leave=False,
        )


class _Lines:
    """A file for tqdm where there is no terminal: each refresh becomes a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
