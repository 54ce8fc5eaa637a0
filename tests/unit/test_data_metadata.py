"""Metadata of passages: taken from records by each loader, kept in the store, absent without a trace where there is none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from simlm.artifacts import build_artifact
from simlm.data.datasets import open_dataset
from simlm.data.formats import BadRecords, MetadataFields, write_csv, write_jsonl, write_parquet
from simlm.data.python_docs import collect
from simlm.data.store import Store
from simlm.data.store_writer import CHUNK_ROWS, Row, StoreWriter
from simlm.errors import DataError
from simlm.progress import Progress
from simlm.recipe import DataSettings, PrepareSettings
from simlm.stages import Context, prepare
from simlm.types import Passage, Scalar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECORDS: list[dict[str, Any]] = [
    {"_id": "a", "text": "the granite kettle", "metadata": {"year": 1999, "topic": "kettles ", "open": True, "score": 0.5}},
    {"_id": "b", "text": "the paper lighthouse", "metadata": {"year": None, "topic": ""}},
    {"_id": "c", "text": "the silent drum", "title": "Drums", "metadata": {"topic": "Trommel\nÜ", "year": -(2**70)}},
    {"_id": "d", "text": "the salt library"},
]
METADATA: list[dict[str, Scalar]] = [
    {"year": 1999, "topic": "kettles", "open": True, "score": 0.5},
    {},
    {"topic": "Trommel\nÜ", "year": -(2**70)},
    {},
]


def read(settings: dict[str, Any], bad: BadRecords | None = None) -> list[dict[str, Scalar]]:
    loader = open_dataset(DataSettings.model_validate(settings))
    return [dict(passage.metadata) for _, passage in loader.passages(bad or BadRecords())]


@pytest.mark.parametrize("dataset", ["beir", "jsonl"])
def test_the_object_of_a_jsonl_record(tmp_path: Path, dataset: str) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    data = {"dataset": dataset, "path": str(tmp_path)}
    assert read(data) == METADATA
    assert read({**data, "metadata_fields": ["topic", "title"]}) == [
        {"topic": "kettles"},
        {},
        {"topic": "Trommel\nÜ", "title": "Drums"},
        {},
    ]
    assert read({**data, "metadata_fields": []}) == [{}, {}, {}, {}]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_columns_only_where_the_recipe_names_them(tmp_path: Path, kind: str) -> None:
    rows = [{"id": "a", "text": "one", "year": 1999, "place": "Orla"}, {"id": "b", "text": "two", "year": 2004, "place": ""}]
    if kind == "parquet":
        write_parquet(tmp_path / "corpus.parquet", rows)
    elif kind == "csv":
        write_csv(tmp_path / "corpus.csv", rows, list(rows[0]))
    else:
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        (tmp_path / "corpus.tsv").write_text("\n".join(lines))
    data = {"dataset": "parquet" if kind == "parquet" else "csv", "path": str(tmp_path)}
    assert read(data) == [{}, {}]
    # A column of a text file is text, one of Parquet has its type.
    years: list[Scalar] = [1999, 2004] if kind == "parquet" else ["1999", "2004"]
    assert read({**data, "metadata_fields": ["place", "year"]}) == [{"place": "Orla", "year": years[0]}, {"year": years[1]}]


@pytest.mark.parametrize(
    ("value", "found"), [(["x"], "a list"), ({"x": 1}, "an object"), (float("inf"), "a number"), (float("nan"), "a number")]
)
def test_a_named_field_that_is_no_single_value_is_refused_with_its_place(tmp_path: Path, value: Any, found: str) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [*RECORDS[:2], {"_id": "x", "text": "y", "metadata": {"topic": value}}])
    data = {"dataset": "beir", "path": str(tmp_path), "metadata_fields": ["topic"]}
    with pytest.raises(DataError) as caught:
        read(data)
    assert str(caught.value).startswith(f"{tmp_path / 'corpus.jsonl'}:3: field 'topic' of data.metadata_fields: ")
    assert f"found {found}" in str(caught.value)
    bad = BadRecords("skip")
    assert read(data, bad) == [{"topic": "kettles"}, {}]
    assert bad.counts == {"wrong type": 1}


def test_lists_that_nobody_asked_for_are_left_out_and_named() -> None:
    fields = MetadataFields(None)
    record = {"metadata": {"year": 2016, "authors": ["1", "2"], "cited_by": [], "nested": {"a": 1}}}
    assert fields.read(record, "here:1", BadRecords()) == {"year": 2016}
    assert fields.facts() == {"metadata_left_out": ["authors", "cited_by", "nested"]}
    for number in range(100):
        fields.read({"metadata": {f"id{number}": []}}, "here:1", BadRecords())
    assert len(fields.facts()["metadata_left_out"]) == 20
    # Something else of that name is a field like any other.
    assert fields.read({"metadata": "text"}, "here:1", BadRecords()) == {}
    assert MetadataFields(["metadata"]).read({"metadata": "text"}, "here:1", BadRecords()) == {"metadata": "text"}
    assert MetadataFields(["x"]).facts() == {}


@pytest.mark.parametrize("value", ["a\0b", "half \ud83d"])
def test_text_that_no_file_can_store(value: str) -> None:
    with pytest.raises(DataError, match=r"here:1: field 'topic' holds"):
        MetadataFields(None).read({"metadata": {"topic": value}}, "here:1", BadRecords())


def test_a_passage_with_metadata_is_still_a_key() -> None:
    one, two = Passage("a", "text", metadata={"year": 1}), Passage("a", "text", metadata={"year": 2})
    assert one != two
    assert len({one, two}) == 2
    assert hash(one) == hash(two)


def test_kinds_of_documented_objects() -> None:
    passages = {passage.name: passage for passage in collect(["json", "logging"]).passages}
    kinds = {name: passages[name].kind for name in ("json", "json.dump", "json.encoder.JSONEncoder", "logging.Logger.debug")}
    assert kinds == {
        "json": "module",
        "json.dump": "function",
        "json.encoder.JSONEncoder": "class",
        "logging.Logger.debug": "method",
    }
    loader = open_dataset(DataSettings(dataset="python-docs", options={"packages": ["json"]}))
    assert {passage.passage_id: passage.metadata for _, passage in loader.passages(BadRecords())}["json.dump"] == {
        "package": "json",
        "kind": "function",
    }


# --- the store


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> Store:
    with build_artifact(folder, kind="store", stage="prepare", settings={}) as builder:
        writer = StoreWriter(builder.work, tokenizer, max_passage_tokens=16, max_query_tokens=8, num_workers=2)
        writer.write_passages(rows)
        writer.finish()
    return Store.open(folder)


def test_round_trip_over_several_chunks(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    count = 2 * CHUNK_ROWS + 3
    values: list[dict[str, Scalar]] = [{"row": row, "name": f"ü{row}"} if row % 3 else {} for row in range(count)]
    rows = [Row(str(row), "the granite kettle", metadata=metadata) for row, metadata in enumerate(values)]
    store = write(tmp_path / "store", tiny_wordpiece, rows)
    assert [store.passages.metadata(row) for row in range(count)] == values
    assert store.info["tables"]["passages"]["with_metadata"] == sum(map(bool, values))
    assert pickle.loads(pickle.dumps(store.passages)).metadata(1) == {"row": 1, "name": "ü1"}


def test_a_store_without_metadata_is_what_it_was(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    store = write(tmp_path / "store", tiny_wordpiece, [Row("a", "the granite kettle"), Row("b", "the paper lighthouse")])
    assert not list((store.path / "passages").glob("metadata*"))
    assert "with_metadata" not in store.info["tables"]["passages"]
    assert store.passages.metadata(1) == {}


def test_passages_taken_from_another_store_keep_it(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    store = write(tmp_path / "store", tiny_wordpiece, [Row("a", "the granite kettle", metadata={"year": 1999})])
    with build_artifact(tmp_path / "other", kind="store", stage="make_queries", settings={}) as builder:
        writer = StoreWriter(builder.work, tiny_wordpiece, max_passage_tokens=16, max_query_tokens=8)
        writer.take_passages(store)
        writer.write_queries("train", [Row("q", "which kettle")])
        writer.finish()
    other = Store.open(tmp_path / "other")
    assert other.passages.metadata(0) == {"year": 1999}
    assert other.queries("train").metadata(0) == {}


# --- prepare


@pytest.fixture
def _tiny_tokenizer(monkeypatch: pytest.MonkeyPatch, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    import simlm.models.backbone

    monkeypatch.setattr(simlm.models.backbone, "load_tokenizer", lambda reference: tiny_wordpiece)


def prepared(target: Path, data: dict[str, Any], *, interrupt: bool = False) -> tuple[Store, dict[str, Any]]:
    settings = PrepareSettings(data=DataSettings.model_validate(data), max_passage_tokens=32, max_query_tokens=16, num_workers=1)
    with build_artifact(target, kind="store", stage="prepare", settings=settings.model_dump(mode="json")) as builder:
        if interrupt:
            # What a kill in the middle of writing leaves.
            (builder.work / "passages").mkdir()
            (builder.work / "passages" / "metadata.bin").write_bytes(b'{"old": 1}')
        prepare.run(settings, {}, Context(builder, 1, Progress(quiet=True)))
    return Store.open(target), builder.facts


@pytest.mark.usefixtures("_tiny_tokenizer")
@pytest.mark.parametrize("interrupt", [False, True])
def test_prepare_keeps_it(tmp_path: Path, interrupt: bool) -> None:
    title_only = {"_id": "e", "title": "A title", "text": "", "metadata": {"year": 3}}
    write_jsonl(tmp_path / "corpus.jsonl", [*RECORDS, title_only])
    store, facts = prepared(tmp_path / "store", {"dataset": "jsonl", "path": str(tmp_path)}, interrupt=interrupt)
    assert [store.passages.metadata(row) for row in range(5)] == [*METADATA, {"year": 3}]
    assert store.passages.text(4) == "A title"
    assert facts["passages"]["with_metadata"] == 3


@pytest.mark.usefixtures("_tiny_tokenizer")
def test_prepare_says_what_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "b", "metadata": {"year": 1, "authors": ["x"]}}])
    _, facts = prepared(tmp_path / "store", {"dataset": "jsonl", "path": str(tmp_path)})
    assert facts["metadata_left_out"] == ["authors"]
    assert prepare._messages(facts, None)[1] == "1 passages have metadata to filter by; left out, as they are not single values: authors"


@pytest.mark.usefixtures("_tiny_tokenizer")
@pytest.mark.parametrize("dataset", ["jsonl", "msmarco"])
def test_a_field_that_no_passage_has_is_an_error(tmp_path: Path, dataset: str) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    (tmp_path / "collection.tsv").write_text("1\tthe text\n")
    with pytest.raises(DataError, match=r"data\.metadata_fields: no passage has a field 'jear', 'place'; give names"):
        prepared(tmp_path / "store", {"dataset": dataset, "path": str(tmp_path), "metadata_fields": ["place", "jear"]})
    assert not (tmp_path / "store").exists()


def test_settings_without_it_have_the_fingerprint_they_had() -> None:
    assert sorted(DataSettings().model_dump(mode="json")) == [
        "corpus",
        "dataset",
        "dev_fraction",
        "fields",
        "max_passages",
        "max_queries",
        "on_bad_record",
        "options",
        "path",
        "qrels",
        "queries",
        "splits",
    ]
    assert DataSettings(metadata_fields=[]).model_dump(mode="json")["metadata_fields"] == []
