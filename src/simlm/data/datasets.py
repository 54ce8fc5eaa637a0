"""The table of data sets, and what can be asked of one before it is prepared: its digest, its splits, its size.

A loader turns `DataSettings` into passages, queries of each split and judgements, each with its place ("path:line"). Adding a data set
is one class and one row here. Nothing heavy is imported: the pipeline asks these questions each time it looks at a recipe.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from simlm.data.formats import BadRecords, format_of, unpack
from simlm.errors import DataError, nearest
from simlm.recipe import DataSettings
from simlm.types import SPLITS, Passage, Qrel, Query, Split

DATASETS: dict[str, str] = {
    "beir": "simlm.data.loaders:BeirLoader",
    "msmarco": "simlm.data.loaders:MsMarcoLoader",
    "jsonl": "simlm.data.loaders:TableLoader",
    "csv": "simlm.data.loaders:TableLoader",
    "parquet": "simlm.data.loaders:TableLoader",
    "text": "simlm.data.loaders:TextLoader",
    "ir_datasets": "simlm.data.hub:IrDatasetsLoader",
    "hub": "simlm.data.hub:HubLoader",
    "python-docs": "simlm.data.loaders:PythonDocsLoader",
}


class Loader(Protocol):
    """What a data set gives. `bad` decides about records that cannot be used; all iterators can be asked for again.

    seed: for the choices that a loader makes itself (python-docs: which summaries become queries of which split).
    """

    OPTIONS: frozenset[str]
    """Keys of data.options that this loader knows."""
    FIELDS: frozenset[str]
    """Keys of data.fields that this loader knows."""

    def __init__(self, settings: DataSettings, *, seed: int) -> None: ...

    def check(self) -> None:
        """Raise DataError (or MissingExtraError) if the data cannot be there; cheap."""

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]: ...

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        """Queries that may belong to `split`; those without a judgement in it are left out later."""

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]: ...

    def splits(self) -> list[Split]:
        """Splits with at least one judgement."""

    def sources(self) -> list[Path]:
        """Files that the data is read from."""

    def versions(self) -> dict[str, str]:
        """What else the data depends on: {name: version}."""

    def facts(self) -> dict[str, Any]:
        """What the loader has to say about the data; asked after reading."""

    def guess(self) -> tuple[int, dict[Split, int]]:
        """Number of passages and of judged queries by a cheap look."""


def open_dataset(settings: DataSettings, *, seed: int = 0) -> Loader:
    """The loader of a recipe's [data] section, checked. DataError for an unknown data set, option or field."""
    if settings.dataset not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise DataError(f"data.dataset: no loader {settings.dataset!r}{nearest(settings.dataset, DATASETS)} (known: {known})")
    module, _, name = DATASETS[settings.dataset].partition(":")
    loader_class = getattr(importlib.import_module(module), name)
    for section, given, known_keys in (
        ("options", settings.options, loader_class.OPTIONS),
        ("fields", settings.fields, loader_class.FIELDS),
    ):
        for key in given:
            if key not in known_keys:
                allowed = ", ".join(sorted(known_keys)) or "none"
                raise DataError(
                    f"data.{section}: the loader {settings.dataset!r} has no {key!r}{nearest(key, known_keys)} (known: {allowed})"
                )
    loader = cast("Loader", loader_class(settings, seed=seed))
    loader.check()
    return loader if settings.splits is None else _SomeSplits(loader, settings.splits)


class _SomeSplits:
    """A loader of which only the queries and judgements of some splits are asked for."""

    def __init__(self, loader: Loader, wanted: list[Split]) -> None:
        self.OPTIONS, self.FIELDS = loader.OPTIONS, loader.FIELDS
        self._loader, self._wanted = loader, frozenset(wanted)
        self.check, self.passages, self.facts = loader.check, loader.passages, loader.facts
        self.sources, self.versions = loader.sources, loader.versions

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        return self._loader.queries(split, bad) if split in self._wanted else iter(())

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
        return self._loader.qrels(split, bad) if split in self._wanted else iter(())

    def splits(self) -> list[Split]:
        return [split for split in self._loader.splits() if split in self._wanted]

    def guess(self) -> tuple[int, dict[Split, int]]:
        passages, queries = self._loader.guess()
        return passages, {split: count for split, count in queries.items() if split in self._wanted}


def signature(settings: DataSettings, digests: dict[str, str]) -> dict[str, str]:
    """What the data is: {file: SHA-256} of the files it is read from, {package: version} of what it depends on.

    digests: cache of `cached_digest`, which the caller keeps. A file that is touched but not changed keeps its digest.
    """
    loader = open_dataset(settings)
    return {str(path): cached_digest(path, digests) for path in loader.sources()} | loader.versions()


def cached_digest(path: Path, digests: dict[str, str]) -> str:
    """SHA-256 of a file, computed again only when its size or date has changed since `digests` got it."""
    try:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in digests:
            with open(path, "rb") as file:
                digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path in [data]") from None
    return digests[key]


def find_splits(settings: DataSettings) -> list[Split]:
    """Splits that the prepared store will have: those with judgements, and dev where it is set apart from train."""
    loader = open_dataset(settings)
    splits = loader.splits()
    if "train" in splits and settings.dataset != "python-docs":
        # python-docs gives every training query a passage, and would take long to look at.
        usable = _training_queries(loader, 2)
        if usable == 0:
            splits = [split for split in splits if split != "train"]
        elif usable == 2 and sets_dev_apart(settings, splits):
            splits = [*splits, "dev"]
    return [split for split in SPLITS if split in splits]


def sets_dev_apart(settings: DataSettings, splits: list[Split]) -> bool:
    """Whether part of the training queries becomes dev: there is no dev split and `dev_fraction` is above 0."""
    return "train" in splits and "dev" not in splits and settings.dev_fraction > 0


def _training_queries(loader: Loader, enough: int) -> int:
    """Number of training queries with a relevant passage, counted up to `enough`."""
    found: set[str] = set()
    for _, qrel in loader.qrels("train", BadRecords("skip")):
        if qrel.grade > 0:
            found.add(qrel.query_id)
        if len(found) >= enough:
            break
    return len(found)


def guess_sizes(settings: DataSettings) -> tuple[int, dict[Split, int]]:
    """Number of passages and of queries by split that a prepared store will have, by a cheap look (large files: extrapolated)."""
    loader = open_dataset(settings)
    passages, queries = loader.guess()
    if sets_dev_apart(settings, list(queries)):
        dev = round(queries["train"] * settings.dev_fraction)
        queries = queries | {"train": queries["train"] - dev, "dev": dev}
    queries = {split: min(count, settings.max_queries.get(split, count)) for split, count in queries.items()}
    return min(passages, settings.max_passages or passages), queries


# --- what is in a folder


@dataclass(frozen=True)
class Found:
    """What `sniff` found: the [data] section as a dictionary, and counts ("passages", and queries by split)."""

    settings: dict[str, Any]
    counts: dict[str, int]


def sniff(path: Path) -> Found:
    """Loader, files and field names that fit a folder or file. DataError, saying what is known, if nothing does."""
    path = Path(path)
    candidates = _sniff_file(path) if path.is_file() else _sniff_folder(path)
    for settings in candidates:
        parsed = DataSettings.model_validate(settings)
        passages, queries = guess_sizes(parsed)
        counts: dict[str, int] = {"passages": passages}
        counts.update({str(split): count for split, count in queries.items()})
        return Found(settings, counts)
    raise DataError(
        f"{path}: no known form of data here. Known are: a BEIR folder (corpus.jsonl, queries.jsonl, qrels/*.tsv), MS MARCO files "
        "(collection.tsv, queries.*.tsv, qrels.*.tsv), a corpus as JSONL, CSV, TSV or Parquet with a text column, "
        "and a folder of .txt or .md files"
    )


def _sniff_file(path: Path) -> Iterator[dict[str, Any]]:
    from simlm.data.loaders import existing_fields, guess_fields

    kind = format_of(path)
    if kind is not None:
        fields = guess_fields(path, "corpus")
        if fields is not None:
            fields = existing_fields(path, fields)
            yield {"dataset": _dataset_of(kind), "path": str(path.parent), "corpus": path.name, "fields": fields}
    elif path.suffix in (".txt", ".md"):
        yield {"dataset": "text", "path": str(path)}


def _sniff_folder(path: Path) -> Iterator[dict[str, Any]]:
    from simlm.data.loaders import existing_fields, find_file, guess_fields

    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; give the folder that holds your corpus")
    here = {"path": str(path)}
    if find_file(path, "corpus.jsonl") and ((path / "qrels").is_dir() or find_file(path, "queries.jsonl")):
        yield {"dataset": "beir", **here}
    if find_file(path, "collection.tsv"):
        yield {"dataset": "msmarco", **here}
    tables = sorted(file for file in path.iterdir() if file.is_file() and format_of(file))
    # Names that say "corpus" first, then the largest file.
    tables.sort(key=lambda file: (not _named(file, CORPUS_NAMES), _named(file, ("quer", "question", "qrel")), -file.stat().st_size))
    for corpus in tables:
        fields = guess_fields(corpus, "corpus")
        if fields is None or _named(corpus, ("quer", "question", "qrel")):
            continue
        settings: dict[str, Any] = {"dataset": _dataset_of(format_of(corpus) or "jsonl"), **here, "corpus": corpus.name}
        queries, qrels = _sniff_queries(path, [file for file in tables if file != corpus])
        fields = existing_fields(corpus, fields)
        for name in queries.values():
            fields |= existing_fields(path / name, guess_fields(path / name, "queries") or {})
        settings |= {key: value for key, value in (("queries", queries), ("qrels", qrels), ("fields", fields)) if value}
        yield settings
    if any(file.suffix in (".txt", ".md") for file in path.rglob("*")):
        yield {"dataset": "text", **here}


CORPUS_NAMES = ("corpus", "passage", "collection", "document", "docs")
_SPLIT_WORDS: dict[Split, tuple[str, ...]] = {"train": ("train",), "dev": ("dev", "valid"), "test": ("test", "eval")}


def _sniff_queries(path: Path, tables: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Query files and qrels files by split. A query file that names no split serves every split that has qrels, else train."""

    folder = path / "qrels"
    files = [*path.iterdir(), *(folder.iterdir() if folder.is_dir() else [])]
    qrels = {
        split: str(file.relative_to(path))
        for split, words in _SPLIT_WORDS.items()
        for file in sorted(files)
        if file.is_file() and (_named(file, ("qrel",)) or file.parent == folder) and _named(file, words)
    }
    query_files = [file for file in tables if not _named(file, ("qrel",)) and _holds_queries(file)]
    query_files.sort(key=lambda file: not _named(file, ("quer", "question")))
    queries: dict[str, str] = {}
    for file in query_files:
        named = [split for split, words in _SPLIT_WORDS.items() if _named(file, words)]
        for split in named or list(qrels) or ["train"]:
            queries.setdefault(split, file.name)
    return queries, {split: name for split, name in qrels.items() if split in queries}


def _holds_queries(file: Path) -> bool:
    from simlm.data.loaders import guess_fields

    fields = guess_fields(file, "queries")
    if fields is None:
        return False
    return fields.get("query") in ("query", "question") or _named(file, ("quer", "question", "train", "dev", "valid", "test"))


def _named(file: Path, words: tuple[str, ...]) -> bool:
    return any(word in file.name.lower() for word in words)


def _dataset_of(kind: str) -> str:
    return "csv" if kind == "tsv" else kind


# --- counting without reading all

LOOK_BYTES = 64 << 20


def count_lines(path: Path) -> int:
    """Lines of a file, exact below 64 MB (unpacked), else extrapolated from its first part."""
    lines = seen = 0
    with path.open("rb") as raw, unpack(raw, path) as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            seen += len(block)
            if seen >= LOOK_BYTES:
                return round(lines * max(path.stat().st_size / max(raw.tell(), 1), 1.0))
            last = block
    return lines + (seen > 0 and not last.endswith(b"\n"))
