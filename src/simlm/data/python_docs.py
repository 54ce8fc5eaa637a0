"""The data set `python-docs`: documentation strings of the Python standard library and of installed packages.

passage title = qualified name, passage text = the docstring without its summary sentence, query = the summary sentence, its one
positive = the passage it was taken from. Real text that is there wherever this program is installed; nothing is imported for it:
source files are parsed, a few built-in modules (already loaded) are asked. Which versions were read is the data set's signature.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from simlm.errors import DataError, nearest

DEFAULT_PACKAGES = (
    "stdlib",
    "numpy",
    "scipy",
    "torch",
    "transformers",
    "sentence_transformers",
    "sklearn",
    "pandas",
    "matplotlib",
    "pyarrow",
    "pydantic",
    "networkx",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "joblib",
    "rich",
    "typer",
    "jinja2",
    "tqdm",
)
"""Read where installed: all but pandas come with this program. A package named by the user must be there."""
COLLECTOR_VERSION = 1
"""Part of the signature: raised when the same packages give another data set."""
MIN_QUERY_WORDS = 4
MAX_QUERY_WORDS = 40
MIN_BODY_WORDS = 12
# Below this much source a second process costs more than it saves.
ALONE_BYTES = 3_000_000
LARGEST_FILE_BYTES = 2_000_000
_SKIPPED_PARTS = {
    "test", "tests", "testing", "conftest", "setup", "__main__", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "vendor",
    "vendored", "third_party", "externals", "extern", "benchmarks", "examples", "__pycache__",
}  # fmt: skip
# Hundreds of architectures that document the same things in nearly the same words.
_SKIPPED_MODULES = ("transformers.models.",)
# Private modules that document compiled objects of numpy and torch.
_DOCUMENTING = {"_add_newdocs", "_add_newdocs_scalars", "_torch_docs", "_tensor_docs", "_storage_docs", "_special_docs"}
# Modules written in C, by the name under which their objects are documented.
_BUILT_IN = {
    "builtins": "", "math": "math", "cmath": "cmath", "itertools": "itertools", "operator": "operator", "time": "time", "sys": "sys",
    "posix": "os", "gc": "gc", "marshal": "marshal", "zlib": "zlib", "array": "array", "binascii": "binascii", "_io": "io",
    "_struct": "struct", "_random": "random", "_datetime": "datetime", "_collections": "collections", "_functools": "functools",
    "unicodedata": "unicodedata", "select": "select", "_socket": "socket", "_sqlite3": "sqlite3", "_ssl": "ssl", "mmap": "mmap",
    "_decimal": "decimal", "_bisect": "bisect", "_heapq": "heapq", "_hashlib": "hashlib", "_thread": "threading", "_csv": "csv",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Documented:
    """One documented object: the package it counts for, its qualified name, the summary sentence and the rest.

    kind: "module", "class", "function", "method" or "property"; empty where the source does not say (compiled objects of numpy).
    """

    package: str
    name: str
    summary: str
    body: str
    kind: str = ""


@dataclass(frozen=True)
class Collection:
    """The data set before it is split: `queries` are positions in `passages` whose summary is nobody else's.

    dropped: how many docstrings were left out, by reason. per_package: passages of each package.
    """

    passages: list[Documented]
    queries: list[int]
    dropped: dict[str, int]
    per_package: dict[str, int]


def collect(packages: Sequence[str] = (), *, min_body_words: int = MIN_BODY_WORDS, num_workers: int = 2) -> Collection:
    """Documentation of `packages` (default: DEFAULT_PACKAGES, as far as installed) in a fixed order.

    Bodies that repeat are kept once; a summary shared by several objects is nobody's query, since it would have several answers.
    """
    docstrings = _read(packages, num_workers)
    dropped: Counter[str] = Counter()
    passages: list[Documented] = []
    names: set[str] = set()
    bodies: set[str] = set()
    for package, name, text, kind in docstrings:
        if name in names:
            dropped["defined twice"] += 1
            continue
        summary, body = split_docstring(text)
        if len(body.split()) < min_body_words:
            dropped["short body"] += 1
            continue
        key = " ".join(body.split())
        if key in bodies:
            dropped["repeated body"] += 1
            continue
        names.add(name)
        bodies.add(key)
        passages.append(Documented(package, name, summary, body, kind))
    shared = Counter(_query_key(passage.summary) for passage in passages)
    queries = []
    for position, passage in enumerate(passages):
        words = len(passage.summary.split())
        if not MIN_QUERY_WORDS <= words <= MAX_QUERY_WORDS or _PARAMETER.match(passage.summary):
            dropped["summary unfit as query"] += 1
        elif shared[_query_key(passage.summary)] > 1:
            dropped["shared summary"] += 1
        else:
            queries.append(position)
    return Collection(passages, queries, dict(dropped), dict(Counter(passage.package for passage in passages)))


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """{package: version} of what `collect` would read, and of the collector itself: changes when the data set does."""
    found = {"python-docs collector": str(COLLECTOR_VERSION)}
    distributions: dict[str, list[str]] = {}
    for package in installed(packages):
        if package == "stdlib" or package.partition(".")[0] in sys.stdlib_module_names:
            found[package] = sys.version.split()[0]
            continue
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # Named differently from its distribution (sklearn), or without one. Reading the names of all distributions is slow.
            distributions = distributions or dict(metadata.packages_distributions())
            owners = distributions.get(package.partition(".")[0], [])
            found[package] = metadata.version(owners[0]) if owners else _dated(package)
    return found


def _dated(package: str) -> str:
    """A package without a distribution (a folder on the path): its newest change."""
    return str(max((path.stat().st_mtime_ns for _, path in _files(package)), default=0))


def installed(packages: Sequence[str]) -> list[str]:
    """Packages that `collect` reads: those named, or the default ones that are there. DataError for a named one that is not."""
    if not packages:
        return [name for name in DEFAULT_PACKAGES if name == "stdlib" or _spec(name) is not None]
    for name in packages:
        if name != "stdlib" and _spec(name) is None:
            raise DataError(
                f"data.options.packages: no package {name!r} is installed{nearest(name, DEFAULT_PACKAGES)}; "
                "install it or leave it out (names are those of `import`)"
            )
    return list(dict.fromkeys(packages))


def _spec(name: str) -> object | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


# --- one docstring


def split_docstring(text: str) -> tuple[str, str]:
    """(summary sentence, all the rest), both as plain readable text: no markup, no doctest prompts, single spaces."""
    lines = [plain for line in inspect.cleandoc(text).splitlines() if (plain := _plain_line(line)) is not None]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
    while len(paragraphs) > 1 and _SIGNATURE.match(paragraphs[0]):
        paragraphs.pop(0)
    first = " ".join(paragraphs[0].split())
    end = _SENTENCE_END.search(first)
    summary, remainder = (first[: end.end()].strip(), first[end.end() :].strip()) if end else (first, "")
    body = "\n".join(part for part in [remainder, *(paragraph.strip() for paragraph in paragraphs[1:])] if part)
    return summary, re.sub(r"\n{2,}", "\n", body).strip()


_SIGNATURE = re.compile(r"[\w.]+\s*\([^\n]*(\n[^\n]*)*\)(\s*->.*)?\s*$|[\w.]+\([^\n]*\)\s*->")
# A sentence ends at a full stop before a space; not after an abbreviation or a single letter.
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bcf)(?<!\b[A-Za-z])[.!?](?=\s|$)")
# "name (type, optional): what it is": a class whose docstring starts with its parameters has no summary; nor has a line without words.
_PARAMETER = re.compile(r"\w+ \([^)]*\) *:|[\W\d_]*$")
_UNDERLINE = re.compile(r"\s*([-=~^*#])\1{2,}\s*$")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`")
_DIRECTIVE = re.compile(
    r"\s*\.\. (versionadded|versionchanged|deprecated|index|currentmodule|plot|autofunction|autoclass|toctree|code-block)::"
)
_PROMPT = re.compile(r"^(\s*)(>>>|\.\.\.)( |$)")


def _plain_line(line: str) -> str | None:
    if _UNDERLINE.match(line) or _DIRECTIVE.match(line):
        return None
    line = _PROMPT.sub(r"\1", line)
    line = _ROLE.sub(r"\1", line).replace("``", "").replace("`", "")
    line = re.sub(r"\s*\.\. (\w+)::\s*", r"\1: ", line)
    return " ".join(line.split())


def _query_key(summary: str) -> str:
    return " ".join(re.findall(r"\w+", summary.casefold()))


# --- many source files

Job = tuple[str, str, str]
"""Package, module, path of a source file."""


@dataclass
class _Module:
    """What the parser found in a file: `all_names` is its `__all__` where it has a plain one.

    docs: (name inside the module, text, kind).
    """

    package: str
    module: str
    all_names: list[str] | None
    docs: list[tuple[str, str, str]]


def _read(packages: Sequence[str], num_workers: int) -> list[tuple[str, str, str, str]]:
    """(package, public qualified name, docstring, kind), ordered by package as given, then by name."""
    chosen = installed(packages)
    jobs = [(package, module, str(path)) for package in chosen for module, path in _files(package)]
    exports = {package: _exports(package) for package in chosen}
    jobs = [job for job in jobs if _wanted(job[1], exports[job[0]])]
    found: list[tuple[int, str, str, str]] = []
    order = {package: number for number, package in enumerate(chosen)}
    for module in _parse_all(jobs, num_workers):
        for inner, text, kind in module.docs:
            name = _public_name(module, inner, exports[module.package])
            if name is not None:
                found.append((order[module.package], name, text, kind))
    for package in chosen:
        found += [(order[package], name, text, kind) for name, text, kind in _built_in(package)]
    found.sort(key=lambda item: (item[0], len(item[1]), item[1], item[2]))
    return [(chosen[number], name, text, kind) for number, name, text, kind in found]


def _files(package: str) -> list[tuple[str, Path]]:
    """(module name, path) of a package's source files, without tests."""
    if package == "stdlib":
        root, prefix = Path(sysconfig.get_path("stdlib")), ""
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or not spec.origin.endswith((".py", ".pyi")):
            return []
        if spec.submodule_search_locations is None:
            return [(package, Path(spec.origin))]
        root, prefix = Path(spec.origin).parent, package
    files = []
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.pyi")]):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in _SKIPPED_PARTS or part.startswith(("test_", "lib-dynload", "config-")) or part.endswith("_test") for part in parts):
            continue
        if path.suffix == ".pyi" and path.with_suffix(".py").exists():
            continue
        module = ".".join([*([prefix] if prefix else []), *(parts[:-1] if parts[-1] == "__init__" else parts)])
        if module and not module.startswith(_SKIPPED_MODULES) and path.stat().st_size <= LARGEST_FILE_BYTES:
            files.append((module, path))
    return files


def _private_at(module: str) -> int | None:
    """Position of the first part of a module's name that starts with an underscore."""
    parts = module.split(".")
    return next((number for number, part in enumerate(parts) if part.startswith("_") and part != "__future__"), None)


@dataclass
class _Exports:
    """What a public package takes from its private modules: names by module, and modules taken whole (`import *`)."""

    names: dict[str, set[str]]
    stars: dict[str, set[str]]


def _exports(package: str) -> _Exports:
    exports = _Exports({}, {})
    for module, path in _files(package):
        if path.stem != "__init__" or _private_at(module) is not None:
            continue
        for node in _parse(path).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            source = node.module or ""
            if node.level:
                base = module.split(".")[: len(module.split(".")) - node.level + 1]
                source = ".".join([*base, *([source] if source else [])])
            if not source.startswith(module + ".") or _private_at(source) is None:
                continue
            for alias in node.names:
                if alias.name == "*":
                    exports.stars.setdefault(module, set()).add(source)
                else:
                    exports.names.setdefault(module, set()).add(alias.name)
                    exports.stars.setdefault(module, set())
    return exports


def _wanted(module: str, exports: _Exports) -> bool:
    """Whether a module is public, or below a public package that exports from private modules."""
    private = _private_at(module)
    if private is None:
        return True
    owner = ".".join(module.split(".")[:private])
    return owner in exports.stars or module.rpartition(".")[2] in _DOCUMENTING


def _public_name(module: _Module, inner: str, exports: _Exports) -> str | None:
    """Qualified name as a user would write it; None for what is private. A leading @ marks a name that is complete already."""
    if inner.startswith("@"):
        return None if any(part.startswith("_") for part in inner[1:].split(".")) else inner[1:]
    if any(part.startswith("_") for part in inner.split(".") if part):
        return None
    private = _private_at(module.module)
    if private is None:
        return f"{module.module}.{inner}" if inner else module.module
    owner = ".".join(module.module.split(".")[:private])
    first = inner.partition(".")[0]
    if not first:
        return None
    listed = module.all_names is None or first in module.all_names
    if first in exports.names.get(owner, ()) or (module.module in exports.stars.get(owner, ()) and listed):
        return f"{owner}.{inner}"
    return None


def _parse_all(jobs: list[Job], num_workers: int) -> Iterator[_Module]:
    """Parse the files, in processes of their own where there is much to parse."""
    total = sum(Path(path).stat().st_size for _, _, path in jobs)
    if num_workers < 2 or total < ALONE_BYTES:
        for job in jobs:
            yield _parse_job(job)
        return
    shares = [jobs[number::num_workers] for number in range(num_workers)]
    command = [sys.executable, "-m", "simlm.data.python_docs"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") for _ in shares]
    try:
        for process, share in zip(processes, shares, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(share))
            process.stdin.close()
        for process in processes:
            assert process.stdout is not None
            for line in process.stdout:
                package, module, all_names, docs = json.loads(line)
                yield _Module(package, module, all_names, [(name, text, kind) for name, text, kind in docs])
            if process.wait() != 0:
                raise DataError(
                    f"reading the installed packages failed (exit status {process.returncode} of a parsing process); run it again"
                )
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _serve() -> None:
    """A parsing process: jobs as JSON in, one line of JSON a module out."""
    gc.disable()  # A syntax tree has no cycles, and to look for them takes a fifth of the time.
    for job in json.load(sys.stdin):
        module = _parse_job(job)
        sys.stdout.write(json.dumps([module.package, module.module, module.all_names, module.docs]) + "\n")


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            # Templates and files for other Python versions.
            return ast.Module(body=[], type_ignores=[])


def _parse_job(job: Sequence[str]) -> _Module:
    package, module, path = job
    tree = _parse(Path(path))
    found = _Module(package, module, None, [])
    _visit(tree, "", found)
    return found


def _visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str, found: _Module) -> None:
    text = ast.get_docstring(node, clean=False)
    if text and _encodable(text):
        found.docs.append((prefix, text, _kind(node, prefix)))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in _statements(node.body):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_"):
                _visit(child, f"{prefix}.{child.name}" if prefix else child.name, found)
        elif isinstance(child, ast.Assign) and not prefix:
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in child.targets):
                found.all_names = _string_list(child.value)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            _added_docstring(child.value, found)


def _kind(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if isinstance(node, ast.Module | ast.ClassDef):
        return "module" if isinstance(node, ast.Module) else "class"
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return "property"
    # Functions inside functions are not read, so what has a dot in its name stands in a class.
    return "method" if "." in name else "function"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block, those inside `if` and `try` included."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])
        else:
            yield statement


def _string_list(node: ast.expr) -> list[str] | None:
    if not isinstance(node, ast.List | ast.Tuple):
        return None
    return [item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def _added_docstring(call: ast.Call, found: _Module) -> None:
    """`add_newdoc(module, name, doc)` of numpy and `add_docstr(torch.name, doc)` of torch: documentation of compiled objects."""
    function = call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if function == "add_newdoc" and len(call.args) >= 3:
        place, name, text = (_constant(argument) for argument in call.args[:3])
        if isinstance(call.args[2], ast.Tuple) and len(call.args[2].elts) == 2:
            member, text = (_constant(item) for item in call.args[2].elts)
            name = f"{name}.{member}"
        if place and name and text and _encodable(text):
            found.docs.append((f"@{_without_private(place)}.{name}", text, ""))
    elif function in ("add_docstr", "_add_docstr") and len(call.args) >= 2:
        text = _constant(call.args[1])
        if text and _encodable(text):
            found.docs.append((f"@{_without_private(ast.unparse(call.args[0]))}", text, ""))


def _without_private(dotted: str) -> str:
    return ".".join(part for part in dotted.split(".") if not part.startswith("_"))


def _constant(node: ast.expr) -> str | None:
    """A string, also one that `.format(...)` or `%` would fill in or `+` joins to something: its plain parts."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        text = _constant(node.func.value)
        return None if text is None else re.sub(r"\{\w*\}", "", text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_constant(node.left) or "") + (_constant(node.right) or "") or None
    return None


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" or character == "\0" for character in text)


def _built_in(package: str) -> Iterator[tuple[str, str, str]]:
    """(qualified name, docstring, kind) of compiled objects of modules that are loaded anyway."""
    if package == "stdlib":
        for source, shown in _BUILT_IN.items():
            if source in sys.builtin_module_names or _spec(source) is not None:
                yield from _members(vars(importlib.import_module(source)), shown)
    elif package == "numpy":
        import numpy

        namespace: dict[str, object] = dict(vars(numpy))
        for name, value in sorted(namespace.items()):
            text = _documentation(value)
            if type(value).__name__ == "ufunc" and text and not name.startswith("_"):
                yield f"numpy.{name}", text, "function"


def _members(namespace: dict[str, Any], prefix: str, *, in_class: bool = False) -> Iterator[tuple[str, str, str]]:
    for name in sorted(namespace):
        value = namespace[name]
        if name.startswith("_") or inspect.ismodule(value) or not (callable(value) or inspect.isdatadescriptor(value)):
            continue
        qualified = f"{prefix}.{name}" if prefix else name
        text = _documentation(value)
        if text:
            kind = "class" if inspect.isclass(value) else "function" if not in_class else "method" if callable(value) else "property"
            yield qualified, text, kind
        if inspect.isclass(value) and prefix.count(".") < 1:
            yield from _members(dict(vars(value)), qualified, in_class=True)


def _documentation(value: object) -> str | None:
    text = getattr(value, "__doc__", None)
    return text if isinstance(text, str) and _encodable(text) else None


if __name__ == "__main__":
    _serve()
