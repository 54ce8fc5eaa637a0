"""simlm: the best single-vector retriever for your own corpus. See README.md.

Importing this package loads neither torch nor transformers; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simlm.errors import SimlmError
    from simlm.evaluation.measures import evaluate_run
    from simlm.index import load_index
    from simlm.models.reranker import load_reranker
    from simlm.models.retriever import load_retriever
    from simlm.pipeline import run_recipe
    from simlm.recipe import load_recipe
    from simlm.searcher import open_run
    from simlm.types import Passage, Query

__version__ = "0.1.0"

_PUBLIC = {
    "Passage": "simlm.types",
    "Query": "simlm.types",
    "SimlmError": "simlm.errors",
    "evaluate_run": "simlm.evaluation.measures",
    "load_index": "simlm.index",
    "load_recipe": "simlm.recipe",
    "load_reranker": "simlm.models.reranker",
    "load_retriever": "simlm.models.retriever",
    "open_run": "simlm.searcher",
    "run_recipe": "simlm.pipeline",
}

__all__ = [
    "Passage",
    "Query",
    "SimlmError",
    "__version__",
    "evaluate_run",
    "load_index",
    "load_recipe",
    "load_reranker",
    "load_retriever",
    "open_run",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'simlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
