"""The API fuzzed from its own OpenAPI document: no 5xx, and no answer that the document does not state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from simlm.serve.app import create_app
from simlm.serve.engine import Engine

# Data that the document allows may still be refused: a filter on a field that this corpus does not have, a model of another name.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
COMMON: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def app(served_run: Path) -> Iterator[FastAPI]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = Engine(served_run)
    engine.open()
    yield create_app(engine)
    engine.close()
    torch.set_num_threads(threads)


def fuzz(app: FastAPI, max_examples: int) -> dict[str, set[int]]:
    """Ask each path for data of its document and for data against it; path -> the statuses seen. Raises what a check finds."""
    seen: dict[str, set[int]] = {}
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = found.ok()
        statuses = seen.setdefault(f"{operation.method.upper()} {operation.path}", set())
        for mode in GenerationMode:
            with contextlib.suppress(Unsatisfiable):  # No data is against the document of a path that takes none.
                ask_often(operation.as_strategy(generation_mode=mode), statuses, max_examples)
    return seen


def ask_often(cases: SearchStrategy[schemathesis.Case], statuses: set[int], max_examples: int) -> None:
    @settings(max_examples=max_examples, **COMMON)
    @given(case=cases)
    def ask(case: schemathesis.Case) -> None:
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    ask()


def check_seen(seen: dict[str, set[int]]) -> None:
    """The fuzzing has been where it was meant to go."""
    assert {200, 422} <= seen["POST /search"]
    assert {200, 422} <= seen["POST /rerank"]
    assert 422 in seen["POST /v1/embeddings"]
    assert len(seen) >= 15


def test_a_few_requests_to_each_path(app: FastAPI) -> None:
    check_seen(fuzz(app, 6))


@pytest.mark.slow
def test_many_requests_to_each_path(app: FastAPI) -> None:
    check_seen(fuzz(app, 300))
