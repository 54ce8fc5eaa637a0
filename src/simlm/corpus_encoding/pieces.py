"""A corpus cut into pieces that are read on their own: rows of a Parquet file, or a range of bytes of a JSONL file.

A line belongs to the piece that its first byte is in. A packed file (.gz, .zst) cannot be entered in the middle, so it is one piece.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from simlm.corpus_encoding.files import file_system
from simlm.data.formats import BOM, BadRecords, MetadataFields
from simlm.data.loaders import FIELD_NAMES, make_passage
from simlm.errors import DataError
from simlm.types import Passage

PARQUET, LINES = (".parquet",), (".jsonl", ".ndjson")
PACKED = {".gz": "gzip", ".zst": "zstd"}
PEEKED_BYTES = 1 << 18
"""Of a JSONL file, from which the length of a line is told."""
READ_ROWS, READ_BYTES = 4096, 1 << 20
COLUMNS = ("passage_id", "title", "text")

Kind = Literal["parquet", "lines", "packed"]


@dataclass(frozen=True)
class Piece:
    """Part of one file: rows `start` to `stop` of Parquet, bytes of lines; all of a packed file. number: its place among all pieces."""

    number: int
    path: str
    kind: Kind
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """Files of passages at an address. names: what the fields passage_id, title and text are called. num_passages: None = not known."""

    address: str
    files: tuple[tuple[str, int, Kind], ...]
    names: dict[str, str]
    num_passages: int | None

    @classmethod
    def find(cls, address: str) -> Corpus:
        """Look at what is there; DataError if it is nothing, or nothing that holds passages."""
        system, path = file_system(address)
        files = tuple(_files(system, path, address))
        names = _field_names(system, files[0], address)
        parquet = [_rows(system, file) for file, _, kind in files if kind == "parquet"]
        return cls(address, files, names, sum(parquet) if len(parquet) == len(files) else None)

    def describe(self) -> dict[str, Any]:
        """What tells this corpus from another: the files' names and sizes."""
        _, root = file_system(self.address)
        return {"files": [[path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1], size] for path, size, _ in self.files]}

    def pieces(self, shard_passages: int) -> list[Piece]:
        """The pieces, of about `shard_passages` passages each."""
        system, _ = file_system(self.address)
        found: list[Piece] = []
        for path, size, kind in self.files:
            if kind == "packed":
                ranges = [(0, size)]
            else:
                length = _rows(system, path) if kind == "parquet" else size
                step = shard_passages if kind == "parquet" else max(int(_line_bytes(system, path) * shard_passages), 1)
                ranges = [(start, min(start + step, length)) for start in range(0, length, step)]
            found += [Piece(len(found) + place, path, kind, start, stop) for place, (start, stop) in enumerate(ranges)]
        return found

    def passages(self, piece: Piece, bad: BadRecords) -> Iterator[Passage]:
        """The passages of a piece, in their order. DataError names the place of what cannot be used."""
        system, _ = file_system(self.address)
        records = {"parquet": _parquet_records, "lines": _line_records, "packed": _packed_records}[piece.kind]
        nothing = MetadataFields([])
        for where, record in records(system, piece, self.names, bad):
            passage = make_passage(record, self.names, where, bad, nothing)
            if passage is None:
                continue
            if not passage.title and not passage.text:
                bad.report(where, "empty passage", f"passage {passage.passage_id!r} has neither title nor text")
                continue
            yield passage


def _files(system: Any, path: str, address: str) -> Iterator[tuple[str, int, Kind]]:
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise DataError(f"{address}: nothing is there; give a file or folder of Parquet or JSONL")
    inside = system.get_file_info(fs.FileSelector(path, recursive=True)) if info.type == fs.FileType.Directory else [info]
    found = []
    for file in sorted(inside, key=lambda file: file.path):
        kind = _kind(file.base_name)
        hidden = any(part.startswith((".", "_")) for part in file.path.removeprefix(path).split("/"))
        if file.type == fs.FileType.File and kind is not None and not hidden and file.size:
            found.append((file.path, int(file.size), kind))
    if not found:
        raise DataError(f"{address}: no passages here; files that end in .parquet, .jsonl or .jsonl.gz were expected")
    yield from found


def _kind(name: str) -> Kind | None:
    name = name.lower()
    if name.endswith(PARQUET):
        return "parquet"
    if name.endswith(LINES):
        return "lines"
    return "packed" if name.endswith(tuple(line + packing for line in LINES for packing in PACKED)) else None


def _field_names(system: Any, file: tuple[str, int, Kind], address: str) -> dict[str, str]:
    path, size, kind = file
    if kind == "parquet":
        have = set(_parquet(system, path).schema_arrow.names)
    else:
        records = _packed_records if kind == "packed" else _line_records
        first = next(records(system, Piece(0, path, kind, 0, size), {}, BadRecords("error")), None)
        have = set(first[1]) if first else set()
    names = {wanted: next((name for name in FIELD_NAMES[wanted] if name in have), wanted) for wanted in COLUMNS}
    for wanted in ("passage_id", "text"):
        if names[wanted] not in have:
            raise DataError(
                f"{path}: no field for the {wanted.replace('_', ' ')} of a passage; found {', '.join(sorted(have)) or 'nothing'}, "
                f"one of {', '.join(FIELD_NAMES[wanted])} was expected"
            )
    return names


def _parquet(system: Any, path: str) -> Any:
    try:
        return pq.ParquetFile(system.open_input_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]}); get it again") from None


def _rows(system: Any, path: str) -> int:
    return int(_parquet(system, path).metadata.num_rows)


def _line_bytes(system: Any, path: str) -> float:
    """Mean length of a line at the beginning of a file."""
    with system.open_input_file(path) as file:
        begin = file.read(PEEKED_BYTES)
    return float(len(begin) / max(begin.count(b"\n"), 1))


def _parquet_records(system: Any, piece: Piece, names: dict[str, str], bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    file = _parquet(system, piece.path)
    columns = [name for name in names.values() if name in file.schema_arrow.names]
    first = 0
    for group in range(file.metadata.num_row_groups):
        last = first + file.metadata.row_group(group).num_rows
        if last > piece.start and first < piece.stop:
            row = first
            for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=[group], columns=columns):
                for place, record in enumerate(batch.to_pylist()):
                    if piece.start <= row + place < piece.stop:
                        yield f"{piece.path}:row {row + place + 1}", record
                row += len(batch)
        first = last


def _line_records(system: Any, piece: Piece, names: dict[str, str], bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    with io.BufferedReader(system.open_input_file(piece.path), READ_BYTES) as file:
        # From one byte before: if that ends a line, the first line is ours, else it began in the piece before.
        place = max(piece.start - 1, 0)
        file.seek(place)
        if piece.start:
            place += len(file.readline())
        while place < piece.stop:
            line = file.readline()
            if not line:
                return
            yield from _record(line.removeprefix(BOM) if place == 0 else line, f"{piece.path}:byte {place}", bad)
            place += len(line)


def _packed_records(system: Any, piece: Piece, names: dict[str, str], bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    packing = next(name for ending, name in PACKED.items() if piece.path.lower().endswith(ending))
    with system.open_input_stream(piece.path, compression=packing) as stream:
        number, rest = 0, b""
        while True:
            try:
                block = stream.read(READ_BYTES)
            except OSError as error:
                raise DataError(f"{piece.path}:{number + 1}: the compressed file is damaged or cut short ({error}); get it again") from None
            lines = (rest + block).split(b"\n")
            rest = lines.pop() if block else b""
            for line in lines:
                number += 1
                yield from _record(line.removeprefix(BOM) if number == 1 else line, f"{piece.path}:{number}", bad)
            if not block:
                return


def _record(line: bytes, where: str, bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record of a line; none for a blank line, or a bad one that was reported."""
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except ValueError as error:
        bad.report(where, "not JSON", f"not readable as JSON ({error})")
        return
    if not isinstance(record, dict):
        bad.report(where, "not an object", "a JSON object was expected")
        return
    yield where, cast("dict[str, Any]", record)
