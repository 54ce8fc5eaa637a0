"""The token store: corpus, queries and judgements as memory-mapped files, tokenised once.

Layout (all integers little-endian; `N` rows a table; tables are `passages` and `queries/SPLIT`):
    store.json                 counts, token width, special-token template, maxima
    tokenizer/                 the tokenizer, as transformers saves it
    TABLE/ids.bin              passage or query ids, UTF-8, end to end; id_offsets.bin int64 [N + 1]
    TABLE/id_hashes.bin        uint64 [N], sorted; id_rows.bin int64 [N], the row of each (look-up by bisection, nothing loaded)
    TABLE/text.bin             title then text of each row, UTF-8; text_offsets.bin int64 [N + 1]; title_bytes.bin uint32 [N]
    TABLE/tokens.bin           uint16 or uint32, title tokens then text tokens, no special tokens
    TABLE/word_starts.bin      one bit a token, least significant first
    TABLE/token_offsets.bin    int64 [N + 1]; title_tokens.bin uint16 [N]; lengths.bin int32 [N], the assembled sequence
    TABLE/head_*.bin           see `_Heads`; only where a tokenizer treats the first word of a text differently
    TABLE/answers.bin          JSON list a query; answer_offsets.bin int64 [N + 1]; only where the data set has answers
    TABLE/metadata.bin         JSON object a passage, nothing for one without; metadata_offsets.bin int64 [N + 1]; only where there is any
    qrels/SPLIT/               offsets.bin int64 [Q + 1], passage_rows.bin int64, grades.bin int32

A row keeps up to `kept_tokens` tokens of its title and as many of its text, more than the retriever's maximum where that is short:
the cross-encoder has room for more of the passage when the query is short. `Table.lengths` and `collate` cut as transformers'
`truncation=True` does, so a stored row and the same text given to the tokenizer make the same sequence.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simlm.artifacts import open_artifact, read_manifest
from simlm.data.tokens import Template
from simlm.errors import DataError
from simlm.types import SPLITS, Scalar, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ints = NDArray[np.int64]

INFO = "store.json"
TOKENIZER = "tokenizer"


class IdColumn:
    """Ids of a table: row -> id and id -> row, both on memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        self._blob = map_bytes(folder / "ids.bin")
        self._offsets = map_array(folder / "id_offsets.bin", np.int64)
        self._hashes = map_array(folder / "id_hashes.bin", np.uint64)
        self._rows = map_array(folder / "id_rows.bin", np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        return self._blob[self._offsets[row] : self._offsets[row + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def row(self, name: str) -> int:
        """Row of an id; KeyError if the table has no such id."""
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found

    def find(self, name: str) -> int | None:
        """Row of an id, None if the table has no such id."""
        wanted = np.uint64(id_hash(name))
        position = int(np.searchsorted(self._hashes, wanted))
        while position < len(self._hashes) and self._hashes[position] == wanted:
            row = int(self._rows[position])
            if self[row] == name:
                return row
            position += 1
        return None


class Table:
    """Passages, or the queries of one split.

    lengths: int32 [N], tokens of the assembled sequence with special tokens, cut to `max_tokens`.
    Pickles as its path, so that data-loader processes map the same files.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.info = info
        self.template = Template(**info["template"])
        self.max_tokens = int(info["max_tokens"])
        self.ids = IdColumn(self.folder)
        self.lengths: NDArray[np.int32] = map_array(self.folder / "lengths.bin", np.int32)
        self.tokens = map_array(self.folder / "tokens.bin", np.dtype(info["token_dtype"]))
        self.word_start_bits = map_array(self.folder / "word_starts.bin", np.uint8)
        self.token_offsets = map_array(self.folder / "token_offsets.bin", np.int64)
        self.title_tokens = map_array(self.folder / "title_tokens.bin", np.uint16)
        self.heads = _Heads.open(self.folder, np.dtype(info["token_dtype"])) if info["heads"] else None
        self._text = map_bytes(self.folder / "text.bin")
        self._text_offsets = map_array(self.folder / "text_offsets.bin", np.int64)
        self._title_bytes = map_array(self.folder / "title_bytes.bin", np.uint32)
        self._answers = map_bytes(self.folder / "answers.bin") if info["answers"] else None
        self._answer_offsets = map_array(self.folder / "answer_offsets.bin", np.int64) if info["answers"] else None
        self._metadata = map_bytes(self.folder / "metadata.bin") if info["metadata"] else None
        self._metadata_offsets = map_array(self.folder / "metadata_offsets.bin", np.int64) if info["metadata"] else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type[Table], tuple[Path, dict[str, Any]]]:
        return Table, (self.folder, self.info)

    def text(self, row: int) -> str:
        """Text of a passage (without its title) or of a query."""
        start = int(self._text_offsets[row]) + int(self._title_bytes[row])
        return self._text[start : int(self._text_offsets[row + 1])].decode()

    def title(self, row: int) -> str:
        """Title of a passage; empty where it has none, and for queries."""
        start = int(self._text_offsets[row])
        return self._text[start : start + int(self._title_bytes[row])].decode()

    def answers(self, row: int) -> tuple[str, ...]:
        """Answer strings of a query; empty where the data set has none."""
        if self._answers is None or self._answer_offsets is None:
            return ()
        return tuple(json.loads(self._answers[int(self._answer_offsets[row]) : int(self._answer_offsets[row + 1])]))

    def metadata(self, row: int) -> dict[str, Scalar]:
        """Metadata of a passage by field name; empty where it has none, and for queries."""
        if self._metadata is None or self._metadata_offsets is None:
            return {}
        found = self._metadata[int(self._metadata_offsets[row]) : int(self._metadata_offsets[row + 1])]
        return dict(json.loads(found)) if found else {}

    def tokens_of(self, row: int) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
        """Kept tokens of title and of text, without special tokens."""
        start, stop = int(self.token_offsets[row]), int(self.token_offsets[row + 1])
        middle = start + int(self.title_tokens[row])
        return self.tokens[start:middle], self.tokens[middle:stop]


@dataclass(frozen=True)
class _Heads:
    """How the tokens of a text change when a title and a space stand before it.

    A cross-encoder reads "title text" as one string, where a space-sensitive tokenizer gives the text's first word other tokens.
    Row r of that string is: title tokens, tokens[offsets[r]:offsets[r + 1]], then the text's tokens without the first `skip[r]`.
    """

    tokens: NDArray[np.integer[Any]]
    starts: NDArray[np.uint8]
    offsets: Ints
    skip: NDArray[np.int32]

    @classmethod
    def open(cls, folder: Path, dtype: np.dtype[Any]) -> _Heads:
        return cls(
            map_array(folder / "head_tokens.bin", dtype),
            map_array(folder / "head_starts.bin", np.uint8),
            map_array(folder / "head_offsets.bin", np.int64),
            map_array(folder / "head_skip.bin", np.int32),
        )


class Store:
    """A finished store. Open with `Store.open(path)`, which checks it; pickles as its path."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.info: dict[str, Any] = json.loads((self.path / INFO).read_text(encoding="utf-8"))
        self.passages = Table(self.path / "passages", self._table_info("passages"))
        self._queries: dict[Split, Table] = {}
        self._tokenizer: PreTrainedTokenizerFast | None = None

    @classmethod
    def open(cls, path: Path | str, *, verify: Literal["full", "sizes"] = "full") -> Store:
        """Open a store and check its files; ArtifactError if it is not whole."""
        return cls(open_artifact(path, "store", verify=verify).path)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.path,)

    @property
    def splits(self) -> list[Split]:
        """Splits that have queries, in the order train, dev, test."""
        return [split for split in SPLITS if split in self.info["queries"]]

    def queries(self, split: Split) -> Table:
        """Queries of a split; DataError if the store has none."""
        if split not in self._queries:
            if split not in self.info["queries"]:
                raise DataError(f"{self.path}: no {split!r} queries in this store, it has {self.splits or 'no queries at all'}")
            self._queries[split] = Table(self.path / "queries" / split, self._table_info(f"queries/{split}"))
        return self._queries[split]

    def qrels(self, split: Split) -> dict[int, dict[int, int]]:
        """Query row -> {passage row: grade}; grades of 0 and below (judged not relevant) are there too."""
        offsets, passage_rows, grades = self.qrel_arrays(split)
        rows, values, bounds = passage_rows.tolist(), grades.tolist(), offsets.tolist()
        return {
            query: dict(zip(rows[bounds[query] : bounds[query + 1]], values[bounds[query] : bounds[query + 1]], strict=True))
            for query in range(len(bounds) - 1)
        }

    def qrel_arrays(self, split: Split) -> tuple[Ints, Ints, NDArray[np.int32]]:
        """Judgements of a split as flat arrays: offsets int64 [Q + 1], passage rows int64, grades int32."""
        self.queries(split)
        folder = self.path / "qrels" / split
        return (
            map_array(folder / "offsets.bin", np.int64),
            map_array(folder / "passage_rows.bin", np.int64),
            map_array(folder / "grades.bin", np.int32),
        )

    def answers(self, split: Split, row: int) -> tuple[str, ...]:
        """Answer strings of a query; empty where the data set has none."""
        return self.queries(split).answers(row)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer the store was made with."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(str(self.path / TOKENIZER)))
        return self._tokenizer

    def _table_info(self, name: str) -> dict[str, Any]:
        shared = {key: self.info[key] for key in ("template", "token_dtype", "heads")}
        queries = name != "passages"
        return {
            **shared,
            "heads": self.info["heads"] and not queries,
            "answers": queries and self.info["tables"][name]["with_answers"],
            # Stores made before there was metadata do not count it.
            "metadata": self.info["tables"][name].get("with_metadata", 0),
            "max_tokens": self.info["max_query_tokens"] if queries else self.info["max_passage_tokens"],
        }


def passages_fingerprint(path: Path) -> str:
    """Of the store whose passages a store has: its own, or that of the store it took them from. Where it is equal, rows are too."""
    own = read_manifest(path, "store").fingerprint
    taken_from = json.loads((Path(path) / INFO).read_text(encoding="utf-8")).get("passages_of")
    return str(taken_from or own)


def id_hash(name: str, seed: int | None = None) -> int:
    """64-bit hash of an id; with a seed, a pseudo-random number that depends on seed and id alone."""
    return hash_bytes(name.encode(), seed)


def hash_bytes(data: bytes, seed: int | None = None) -> int:
    """64-bit hash, the same on every machine."""
    salt = b"" if seed is None else (seed % (1 << 64)).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, salt=salt).digest(), "little")


def map_array(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    """A file as a read-only array; empty files cannot be mapped and give an empty array."""
    little = np.dtype(dtype).newbyteorder("<")
    if path.stat().st_size == 0:
        return np.empty(0, dtype=little)
    return np.asarray(np.memmap(path, dtype=little, mode="r"))


def map_bytes(path: Path) -> bytes | mmap.mmap:
    if path.stat().st_size == 0:
        return b""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
