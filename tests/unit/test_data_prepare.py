"""prepare: every kind of bad input is named before the long work, or skipped and counted; choices depend on the seed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.artifacts import build_artifact
from simlm.data.batches import collate
from simlm.data.store import Store
from simlm.errors import DataError
from simlm.progress import Progress
from simlm.recipe import DataSettings, PrepareSettings
from simlm.stages import Context, prepare
from tests.conftest import tiny_passages, write_beir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PASSAGES: list[dict[str, Any]] = [{"_id": f"p{n}", "title": f"title {n}", "text": f"text of passage number {n}"} for n in range(6)]
QUERIES: list[dict[str, Any]] = [{"_id": f"q{n}", "text": f"query number {n}"} for n in range(6)]
QRELS = {"train": [(f"q{n}", f"p{n}", 1) for n in range(4)], "dev": [("q4", "p4", 1)], "test": [("q5", "p5", 1)]}


@pytest.fixture(autouse=True)
def _tiny_tokenizer(monkeypatch: pytest.MonkeyPatch, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    import simlm.models.backbone

    monkeypatch.setattr(simlm.models.backbone, "load_tokenizer", lambda reference: tiny_wordpiece)


def prepared(folder: Path, data: dict[str, Any] | None = None, *, seed: int = 1, **more: Any) -> tuple[Store, dict[str, Any]]:
    settings = PrepareSettings(
        data=DataSettings.model_validate({"dataset": "beir", "path": str(folder), **(data or {})}),
        **{"max_passage_tokens": 32, "max_query_tokens": 16, "num_workers": 2, **more},
    )
    target = folder.parent / f"{folder.name}-store"
    with build_artifact(target, kind="store", stage="prepare", settings=settings.model_dump(mode="json"), seed=seed) as builder:
        prepare.run(settings, {}, Context(builder, seed, Progress(quiet=True)))
    return Store.open(target), builder.facts


def beir(tmp_path: Path, passages: Any = None, queries: Any = None, qrels: Any = None) -> Path:
    return write_beir(
        tmp_path / "data",
        PASSAGES if passages is None else passages,
        QUERIES if queries is None else queries,
        QRELS if qrels is None else qrels,
    )


def append(path: Path, data: bytes) -> int:
    """Add bytes to a file; number of the line they begin at."""
    before = path.read_bytes()
    path.write_bytes(before + data)
    return before.count(b"\n") + 1


def test_a_whole_data_set(tmp_path: Path) -> None:
    store, facts = prepared(beir(tmp_path))
    assert [store.passages.text(row) for row in range(6)] == [line["text"] for line in PASSAGES]
    assert {split: list(store.queries(split).ids) for split in store.splits} == {
        "train": ["q0", "q1", "q2", "q3"],
        "dev": ["q4"],
        "test": ["q5"],
    }
    assert store.qrels("train") == {0: {0: 1}, 1: {1: 1}, 2: {2: 1}, 3: {3: 1}}
    assert store.qrels("test") == {0: {5: 1}}
    assert facts["passages"]["rows"] == 6
    assert facts["judgements"] == {"train": 4, "dev": 1, "test": 1}
    assert "skipped" not in facts
    assert "queries_without_judgement" not in facts
    assert facts["scripts"] == {"latin": 1.0}


BAD_PASSAGES = [
    (b'{"_id": "x", "text": "cut sho\n', "not valid JSON", "broken JSON"),
    (b'{"_id": "x", "title": "t"}\n', "no field 'text'", "missing field"),
    (b'{"title": "t", "text": "x"}\n', "no field '_id'", "missing field"),
    (b'{"_id": "x", "text": ["a", "list"]}\n', "field 'text': text was expected, found a list", "wrong type"),
    (b'{"_id": 1.5, "text": "x"}\n', "field '_id': text was expected, found a number", "wrong type"),
    (b'{"_id": "p3", "text": "another text"}\n', "passage id 'p3' is used twice, first at ", "duplicate id"),
    (b'{"_id": "x", "title": "", "text": " \\n "}\n', "passage 'x' has neither text nor title", "empty passage"),
    (b'{"_id": "x", "text": "caf\xe9"}\n', "not valid UTF-8: byte 0xe9", "invalid UTF-8"),
    (b'{"_id": "x", "text": "a\x00b"}\n', "a NUL byte in the line", "NUL byte"),
    (b'{"_id": "x", "text": "a\\u0000b"}\n', "field 'text' holds a NUL character", "NUL byte"),
    (b'{"_id": "x", "text": "half \\ud83d"}\n', "half of a surrogate pair", "invalid UTF-8"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BAD_PASSAGES)
def test_bad_passages(tmp_path: Path, line: bytes, message: str, reason: str) -> None:
    folder = beir(tmp_path)
    number = append(folder / "corpus.jsonl", line)
    with pytest.raises(DataError, match=message) as caught:
        prepared(folder)
    assert str(caught.value).startswith(f"{folder / 'corpus.jsonl'}:{number}: ")
    assert not (tmp_path / "data-store").exists()
    store, facts = prepared(folder, {"on_bad_record": "skip"})
    assert facts["skipped"] == {reason: 1}
    assert list(store.passages.ids) == [f"p{n}" for n in range(6)]
    assert store.passages.text(3) == "text of passage number 3"


BAD_QUERIES = [
    (b'{"_id": "q1"\n', "not valid JSON", "broken JSON"),
    (b'{"_id": "x"}\n', "no field 'text'", "missing field"),
    (b'{"_id": "x", "text": 3}\n', "field 'text': text was expected", "wrong type"),
    (b'{"_id": "x", "text": "y", "answers": {"a": 1}}\n', "a text or a list of texts was expected", "wrong type"),
    (b'{"_id": "q1", "text": "again"}\n', "query id 'q1' is used twice, first at ", "duplicate id"),
    (b'{"_id": "x", "text": ""}\n', "query 'x' has no text", "empty query"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BAD_QUERIES)
def test_bad_queries(tmp_path: Path, line: bytes, message: str, reason: str) -> None:
    folder = beir(tmp_path)
    number = append(folder / "queries.jsonl", line)
    with pytest.raises(DataError, match=message) as caught:
        prepared(folder)
    assert str(caught.value).startswith(f"{folder / 'queries.jsonl'}:{number}: ")
    store, facts = prepared(folder, {"on_bad_record": "skip"})
    assert facts["skipped"] == {reason: 1}
    assert store.queries("train").text(1) == "query number 1"


BAD_QRELS = [
    (b"q0\tnowhere\t1\n", "names passage 'nowhere', absent from the corpus", "unknown passage id"),
    (b"nobody\tp0\t1\n", "names query 'nobody', absent from the", "unknown query id"),
    (b"q0\tp0\t0\n", "grade 0 contradicts grade 1", "contradicting judgement"),
    (b"q0\tp0\tvery\n", "a whole number was expected as grade, found 'very'", "wrong type"),
    (b"q0\n", "query, passage and grade were expected", "broken row"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BAD_QRELS)
def test_bad_judgements(tmp_path: Path, line: bytes, message: str, reason: str) -> None:
    folder = beir(tmp_path)
    number = append(folder / "qrels" / "train.tsv", line)
    with pytest.raises(DataError, match=message) as caught:
        prepared(folder)
    assert str(caught.value).startswith(f"{folder / 'qrels' / 'train.tsv'}:{number}: ")
    store, facts = prepared(folder, {"on_bad_record": "skip"})
    assert facts["skipped"] == {reason: 1}
    assert store.qrels("train") == {0: {0: 1}, 1: {1: 1}, 2: {2: 1}, 3: {3: 1}}


def test_crlf_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    store, _ = prepared(beir(tmp_path / "a"))
    folder = beir(tmp_path / "b")
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", *(folder / "qrels").iterdir()):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    windows, _ = prepared(folder)
    assert [windows.passages.text(row) for row in range(6)] == [store.passages.text(row) for row in range(6)]
    assert windows.qrels("train") == store.qrels("train")
    assert (windows.passages.tokens == store.passages.tokens).all()


def test_a_passage_of_a_million_characters_is_cut_and_counted(tmp_path: Path) -> None:
    store, facts = prepared(beir(tmp_path, [*PASSAGES, {"_id": "huge", "text": "word " * 200_000}]))
    assert facts["passages"]["cut"] == 1
    assert store.passages.lengths[6] == 32
    assert len(store.passages.text(6)) == 999_999


def test_a_title_alone_is_text(tmp_path: Path) -> None:
    store, facts = prepared(beir(tmp_path, [*PASSAGES, {"_id": "t", "title": "only a title", "text": ""}]))
    assert (store.passages.title(6), store.passages.text(6)) == ("", "only a title")
    assert facts["passages_with_title_only"] == 1


def test_one_passage(tmp_path: Path) -> None:
    store, _ = prepared(beir(tmp_path, [{"_id": "p", "text": "alone"}], [{"_id": "q", "text": "who"}], {"test": [("q", "p", 1)]}))
    assert len(store.passages) == 1
    assert store.qrels("test") == {0: {0: 1}}
    assert collate(store.passages, [0]).input_ids.shape[0] == 1


def test_no_passages_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus has no passages"):
        prepared(beir(tmp_path, [], [], {}))
    broken = beir(tmp_path / "b", [], [], {})
    append(broken / "corpus.jsonl", b"nonsense\n")
    with pytest.raises(DataError, match="1 records were skipped, the first: "):
        prepared(broken, {"on_bad_record": "skip"})


def test_queries_without_a_positive(tmp_path: Path) -> None:
    qrels = {
        "train": [("q0", "p0", 1), ("q1", "p1", 0)],
        "dev": [("q2", "p2", 1)],
        "test": [("q3", "p3", 0), ("q4", "p4", 2), ("q4", "p0", -1)],
    }
    store, facts = prepared(beir(tmp_path, qrels=qrels))
    # Nothing can be learned from q1, which is left out; q3 is judged, so it counts in the measures.
    assert list(store.queries("train").ids) == ["q0"]
    assert list(store.queries("test").ids) == ["q3", "q4"]
    assert store.qrels("test") == {0: {3: 0}, 1: {0: -1, 4: 2}}
    assert facts["queries_without_positive"] == {"train": 1, "test": 1}
    assert facts["queries_without_judgement"] == 1


def test_no_training_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = beir(tmp_path, qrels={"test": [("q5", "p5", 1)]})
    store, _ = prepared(folder)
    assert store.splits == ["test"]
    settings = PrepareSettings(data=DataSettings(path=str(folder)), max_passage_tokens=32, max_query_tokens=16)
    with build_artifact(tmp_path / "other", kind="store") as builder:
        prepare.run(settings, {}, Context(builder, 1, Progress()))
    assert "no training queries: pre-training, BM25 and the indexes work" in capsys.readouterr().err


def test_no_queries_file(tmp_path: Path) -> None:
    folder = beir(tmp_path, qrels={})
    (folder / "queries.jsonl").unlink()
    store, _ = prepared(folder)
    assert store.splits == []
    (folder / "qrels" / "test.tsv").write_text("q1\tp1\t1\n")
    with pytest.raises(DataError, match="judgements of 'test' queries, but no file of those queries"):
        prepared(folder)


def test_dev_is_set_apart_where_there_is_none(tmp_path: Path) -> None:
    queries = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(40)]
    qrels = {"train": [(f"q{n}", f"p{n % 6}", 1) for n in range(40)]}
    folder = beir(tmp_path, queries=queries, qrels=qrels)
    first, facts = prepared(folder, {"dev_fraction": 0.25})
    train, dev = list(first.queries("train").ids), list(first.queries("dev").ids)
    assert len(dev) == 10 == facts["dev_set_apart_from_train"]
    assert sorted(train + dev) == sorted(line["_id"] for line in queries)
    assert first.splits == ["train", "dev"]
    again, _ = prepared(folder, {"dev_fraction": 0.25})
    assert list(again.queries("dev").ids) == dev
    other, _ = prepared(folder, {"dev_fraction": 0.25}, seed=2)
    assert list(other.queries("dev").ids) != dev
    none, _ = prepared(folder, {"dev_fraction": 0.0})
    assert none.splits == ["train"]
    least, _ = prepared(folder, {"dev_fraction": 0.001})
    assert len(least.queries("dev")) == 1


def test_samples_keep_judged_passages_first(tmp_path: Path) -> None:
    passages = [{"_id": f"p{n}", "text": f"text {n}"} for n in range(50)]
    qrels = {"train": [("q0", "p40", 1), ("q1", "p41", 1)], "dev": [("q2", "p42", 1)], "test": [("q3", "p43", 0)]}
    folder = beir(tmp_path, passages, qrels=qrels)
    store, _ = prepared(folder, {"max_passages": 10})
    assert len(store.passages) == 10
    assert {"p40", "p41", "p42", "p43"} <= set(store.passages.ids)
    assert list(store.passages.ids) == sorted(store.passages.ids, key=lambda name: int(name[1:]))
    assert store.splits == ["train", "dev", "test"]
    # Fewer than the judged ones: positives before others, and a training query without its positive goes.
    small, _ = prepared(folder, {"max_passages": 2})
    assert set(small.passages.ids) < {"p40", "p41", "p42"}
    assert sum(len(small.queries(split)) for split in small.splits) == 2
    fewer, _ = prepared(folder, {"max_queries": {"train": 1}})
    assert len(fewer.queries("train")) == 1
    assert len(fewer.passages) == 50


def test_shared_queries_of_train_and_test_are_told(tmp_path: Path) -> None:
    qrels = {"train": [("q0", "p0", 1), ("q1", "p1", 1)], "dev": [("q2", "p2", 1)], "test": [("q0", "p0", 1)]}
    _, facts = prepared(beir(tmp_path, qrels=qrels))
    assert facts["queries_in_several_splits"] == {"train and test": 1}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    settings = {"train_vocabulary": 150}
    first, _ = prepared(folder, **settings)
    before = {path.name: path.read_bytes() for path in first.path.rglob("*") if path.is_file() and path.name != "manifest.json"}
    again, _ = prepared(folder, num_workers=1, **settings)
    after = {path.name: path.read_bytes() for path in again.path.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert before == after


def test_an_interrupted_try_is_cleared(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    settings = PrepareSettings(data=DataSettings(path=str(folder)), max_passage_tokens=32, max_query_tokens=16, num_workers=1)
    with build_artifact(tmp_path / "store", kind="store") as builder:
        (builder.work / "passages").mkdir()
        (builder.work / "passages" / "half.bin").write_bytes(b"x")
        (builder.work / "store.json").write_text("{")
        prepare.run(settings, {}, Context(builder, 1, Progress(quiet=True)))
    assert not (tmp_path / "store" / "passages" / "half.bin").exists()
    assert len(Store.open(tmp_path / "store").passages) == 6


def test_a_new_vocabulary(tmp_path: Path) -> None:
    folder = beir(tmp_path, tiny_passages())
    for split in QRELS:
        (folder / "qrels" / f"{split}.tsv").unlink()
    store, facts = prepared(folder, train_vocabulary=250)
    tokenizer = store.tokenizer()
    assert len(tokenizer) <= 250
    assert facts["vocabulary"] == len(tokenizer)
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    batch = collate(store.passages, np.arange(len(store.passages)))
    assert batch.token_type_ids is not None
    assert not (batch.input_ids == tokenizer.unk_token_id).any()
    text = store.passages.text(0)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
    # A common word is one piece, the text is lower-cased, and the pieces do not depend on the run.
    assert tokenizer.tokenize("The") == ["the"]
    cased, _ = prepared(folder, train_vocabulary=250, lowercase=False)
    assert "The" in cased.tokenizer().get_vocab()


def test_what_meta_json_says_is_kept(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    (folder / "meta.json").write_text(json.dumps({"name": "mine", "licence": "CC0", "other": 3}))
    store, _ = prepared(folder)
    assert store.info["source"]["licence"] == "CC0"
    assert store.info["source"]["dataset"] == "beir"


def test_quick_check_finds_absent_files_and_early_bad_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare.check(PrepareSettings(data=DataSettings(path=str(tmp_path / "none"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no corpus\.jsonl"):
        prepare.check(PrepareSettings(data=DataSettings(path=str(tmp_path / "empty"))))
    folder = beir(tmp_path, [{"_id": "p0"}])
    with pytest.raises(DataError, match="no field 'text'"):
        prepare.check(PrepareSettings(data=DataSettings(path=str(folder))))


def test_hashes_are_not_trusted_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ids with one hash are two ids."""
    monkeypatch.setattr("simlm.data.store.hash_bytes", lambda data, seed=None: len(data))
    monkeypatch.setattr("simlm.data.store_writer.hash_bytes", len)
    passages = [{"_id": name, "text": name} for name in ("aa", "bb", "cc")]
    folder = beir(tmp_path, passages, [], {})
    found, _ = prepared(folder)
    assert [found.passages.ids.row(name) for name in ("aa", "bb", "cc")] == [0, 1, 2]
    assert "dd" not in found.passages.ids
