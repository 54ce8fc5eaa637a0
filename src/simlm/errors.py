"""The error family. Each message says where, what was found, what was expected, and what to do next."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class SimlmError(Exception):
    """A fault of the input, the settings or the machine. The command line prints it without a traceback."""


class DataError(SimlmError):
    """Corpus, queries or judgements cannot be used as they are."""


class RecipeError(SimlmError):
    """A recipe has an unknown key, a wrong type or a value out of range."""


class ArtifactError(SimlmError):
    """A directory is not a finished artifact of the expected kind, or its files do not match its manifest."""


class ModelError(SimlmError):
    """A checkpoint cannot be used: absent, damaged, or of another vocabulary or architecture."""


class ShapeError(SimlmError):
    """Tensors do not fit together."""


class TrainingError(SimlmError):
    """Training cannot go on: a loss that is not finite, or a checkpoint of other settings."""


class DiskError(SimlmError):
    """There is not enough disk space, or a folder cannot be written."""


class EndpointError(SimlmError):
    """A language model's endpoint cannot be reached, or does not answer as it should."""


class MissingExtraError(SimlmError):
    """An optional library is absent; the message names the extra that installs it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the library {library!r}, which is not installed; run: pip install 'simlm[{extra}]'")


def require_extra(library: str, extra: str, purpose: str) -> None:
    """MissingExtraError unless an optional library is installed; nothing is imported."""
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(library, extra, purpose)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
