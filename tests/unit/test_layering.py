"""Imports go downward only, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "simlm"

LAYERS = {
    "types": 0,
    "errors": 0,
    "artifacts": 1,
    "embedding_files": 1,
    "progress": 1,
    "rankings": 1,
    "recipe": 1,
    "runtime": 1,
    "training_options": 1,
    "data": 2,
    "evaluation": 2,
    "index": 2,
    "losses": 2,
    "models": 2,
    "objectives": 3,
    "training": 3,
    "stages": 4,
    "additions": 5,
    "compare": 5,
    "corpus_encoding": 5,
    "estimates": 5,
    "export": 5,
    "index_choice": 5,
    "negative_report": 5,
    "pipeline": 5,
    "scaffold": 5,
    "searcher": 5,
    "serve": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of simlm that a module imports, imports inside functions and under TYPE_CHECKING included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import; the house imports absolutely")
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module] if node.module != "simlm" else [f"simlm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        names.update(module.split(".")[1] for module in modules if module.startswith("simlm.") and module.split(".")[1] != "__version__")
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for other in imported_parts(path):
        assert other in LAYERS, f"{path}: {other} is in no layer; add it to LAYERS"
        if other == part:
            continue
        if part == "stages":
            assert LAYERS[other] < LAYERS["stages"], f"{path}: a stage imports {other}"
        elif LAYERS[part] == 5:
            assert LAYERS[other] <= 5, f"{path} imports {other}, which is above it"
        elif LAYERS[part] == 1:
            assert LAYERS[other] <= 1, f"{path} imports {other}, which is above it"
        elif LAYERS[part] == 3:
            assert LAYERS[other] <= 3, f"{path} imports {other}, which is above it"
        else:
            assert LAYERS[other] < LAYERS[part], f"{path} imports {other}, which is not below it"


def test_stages_do_not_import_each_other() -> None:
    for path in (SOURCE / "stages").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simlm.stages."):
                raise AssertionError(f"{path}: imports {node.module}; stages only share simlm.stages itself")


def test_data_and_evaluation_keep_to_their_libraries() -> None:
    for path in (SOURCE / "evaluation").rglob("*.py"):
        assert "import torch" not in path.read_text(encoding="utf-8"), f"{path}: evaluation uses no torch"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_simlm_is_light() -> None:
    code = "import sys, simlm; print([name for name in ('torch', 'transformers', 'numpy', 'pydantic') if name in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_simlm_takes_under_300_ms() -> None:
    code = "import time; t = time.perf_counter(); import simlm; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_public_names_are_few_and_exist() -> None:
    import simlm

    assert len(simlm.__all__) <= 12
    for name in simlm.__all__:
        assert getattr(simlm, name) is not None


def test_public_help_needs_no_torch() -> None:
    code = (
        "import sys; from simlm.cli import app; from typer.testing import CliRunner; "
        "result = CliRunner().invoke(app, ['--help']); print(result.exit_code, 'torch' in sys.modules)"
    )
    assert run_python(code) == "0 False"
