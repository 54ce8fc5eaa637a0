"""Readers and writers of the files that retrieval data comes in: JSONL, TSV, CSV, Parquet, TREC runs and qrels.

All readers stream, take plain, gzip or zstd files (told by their first bytes, not their name), drop a byte-order mark, take LF and CRLF
line ends and leave blank lines out. Every record comes with its place, "path:line" (Parquet: "path:row N"). A record that cannot
be used goes to `BadRecords`, which stops or counts, as the user chose. A NUL makes a record bad: it is the sign of a binary or UTF-16 file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TextIO, cast
from urllib.parse import quote

from simlm.errors import DataError
from simlm.types import Qrel, Scalar

Record = tuple[str, dict[str, Any]]
BOM = b"\xef\xbb\xbf"
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
"""Ending -> format; a further .gz or .zst does not matter."""
# Wide enough for any passage; the library's own limit of 131,072 characters a field is not.
CSV_FIELD_CHARACTERS = 1 << 30
_SHOWN = 60


class BadRecords:
    """What to do with a record that cannot be used: `on_bad` "error" stops with its place, "skip" counts it by reason.

    A place counts once for a reason, however often the file is read.
    """

    def __init__(self, on_bad: Literal["error", "skip"] = "error", *, keep: int = 10) -> None:
        self.on_bad = on_bad
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self._keep = keep
        self._seen: set[tuple[str, str]] = set()

    def report(self, where: str, reason: str, message: str) -> None:
        """Note a bad record. Raises DataError unless bad records are skipped."""
        if self.on_bad == "error":
            raise DataError(f'{where}: {message} (data.on_bad_record = "skip" leaves such records out and counts them)')
        if (where, reason) in self._seen:
            return
        self._seen.add((where, reason))
        self.counts[reason] += 1
        if len(self.examples) < self._keep:
            self.examples.append(f"{where}: {message}")


# --- reading


def format_of(path: Path) -> str | None:
    """ "jsonl", "csv", "tsv" or "parquet" by the file's ending, None if it is another."""
    name = path.name.lower()
    for compression in (".gz", ".zst"):
        name = name.removesuffix(compression)
    return SUFFIXES.get(Path(name).suffix)


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed if it begins as gzip or zstd does. DataError if there is no such file."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path in [data]") from None
    with raw, unpack(raw, path) as file:
        yield file


@contextmanager
def unpack(raw: io.BufferedReader, path: Path) -> Iterator[BinaryIO]:
    """The same bytes decompressed; `raw.tell()` says how much of the packed file has been read."""
    start = raw.peek(4)[:4]
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(raw) as unpacked:
            yield cast("BinaryIO", unpacked)
    elif start == b"\x28\xb5\x2f\xfd":
        with io.BufferedReader(_ZstdFile(raw, path), 1 << 20) as zstd:
            yield cast("BinaryIO", zstd)
    else:
        yield raw


def read_lines(path: Path, bad: BadRecords) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without line end) of every line that is not blank and is UTF-8 without NUL."""
    number = 0
    with open_binary(path) as file:
        lines = iter(file)
        while True:
            try:
                line = next(lines, None)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut short ({error}); get it again") from None
            if line is None:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            text = _decoded(path, number, line, bad)
            if text is not None and text.strip():
                yield number, text


def _decoded(path: Path, number: int, line: bytes, bad: BadRecords) -> str | None:
    if b"\0" in line:
        hint = "; the file looks like UTF-16, save it as UTF-8" if line.count(b"\0") * 3 > len(line) else ""
        bad.report(f"{path}:{number}", "NUL byte", f"a NUL byte in the line{hint}")
        return None
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        message = f"not valid UTF-8: byte 0x{line[error.start]:02x} at position {error.start}; save the file as UTF-8"
        bad.report(f"{path}:{number}", "invalid UTF-8", message)
        return None


def read_jsonl(path: Path, bad: BadRecords) -> Iterator[Record]:
    """One JSON object a line."""
    for number, line in read_lines(path, bad):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            hint = "; one object a line is expected, not one list for all" if number == 1 and line.lstrip().startswith("[") else ""
            bad.report(where, "broken JSON", f"not valid JSON ({error}): {_shorten(line)}{hint}")
            continue
        if not isinstance(value, dict):
            bad.report(where, "wrong type", f"a JSON object was expected, found {_type(value)}: {_shorten(line)}")
            continue
        yield where, value


def read_tsv(path: Path, bad: BadRecords) -> Iterator[tuple[str, list[str]]]:
    """Cells of each line, split at tabs; quotes mean nothing (as in MS MARCO's and BEIR's files)."""
    for number, line in read_lines(path, bad):
        yield f"{path}:{number}", line.split("\t")


def read_csv(path: Path, bad: BadRecords, *, delimiter: str = ",") -> Iterator[Record]:
    """Rows of a CSV file with a header; quoted cells may hold line ends. A row with more or fewer cells than the header is bad."""
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    place = _Place()
    reader = csv.reader(_raw_lines(path, bad, place), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = place.number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{first}: not valid CSV ({error}); a quote is probably not closed") from None
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}:{first}"
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) != len(header):
                raise DataError(f"{where}: the header names a column twice: {header}")
            continue
        if len(row) != len(header):
            bad.report(where, "broken row", f"{len(row)} cells, the header has {len(header)}: {_shorten(str(row))}")
            continue
        yield where, dict(zip(header, row, strict=True))


def read_parquet(path: Path, bad: BadRecords, *, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Rows of a Parquet file, a few thousand in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=2048, columns=list(columns) if columns else None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except FileNotFoundError:
        raise DataError(f"{path}: cannot be read (No such file or directory); check the path in [data]") from None
    except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def read_records(path: Path, bad: BadRecords, *, default: str = "jsonl") -> Iterator[Record]:
    """Records of a JSONL, CSV, TSV (with a header) or Parquet file, by its ending; `default` where the ending is another."""
    kind = format_of(path) or default
    if kind == "jsonl":
        return read_jsonl(path, bad)
    if kind == "parquet":
        return read_parquet(path, bad)
    return read_csv(path, bad, delimiter="\t" if kind == "tsv" else ",")


def read_qrels(path: Path, bad: BadRecords) -> Iterator[tuple[str, Qrel]]:
    """Judgements from tab- or space-separated lines.

    Forms: BEIR's query, passage, grade with a header; the same without one; TREC's and MS MARCO's query, 0, passage, grade;
    query and passage alone (grade 1).
    """
    for number, line in read_lines(path, bad):
        where = f"{path}:{number}"
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]
        if len(cells) not in (2, 3, 4) or not all(cells):
            bad.report(where, "broken row", f"query, passage and grade were expected (or query, 0, passage, grade), found {_shorten(line)}")
            continue
        if len(cells) == 2:
            if number == 1 and cells[0].lower() in _HEADER_WORDS:
                continue
            yield where, Qrel(cells[0], cells[1])
            continue
        grade = _grade(cells[-1])
        if grade is None:
            if number == 1:
                continue
            bad.report(where, "wrong type", f"a whole number was expected as grade, found {cells[-1]!r}")
            continue
        yield where, Qrel(cells[0], cells[-2], grade)


_HEADER_WORDS = {"query-id", "query_id", "qid", "query", "queryid", "topic"}


def _grade(text: str) -> int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def read_trec_run(path: Path) -> dict[str, dict[str, float]]:
    """Query id -> {passage id: score} of a TREC run file: query, Q0, passage, rank, score, tag. DataError names the line."""
    run: dict[str, dict[str, float]] = {}
    bad = BadRecords("error")
    for number, line in read_lines(path, bad):
        cells = line.split()
        try:
            query, _, passage, _, score, _ = cells
            value = float(score)
        except ValueError:
            raise DataError(f"{path}:{number}: query, Q0, passage, rank, score, tag were expected, found {_shorten(line)}") from None
        if passage in run.setdefault(query, {}):
            raise DataError(f"{path}:{number}: passage {passage!r} is listed twice for query {query!r}")
        run[query][passage] = value
    return run


# --- fields of a record


def text_field(record: dict[str, Any], name: str, where: str, bad: BadRecords, *, optional: bool = False) -> str | None:
    """Text of a field without the space around it; None if it was bad and reported. optional: absent or null gives "".

    The text itself is left as it is (case, inner spaces, Unicode form): the tokenizer decides about those.
    """
    value = record.get(name)
    if value is None:
        if optional:
            return ""
        bad.report(where, "missing field", f"no field {name!r}; the record has {sorted(map(str, record))}")
        return None
    if not isinstance(value, str):
        bad.report(where, "wrong type", f"field {name!r}: text was expected, found {_type(value)}: {_shorten(str(value))}")
        return None
    return clean_text(value, name, where, bad)


def id_field(record: dict[str, Any], name: str, where: str, bad: BadRecords) -> str | None:
    """An id: text, or a whole number as its digits. None if it was bad and reported."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = text_field(record, name, where, bad)
    if text == "":
        bad.report(where, "missing field", f"field {name!r} is empty")
        return None
    return text


class MetadataFields:
    """Takes the metadata of passages out of records.

    wanted: fields to take, from the record or from its object "metadata". None = all of that object; what is not one value there is left
    out, since corpora made for other uses have lists in it (BEIR's SciDocs: authors, cited_by).
    """

    def __init__(self, wanted: Sequence[str] | None) -> None:
        self.wanted = wanted
        self._left_out: set[str] = set()

    def read(self, record: dict[str, Any], where: str, bad: BadRecords) -> dict[str, Scalar] | None:
        """Text, numbers and true or false by field name; None if a wanted field was bad and reported. Null and "" count as absent."""
        metadata: dict[str, Scalar] = {}
        for name, value in self._values(record).items():
            if value is None:
                continue
            if not _is_scalar(value):
                if self.wanted is None:
                    self._leave_out(name)
                    continue
                message = f"field {name!r} of data.metadata_fields: text, a finite number or true or false was expected"
                bad.report(where, "wrong type", f"{message}, found {_type(value)}: {_shorten(str(value))}")
                return None
            kept = clean_text(value, name, where, bad) if isinstance(value, str) else value
            if kept is None:
                return None
            if kept != "":
                metadata[name] = kept
        return metadata

    def facts(self) -> dict[str, Any]:
        """Fields that were left out, if there are any."""
        return {"metadata_left_out": sorted(self._left_out)} if self._left_out else {}

    def _values(self, record: dict[str, Any]) -> dict[str, Any]:
        nested = record.get("metadata")
        nested = nested if isinstance(nested, dict) else {}
        if self.wanted is None:
            return nested
        return {name: record[name] if name in record else nested[name] for name in self.wanted if name in record or name in nested}

    def _leave_out(self, name: str) -> None:
        # Keys that are data, not names (ids of other records), would otherwise fill memory.
        if len(self._left_out) < _NAMED_FIELDS:
            self._left_out.add(name)


_NAMED_FIELDS = 20


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def clean_text(value: str, name: str, where: str, bad: BadRecords) -> str | None:
    """The text without space around it; None (reported) if it holds NUL or a half surrogate pair, which no file can store."""
    if "\0" in value:
        bad.report(where, "NUL byte", f"field {name!r} holds a NUL character: {_shorten(value)}")
        return None
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad.report(where, "invalid UTF-8", f"field {name!r} holds half of a surrogate pair at position {error.start}")
            return None
    return value.strip()


# --- writing


@contextmanager
def open_writer(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file to write, compressed if its name ends in .gz or .zst; equal input gives equal bytes."""
    with open(path, "wb") as raw:
        packed: IO[bytes] = raw
        if path.suffix == ".gz":
            packed = cast("IO[bytes]", gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
        elif path.suffix == ".zst":
            import zstandard

            packed = cast("IO[bytes]", zstandard.ZstdCompressor().stream_writer(raw, closefd=False))
        with io.TextIOWrapper(cast("BinaryIO", packed), encoding="utf-8", newline="") as text:
            yield text


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with open_writer(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_csv(path: Path, records: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """A CSV file with a header; columns that a record lacks stay empty."""
    with open_writer(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def write_tsv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Cells separated by tabs. DataError if a cell holds a tab or a line end, which this format cannot express."""
    with open_writer(path) as file:
        for number, row in enumerate(rows, start=1):
            if any(character in cell for cell in row for character in "\t\r\n"):
                raise DataError(f"{path}:{number}: a cell holds a tab or a line end, which TSV cannot express; write JSONL instead")
            file.write("\t".join(row) + "\n")


def write_parquet(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """A Parquet file of records with the same fields."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)


def write_qrels(path: Path, qrels: Iterable[Qrel]) -> None:
    """TREC qrels: query, 0, passage, grade. White space in an id is percent-encoded, since it separates the columns."""
    with open_writer(path) as file:
        for qrel in qrels:
            file.write(f"{trec_id(qrel.query_id)} 0 {trec_id(qrel.passage_id)} {qrel.grade}\n")


def write_trec_run(path: Path, run: Iterable[tuple[str, str, int, float]], *, tag: str) -> None:
    """A TREC run from (query id, passage id, rank from 1, score). White space in an id is percent-encoded."""
    with open_writer(path) as file:
        for query, passage, rank, score in run:
            # Nine digits tell any two float32 apart.
            file.write(f"{trec_id(query)} Q0 {trec_id(passage)} {rank} {score:.9g} {tag}\n")


def trec_id(name: str) -> str:
    """The id as one word: white space, and the percent sign before it, in percent-encoding."""
    if not any(character.isspace() for character in name):
        return name
    return "".join(quote(character) if character.isspace() or character == "%" else character for character in name)


# --- details


class _ZstdFile(io.RawIOBase):
    """Decompresses one or more zstd frames; DataError if the last one is not whole (the library's own reader would just end)."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        import zstandard

        self._raw, self._path = raw, path
        self._library = zstandard
        self._frame: Any = None
        self._ready = b""
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._pending or self._raw.read(1 << 17)
            self._pending = b""
            if not data:
                if self._frame is not None:
                    raise DataError(f"{self._path}: the zstd file is cut short; get it again")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise DataError(f"{self._path}: the zstd file is damaged ({error}); get it again") from None
            if self._frame.eof:
                self._pending = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Place:
    """Number of the last physical line that was handed to the CSV reader."""

    number = 0


def _raw_lines(path: Path, bad: BadRecords, place: _Place) -> Iterator[str]:
    """Lines with their line ends, for the CSV reader; a bad line is left out (and with it its row)."""
    with open_binary(path) as file:
        lines = iter(file)
        while True:
            try:
                line = next(lines, None)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}:{place.number + 1}: the compressed file is damaged or cut short ({error}); get it again") from None
            if line is None:
                return
            place.number += 1
            if place.number == 1:
                line = line.removeprefix(BOM)
            text = _decoded(path, place.number, line, bad)
            if text is not None:
                yield text + "\n"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
