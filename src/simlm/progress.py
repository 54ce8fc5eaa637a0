"""Progress bars and one-line messages, in one place so that stages do not care whether anybody watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
log = logging.getLogger("simlm")


class Progress:
    """Shows bars on a terminal and sparse lines elsewhere; `quiet` shows nothing (ranks above 0, tests)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, message: str) -> None:
        """Print one line above any bar."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def track(self, items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "it") -> Iterator[Item]:
        """Yield `items` with a bar; `total` is their number where `len` does not know it."""
        from tqdm.auto import tqdm

        interactive = sys.stderr.isatty()
        yield from tqdm(
            items,
            desc=description,
            total=total,
            unit=unit,
            disable=self.quiet,
            mininterval=0.5 if interactive else 15.0,
            dynamic_ncols=interactive,
            leave=interactive,
        )
