"""Passages added to a finished run, and passages deleted from it, without training or encoding anything again.

    RUN/added/current.json         what counts: the segments, the deletions, and the corpus that they belong to
    RUN/added/0001/ ...            a segment: store, bm25, NAME_embeddings and NAME_index of the passages of one call, each an artifact
    RUN/added/deleted-*.npy        int64, rows of deleted passages, sorted; a row counts through corpus and segments, in their order

Nothing counts that current.json does not name, and it is replaced by a rename when all else is on the disk: a kill leaves the state before
or the state after. What a killed call has finished or encoded is taken up when the same passages are added again.
The artifacts of the run stay as they are. A run whose store is made again has another corpus: what was added to the old one is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simlm.artifacts import (
    ArtifactBuilder,
    Kind,
    Manifest,
    file_digest,
    json_digest,
    open_artifact,
    peak_memory_bytes,
    read_manifest,
    write_json,
)
from simlm.errors import ArtifactError, DataError, SimlmError
from simlm.progress import Progress
from simlm.rankings import Ints
from simlm.searcher import find_retriever, opened_index

if TYPE_CHECKING:
    from simlm.data.store import Store
    from simlm.data.store_writer import Row

FOLDER = "added"
CURRENT = "current.json"
VERSION = 1
"""Of the way segments are made; part of their fingerprints."""
LOADERS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class Additions:
    """What has been added to a run and deleted from it. segments: their folders, in order; deleted: sorted rows."""

    run: Path
    segments: tuple[Path, ...]
    deleted: Ints

    @classmethod
    def open(cls, run: Path) -> Additions:
        """Of a run; nothing where nothing was added or deleted. ArtifactError if it is damaged or of another corpus."""
        folder = run / FOLDER
        try:
            state = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
            store, names, deletions = state["store"], [str(name) for name in state["segments"]], state["deleted"]
            deletions = None if deletions is None else (str(deletions["file"]), str(deletions["sha256"]))
        except FileNotFoundError:
            return cls(run, (), np.empty(0, np.int64))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / CURRENT}: not readable ({error!r}); delete {folder} and add the passages again") from None
        if store != _corpus_fingerprint(run):
            raise ArtifactError(
                f"{folder}: belongs to an earlier 'store' than the one that is there now; delete it, and add what is still missing again"
            )
        deleted = np.empty(0, np.int64)
        if deletions is not None:
            file = folder / deletions[0]
            if not file.is_file() or file_digest(file) != deletions[1]:
                raise ArtifactError(f"{file}: absent or not the file that {CURRENT} names; delete {folder} and add the passages again")
            deleted = np.load(file, allow_pickle=False)
        return cls(run, tuple(folder / name for name in names), deleted)

    def __bool__(self) -> bool:
        return bool(self.segments) or len(self.deleted) > 0

    def alive(self, count: int) -> NDArray[np.bool_] | None:
        """bool [count]: rows that are not deleted; None if none is."""
        if not len(self.deleted):
            return None
        alive = np.ones(count, dtype=bool)
        alive[self.deleted] = False
        return alive

    def num_added(self) -> int:
        """Passages in the segments, deleted ones too."""
        return sum(int(read_manifest(segment / "store", "store").facts["passages"]["rows"]) for segment in self.segments)

    def extend_store(self, store: Store) -> None:
        """Let the passages of an opened store be those of the corpus and of the segments together."""
        from simlm.data.joined import JoinedTable
        from simlm.data.store import Store

        if self:
            tables = [store.passages, *(Store.open(segment / "store").passages for segment in self.segments)]
            store.passages = JoinedTable(tables, self.alive(sum(map(len, tables))))

    def extend_index(self, name: str, index: Any) -> Any:
        """The index `name` of the run together with those of the segments; the index itself where nothing was added or deleted.

        Raises ArtifactError if a segment was encoded by another model than the run's passages, or is compared by other numbers.
        """
        from simlm.index import open_index
        from simlm.index.segments import SegmentedIndex

        if not self:
            return index
        for segment in self.segments:
            self._check_segment(segment, name)
        parts = [index, *(open_index(segment / name) for segment in self.segments)]
        for part in parts[1:]:
            if _numbers_compared(part) != _numbers_compared(index):
                raise ArtifactError(
                    f"{part.folder}: compares {_numbers_compared(part)} numbers of a vector, the run's index {_numbers_compared(index)}, "
                    f"so their scores say different things; {self._again(name)}"
                )
        return SegmentedIndex(parts, index.takes, self.alive(sum(map(len, parts))))

    def _again(self, name: str) -> str:
        of = "" if name == "bm25" else f" --retriever {name.removesuffix('_index')}"
        return f"bring what was added up to the run's models: simlm add-passages {self.run}{of}"

    def _check_segment(self, segment: Path, name: str) -> None:
        again = self._again(name)
        if not (segment / name).is_dir():
            raise ArtifactError(f"{segment}: has no {name!r}, the passages were added for another retriever; {again}")
        if name == "bm25":
            return
        encoded = f"{name.removesuffix('_index')}_embeddings"
        here, there = (read_manifest(folder / encoded, "embeddings") for folder in (segment, self.run))
        if (here.inputs.get("model"), _model_of(here)) != (there.inputs.get("model"), _model_of(there)):
            raise ArtifactError(f"{segment / encoded}: encoded by an earlier model than the run's passages; {again}")


def _numbers_compared(index: Any) -> int | None:
    """Numbers of a vector that an index's scores come from; None where it compares words."""
    info: dict[str, Any] = index.info
    return info.get("dim") if info.get("rescore") else info.get("cut", info.get("dim"))


@dataclass(frozen=True)
class Change:
    """What a call has done. encoded: passages that went through the model; total: passages that can be found now."""

    added: int
    deleted: int
    encoded: int
    total: int


def add_passages(run: Path, file: Path, *, retriever: str | None = None, replace: bool = False, progress: Progress | None = None) -> Change:
    """Add the passages of a JSONL, CSV or Parquet file to what a run finds.

    retriever: whose index they join; none = the one that searches use. replace: passages whose ids are there already take the place of
    those; else that is an error. Raises DataError for what cannot be used, before anything is encoded.
    """
    run = Path(run)
    with _alone(run):
        before = Additions.open(run)
        store = _extended_store(run, before)
        rows = _read(file)
        replaced = _check_ids(store, rows, file, replace)
        segment = run / FOLDER / _next_name(before)
        made = _Segment(run, segment, retriever, progress)
        encoded = made.make(rows, file_digest(file))
        _write_state(run, [*before.segments, segment], np.union1d(before.deleted, replaced))
        total = len(store.passages) + len(rows) - len(before.deleted) - len(replaced)
        return Change(len(rows), len(replaced), encoded, total)


def delete_passages(run: Path, ids: Sequence[str]) -> Change:
    """Let passages be found no more. DataError, and nothing is done, if one of the ids is not there."""
    run = Path(run)
    with _alone(run):
        before = Additions.open(run)
        store = _extended_store(run, before)
        found = {name: store.passages.ids.find(name) for name in ids}
        unknown = [name for name, row in found.items() if row is None]
        if unknown:
            raise DataError(
                f"{_listed(unknown)}: no passage of {run} has this id (of {len(found):,} given, {len(unknown):,} are not there)"
            )
        rows = np.array(sorted(row for row in found.values() if row is not None), dtype=np.int64)
        _write_state(run, before.segments, np.union1d(before.deleted, rows))
        return Change(0, len(rows), 0, len(store.passages) - len(before.deleted) - len(rows))


def refresh(run: Path, *, retriever: str | None = None, progress: Progress | None = None) -> Change:
    """Bring what was added up to the run's models: encode the segments again where they were encoded by others."""
    run = Path(run)
    with _alone(run):
        before = Additions.open(run)
        encoded = sum(_Segment(run, segment, retriever, progress).bring_up() for segment in before.segments)
        return Change(0, 0, encoded, len(_extended_store(run, before).passages) - len(before.deleted))


class _Segment:
    """One segment under construction: four artifacts beside each other."""

    def __init__(self, run: Path, folder: Path, retriever: str | None, progress: Progress | None) -> None:
        self.run = run
        self.folder = folder
        self.progress = progress or Progress(quiet=True)
        bm25_alone = retriever is None and (run / "bm25").is_dir() and not any(run.glob("*_index"))
        self.dense = None if bm25_alone else find_retriever(run, retriever)
        """Name of the retriever, and the folder of its model where that is a trained one; none where the run has BM25 alone."""

    def make(self, rows: list[Row], digest: str) -> int:
        """Write all of it; how many passages were encoded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._artifact("store", "store", [_corpus_fingerprint(self.run), digest], {}, lambda builder: self._write_store(rows, builder))
        return self.bring_up()

    def bring_up(self) -> int:
        """Write what is missing or was made by other models; how many passages were encoded."""
        encoded = 0
        if self.dense is not None:
            name, model = self.dense
            encoded = self._encode(name, model)
            self._index(name)
        if (self.run / "bm25").is_dir():
            self._bm25()
        return encoded

    def _write_store(self, rows: list[Row], builder: ArtifactBuilder) -> None:
        from simlm.data.store import Store
        from simlm.data.store_writer import StoreWriter

        for entry in builder.work.iterdir():
            if entry != builder.resume:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        corpus = Store.open(self.run / "store")
        lengths = {name: int(corpus.info[name]) for name in ("max_passage_tokens", "max_query_tokens")}
        writer = StoreWriter(builder.work, corpus.tokenizer(), **lengths)
        builder.facts.update(passages=writer.write_passages(rows))
        writer.finish(scripts=corpus.info.get("scripts", {}), source={})

    def _encode(self, name: str, model: Path | None) -> int:
        from simlm.recipe import EncodeSettings
        from simlm.stages import Context, encode

        theirs = read_manifest(self.run / f"{name}_embeddings", "embeddings")
        # The cache of the run belongs to its steps.
        settings = EncodeSettings.model_validate(theirs.settings | {"cache": False})
        inputs = {"store": self.folder / "store"} | ({"model": model} if model else {})
        fingerprints = {role: read_manifest(path).fingerprint for role, path in inputs.items()}
        made = self._artifact(
            f"{name}_embeddings",
            "embeddings",
            [settings.model_dump(), fingerprints],
            fingerprints,
            lambda builder: encode.run(settings, inputs, Context(builder, theirs.seed, self.progress)),
            settings.model_dump(),
        )
        return int(read_manifest(self.folder / f"{name}_embeddings").facts["num_passages"]) if made else 0

    def _index(self, name: str) -> None:
        from simlm.index import INFO
        from simlm.recipe import IndexSettings
        from simlm.stages import Context, build_index

        theirs = json.loads(open_artifact(opened_index(self.run, name), "index", verify="sizes").file(INFO).read_text(encoding="utf-8"))
        # Scores of an index that was cut are those of what is left of the vectors, unless it scores with the whole ones in the end.
        cut = 0 if theirs.get("rescore") else int(theirs.get("cut", 0))
        settings = IndexSettings(type="flat", options={"dim": 0 if cut == theirs["dim"] else cut})
        inputs = {"store": self.folder / "store", "embeddings": self.folder / f"{name}_embeddings"}
        fingerprints = {role: read_manifest(path).fingerprint for role, path in inputs.items()}
        self._artifact(
            f"{name}_index",
            "index",
            [settings.model_dump(), fingerprints],
            fingerprints,
            lambda builder: build_index.run(settings, inputs, Context(builder, 0, self.progress)),
            settings.model_dump(),
        )

    def _bm25(self) -> None:
        from simlm.data.store import Store
        from simlm.index import INFO, open_index
        from simlm.index.bm25 import BM25Index
        from simlm.stages.build_index import PassageTexts

        base: Any = open_index(self.run / "bm25")
        store = Store.open(self.folder / "store")
        fingerprints = {"store": read_manifest(store.path).fingerprint, "base": read_manifest(base.folder).fingerprint}

        def build(builder: ArtifactBuilder) -> None:
            corpus = PassageTexts(Store.open(self.run / "store").passages)
            info = BM25Index.build_addition(PassageTexts(store.passages), builder.work, base, corpus)
            write_json(builder.work / INFO, info | {"type": "bm25", "store_fingerprint": fingerprints["store"]})

        self._artifact("bm25", "index", [fingerprints], fingerprints, build)

    def _artifact(
        self,
        name: str,
        kind: Kind,
        basis: list[Any],
        inputs: dict[str, str],
        build: Callable[[ArtifactBuilder], None],
        settings: dict[str, Any] | None = None,
    ) -> bool:
        """Make one of the artifacts unless it is there; whether it was made."""
        path = self.folder / name
        fingerprint = json_digest(["added", name, VERSION, *basis])
        if path.is_dir() and read_manifest(path, kind).fingerprint == fingerprint:
            return False
        builder = ArtifactBuilder(path, kind=kind, stage="add_passages", code_version=VERSION, fingerprint=fingerprint)
        builder.begin()
        started = time.monotonic()
        build(builder)
        seconds = time.monotonic() - started
        builder.finish(settings=settings or {}, inputs=inputs, seed=0, seconds=seconds, peak_memory_bytes=peak_memory_bytes())
        return True


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One call at a time; the lock falls with the process that holds it."""
    if not (run / "store").is_dir():
        raise ArtifactError(f"{run}: holds no finished `store`, so this is not the folder of a run; give runs/NAME, made by `simlm run`")
    (run / FOLDER).mkdir(exist_ok=True)
    with open(run / FOLDER / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SimlmError(f"{run / FOLDER}: another process is adding or deleting passages; wait until it has finished") from None
        yield


def _write_state(run: Path, segments: Sequence[Path], deleted: Ints) -> None:
    """Let this be what counts. The list of deletions before this one stays for who is reading it; older ones go."""
    folder = run / FOLDER
    earlier = _deletions(folder)
    deletions = None
    if len(deleted):
        number = 1 + max((int(path.stem.removeprefix("deleted-")) for path in folder.glob("deleted-*.npy")), default=0)
        file = folder / f"deleted-{number:04d}.npy"
        temporary = folder / f".{file.name}.tmp"
        with open(temporary, "wb") as output:
            np.save(output, deleted.astype(np.int64), allow_pickle=False)
            output.flush()
            os.fsync(output.fileno())
        temporary.replace(file)
        deletions = {"file": file.name, "sha256": file_digest(file), "count": len(deleted)}
    state = {"format": 1, "store": _corpus_fingerprint(run), "segments": [path.name for path in segments], "deleted": deletions}
    write_json(folder / CURRENT, state)
    kept = {earlier, deletions["file"] if deletions else None}
    for path in folder.glob("deleted-*.npy"):
        if path.name not in kept:
            path.unlink()


def _deletions(folder: Path) -> str | None:
    """Name of the list of deletions that counts now."""
    if not (folder / CURRENT).exists():
        return None
    found = json.loads((folder / CURRENT).read_text(encoding="utf-8"))["deleted"]
    return str(found["file"]) if found else None


def _extended_store(run: Path, additions: Additions) -> Store:
    from simlm.data.store import Store

    store = Store.open(run / "store")
    additions.extend_store(store)
    return store


def _corpus_fingerprint(run: Path) -> str:
    from simlm.data.store import passages_fingerprint

    return passages_fingerprint(run / "store")


def _model_of(embeddings: Manifest) -> Any:
    """Settings of the starting model, which is what encoded the passages where no trained one did."""
    return None if "model" in embeddings.inputs else embeddings.settings["model"]


def _next_name(additions: Additions) -> str:
    return f"{1 + max((int(path.name) for path in additions.segments), default=0):04d}"


def _read(file: Path) -> list[Row]:
    """The passages of a file, checked as those of a corpus are."""
    from simlm.data.datasets import open_dataset
    from simlm.data.selection import select
    from simlm.recipe import DataSettings

    if not file.is_file():
        raise DataError(f"{file}: no such file; give a JSONL, CSV or Parquet file of passages")
    suffix = file.with_suffix("").suffix if file.suffix in PACKED else file.suffix
    if suffix not in LOADERS:
        raise DataError(f"{file}: passages are read from {', '.join(LOADERS)} files, also packed as {' or '.join(PACKED)}")
    settings = DataSettings(dataset=LOADERS[suffix], path=str(file.resolve().parent), corpus=str(file.resolve()), splits=[])
    return list(select(open_dataset(settings), settings, seed=0).passages())


def _check_ids(store: Store, rows: list[Row], file: Path, replace: bool) -> Ints:
    """Rows of the passages whose place the new ones take. DataError if there are any and that was not asked for."""
    there = {row.name: found for row in rows if (found := store.passages.ids.find(row.name)) is not None}
    if there and not replace:
        raise DataError(
            f"{file}: {len(there):,} of {len(rows):,} ids are there already ({_listed(there)}); "
            "leave those passages out, or add --replace to put them in the place of the old ones"
        )
    return np.array(sorted(there.values()), dtype=np.int64)


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - NAMED_IN_ERRORS:,} more" if len(shown) > NAMED_IN_ERRORS else ""
    return ", ".join(map(repr, shown[:NAMED_IN_ERRORS])) + more
