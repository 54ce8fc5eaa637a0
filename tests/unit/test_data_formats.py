"""Readers take what people have, and say where and why when they cannot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from simlm.data.formats import (
    BadRecords,
    clean_text,
    format_of,
    id_field,
    read_csv,
    read_jsonl,
    read_parquet,
    read_qrels,
    read_records,
    read_trec_run,
    read_tsv,
    text_field,
    trec_id,
    write_csv,
    write_jsonl,
    write_parquet,
    write_qrels,
    write_trec_run,
    write_tsv,
)
from simlm.errors import DataError
from simlm.types import Qrel

RECORDS: list[dict[str, Any]] = [{"id": "a", "text": "first, with comma"}, {"id": "b", "text": 'say "hé"\n数学'}]


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def jsonl(path: Path, bad: BadRecords | None = None) -> list[tuple[str, dict[str, Any]]]:
    return list(read_jsonl(path, bad or BadRecords()))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus.jsonl{ending}"
    write_jsonl(path, RECORDS)
    assert jsonl(path) == [(f"{path}:1", RECORDS[0]), (f"{path}:2", RECORDS[1])]
    first = path.read_bytes()
    write_jsonl(path, RECORDS)
    assert path.read_bytes() == first
    table = tmp_path / f"corpus.csv{ending}"
    write_csv(table, RECORDS, ["id", "text"])
    # The second row begins at line 3 and goes over two lines.
    assert list(read_csv(table, BadRecords())) == [(f"{table}:2", RECORDS[0]), (f"{table}:3", RECORDS[1])]
    write_tsv(tmp_path / f"rows.tsv{ending}", [["1", "x y"], ["2", '"']])
    assert [cells for _, cells in read_tsv(tmp_path / f"rows.tsv{ending}", BadRecords())] == [["1", "x y"], ["2", '"']]
    # The name does not matter: the first bytes say how a file is packed.
    assert len(jsonl(put(tmp_path / "plain.jsonl", path.read_bytes()))) == 2


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    write_parquet(path, RECORDS)
    assert list(read_parquet(path, BadRecords())) == [(f"{path}:row 1", RECORDS[0]), (f"{path}:row 2", RECORDS[1])]
    with pytest.raises(DataError, match="not a readable Parquet"):
        list(read_parquet(put(tmp_path / "no.parquet", b"PAR1 not really"), BadRecords()))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_parquet(tmp_path / "none.parquet", BadRecords()))


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = put(tmp_path / "c.jsonl", b'\xef\xbb\xbf{"id": "a"}\r\n\r\n  \n{"id": "b"}')
    assert jsonl(path) == [(f"{path}:1", {"id": "a"}), (f"{path}:4", {"id": "b"})]
    table = put(tmp_path / "c.csv", b'\xef\xbb\xbfid,text\r\n1,"two\r\nlines"\r\n\r\n2,x\r\n')
    assert [record for _, record in read_csv(table, BadRecords())] == [{"id": "1", "text": "two\nlines"}, {"id": "2", "text": "x"}]
    qrels = put(tmp_path / "q.tsv", b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\r\nq1\tp1\t1\r\n")
    assert [qrel for _, qrel in read_qrels(qrels, BadRecords())] == [Qrel("q1", "p1", 1)]


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b'{"id": "a"', "not valid JSON", "broken JSON"),
        (b'["a", "b"]', "a JSON object was expected, found a list", "wrong type"),
        (b'{"id": "\xff"}', "not valid UTF-8: byte 0xff at position 8", "invalid UTF-8"),
        (b'{"id": "a\x00b"}', "a NUL byte", "NUL byte"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path: Path, line: bytes, message: str, reason: str) -> None:
    path = put(tmp_path / "c.jsonl", b'{"id": "ok"}\n' + line + b'\n{"id": "last"}\n')
    with pytest.raises(DataError, match=message) as caught:
        jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    bad = BadRecords("skip")
    assert [record["id"] for _, record in jsonl(path, bad)] == ["ok", "last"]
    jsonl(path, bad)
    assert dict(bad.counts) == {reason: 1}
    assert bad.examples[0].startswith(f"{path}:2: ")


def test_a_list_instead_of_lines_and_utf16_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one object a line is expected"):
        jsonl(put(tmp_path / "c.json", b'[\n{"id": 1}\n]'))
    with pytest.raises(DataError, match="UTF-16"):
        jsonl(put(tmp_path / "c.jsonl", '{"id": "a"}\n'.encode("utf-16-le")))


def test_packed_files_that_are_cut_short(tmp_path: Path) -> None:
    text = "".join(json.dumps({"id": number, "text": str(number) * 50}) + "\n" for number in range(3000)).encode()
    for name, packed in (("c.jsonl.gz", gzip.compress(text)), ("c.jsonl.zst", zstandard.compress(text))):
        with pytest.raises(DataError, match="cut short"):
            jsonl(put(tmp_path / name, packed[: len(packed) // 2]))
    damaged = bytearray(gzip.compress(text))
    damaged[-6] ^= 255
    with pytest.raises(DataError, match="damaged"):
        jsonl(put(tmp_path / "d.jsonl.gz", bytes(damaged)))
    two_frames = zstandard.compress(b'{"id": 1}\n') + zstandard.compress(b'{"id": 2}\n')
    assert len(jsonl(put(tmp_path / "two.jsonl.zst", two_frames))) == 2


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", b"id,text\n1,a,b\n2,x\n")
    with pytest.raises(DataError, match=r"c\.csv:2: 3 cells, the header has 2"):
        list(read_csv(path, BadRecords()))
    assert len(list(read_csv(path, BadRecords("skip")))) == 1
    with pytest.raises(DataError, match="a quote is probably not closed"):
        list(read_csv(put(tmp_path / "q.csv", b'id,text\n1,"open\n'), BadRecords()))
    with pytest.raises(DataError, match="names a column twice"):
        list(read_csv(put(tmp_path / "t.csv", b"id,id\n1,2\n"), BadRecords()))
    wide = put(tmp_path / "w.csv", b"id,text\n1," + b"x" * 1_000_000 + b"\n")
    assert len(next(read_csv(wide, BadRecords()))[1]["text"]) == 1_000_000


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("query-id\tcorpus-id\tscore\nq 1\tp 1\t2\n", [Qrel("q 1", "p 1", 2)]),
        ("q1\tp1\t-1\nq1\tp2\t1.0\n", [Qrel("q1", "p1", -1), Qrel("q1", "p2", 1)]),
        ("q1 0 p1 1\nq1 Q0 p2 0\n", [Qrel("q1", "p1", 1), Qrel("q1", "p2", 0)]),
        ("1185869\t0\t0\t1\n", [Qrel("1185869", "0", 1)]),
        ("query_id\tpassage_id\nq1\tp1\n", [Qrel("q1", "p1", 1)]),
        ("", []),
    ],
)
def test_forms_of_qrels(tmp_path: Path, text: str, wanted: list[Qrel]) -> None:
    path = put(tmp_path / "q.tsv", text.encode())
    assert [qrel for _, qrel in read_qrels(path, BadRecords())] == wanted


def test_bad_qrels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.tsv:2: a whole number was expected as grade, found 'high'"):
        list(read_qrels(put(tmp_path / "q.tsv", b"q1\tp1\t1\nq1\tp2\thigh\n"), BadRecords()))
    with pytest.raises(DataError, match=r"q\.tsv:1: query, passage and grade were expected"):
        list(read_qrels(put(tmp_path / "q.tsv", b"q1\n"), BadRecords()))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_qrels(tmp_path / "none.tsv", BadRecords()))


def test_trec_files_go_round(tmp_path: Path) -> None:
    write_trec_run(tmp_path / "a.trec", [("q1", "p1", 1, 1.5), ("q1", "p 2", 2, 0.1)], tag="me")
    assert (tmp_path / "a.trec").read_text() == "q1 Q0 p1 1 1.5 me\nq1 Q0 p%202 2 0.1 me\n"
    assert read_trec_run(tmp_path / "a.trec") == {"q1": {"p1": 1.5, "p%202": 0.1}}
    write_qrels(tmp_path / "q.trec", [Qrel("q1", "p1", 2)])
    assert [qrel for _, qrel in read_qrels(tmp_path / "q.trec", BadRecords())] == [Qrel("q1", "p1", 2)]
    assert trec_id("50%") == "50%"
    with pytest.raises(DataError, match=r"a\.trec:1: query, Q0, passage, rank, score, tag"):
        read_trec_run(put(tmp_path / "a.trec", b"q1 p1 0.5\n"))
    with pytest.raises(DataError, match=r"a\.trec:2: passage 'p1' is listed twice"):
        read_trec_run(put(tmp_path / "a.trec", b"q1 Q0 p1 1 2 x\nq1 Q0 p1 2 1 x\n"))
    with pytest.raises(DataError, match="a tab or a line end"):
        write_tsv(tmp_path / "t.tsv", [["a\tb"]])


def test_fields_of_a_record() -> None:
    bad = BadRecords("skip")
    record = {"n": 7, "f": 1.5, "s": "  x ", "none": None, "empty": "", "nul": "a\0b", "half": "\ud800", "flag": True}
    assert id_field(record, "n", "f:1", bad) == "7"
    assert text_field(record, "s", "f:1", bad) == "x"
    assert text_field(record, "none", "f:1", bad, optional=True) == ""
    assert text_field(record, "absent", "f:2", bad) is None
    assert text_field(record, "f", "f:3", bad) is None
    assert id_field(record, "flag", "f:4", bad) is None
    assert id_field(record, "empty", "f:5", bad) is None
    assert text_field(record, "nul", "f:6", bad) is None
    assert text_field(record, "half", "f:7", bad) is None
    assert clean_text(" é ", "t", "f:8", bad) == "é"
    assert dict(bad.counts) == {"missing field": 2, "wrong type": 2, "NUL byte": 1, "invalid UTF-8": 1}
    with pytest.raises(DataError, match=r"f:9: no field 'text'; the record has \['n'\]"):
        text_field({"n": 1}, "text", "f:9", BadRecords())


def test_formats_by_ending(tmp_path: Path) -> None:
    assert [format_of(Path(name)) for name in ("a.jsonl.gz", "b.CSV", "c.tsv.zst", "d.parquet", "e.txt")] == [
        "jsonl",
        "csv",
        "tsv",
        "parquet",
        None,
    ]
    path = put(tmp_path / "c.tsv", b"id\ttext\n1\ta,b\n")
    assert [record for _, record in read_records(path, BadRecords())] == [{"id": "1", "text": "a,b"}]
