"""Loaders of data sets that other libraries fetch: `ir_datasets` ids and hub data sets (both extras)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from simlm.data.formats import BadRecords, MetadataFields, clean_text, id_field
from simlm.data.loaders import make_passage, make_query
from simlm.errors import DataError, MissingExtraError
from simlm.recipe import DataSettings
from simlm.types import SPLITS, Passage, Qrel, Query, Split

# What others call our splits.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "dev": ("dev", "validation", "val", "valid"), "test": ("test",)}


class _FetchedLoader:
    """What both have in common: no files of ours, a size that only the library knows."""

    OPTIONS: frozenset[str] = frozenset()
    FIELDS: frozenset[str] = frozenset()

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        if not settings.path:
            raise DataError(f"data.path: the loader {settings.dataset!r} needs the id of the data set there")
        for key, value in settings.options.items():
            if not isinstance(value, str):
                raise DataError(f"data.options.{key}: text was expected, found {value!r}")
        self.settings = settings
        self.metadata = MetadataFields(settings.metadata_fields)
        self.path = settings.path

    def sources(self) -> list[Path]:
        return []

    def facts(self) -> dict[str, Any]:
        return self.metadata.facts()


class IrDatasetsLoader(_FetchedLoader):
    """An `ir_datasets` id as data.path. Judged queries of a split come from data.options.SPLIT (an id, whole or below data.path);
    without options from `PATH/train`, `PATH/dev` and `PATH/test`, or, if there are none, from `PATH` itself as test."""

    OPTIONS = frozenset(SPLITS)
    FIELDS = frozenset({"title", "text", "query"})

    def check(self) -> None:
        self._dataset(self.path)
        for split in SPLITS:
            self._judged(split)

    def versions(self) -> dict[str, str]:
        return {"ir_datasets": metadata.version("ir_datasets"), f"ir_datasets {self.path}": "fixed"}

    def splits(self) -> list[Split]:
        return [split for split in SPLITS if self._judged(split) is not None]

    def guess(self) -> tuple[int, dict[Split, int]]:
        return int(self._dataset(self.path).docs_count()), {split: int(self._judged(split).queries_count()) for split in self.splits()}

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        title_name = self.settings.fields.get("title", "title")
        for number, document in enumerate(self._dataset(self.path).docs_iter(), start=1):
            where = f"{self.path}:document {number}"
            title = clean_text(str(getattr(document, title_name, "") or ""), "title", where, bad)
            text = clean_text(self._text(document), "text", where, bad)
            metadata = self.metadata.read({name: getattr(document, name, None) for name in self.metadata.wanted or ()}, where, bad)
            if title is not None and text is not None and metadata is not None:
                yield where, Passage(str(document.doc_id), text, title, metadata)

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        dataset = self._judged(split)
        name = self.settings.fields.get("query", "")
        for number, query in enumerate(dataset.queries_iter() if dataset is not None else (), start=1):
            where = f"{self.path}:{split} query {number}"
            text = getattr(query, name) if name else query.default_text()
            cleaned = clean_text(str(text), "query", where, bad)
            if cleaned is not None:
                yield where, Query(str(query.query_id), cleaned)

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
        dataset = self._judged(split)
        for number, qrel in enumerate(dataset.qrels_iter() if dataset is not None else (), start=1):
            yield f"{self.path}:{split} judgement {number}", Qrel(str(qrel.query_id), str(qrel.doc_id), int(qrel.relevance))

    def _text(self, document: Any) -> str:
        name = self.settings.fields.get("text") or ("text" if hasattr(document, "text") else "")
        if name and not hasattr(document, name):
            raise DataError(f"data.fields.text: documents of {self.path} have no {name!r}, they have {list(document._fields)}")
        return str(getattr(document, name) if name else document.default_text())

    def _dataset(self, name: str) -> Any:
        library = _library("ir_datasets", "ir-datasets")
        try:
            return library.load(name)
        except KeyError:
            raise DataError(f"data.path: ir_datasets knows no data set {name!r}; see its catalogue for the ids") from None

    def _judged(self, split: Split) -> Any:
        """The data set with queries and judgements of a split; None if there is none."""
        given = self.settings.options.get(split)
        if given:
            dataset = self._dataset(given if given.startswith(self.path) else f"{self.path}/{given}")
            if not (dataset.has_queries() and dataset.has_qrels()):
                raise DataError(f"data.options.{split}: {given!r} has no queries or no judgements; choose another id")
            return dataset
        if self.settings.options:
            return None
        for name in [f"{self.path}/{name}" for name in SPLIT_NAMES[split]]:
            try:
                dataset = _library("ir_datasets", "ir-datasets").load(name)
            except KeyError:
                continue
            if dataset.has_queries() and dataset.has_qrels():
                return dataset
        whole = self._dataset(self.path)
        alone = split == "test" and whole.has_queries() and whole.has_qrels()
        return whole if alone else None


class HubLoader(_FetchedLoader):
    """A hub data set with the configurations of BEIR and MTEB: `corpus`, `queries`, and judgements by split.

    options: corpus_config, queries_config, qrels (another data set that holds the judgements; "BeIR/NAME-qrels" for BeIR/NAME),
    qrels_config (default "default"), revision. Without a revision the newest is taken once and not looked at again.
    """

    OPTIONS = frozenset({"corpus_config", "queries_config", "qrels", "qrels_config", "revision"})
    FIELDS = frozenset({"passage_id", "title", "text", "query_id", "query", "answers", "judged_query", "judged_passage", "grade"})

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        names = {"passage_id": "_id", "title": "title", "text": "text", "query_id": "_id", "query": "text", "answers": "answers"}
        names |= {"judged_query": "query-id", "judged_passage": "corpus-id", "grade": "score"}
        self.names = names | settings.fields
        self._loaded: dict[str, Any] = {}

    def check(self) -> None:
        _library("datasets", "hub")

    def versions(self) -> dict[str, str]:
        return {f"hub {self.path}": self.settings.options.get("revision", "newest")}

    def splits(self) -> list[Split]:
        return [split for split in SPLITS if self._judgements(split) is not None]

    def guess(self) -> tuple[int, dict[Split, int]]:
        queries = {split: len(set(self._judgements(split)[self.names["judged_query"]])) for split in self.splits()}
        return len(self._table("corpus")), queries

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        for number, record in enumerate(self._table("corpus"), start=1):
            where = f"{self.path}:corpus row {number}"
            passage = make_passage(record, self.names, where, bad, self.metadata)
            if passage is not None:
                yield where, passage

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        for number, record in enumerate(self._table("queries"), start=1):
            where = f"{self.path}:queries row {number}"
            query = make_query(record, self.names, where, bad)
            if query is not None:
                yield where, query

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
        table = self._judgements(split)
        for number, record in enumerate(table if table is not None else (), start=1):
            where = f"{self.path}:{split} judgement {number}"
            query = id_field(record, self.names["judged_query"], where, bad)
            passage = id_field(record, self.names["judged_passage"], where, bad)
            grade = record.get(self.names["grade"], 1)
            if not isinstance(grade, int | float) or int(grade) != grade:
                bad.report(where, "wrong type", f"a whole number was expected as grade, found {grade!r}")
            elif query is not None and passage is not None:
                yield where, Qrel(query, passage, int(grade))

    def _table(self, role: str) -> Any:
        """The one table of a configuration."""
        config = self.settings.options.get(f"{role}_config", role)
        tables = self._load(self.path, config)
        return tables[role] if role in tables else next(iter(tables.values()))

    def _judgements(self, split: Split) -> Any:
        options = self.settings.options
        tables = self._load(options.get("qrels", self.path), options.get("qrels_config", "default"))
        return next((tables[name] for name in SPLIT_NAMES[split] if name in tables), None)

    def _load(self, path: str, config: str) -> Any:
        key = f"{path}:{config}"
        if key not in self._loaded:
            library = _library("datasets", "hub")
            revision = self.settings.options.get("revision") if path == self.path else None
            try:
                self._loaded[key] = library.load_dataset(path, config, revision=revision)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(
                    f"data.path: the configuration {config!r} of the hub data set {path!r} cannot be loaded ({reason})"
                ) from error
        return self._loaded[key]


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(name, extra, "the data set named in [data]") from None
