"""A corpus in pieces: every passage in exactly one, whatever the files look like; files of vectors complete or not there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simlm.corpus_encoding import Corpus, Job, encode_corpus, make_job, worker
from simlm.corpus_encoding.files import file_system
from simlm.corpus_encoding.output import BEGUN, Output
from simlm.data.formats import BadRecords
from simlm.errors import ArtifactError, DataError
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.retriever import load_retriever
from simlm.progress import Progress
from simlm.recipe import ModelSettings
from tests.conftest import tiny_passages
from tests.unit.object_store import object_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
QUIET = Progress(quiet=True)


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config=CONFIG), seed=1, tokenizer=tokenizer), "mean")
    model.save(folder, tokenizer, max_query_tokens=16, max_passage_tokens=48, passage_prompt="read: ")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m", tiny_wordpiece)


def passages_of(count: int) -> list[dict[str, Any]]:
    """Passages of very different lengths, with letters of two and three bytes."""
    tiny = tiny_passages()
    texts = ["\u00e9\u6f22 " * (row % 7) + tiny[row % 60]["text"][: 5 + row * 13 % 90] for row in range(count)]
    return [{"_id": f"p{row}", "title": tiny[row % 60]["title"], "text": text} for row, text in enumerate(texts)]


def write_lines(file: Path, passages: list[dict[str, Any]], *, end: str = "\n", last: bool = True) -> Path:
    text = end.join(json.dumps(passage, ensure_ascii=False) for passage in passages) + (end if last else "")
    data = text.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def write_parquet(file: Path, passages: list[dict[str, Any]], group: int = 10) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(passages), file, row_group_size=group)
    return file


def read_pieces(corpus: Corpus, shard_passages: int) -> list[list[str]]:
    return [[passage.passage_id for passage in corpus.passages(piece, BadRecords("error"))] for piece in corpus.pieces(shard_passages)]


@pytest.mark.parametrize("shard_passages", [1, 3, 7, 10, 1000])
@pytest.mark.parametrize("kind", ["lines", "windows", "no last line end", "blank lines", "parquet", "packed"])
def test_every_passage_is_in_one_piece(tmp_path: Path, kind: str, shard_passages: int) -> None:
    passages = passages_of(53)
    if kind == "parquet":
        place = write_parquet(tmp_path / "c.parquet", passages)
    elif kind == "packed":
        place = write_lines(tmp_path / "c.jsonl.gz", passages)
    else:
        end = {"windows": "\r\n", "blank lines": "\n\n"}.get(kind, "\n")
        place = write_lines(tmp_path / "c.jsonl", passages, end=end, last=kind != "no last line end")
    pieces = read_pieces(Corpus.find(str(place)), shard_passages)
    assert [name for piece in pieces for name in piece] == [passage["_id"] for passage in passages]
    if kind == "parquet":
        assert [len(piece) for piece in pieces[:-1]] == [shard_passages] * (len(pieces) - 1)
    elif kind == "packed":
        assert len(pieces) == 1
    elif shard_passages < 10:
        assert len(pieces) > 3


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    passages = passages_of(30)
    write_parquet(tmp_path / "c" / "b" / "2.parquet", passages[10:20])
    write_lines(tmp_path / "c" / "a.jsonl", passages[:10])
    write_lines(tmp_path / "c" / "z.ndjson", passages[20:])
    (tmp_path / "c" / "_SUCCESS").write_text("", encoding="utf-8")
    write_lines(tmp_path / "c" / ".hidden.jsonl", passages[:1])
    write_lines(tmp_path / "c" / "_tmp" / "x.jsonl", passages[:1])
    (tmp_path / "c" / "empty.jsonl").touch()
    (tmp_path / "c" / "README.md").write_text("no passages", encoding="utf-8")
    corpus = Corpus.find(str(tmp_path / "c"))
    assert [name for piece in read_pieces(corpus, 4) for name in piece] == [passage["_id"] for passage in passages]
    assert corpus.num_passages is None
    assert corpus.describe()["files"][0][0] == "a.jsonl"
    by_address = Corpus.find((tmp_path / "c").as_uri())
    assert read_pieces(by_address, 4) == read_pieces(corpus, 4)


def test_a_byte_order_mark_and_other_names_of_fields(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"docid": row, "contents": f"text {row}"}) + "\n" for row in range(3))
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    corpus = Corpus.find(str(tmp_path / "c.jsonl"))
    assert corpus.names == {"passage_id": "docid", "title": "title", "text": "contents"}
    assert read_pieces(corpus, 1) == [["0"], ["1"], ["2"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"_id": "a", "text": "x"}\n{"_id": "b", "text"\n', r"c\.jsonl:byte 26: not readable as JSON"),
        (b'{"_id": "a", "text": "x"}\n[1]\n', r"c\.jsonl:byte 26: a JSON object was expected"),
        (b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": 5}\n', r"c\.jsonl:byte 26: field 'text': text was expected"),
        (b'{"_id": "a", "text": "x"}\n{"_id": "", "text": "y"}\n', r"c\.jsonl:byte 26: field '_id' is empty"),
        (b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": " "}\n', r"c\.jsonl:byte 26: passage 'b' has neither title nor text"),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, model: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    job = make_job(str(model), str(tmp_path / "out"))
    with pytest.raises(DataError, match=message):
        encode_corpus(str(tmp_path / "c.jsonl"), job, progress=QUIET)
    assert Output.at(str(tmp_path / "out")).finished() == set()
    skipping = make_job(str(model), str(tmp_path / "other"), on_bad_record="skip")
    assert encode_corpus(str(tmp_path / "c.jsonl"), skipping, progress=QUIET)["count"] == 1


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is there"):
        Corpus.find(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"no passages here; files that end in \.parquet"):
        Corpus.find(str(tmp_path))
    (tmp_path / "c.jsonl").write_text('{"name": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no field for the passage id of a passage; found name, one of _id, id"):
        Corpus.find(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"d\.parquet: not readable as Parquet"):
        Corpus.find(str(tmp_path / "d.parquet"))
    whole = gzip.compress(b'{"_id": "a", "text": "x"}\n' * 1000)
    (tmp_path / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    file = str(tmp_path / "e.jsonl.gz")
    corpus = Corpus(file, ((file, 1, "packed"),), {"passage_id": "_id", "title": "title", "text": "text"}, None)
    with pytest.raises(DataError, match="damaged or cut short"):
        read_pieces(corpus, 10)
    with pytest.raises(DataError, match="an address with a password"):
        file_system("s3://key:secret@bucket/corpus")
    with pytest.raises(DataError, match=r"nowhere://x: not an address"):
        file_system("nowhere://x")


def vectors_at(folder: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    table = pq.read_table(folder)
    return table["passage_id"].to_pylist(), np.array(table["vector"].to_pylist(), dtype=np.float32)


def test_vectors_are_those_of_the_retriever(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CHUNK", 5)
    passages = passages_of(40)
    write_lines(tmp_path / "c.jsonl", passages)
    job = make_job(str(model), str(tmp_path / "out"), precision="fp32")
    info = encode_corpus(str(tmp_path / "c.jsonl"), job, shard_passages=12, progress=QUIET)
    assert (info["count"], info["dim"], info["precision"], info["dtype"]) == (40, 32, "fp32", "float32")
    ids, vectors = vectors_at(tmp_path / "out")
    assert ids == [passage["_id"] for passage in passages]
    expected = load_retriever(model).encode_passages([(passage["title"], passage["text"]) for passage in passages])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    half = make_job(str(model), str(tmp_path / "half"), precision="fp32", dtype="float16")
    encode_corpus(str(tmp_path / "c.jsonl"), half, progress=QUIET)
    assert pq.read_schema(tmp_path / "half" / "part-000000.parquet").field("vector").type == pa.list_(pa.float16(), 32)
    np.testing.assert_allclose(vectors_at(tmp_path / "half")[1], expected, atol=1e-3)
    assert str(tmp_path) not in (tmp_path / "out" / "_embeddings.json").read_text(encoding="utf-8")


def test_what_is_there_is_not_made_again(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(40))
    job = make_job(str(model), str(tmp_path / "out"))
    done: list[int] = []
    encode = worker.Encoder.__call__

    def stopping(self: Any, piece: Any, corpus: Any) -> Any:
        if len(done) == 2:
            (tmp_path / "out" / f"{BEGUN}000009-x").write_bytes(b"half a file")
            raise KeyboardInterrupt
        done.append(piece.number)
        return encode(self, piece, corpus)

    monkeypatch.setattr(worker.Encoder, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(str(tmp_path / "c.jsonl"), job, shard_passages=8, progress=QUIET)
    assert Output.at(str(tmp_path / "out")).finished() == {0, 1}
    assert not (tmp_path / "out" / "_embeddings.json").exists()
    monkeypatch.setattr(worker.Encoder, "__call__", lambda *given: done.append(given[1].number) or encode(*given))
    info = encode_corpus(str(tmp_path / "c.jsonl"), job, shard_passages=8, progress=QUIET)
    assert done == list(range(len(info["parts"])))
    assert vectors_at(tmp_path / "out")[0] == [f"p{row}" for row in range(40)]
    assert not list((tmp_path / "out").glob(f"{BEGUN}*"))
    encode_corpus(str(tmp_path / "c.jsonl"), job, shard_passages=8, progress=QUIET)
    assert len(done) == len(info["parts"]), "a finished folder is left as it is"


def test_a_piece_that_fails_leaves_no_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(10))
    job = make_job(str(model), str(tmp_path / "out"))
    monkeypatch.setattr("simlm.models.retriever.Retriever.encode_passages", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        encode_corpus(str(tmp_path / "c.jsonl"), job, progress=QUIET)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["_plan.json"]


def test_vectors_of_something_else_are_not_mixed(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(10))
    job = make_job(str(model), str(tmp_path / "out"))
    encode_corpus(str(tmp_path / "c.jsonl"), job, progress=QUIET)
    with pytest.raises(ArtifactError, match="another corpus, model or setting"):
        encode_corpus(str(tmp_path / "c.jsonl"), job, shard_passages=3, progress=QUIET)
    write_lines(tmp_path / "c.jsonl", passages_of(11))
    with pytest.raises(ArtifactError, match="another corpus, model or setting"):
        encode_corpus(str(tmp_path / "c.jsonl"), job, progress=QUIET)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ArtifactError, match="not empty, and what is there are no vectors"):
        encode_corpus(str(tmp_path / "c.jsonl"), make_job(str(model), str(tmp_path / "full")), progress=QUIET)


def test_a_damaged_file_of_vectors_is_named(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(10))
    job = make_job(str(model), str(tmp_path / "out"))
    encode_corpus(str(tmp_path / "c.jsonl"), job, progress=QUIET)
    (tmp_path / "out" / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"part-000000\.parquet: absent or damaged .*; delete it and run the same command"):
        encode_corpus(str(tmp_path / "c.jsonl"), job, progress=QUIET)


def test_settings_that_do_not_fit(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "c.jsonl", passages_of(2))
    with pytest.raises(DataError, match=r"unknown engine 'rya'; did you mean 'ray'\?"):
        encode_corpus(str(tmp_path / "c.jsonl"), make_job(str(model), str(tmp_path / "out")), engine="rya", progress=QUIET)
    with pytest.raises(DataError, match="precision: found 'fp8'; one of auto, fp32"):
        make_job(str(model), str(tmp_path / "out"), precision="fp8")
    with pytest.raises(DataError, match="not the folder of a run"):
        make_job(str(model), str(tmp_path / "out"), retriever="distilled")


def test_from_the_command_line(tmp_path: Path, model: Path) -> None:
    from typer.testing import CliRunner

    from simlm.cli import app
    from simlm.errors import SimlmError

    corpus = str(write_lines(tmp_path / "c.jsonl", passages_of(10)))
    result = CliRunner().invoke(app, ["encode", corpus, "--model", str(model), "-o", str(tmp_path / "out"), "--storage", "fp16"])
    assert result.exit_code == 0, result.output
    assert "10 vectors of 32 numbers in 1 files" in result.output
    for arguments, message in (
        ([corpus], "say with what and where to"),
        (["a.toml", "--engine", "ray"], "a recipe says itself what is encoded"),
        ([corpus, "--model", "m", "-o", "o", "--storage", "fp8"], "fp32 or fp16 was expected"),
    ):
        found = CliRunner().invoke(app, ["encode", *arguments])
        assert isinstance(found.exception, SimlmError)
        assert message in str(found.exception)


def test_a_job_travels() -> None:
    import pickle

    job = Job(ModelSettings(start="x"), "out", "digest", 32)
    assert pickle.loads(pickle.dumps(job)) == job


def test_from_an_object_store_to_an_object_store(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    passages = passages_of(40)
    with object_store() as (where, objects):
        objects["corpus/a.jsonl"] = write_lines(tmp_path / "a.jsonl", passages[:20]).read_bytes()
        objects["corpus/b/c.parquet"] = write_parquet(tmp_path / "c.parquet", passages[20:]).read_bytes()
        job = make_job(str(model), f"s3://bucket/vectors{where}", precision="fp32")
        info = encode_corpus(f"s3://bucket/corpus{where}", job, shard_passages=8, progress=QUIET)
        assert info["count"] == 40
        del objects["vectors/part-000001.parquet"]
        assert encode_corpus(f"s3://bucket/corpus{where}", job, shard_passages=8, progress=QUIET) == info
        names = sorted(name for name in objects if name.startswith("vectors/") and not name.endswith("/"))
        parts = [pq.read_table(pa.BufferReader(objects[name])) for name in names if "part-" in name]
        assert [name for name in names if "part-" not in name] == ["vectors/_embeddings.json", "vectors/_plan.json"]
    assert [name for part in parts for name in part["passage_id"].to_pylist()] == [passage["_id"] for passage in passages]
    vectors = np.concatenate([np.array(part["vector"].to_pylist(), np.float32) for part in parts])
    expected = load_retriever(model).encode_passages([(passage["title"], passage["text"]) for passage in passages])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
