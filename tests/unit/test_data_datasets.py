"""Each loader reads its form of data; `sniff` finds the form by itself; signatures change with the content and with nothing else."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from simlm.data.datasets import DATASETS, Loader, cached_digest, count_lines, find_splits, guess_sizes, open_dataset, signature, sniff
from simlm.data.formats import BadRecords, write_csv, write_jsonl, write_parquet
from simlm.errors import DataError, MissingExtraError
from simlm.recipe import DataSettings
from simlm.types import SPLITS, Passage, Qrel, Query, Split
from tests.conftest import write_beir

PASSAGES = [Passage("p1", "one, text", "Title"), Passage("p2", 'two "texts"'), Passage("p3", "drei\nZeilen", "Ünï")]
QUERIES = {"train": [Query("q1", "first?", ("one",)), Query("q2", "second?")], "test": [Query("q3", "third?")]}
QRELS = {"train": [Qrel("q1", "p1", 1), Qrel("q2", "p2", 1), Qrel("q2", "p3", 1)], "test": [Qrel("q3", "p3", 1)]}


def settings(**values: Any) -> DataSettings:
    return DataSettings.model_validate(values)


def everything(loader: Loader) -> tuple[list[Passage], dict[str, list[Query]], dict[str, list[Qrel]]]:
    bad = BadRecords()
    splits: list[Split] = loader.splits()
    return (
        [passage for _, passage in loader.passages(bad)],
        {split: [query for _, query in loader.queries(split, bad)] for split in splits},
        {split: [qrel for _, qrel in loader.qrels(split, bad)] for split in splits},
    )


def put_table(folder: Path, kind: str, *, inline: bool) -> dict[str, Any]:
    """The data above as CSV, TSV, JSONL or Parquet with unusual field names; the settings that read it."""
    folder.mkdir(exist_ok=True)
    positives = {
        qrel.query_id: [other.passage_id for other in QRELS["train"] + QRELS["test"] if other.query_id == qrel.query_id]
        for qrels in QRELS.values()
        for qrel in qrels
    }
    tables: dict[str, list[dict[str, Any]]] = {"articles": [{"key": p.passage_id, "head": p.title, "body": p.text} for p in PASSAGES]}
    for split, queries in QUERIES.items():
        tables[f"{split}_questions"] = [{"key": q.query_id, "ask": q.text, "answers": " ".join(q.answers)} for q in queries]
        if inline:
            for record in tables[f"{split}_questions"]:
                found = positives[record["key"]]
                record["gold"] = " ".join(found) if kind == "csv" else found
    for name, records in tables.items():
        path = folder / f"{name}.{kind}"
        if kind == "csv":
            write_csv(path, records, list(records[0]))
        elif kind == "jsonl":
            write_jsonl(path, records)
        else:
            write_parquet(path, records)
    fields = {"passage_id": "key", "title": "head", "text": "body", "query_id": "key", "query": "ask", "positives": "gold"}
    found_settings: dict[str, Any] = {"dataset": kind, "path": str(folder), "corpus": f"articles.{kind}", "fields": fields}
    found_settings["queries"] = {split: f"{split}_questions.{kind}" for split in QUERIES}
    if not inline:
        for split, qrels in QRELS.items():
            (folder / f"{split}.qrels").write_text("".join(f"{q.query_id} 0 {q.passage_id} {q.grade}\n" for q in qrels))
        found_settings["qrels"] = {split: f"{split}.qrels" for split in QRELS}
    return found_settings


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables(tmp_path: Path, kind: str, inline: bool) -> None:
    loader = open_dataset(settings(**put_table(tmp_path / "t", kind, inline=inline)))
    assert everything(loader) == (PASSAGES, QUERIES, QRELS)
    assert loader.splits() == ["train", "test"]
    assert len(loader.sources()) == (3 if inline else 5)
    assert find_splits(loader.settings) == ["train", "dev", "test"]  # type: ignore[attr-defined]


def test_tables_with_usual_names_need_no_fields(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "passages.jsonl", [{"id": 1, "contents": "a"}, {"id": 2, "contents": "b"}])
    write_jsonl(tmp_path / "q.jsonl", [{"qid": "x", "question": "why", "positives": 2, "answer": "b"}])
    loader = open_dataset(settings(dataset="jsonl", path=str(tmp_path), queries="q.jsonl"))
    passages, queries, qrels = everything(loader)
    assert passages == [Passage("1", "a"), Passage("2", "b")]
    assert queries == {"train": [Query("x", "why", ("b",))]}
    assert qrels == {"train": [Qrel("x", "2")]}
    # One training query cannot be shared with a dev split.
    assert find_splits(settings(dataset="jsonl", path=str(tmp_path), queries="q.jsonl")) == ["train"]


def test_tables_without_ids_are_numbered_only_when_asked(tmp_path: Path) -> None:
    write_csv(tmp_path / "corpus.csv", [{"text": "a"}, {"text": "b"}], ["text"])
    with pytest.raises(DataError, match="no field of a usual name for the id, it has \\['text'\\]"):
        open_dataset(settings(dataset="csv", path=str(tmp_path)))
    loader = open_dataset(settings(dataset="csv", path=str(tmp_path), fields={"passage_id": "#"}))
    assert [passage.passage_id for _, passage in loader.passages(BadRecords())] == ["0", "1"]
    with pytest.raises(DataError, match="no field of a usual name for the text"):
        open_dataset(settings(dataset="csv", path=str(tmp_path), fields={"text": "body"}))


def test_positives_of_a_wrong_type(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "1", "text": "a"}])
    write_jsonl(tmp_path / "q.jsonl", [{"id": "x", "query": "why", "positives": {"a": 1}}, {"id": "y", "query": "who", "positives": [1.5]}])
    loader = open_dataset(settings(dataset="jsonl", path=str(tmp_path), queries={"train": "q.jsonl"}))
    with pytest.raises(DataError, match="a passage id or a list of them"):
        list(loader.qrels("train", BadRecords()))
    bad = BadRecords("skip")
    assert list(loader.qrels("train", bad)) == []
    assert bad.counts["wrong type"] == 2


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_beir_folders(tmp_path: Path, ending: str) -> None:
    write_jsonl(tmp_path / f"corpus.jsonl{ending}", [{"_id": p.passage_id, "title": p.title, "text": p.text} for p in PASSAGES])
    write_jsonl(
        tmp_path / f"queries.jsonl{ending}",
        [{"_id": q.query_id, "text": q.text, "answers": list(q.answers)} for queries in QUERIES.values() for q in queries],
    )
    (tmp_path / "qrels").mkdir()
    for split, qrels in QRELS.items():
        lines = "".join(f"{q.query_id}\t{q.passage_id}\t{q.grade}\n" for q in qrels)
        (tmp_path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    loader = open_dataset(settings(path=str(tmp_path)))
    passages, queries, qrels_found = everything(loader)
    assert passages == PASSAGES
    assert queries["test"] == QUERIES["train"] + QUERIES["test"]
    assert qrels_found == QRELS
    found = sniff(tmp_path)
    assert found.settings == {"dataset": "beir", "path": str(tmp_path)}
    assert found.counts == {"passages": 3, "train": 2, "dev": 0, "test": 1} or found.counts["test"] == 1
    assert guess_sizes(settings(path=str(tmp_path), max_passages=2, max_queries={"test": 1}, dev_fraction=0.0)) == (
        2,
        {"train": 2, "test": 1},
    )


def test_ms_marco_with_and_without_titles(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("0\tTitle\ta text\n1\t\tno title\n")
    (tmp_path / "queries.train.tsv").write_text("10\twhat\n")
    (tmp_path / "qrels.train.tsv").write_text("10\t0\t1\t1\n")
    (tmp_path / "queries.dev.tsv").write_text("11\tbig\n")
    (tmp_path / "qrels.dev.tsv").write_text("11\t0\t0\t1\n")
    data = settings(dataset="msmarco", path=str(tmp_path))
    passages, queries, qrels = everything(open_dataset(data))
    assert passages == [Passage("0", "a text", "Title"), Passage("1", "no title")]
    assert queries == {"train": [Query("10", "what")], "dev": [Query("11", "big")]}
    assert qrels == {"train": [Qrel("10", "1")], "dev": [Qrel("11", "0")]}
    (tmp_path / "queries.dev.small.tsv").write_text("12\tsmall\n")
    (tmp_path / "qrels.dev.small.tsv").write_text("12\t0\t0\t1\n")
    assert everything(open_dataset(data))[1]["dev"] == [Query("12", "small")]
    renamed = settings(dataset="msmarco", path=str(tmp_path), queries={"test": "queries.dev.tsv"}, qrels={"test": "qrels.dev.tsv"})
    assert everything(open_dataset(renamed))[1] == {"test": [Query("11", "big")]}
    assert sniff(tmp_path).settings["dataset"] == "msmarco"
    (tmp_path / "collection.tsv").write_text("0\ta text\n1\tmore\tcells\n")
    with pytest.raises(DataError, match=r"collection\.tsv:2: 2 cells as in the first line expected between tabs, found 3"):
        everything(open_dataset(data))


def test_text_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "note.txt").write_bytes(b"\xef\xbb\xbffirst line\r\nsame paragraph\r\n\r\nsecond paragraph\r\n")
    words = " ".join(str(number) for number in range(25))
    (tmp_path / "guide.md").write_text(f"# Start\n\nhello there\n\n## More words\n{words}\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    loader = open_dataset(settings(dataset="text", path=str(tmp_path), options={"window_words": 10, "overlap_words": 2}))
    found = [(where.removeprefix(f"{tmp_path}/"), passage) for where, passage in loader.passages(BadRecords())]
    assert found[0] == ("deep/note.txt:1", Passage("deep/note.txt#0", "first line same paragraph second paragraph", "note"))
    assert found[1] == ("guide.md:3", Passage("guide.md#0", "hello there", "Start"))
    windows = [passage.text.split() for _, passage in found[2:]]
    assert [(window[0], window[-1]) for window in windows] == [("0", "9"), ("8", "17"), ("16", "24")]
    assert found[2][1].title == "More words"
    assert loader.splits() == []
    assert sniff(tmp_path).settings["dataset"] == "text"
    with pytest.raises(DataError, match="overlap_words 10 must be"):
        open_dataset(settings(dataset="text", path=str(tmp_path), options={"window_words": 10, "overlap_words": 10}))
    with pytest.raises(DataError, match="window_words: a whole number"):
        open_dataset(settings(dataset="text", path=str(tmp_path), options={"window_words": "ten"}))
    (tmp_path / "bad.txt").write_bytes(b"ok\n\nnot \xff ok\n")
    with pytest.raises(DataError, match=r"bad\.txt:3: not valid UTF-8"):
        list(loader.passages(BadRecords()))
    assert sniff(tmp_path / "guide.md").settings == {"dataset": "text", "path": str(tmp_path / "guide.md")}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_sniffed_settings_can_be_loaded(tmp_path: Path, kind: str) -> None:
    write = {"jsonl": write_jsonl, "parquet": write_parquet, "csv": lambda path, records: write_csv(path, records, list(records[0]))}[kind]
    write(tmp_path / f"articles.{kind}", [{"docid": "1", "headline": "t", "body": "text"}, {"docid": "2", "headline": "", "body": "more"}])
    write(tmp_path / f"train_queries.{kind}", [{"qid": f"q{n}", "question": "why"} for n in range(3)])
    write(tmp_path / f"test_queries.{kind}", [{"qid": "q9", "question": "who"}])
    (tmp_path / "qrels_train.tsv").write_text("".join(f"q{n}\t1\t1\n" for n in range(3)))
    (tmp_path / "qrels_test.tsv").write_text("q9\t2\t1\n")
    found = sniff(tmp_path)
    assert found.settings["dataset"] == kind
    assert found.counts["passages"] == 2
    loader = open_dataset(settings(**found.settings))
    passages, queries, qrels = everything(loader)
    assert [passage.title for passage in passages] == ["t", ""]
    assert [len(queries[split]) for split in ("train", "test")] == [3, 1]
    assert qrels["test"] == [Qrel("q9", "2")]


def test_sniffing_one_file_without_ids(tmp_path: Path) -> None:
    write_csv(tmp_path / "things.csv", [{"text": "a", "size": "1"}], ["text", "size"])
    found = sniff(tmp_path / "things.csv")
    assert found.settings == {
        "dataset": "csv",
        "path": str(tmp_path),
        "corpus": "things.csv",
        "fields": {"passage_id": "#", "text": "text"},
    }
    assert found.counts == {"passages": 1}
    assert len(everything(open_dataset(settings(**found.settings)))[0]) == 1


def test_sniffing_what_is_not_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known form of data here"):
        sniff(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        sniff(tmp_path / "none")
    (tmp_path / "settings.json").write_text('{"colour": "red"}\n')
    with pytest.raises(DataError, match="no known form of data here"):
        sniff(tmp_path)


def test_signatures_follow_the_content(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "d", [{"_id": "p", "text": "x"}], [{"_id": "q", "text": "y"}], {"test": [("q", "p", 1)]})
    data, cache = settings(path=str(folder)), dict[str, str]()
    first = signature(data, cache)
    assert set(first) == {str(folder / "corpus.jsonl"), str(folder / "queries.jsonl"), str(folder / "qrels" / "test.tsv")}
    os.utime(folder / "corpus.jsonl", ns=(1, 1))
    assert signature(data, cache) == first
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "p2", "text": "x"}\n')
    assert signature(data, cache) != first
    known = dict.fromkeys(
        [f"{(folder / 'corpus.jsonl').resolve()}|{s.st_size}|{s.st_mtime_ns}" for s in [(folder / "corpus.jsonl").stat()]], "kept"
    )
    assert cached_digest(folder / "corpus.jsonl", known) == "kept"
    with pytest.raises(DataError, match="cannot be read"):
        cached_digest(folder / "none", {})


def test_mistakes_in_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no loader 'bier'; did you mean 'beir'\?"):
        open_dataset(settings(dataset="bier", path=str(tmp_path)))
    with pytest.raises(DataError, match=r"the loader 'text' has no 'window_word'; did you mean 'window_words'\?"):
        open_dataset(settings(dataset="text", path=str(tmp_path), options={"window_word": 3}))
    with pytest.raises(DataError, match=r"data.fields: the loader 'beir' has no 'body'"):
        open_dataset(settings(path=str(tmp_path), fields={"body": "x"}))
    with pytest.raises(DataError, match=r"data\.path: the loader 'beir' reads files"):
        open_dataset(settings())
    folder = write_beir(tmp_path / "d", [{"_id": "p", "text": "x"}], [], {})
    (folder / "all.tsv").write_text("q\tp\t1\n")
    with pytest.raises(DataError, match="is one file, which does not say its split"):
        open_dataset(settings(path=str(folder), qrels="all.tsv"))
    with pytest.raises(DataError, match=r"data\.corpus: .* does not exist"):
        open_dataset(settings(path=str(folder), corpus="other.jsonl"))


def test_lines_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"")
    assert count_lines(path) == 0
    path.write_bytes(b"a\nb")
    assert count_lines(path) == 2
    for name in ("y.jsonl", "y.jsonl.gz", "y.jsonl.zst"):
        write_jsonl(
            tmp_path / name,
            ({"id": number, "text": f"{number * 7919 % 100_003:x} {number * 104_729 % 99_991}"} for number in range(50_000)),
        )
        assert count_lines(tmp_path / name) == 50_000
        with monkeypatch.context() as patch:
            patch.setattr("simlm.data.datasets.LOOK_BYTES", 1 << 20)
            assert abs(count_lines(tmp_path / name) - 50_000) < 20_000


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_row_of_the_table_is_a_loader(name: str) -> None:
    module, _, class_name = DATASETS[name].partition(":")
    loader = getattr(importlib.import_module(module), class_name)
    for attribute in ("OPTIONS", "FIELDS", "check", "passages", "queries", "qrels", "splits", "sources", "versions", "facts", "guess"):
        assert hasattr(loader, attribute)


# --- the extras


def fake_ir_datasets() -> types.ModuleType:
    document = namedtuple("document", ["doc_id", "title", "text"])
    query = namedtuple("query", ["query_id", "text", "default_text"])
    qrel = namedtuple("qrel", ["query_id", "doc_id", "relevance", "iteration"])

    class Data:
        def __init__(self, judged: bool) -> None:
            self.judged = judged

        def has_queries(self) -> bool:
            return self.judged

        has_qrels = has_queries

        def docs_iter(self) -> list[Any]:
            return [document("p1", "T", "text one"), document("p2", "", "text two")]

        def docs_count(self) -> int:
            return 2

        def queries_iter(self) -> list[Any]:
            return [query("q1", "why", lambda: "why")]

        def queries_count(self) -> int:
            return 1

        def qrels_iter(self) -> list[Any]:
            return [qrel("q1", "p2", 2, "0")]

    known = {"toy": Data(False), "toy/train": Data(True), "toy/val": Data(True), "toy/trec": Data(True)}
    module = types.ModuleType("ir_datasets")
    module.load = known.__getitem__  # type: ignore[attr-defined]
    return module


def test_ir_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_datasets", fake_ir_datasets())
    loader = open_dataset(settings(dataset="ir_datasets", path="toy"))
    assert loader.splits() == ["train", "dev"]
    passages, queries, qrels = everything(loader)
    assert passages == [Passage("p1", "text one", "T"), Passage("p2", "text two")]
    assert queries == {"train": [Query("q1", "why")], "dev": [Query("q1", "why")]}
    assert qrels["dev"] == [Qrel("q1", "p2", 2)]
    assert loader.guess() == (2, {"train": 1, "dev": 1})
    chosen = open_dataset(settings(dataset="ir_datasets", path="toy", options={"test": "trec"}))
    assert chosen.splits() == ["test"]
    with pytest.raises(DataError, match="ir_datasets knows no data set 'other'"):
        open_dataset(settings(dataset="ir_datasets", path="other"))


@pytest.mark.parametrize(("name", "library", "extra"), [("ir_datasets", "ir_datasets", "ir-datasets"), ("hub", "datasets", "hub")])
def test_absent_extras_are_named(monkeypatch: pytest.MonkeyPatch, name: str, library: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'simlm\[{extra}\]'"):
        open_dataset(settings(dataset=name, path="someone/something"))


def test_hub_data_sets_with_the_configurations_of_mteb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "corpus": {"corpus": [{"_id": "p1", "title": "T", "text": "one"}, {"_id": "p2", "title": "", "text": "two"}]},
        "queries": {"queries": [{"_id": "q1", "text": "why"}]},
        "default": {
            "train": [{"query-id": "q1", "corpus-id": "p2", "score": 1.0}],
            "validation": [{"query-id": "q1", "corpus-id": "p1", "score": 0}],
        },
    }

    def load_dataset(path: str, config: str, revision: str | None = None) -> Any:
        assert (path, revision) == ("me/toy", "abc")
        return tables[config]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    loader = open_dataset(settings(dataset="hub", path="me/toy", options={"revision": "abc"}))
    passages, queries, qrels = everything(loader)
    assert passages == [Passage("p1", "one", "T"), Passage("p2", "two")]
    assert queries["train"] == [Query("q1", "why")]
    assert qrels == {"train": [Qrel("q1", "p2", 1)], "dev": [Qrel("q1", "p1", 0)]}
    assert loader.versions() == {"hub me/toy": "abc"}


def test_splits_are_the_known_ones() -> None:
    assert SPLITS == ("train", "dev", "test")
