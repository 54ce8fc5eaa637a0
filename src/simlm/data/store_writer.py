"""Writing a token store: passages, queries and judgements in, the files that `simlm.data.store` describes out."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import write_json
from simlm.data.store import INFO, TOKENIZER, Store, hash_bytes, map_array, map_bytes, passages_fingerprint
from simlm.data.tokens import Template, TextEncoder, Tokens, plain_tokenizer, truncate_pair
from simlm.errors import DataError
from simlm.types import Scalar, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# A cross-encoder's pair is at most 192 tokens in the paper; 256 kept tokens serve pairs up to 256 exactly.
KEPT_TOKENS = 256
# A chunk is what one thread tokenises at a time; both bounds keep memory flat whatever the passages are.
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 20
HEAD_FILES = ("head_tokens", "head_starts", "head_offsets", "head_skip")


@dataclass(frozen=True)
class Row:
    """What a table is written from."""

    name: str
    text: str
    title: str = ""
    answers: tuple[str, ...] = ()
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


class StoreWriter:
    """Writes a store into an empty folder: passages first, then queries and judgements, then `finish`.

    Memory stays at a few chunks of passages, and 8 bytes a row while the ids of a table are sorted.
    num_workers: threads that tokenise at the same time (the tokenizers library works outside Python's lock); 0 = one a core.
    """

    def __init__(
        self, path: Path, tokenizer: PreTrainedTokenizerFast, *, max_passage_tokens: int, max_query_tokens: int, num_workers: int = 0
    ) -> None:
        self.path = Path(path)
        self.template = Template.of(tokenizer)
        self.kept_tokens = max(KEPT_TOKENS, max_passage_tokens, max_query_tokens)
        self.encoder = TextEncoder(plain_tokenizer(tokenizer), kept=self.kept_tokens)
        vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.token_dtype = "<u2" if vocabulary <= 1 << 16 else "<u4"
        self.num_workers = num_workers or available_cores()
        self.info: dict[str, Any] = {
            "format": 1,
            "vocabulary": vocabulary,
            "token_dtype": self.token_dtype,
            "template": asdict(self.template),
            "words": self.encoder.words,
            "heads": self.encoder.space_sensitive,
            "kept_tokens": self.kept_tokens,
            "max_passage_tokens": max_passage_tokens,
            "max_query_tokens": max_query_tokens,
            "num_passages": 0,
            "queries": {},
            "tables": {},
        }
        for name, least in (("max_passage_tokens", self.template.num_pair + 2), ("max_query_tokens", self.template.num_single + 1)):
            if self.info[name] < least:
                raise DataError(f"{name} = {self.info[name]} leaves no room beside the special tokens; {least} or more is needed")
        save_tokenizer(tokenizer, self.path / TOKENIZER)
        self.info["tokenizer_sha256"] = hashlib.sha256((self.path / TOKENIZER / "tokenizer.json").read_bytes()).hexdigest()

    def write_passages(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Write the corpus; returns its facts (rows, tokens, mean length ...)."""
        facts = self._write_table("passages", rows, self.info["max_passage_tokens"], heads=self.encoder.space_sensitive)
        self.info["num_passages"] = facts["rows"]
        return facts

    def take_passages(self, store: Store) -> None:
        """Have the passages of a finished store, row for row, without reading or copying them where the file system has hard links."""
        assert (self.kept_tokens, self.token_dtype) == (store.info["kept_tokens"], store.info["token_dtype"]), "another tokenizer or length"
        folder = self.path / "passages"
        folder.mkdir(parents=True)
        for file in sorted((store.path / "passages").iterdir()):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)
        self.info["num_passages"] = store.info["num_passages"]
        self.info["tables"]["passages"] = store.info["tables"]["passages"]
        self.info["passages_of"] = passages_fingerprint(store.path)

    def take_queries(self, store: Store, split: Split, chosen: Ints) -> dict[str, Any]:
        """Write queries of a finished store with their judgements; returns their facts.

        chosen: int64, ascending rows of that store's queries; they become rows 0, 1, 2 ...
        """
        table = store.queries(split)
        facts = self.write_queries(split, (Row(table.ids[row], table.text(row), answers=table.answers(row)) for row in map(int, chosen)))
        offsets, passage_rows, grades = store.qrel_arrays(split)
        counts = np.diff(offsets)[chosen]
        places = np.concatenate([np.empty(0, np.int64), *(np.arange(offsets[row], offsets[row + 1]) for row in chosen)]).astype(np.int64)
        self.write_qrels(split, np.repeat(np.arange(len(chosen)), counts), np.asarray(passage_rows)[places], np.asarray(grades)[places])
        return facts

    def write_queries(self, split: Split, rows: Iterable[Row]) -> dict[str, Any]:
        """Write the queries of a split; returns their facts."""
        facts = self._write_table(f"queries/{split}", rows, self.info["max_query_tokens"], heads=False)
        self.info["queries"][split] = facts["rows"]
        return facts

    def write_qrels(self, split: Split, query_rows: Ints, passage_rows: Ints, grades: NDArray[np.int32]) -> None:
        """Write judgements given as three arrays of one length, in any order; one judgement a pair."""
        order = np.lexsort((passage_rows, query_rows))
        counts = np.bincount(query_rows, minlength=self.info["queries"][split])
        folder = self.path / "qrels" / split
        folder.mkdir(parents=True)
        _offsets(counts).tofile(folder / "offsets.bin")
        passage_rows[order].astype("<i8").tofile(folder / "passage_rows.bin")
        grades[order].astype("<i4").tofile(folder / "grades.bin")

    def finish(self, **more: Any) -> None:
        """Write store.json; `more` is kept in it."""
        write_json(self.path / INFO, {**self.info, **more})

    def _write_table(self, name: str, rows: Iterable[Row], max_tokens: int, *, heads: bool) -> dict[str, Any]:
        folder = self.path / name
        folder.mkdir(parents=True)
        writer = _TableWriter(folder, self.template, max_tokens=max_tokens, kept=self.kept_tokens, dtype=self.token_dtype, heads=heads)
        with writer.open(), _serial_tokenizers(), ThreadPoolExecutor(self.num_workers) as pool:
            waiting: deque[Future[list[_Encoded]]] = deque()
            for chunk in _chunks(rows):
                waiting.append(pool.submit(_encode_chunk, self.encoder, chunk, heads))
                if len(waiting) > 2 * self.num_workers:
                    writer.add(waiting.popleft().result())
            while waiting:
                writer.add(waiting.popleft().result())
        _sort_ids(folder)
        facts = writer.facts()
        self.info["tables"][name] = facts
        return facts


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer so that the text of a special token inside a passage stays text (`split_special_tokens`), also when loaded."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.init_kwargs["split_special_tokens"] = True
    tokenizer.split_special_tokens = True
    tokenizer.save_pretrained(str(folder))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Encoded:
    row: Row
    title: Tokens
    text: Tokens
    joined: Tokens | None


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text) + len(row.title)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode_chunk(encoder: TextEncoder, chunk: list[Row], heads: bool) -> list[_Encoded]:
    texts = encoder.encode([row.text for row in chunk])
    titled = [position for position, row in enumerate(chunk) if row.title]
    nothing = Tokens([], np.empty(0, dtype=bool), False)
    titles = dict(zip(titled, encoder.encode([chunk[position].title for position in titled]), strict=True))
    joined: dict[int, Tokens] = {}
    if heads:
        joined = dict(zip(titled, encoder.encode([" " + chunk[position].text for position in titled]), strict=True))
    return [_Encoded(row, titles.get(place, nothing), texts[place], joined.get(place)) for place, row in enumerate(chunk)]


class _TableWriter:
    """Appends encoded rows to the files of one table."""

    def __init__(self, folder: Path, template: Template, *, max_tokens: int, kept: int, dtype: str, heads: bool) -> None:
        self.folder, self.template, self.max_tokens, self.kept, self.dtype, self.heads = folder, template, max_tokens, kept, dtype, heads
        self.files: dict[str, BinaryIO] = {}
        self.ends = {"id": 0, "text": 0, "token": 0, "head": 0, "answer": 0, "metadata": 0}
        self.spare_bits: Bools = np.empty(0, dtype=bool)
        self.rows = self.titles = self.cut = self.total_tokens = self.with_answers = self.with_metadata = self.longest = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        names = ["ids", "id_offsets", "text", "text_offsets", "title_bytes", "tokens", "word_starts", "token_offsets", "title_tokens"]
        names += [
            "lengths",
            "answers",
            "answer_offsets",
            "metadata",
            "metadata_offsets",
            *(["head_tokens", "head_starts", "head_offsets", "head_skip"] if self.heads else []),
        ]
        with ExitStack() as stack:
            self.files = {name: stack.enter_context(open(self.folder / f"{name}.bin", "wb")) for name in names}
            for name in names:
                if name.endswith("_offsets"):
                    self.files[name].write(bytes(8))
            yield
            self.files["word_starts"].write(np.packbits(self.spare_bits, bitorder="little").tobytes())
        unused = [] if self.with_answers else ["answers", "answer_offsets"]
        unused += [] if self.with_metadata else ["metadata", "metadata_offsets"]
        for name in unused:
            (self.folder / f"{name}.bin").unlink()

    def add(self, chunk: list[_Encoded]) -> None:
        self._strings("ids", "id", [encoded.row.name.encode() for encoded in chunk])
        titles = [encoded.row.title.encode() for encoded in chunk]
        self._strings("text", "text", [title + encoded.row.text.encode() for title, encoded in zip(titles, chunk, strict=True)])
        self._array("title_bytes", "<u4", [len(title) for title in titles])
        lists = [json.dumps(encoded.row.answers, ensure_ascii=False).encode() for encoded in chunk]
        self._strings("answers", "answer", lists)
        self._strings("metadata", "metadata", [_metadata_bytes(encoded.row) for encoded in chunk])
        self._tokens(chunk)
        if self.heads:
            self._joined(chunk)
        self.rows += len(chunk)
        self.titles += sum(1 for title in titles if title)
        self.with_answers += sum(1 for encoded in chunk if encoded.row.answers)
        self.with_metadata += sum(1 for encoded in chunk if encoded.row.metadata)

    def facts(self) -> dict[str, Any]:
        """Rows, titles, tokens with special tokens, mean and longest length, rows cut at the maximum; rows with metadata if any."""
        return {
            "rows": self.rows,
            "with_title": self.titles,
            "with_answers": self.with_answers,
            "tokens": self.total_tokens,
            "mean_tokens": round(self.total_tokens / self.rows, 2) if self.rows else 0.0,
            "longest_tokens": self.longest,
            "cut": self.cut,
            **({"with_metadata": self.with_metadata} if self.with_metadata else {}),
        }

    def _tokens(self, chunk: list[_Encoded]) -> None:
        raw_titles = np.array([len(encoded.title.ids) for encoded in chunk], dtype=np.int64)
        raw_texts = np.array([len(encoded.text.ids) for encoded in chunk], dtype=np.int64)
        pieces: list[int] = []
        starts: list[Bools] = [self.spare_bits]
        for encoded in chunk:
            pieces += encoded.title.ids
            pieces += encoded.text.ids
            starts += [encoded.title.starts, encoded.text.starts]
        self._array("tokens", self.dtype, pieces)
        bits = np.concatenate(starts)
        whole = len(bits) - len(bits) % 8
        self.files["word_starts"].write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self.spare_bits = bits[whole:]
        self._ends("token", raw_titles + raw_texts)
        self._array("title_tokens", "<u2", raw_titles)
        lengths = assembled_lengths(self.template, raw_titles, raw_texts, self.max_tokens)
        self._array("lengths", "<i4", lengths)
        special = np.where(raw_titles > 0, self.template.num_pair, self.template.num_single)
        was_cut = np.array([encoded.title.cut or encoded.text.cut for encoded in chunk])
        self.cut += int((was_cut | (raw_titles + raw_texts + special > lengths)).sum())
        self.total_tokens += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))

    def _joined(self, chunk: list[_Encoded]) -> None:
        counts, skips, tokens, starts = [], [], [], []
        for encoded in chunk:
            head, skip = 0, 0
            if encoded.joined is not None:
                head, skip = _unlike_head(encoded.joined, encoded.text)
                tokens += encoded.joined.ids[:head]
                starts += encoded.joined.starts[:head].tolist()
            counts.append(head)
            skips.append(skip)
        self._array("head_tokens", self.dtype, tokens)
        self._array("head_starts", "<u1", starts)
        self._array("head_skip", "<i4", skips)
        self._ends("head", np.array(counts, dtype=np.int64))

    def _strings(self, name: str, offsets: str, strings: list[bytes]) -> None:
        self.files[name].write(b"".join(strings))
        self._ends(offsets, np.array([len(string) for string in strings], dtype=np.int64))

    def _ends(self, name: str, lengths: Ints) -> None:
        ends = self.ends[name] + np.cumsum(lengths)
        self.ends[name] = int(ends[-1])
        self._array(f"{name}_offsets", "<i8", ends)

    def _array(self, name: str, dtype: str, values: Any) -> None:
        self.files[name].write(np.asarray(values, dtype=dtype).tobytes())


def _metadata_bytes(row: Row) -> bytes:
    if not row.metadata:
        return b""
    return json.dumps(dict(row.metadata), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def assembled_lengths(template: Template, titles: Ints, texts: Ints, max_tokens: int) -> NDArray[np.int32]:
    """Tokens of `[CLS] title [SEP] text [SEP]` (or `[CLS] text [SEP]` where the title has none), cut to `max_tokens`."""
    pair_title, pair_text = truncate_pair(titles, texts, max_tokens - template.num_pair)
    single = np.minimum(texts, max_tokens - template.num_single) + template.num_single
    return np.where(titles > 0, pair_title + pair_text + template.num_pair, single).astype(np.int32)


def _unlike_head(joined: Tokens, alone: Tokens) -> tuple[int, int]:
    """(tokens of `joined`, tokens of `alone`) before the two run together, as few as possible; all of both if they never do."""
    whole = not joined.cut and not alone.cut
    for total in range(33):
        for head in range(total + 1):
            skip = total - head
            rest = min(len(joined.ids) - head, len(alone.ids) - skip)
            if rest <= 0 or (whole and len(joined.ids) - head != len(alone.ids) - skip):
                continue
            if joined.ids[head : head + rest] == alone.ids[skip : skip + rest]:
                return head, skip
    return len(joined.ids), len(alone.ids)


def _sort_ids(folder: Path) -> None:
    """Write the look-up from ids to rows."""
    blob = map_bytes(folder / "ids.bin")
    offsets = map_array(folder / "id_offsets.bin", np.int64)
    count = len(offsets) - 1
    bounds = offsets.tolist()
    hashes = np.fromiter((hash_bytes(blob[bounds[row] : bounds[row + 1]]) for row in range(count)), dtype=np.uint64, count=count)
    order = np.argsort(hashes, kind="stable")
    hashes[order].astype("<u8").tofile(folder / "id_hashes.bin")
    order.astype("<i8").tofile(folder / "id_rows.bin")


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Each thread tokenises its own chunk; the library's own threads would only compete with ours."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _offsets(counts: Ints) -> Ints:
    offsets = np.zeros(len(counts) + 1, dtype="<i8")
    np.cumsum(counts, out=offsets[1:])
    return offsets
