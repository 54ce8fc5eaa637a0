"""Loaders of data that lies in files, and of the documentation of Python: the rows of `simlm.data.datasets.DATASETS`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from simlm.data import python_docs
from simlm.data.datasets import count_lines
from simlm.data.formats import (
    BadRecords,
    MetadataFields,
    clean_text,
    format_of,
    id_field,
    open_binary,
    read_qrels,
    read_records,
    read_tsv,
    text_field,
)
from simlm.errors import DataError
from simlm.recipe import DataSettings, expand_path
from simlm.types import SPLITS, Passage, Qrel, Query, Split

ROW_NUMBER = "#"
"""As a field name of an id: there is no id column, the rows are numbered."""
COMPRESSIONS = ("", ".gz", ".zst")
# Tried in this order where the recipe names no field.
FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "passage_id": ("_id", "id", "passage_id", "pid", "doc_id", "docid", "docno", "corpus_id"),
    "title": ("title", "heading", "headline"),
    "text": ("text", "contents", "content", "passage", "body", "abstract", "document"),
    "query_id": ("_id", "id", "query_id", "qid", "question_id"),
    "query": ("query", "question", "text"),
    "answers": ("answers", "answer"),
    "positives": ("positives", "positive_passages", "positive_ids", "positive", "relevant"),
}


class FileLoader:
    """What the loaders of files share: the folder, finding files, and the size guess."""

    OPTIONS: frozenset[str] = frozenset()
    FIELDS: frozenset[str] = frozenset()

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        if not settings.path:
            raise DataError(f"data.path: the loader {settings.dataset!r} reads files; give the folder that holds them")
        self.settings = settings
        self.metadata = MetadataFields(settings.metadata_fields)
        self.read_splits = tuple(split for split in SPLITS if settings.splits is None or split in settings.splits)
        self.root = expand_path(settings.path)
        if not self.root.exists():
            raise DataError(f"data.path: {self.root} does not exist (written as {settings.path!r}); check the path and its variables")

    def corpus(self) -> Path:
        raise NotImplementedError

    def query_file(self, split: Split) -> Path | None:
        raise NotImplementedError

    def qrels_file(self, split: Split) -> Path | None:
        raise NotImplementedError

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
        file = self.qrels_file(split)
        if file is not None:
            yield from read_qrels(file, bad)

    def check(self) -> None:
        self.corpus()
        for split in self.read_splits:
            if self.qrels_file(split) is not None and self.query_file(split) is None:
                raise DataError(
                    f"{self.qrels_file(split)}: judgements of {split!r} queries, but no file of those queries; name it in data.queries"
                )

    def sources(self) -> list[Path]:
        files = [self.corpus()]
        for split in self.read_splits:
            files += [file for file in (self.query_file(split), self.qrels_file(split)) if file is not None]
        return list(dict.fromkeys(files))

    def splits(self) -> list[Split]:
        # Skipping here loses nothing: reading for the store meets the same records again, and stops there.
        return [split for split in self.read_splits if next(self.qrels(split, BadRecords("skip")), None) is not None]

    def versions(self) -> dict[str, str]:
        return {}

    def facts(self) -> dict[str, Any]:
        return self.metadata.facts()

    def guess(self) -> tuple[int, dict[Split, int]]:
        passages = _count_records(self.corpus())
        return passages, {split: len({qrel.query_id for _, qrel in self.qrels(split, BadRecords("skip"))}) for split in self.splits()}

    def inside(self, name: str, key: str) -> Path:
        """A file named in the recipe: inside the data set's folder, or absolute."""
        path = expand_path(name)
        path = path if path.is_absolute() else self.root / path
        if not path.exists():
            raise DataError(f"{key}: {path} does not exist; name a file inside data.path or give an absolute path")
        return path

    def named(self, key: Literal["queries", "qrels"], split: Split) -> Path | None:
        """The file that the recipe names for a split; None if it names none for it."""
        value = getattr(self.settings, key)
        if isinstance(value, dict):
            return self.inside(value[split], f"data.{key}.{split}") if split in value else None
        return None

    def qrels_folder(self, name: str) -> Path:
        """The folder of qrels files that the recipe names as a whole."""
        folder = self.inside(name, "data.qrels")
        if folder.is_file():
            raise DataError(f'data.qrels: {folder} is one file, which does not say its split; write qrels = {{ test = "{name}" }}')
        return folder


class BeirLoader(FileLoader):
    """corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, each also packed as .gz or .zst."""

    FIELDS = frozenset({"passage_id", "title", "text", "query_id", "query", "answers"})

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        names = {"passage_id": "_id", "title": "title", "text": "text", "query_id": "_id", "query": "text", "answers": "answers"}
        self.names = names | settings.fields

    def corpus(self) -> Path:
        if self.settings.corpus:
            return self.inside(self.settings.corpus, "data.corpus")
        return _needed(self.root, "corpus.jsonl", "a BEIR folder has one; name another in data.corpus")

    def query_file(self, split: Split) -> Path | None:
        if isinstance(self.settings.queries, str):
            return self.inside(self.settings.queries, "data.queries")
        if self.settings.queries is not None:
            return self.named("queries", split)
        return find_file(self.root, "queries.jsonl")

    def qrels_file(self, split: Split) -> Path | None:
        if isinstance(self.settings.qrels, dict):
            return self.named("qrels", split)
        folder = self.qrels_folder(self.settings.qrels) if self.settings.qrels else self.root / "qrels"
        return find_file(folder, f"{split}.tsv")

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        for where, record in read_records(self.corpus(), bad):
            passage = make_passage(record, self.names, where, bad, self.metadata)
            if passage is not None:
                yield where, passage

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        file = self.query_file(split)
        for where, record in read_records(file, bad) if file else ():
            query = make_query(record, self.names, where, bad)
            if query is not None:
                yield where, query


class MsMarcoLoader(FileLoader):
    """collection.tsv (id, text; or id, title, text as in the RocketQA corpus; or id, url, title, text), queries.SPLIT.tsv (id, text) and
    qrels.SPLIT.tsv (TREC's four columns). Without other names dev is the small one where it is there."""

    def corpus(self) -> Path:
        if self.settings.corpus:
            return self.inside(self.settings.corpus, "data.corpus")
        return _needed(self.root, "collection.tsv", "MS MARCO has one; name another in data.corpus")

    def query_file(self, split: Split) -> Path | None:
        return self._file("queries", split)

    def qrels_file(self, split: Split) -> Path | None:
        return self._file("qrels", split)

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        width = 0
        for where, cells in read_tsv(self.corpus(), bad):
            width = width or len(cells)
            if len(cells) != width or width not in (2, 3, 4):
                expected = f"{width} cells as in the first line" if width in (2, 3, 4) else "id, text or id, title, text"
                bad.report(where, "broken row", f"{expected} expected between tabs, found {len(cells)}")
                continue
            title = clean_text(cells[-2], "title", where, bad) if width > 2 else ""
            text = clean_text(cells[-1], "text", where, bad)
            if text is not None and title is not None and _has_id(cells[0], where, bad):
                yield where, Passage(cells[0].strip(), text, title)

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        file = self.query_file(split)
        for where, cells in read_tsv(file, bad) if file else ():
            if len(cells) != 2:
                bad.report(where, "broken row", f"id and query expected between tabs, found {len(cells)} cells")
                continue
            text = clean_text(cells[1], "query", where, bad)
            if text is not None and _has_id(cells[0], where, bad):
                yield where, Query(cells[0].strip(), text)

    def _file(self, key: Literal["queries", "qrels"], split: Split) -> Path | None:
        value = getattr(self.settings, key)
        if isinstance(value, str):
            raise DataError(f'data.{key}: MS MARCO has a file for each split; write {key} = {{ train = "...", dev = "..." }}')
        if value is not None:
            return self.named(key, split)
        names = [f"{key}.dev.small.tsv", f"{key}.dev.tsv"] if split == "dev" else [f"{key}.{split}.tsv"]
        if split == "dev" and not (find_file(self.root, "queries.dev.small.tsv") and find_file(self.root, "qrels.dev.small.tsv")):
            names = names[1:]
        return next((file for name in names if (file := find_file(self.root, name)) is not None), None)


class TableLoader(FileLoader):
    """A corpus file with named fields (JSONL, CSV, TSV with a header, Parquet), query files, and judgements as qrels files or as a list of
    passage ids in each query's `positives`. Field names are found by themselves where they are usual ones (FIELD_NAMES)."""

    FIELDS = frozenset(FIELD_NAMES)

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        self._names: dict[Path, dict[str, str]] = {}

    def corpus(self) -> Path:
        if self.settings.corpus:
            return self.inside(self.settings.corpus, "data.corpus")
        if self.root.is_file():
            return self.root
        for stem in ("corpus", "passages", "collection", "documents"):
            for ending in {"jsonl": (".jsonl",), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}[self.settings.dataset]:
                found = find_file(self.root, stem + ending)
                if found is not None:
                    return found
        kind = self.settings.dataset
        raise DataError(f'data.corpus: no corpus file with a usual name in {self.root}; name yours, e.g. corpus = "articles.{kind}"')

    def query_file(self, split: Split) -> Path | None:
        if isinstance(self.settings.queries, str):
            # One file for all splits that have qrels; without qrels its inline positives are training data.
            if self.settings.qrels is not None or split == "train":
                return self.inside(self.settings.queries, "data.queries")
            return None
        return self.named("queries", split)

    def qrels_file(self, split: Split) -> Path | None:
        if isinstance(self.settings.qrels, str):
            return find_file(self.qrels_folder(self.settings.qrels), f"{split}.tsv")
        return self.named("qrels", split)

    def check(self) -> None:
        super().check()
        self.names(self.corpus(), "corpus")
        for split in self.read_splits:
            file = self.query_file(split)
            if file is not None:
                self.names(file, "queries")

    def names(self, file: Path, role: Literal["corpus", "queries"]) -> dict[str, str]:
        """Field names of a file: the recipe's, else usual ones that its first record has."""
        if file not in self._names:
            guessed = guess_fields(file, role, default=self.settings.dataset, given=self.settings.fields)
            main, key = ("text", "passage_id") if role == "corpus" else ("query", "query_id")
            have = _field_names(file, self.settings.dataset)
            if guessed is None:
                raise DataError(f'{file}: no field of a usual name for the {main}, it has {have}; name it: fields = {{ {main} = "..." }}')
            if guessed[key] == ROW_NUMBER and self.settings.fields.get(key) != ROW_NUMBER:
                raise DataError(
                    f'{file}: no field of a usual name for the id, it has {have}; name it: fields = {{ {key} = "..." }}, '
                    f'or number the rows: fields = {{ {key} = "{ROW_NUMBER}" }}'
                )
            self._names[file] = guessed
        return self._names[file]

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        file = self.corpus()
        names = self.names(file, "corpus")
        for number, (where, record) in enumerate(read_records(file, bad, default=self.settings.dataset)):
            passage = make_passage(_numbered(record, names["passage_id"], number), names, where, bad, self.metadata)
            if passage is not None:
                yield where, passage

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        for where, query, _ in self._query_records(split, bad):
            yield where, query

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
        if self.qrels_file(split) is not None:
            yield from super().qrels(split, bad)
            return
        # Bad queries are reported where the queries are read; here only what concerns the positives.
        for where, query, positives in self._query_records(split, BadRecords("skip")):
            for passage_id in _ids_of(positives, where, bad):
                yield where, Qrel(query.query_id, passage_id)

    def _query_records(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query, Any]]:
        file = self.query_file(split)
        if file is None:
            return
        names = self.names(file, "queries")
        for number, (where, record) in enumerate(read_records(file, bad, default=self.settings.dataset)):
            query = make_query(_numbered(record, names["query_id"], number), names, where, bad)
            if query is not None:
                yield where, query, record.get(names["positives"])


class TextLoader(FileLoader):
    """Passages from the paragraphs of .txt and .md files below a folder; there are no queries.

    Paragraphs (parted by blank lines) are joined up to `window_words` words (default 120, about the paper's 144 tokens); a longer
    paragraph is cut into windows that overlap by `overlap_words` (default 20). Title: the last Markdown heading, else the file's name.
    """

    OPTIONS = frozenset({"window_words", "overlap_words"})

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        self.window, self.overlap = (_whole(settings, key, default) for key, default in (("window_words", 120), ("overlap_words", 20)))
        if not 0 <= self.overlap < self.window:
            raise DataError(f"data.options: overlap_words {self.overlap} must be at least 0 and below window_words {self.window}")

    def check(self) -> None:
        if not self.sources():
            raise DataError(f"{self.root}: no .txt or .md file here; other forms of text have to be converted first")

    def sources(self) -> list[Path]:
        if self.root.is_file():
            return [self.root]
        return sorted(path for path in self.root.rglob("*") if path.suffix.lower() in (".txt", ".md") and path.is_file())

    def query_file(self, split: Split) -> Path | None:
        return None

    def qrels_file(self, split: Split) -> Path | None:
        return None

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        return iter(())

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        for path in self.sources():
            name = path.name if self.root.is_file() else path.relative_to(self.root).as_posix()
            for number, (line, title, words) in enumerate(self._windows(path, bad)):
                yield f"{path}:{line}", Passage(f"{name}#{number}", " ".join(words), title)

    def _windows(self, path: Path, bad: BadRecords) -> Iterator[tuple[int, str, list[str]]]:
        title, first_line = path.stem, 1
        waiting: list[str] = []
        for line, paragraph in _paragraphs(path, bad):
            heading = paragraph.lstrip("#").strip() if path.suffix.lower() == ".md" and paragraph.startswith("#") else ""
            words = paragraph.split()
            if waiting and (heading or len(waiting) + len(words) > self.window):
                yield first_line, title, waiting
                waiting = []
            if heading:
                title = heading
                continue
            first_line = first_line if waiting else line
            waiting += words
            while len(waiting) > self.window:
                yield line, title, waiting[: self.window]
                waiting = waiting[self.window - self.overlap :]
        if waiting:
            yield first_line, title, waiting

    def guess(self) -> tuple[int, dict[Split, int]]:
        # About six letters a word with its space.
        return max(1, sum(path.stat().st_size for path in self.sources()) // (6 * self.window)), {}


class PythonDocsLoader:
    """Documentation strings of Python and of installed packages; see `simlm.data.python_docs`."""

    OPTIONS = frozenset({"packages", "max_passages", "train_queries", "dev_queries", "test_queries", "min_body_words"})
    FIELDS: frozenset[str] = frozenset()
    # Shares of the queries where the recipe gives no numbers.
    SHARES: ClassVar[dict[Split, float]] = {"train": 0.70, "dev": 0.08, "test": 0.22}

    def __init__(self, settings: DataSettings, *, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.metadata = MetadataFields(settings.metadata_fields)
        packages = settings.options.get("packages", [])
        if not isinstance(packages, list) or not all(isinstance(name, str) for name in packages):
            raise DataError(f"data.options.packages: a list of package names was expected, found {packages!r}")
        self.packages: list[str] = packages
        self.min_body_words = _whole(settings, "min_body_words", python_docs.MIN_BODY_WORDS)
        self.max_passages = _whole(settings, "max_passages", 0)
        self.wanted: dict[Split, int | None] = {
            split: _whole(settings, f"{split}_queries", 0) if f"{split}_queries" in settings.options else None for split in SPLITS
        }
        self._collection: python_docs.Collection | None = None
        self._kept: list[int] = []
        self._split: dict[Split, list[int]] = {}

    def check(self) -> None:
        python_docs.installed(self.packages)

    def sources(self) -> list[Path]:
        return []

    def versions(self) -> dict[str, str]:
        return python_docs.versions(self.packages)

    def splits(self) -> list[Split]:
        return [split for split in SPLITS if self.wanted[split] != 0]

    def guess(self) -> tuple[int, dict[Split, int]]:
        # As many as were found with the packages that come with this program; reading them would take half a minute.
        passages = self.max_passages or 15_000
        default = {split: round(share * 0.85 * passages) for split, share in self.SHARES.items()}
        return passages, {split: default[split] if (wanted := self.wanted[split]) is None else wanted for split in self.splits()}

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        collection = self._read()
        for position in self._kept:
            found = collection.passages[position]
            where = f"documentation of {found.name}"
            metadata = self.metadata.read({"metadata": {"package": found.package, "kind": found.kind}}, where, bad)
            yield where, Passage(found.name, found.body, found.name, metadata or {})

    def queries(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Query]]:
        collection = self._read()
        for position in self._split.get(split, []):
            found = collection.passages[position]
            yield f"documentation of {found.name}", Query(f"summary:{found.name}", found.summary)

    def qrels(self, split: Split, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
        collection = self._read()
        for position in self._split.get(split, []):
            name = collection.passages[position].name
            yield f"documentation of {name}", Qrel(f"summary:{name}", name)

    def facts(self) -> dict[str, Any]:
        collection = self._read()
        kept: dict[str, int] = {}
        for position in self._kept:
            package = collection.passages[position].package
            kept[package] = kept.get(package, 0) + 1
        return {"passages_per_package": kept, "docstrings_left_out": collection.dropped, "versions": self.versions()}

    def _read(self) -> python_docs.Collection:
        if self._collection is None:
            self._collection = collection = python_docs.collect(self.packages, min_body_words=self.min_body_words)
            if not collection.passages:
                raise DataError(
                    f"data.options.packages: no usable documentation in {self.packages or 'the installed packages'}; name others"
                )
            names = [passage.name for passage in collection.passages]
            shuffled = sorted(range(len(names)), key=lambda position: _draw(names[position], self.seed))
            kept = set(shuffled[: self.max_passages] if self.max_passages else shuffled)
            self._kept = [position for position in range(len(names)) if position in kept]
            usable = set(collection.queries) & kept
            queries = [position for position in shuffled if position in usable]
            start = 0
            for split, count in self._shares(len(queries)).items():
                # In the order of the corpus, so that neighbouring rows are not ordered by a random draw.
                self._split[split] = sorted(queries[start : start + count])
                start += count
        return self._collection

    def _shares(self, available: int) -> dict[Split, int]:
        """Queries of each split, test first: the numbers asked for; where that is more than there are, all shrink in proportion."""
        asked = {}
        for split, share in self.SHARES.items():
            wanted = self.wanted[split]
            asked[split] = float(available * share if wanted is None else wanted)
        total = sum(asked.values())
        scale = min(1.0, available / total) if total else 0.0
        return {split: int(asked[split] * scale) for split in ("test", "dev", "train")}


# --- finding and counting files


def find_file(folder: Path, name: str) -> Path | None:
    """`folder/name`, also with .gz or .zst; None if it is not there."""
    return next((folder / f"{name}{ending}" for ending in COMPRESSIONS if (folder / f"{name}{ending}").is_file()), None)


def _needed(folder: Path, name: str, advice: str) -> Path:
    found = find_file(folder, name)
    if found is None:
        raise DataError(f"{folder}: no {name} (nor {name}.gz, {name}.zst) here; {advice}")
    return found


def _count_records(path: Path) -> int:
    if format_of(path) == "parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    lines = count_lines(path)
    return max(lines - 1, 0) if format_of(path) == "csv" or (format_of(path) == "tsv" and path.stem != "collection") else lines


def guess_fields(
    path: Path, role: Literal["corpus", "queries"], *, default: str = "jsonl", given: dict[str, str] | None = None
) -> dict[str, str] | None:
    """Field names of a corpus or query file, by its first record; None if nothing in it looks like the text.

    given: names that the recipe sets; they are taken as they are. ROW_NUMBER stands for an id that the file does not have.
    """
    have = _field_names(path, default)
    roles = ("passage_id", "title", "text") if role == "corpus" else ("query_id", "query", "answers", "positives")
    names = {}
    for wanted in roles:
        found = next((name for name in FIELD_NAMES[wanted] if name in have), None)
        names[wanted] = (given or {}).get(wanted) or found or (ROW_NUMBER if wanted.endswith("_id") else wanted)
    main = names["text" if role == "corpus" else "query"]
    return names if main in have else None


def existing_fields(path: Path, names: dict[str, str]) -> dict[str, str]:
    """Those of `names` that a recipe has to say: fields that the file's first record has, and numbered rows."""
    have = _field_names(path, format_of(path) or "jsonl")
    return {key: name for key, name in names.items() if name in have or name == ROW_NUMBER}


def _field_names(path: Path, default: str) -> list[str]:
    # A first record that is broken is reported when the file is read as a whole.
    for _, record in read_records(path, BadRecords("skip"), default=default):
        return [str(name) for name in record]
    return []


# --- records


def make_passage(record: dict[str, Any], names: dict[str, str], where: str, bad: BadRecords, metadata: MetadataFields) -> Passage | None:
    """A passage from a record whose fields are called `names`; None if it was bad and reported."""
    passage_id = id_field(record, names["passage_id"], where, bad)
    if passage_id is None:
        return None
    title = text_field(record, names["title"], where, bad, optional=True)
    text = text_field(record, names["text"], where, bad)
    known = metadata.read(record, where, bad)
    return None if title is None or text is None or known is None else Passage(passage_id, text, title, known)


def make_query(record: dict[str, Any], names: dict[str, str], where: str, bad: BadRecords) -> Query | None:
    """A query from a record whose fields are called `names`; None if it was bad and reported."""
    query_id = id_field(record, names["query_id"], where, bad)
    text = text_field(record, names["query"], where, bad) if query_id is not None else None
    if query_id is None or text is None:
        return None
    answers = record.get(names["answers"])
    values = [answers] if isinstance(answers, str) else answers or []
    if not isinstance(values, list) or not all(isinstance(answer, str) for answer in values):
        bad.report(where, "wrong type", f"field {names['answers']!r}: a text or a list of texts was expected")
        return None
    cleaned = [clean_text(answer, names["answers"], where, bad) for answer in values]
    return Query(query_id, text, tuple(answer for answer in cleaned if answer))


def _numbered(record: dict[str, Any], id_name: str, number: int) -> dict[str, Any]:
    return record | {ROW_NUMBER: number} if id_name == ROW_NUMBER else record


def _ids_of(value: Any, where: str, bad: BadRecords) -> Iterator[str]:
    """Passage ids of a query's `positives`: one id, a list of ids, or ids with spaces between them in a CSV cell."""
    values = value.split() if isinstance(value, str) else [value] if isinstance(value, int) else value or []
    if not isinstance(values, list):
        bad.report(where, "wrong type", f"positives: a passage id or a list of them was expected, found {value!r}")
        return
    for item in values:
        if isinstance(item, str | int) and not isinstance(item, bool) and str(item):
            yield str(item)
        else:
            bad.report(where, "wrong type", f"positives: a passage id was expected, found {item!r}")


def _has_id(cell: str, where: str, bad: BadRecords) -> bool:
    if not cell.strip():
        bad.report(where, "missing field", "the id is empty")
    return bool(cell.strip())


def _paragraphs(path: Path, bad: BadRecords) -> Iterator[tuple[int, str]]:
    """(line of its beginning, text) of what blank lines part; Markdown headings stand alone."""
    start, lines = 1, list[str]()
    with open_binary(path) as file:
        for number, raw in enumerate(file, start=1):
            text = _line_of_text(path, number, raw, bad)
            if text.startswith("#") or not text:
                if lines:
                    yield start, " ".join(lines)
                lines = []
                if text:
                    yield number, text
                continue
            start = start if lines else number
            lines.append(text)
    if lines:
        yield start, " ".join(lines)


def _line_of_text(path: Path, number: int, raw: bytes, bad: BadRecords) -> str:
    where = f"{path}:{number}"
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad.report(
            where, "invalid UTF-8", f"not valid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}; save the file as UTF-8"
        )
        return ""
    return clean_text(text, "line", where, bad) or ""


def _whole(settings: DataSettings, key: str, default: int) -> int:
    value = settings.options.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"data.options.{key}: a whole number of at least 0 was expected, found {value!r}")
    return value


def _draw(name: str, seed: int) -> bytes:
    """A pseudo-random key that depends on seed and name alone: another package more or less leaves the order of the rest."""
    return hashlib.blake2b(name.encode(), digest_size=8, salt=(seed % (1 << 64)).to_bytes(8, "little")).digest()
