"""Where vectors go: part-NNNNNN.parquet, one a piece, each complete or not there; _embeddings.json when all are."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from simlm.artifacts import json_digest, sync
from simlm.corpus_encoding.files import file_system
from simlm.errors import ArtifactError, DiskError

INFO = "_embeddings.json"
PLAN = "_plan.json"
"""Readers of folders of Parquet pass over names that begin so."""
BEGUN = ".begun-"
"""Files that a worker is writing, or was when it was lost."""


@dataclass(frozen=True)
class Output:
    """A folder on a disk or in an object store."""

    system: Any
    path: str
    address: str

    @classmethod
    def at(cls, address: str) -> Output:
        return cls(*file_system(address), address)

    def begin(self, plan: dict[str, Any], num_pieces: int) -> None:
        """Make the folder, or go on in one that was begun with the same plan.

        Raises ArtifactError if something else is there, DiskError if it cannot be written.
        """
        digest = json_digest([plan, num_pieces])
        names = {file.base_name for file in self._files()}
        if PLAN in names:
            if self._read(PLAN)["digest"] != digest:
                raise ArtifactError(
                    f"{self.address}: holds vectors of another corpus, model or setting; give a new folder, or delete this one"
                )
        elif names:
            raise ArtifactError(f"{self.address}: not empty, and what is there are no vectors; give a new folder")
        try:
            self.system.create_dir(self.path, recursive=True)
            self._write(PLAN, {"digest": digest, "num_pieces": num_pieces} | plan)
        except OSError as error:
            raise DiskError(f"{self.address}: cannot be written ({error}); choose another place") from error
        for file in self._files():
            if file.base_name.startswith(BEGUN):
                self.system.delete_file(file.path)

    def finished(self) -> set[int]:
        """Numbers of the pieces whose vectors are there."""
        names = (file.base_name for file in self._files())
        return {int(name[5:-8]) for name in names if name.startswith("part-") and name.endswith(".parquet")}

    @contextlib.contextmanager
    def part(self, number: int) -> Iterator[Any]:
        """A stream to write the vectors of a piece to; they count when the block ends without an error."""
        begun = f"{self.path}/{BEGUN}{number:06d}-{uuid.uuid4().hex}"
        try:
            with self.system.open_output_stream(begun) as stream:
                yield stream
            if isinstance(self.system, fs.LocalFileSystem):
                sync(begun)
            self.system.move(begun, self._part(number))
        except BaseException:
            with contextlib.suppress(OSError):
                self.system.delete_file(begun)
            raise

    def counts(self, num_pieces: int) -> list[int]:
        """Vectors in each part; ArtifactError if one is absent or damaged."""
        found = []
        for number in range(num_pieces):
            try:
                with self.system.open_input_file(self._part(number)) as file:
                    found.append(int(pq.ParquetFile(file).metadata.num_rows))
            except (OSError, ValueError) as error:
                raise ArtifactError(f"{self._part(number)}: absent or damaged ({error}); delete it and run the same command") from None
        return found

    def finish(self, counts: list[int]) -> dict[str, Any]:
        """Write _embeddings.json; its contents."""
        job = self._read(PLAN)["job"]
        info: dict[str, Any] = {"count": sum(counts), "parts": counts, "normalised": True} | job
        self._write(INFO, info)
        return info

    def _part(self, number: int) -> str:
        return f"{self.path}/part-{number:06d}.parquet"

    def _files(self) -> list[Any]:
        return [*self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))]

    def _read(self, name: str) -> dict[str, Any]:
        with self.system.open_input_stream(f"{self.path}/{name}") as stream:
            value: dict[str, Any] = json.loads(stream.read())
        return value

    def _write(self, name: str, value: dict[str, Any]) -> None:
        begun = f"{self.path}/{BEGUN}{name}-{uuid.uuid4().hex}"
        with self.system.open_output_stream(begun) as stream:
            stream.write(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode())
        self.system.move(begun, f"{self.path}/{name}")
