"""Artifacts: directories written atomically, with a manifest, refused by readers when they are not whole.

An artifact is built in a work folder beside its final place (`.NAME.work`). The work folder survives a kill, so a stage may
keep what it needs to go on under `resume/` there. `finish` hashes and syncs every file, writes the manifest last and
renames the folder to its final name (then drops `resume/`): a directory with a manifest is whole, any other is not an artifact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from simlm.errors import ArtifactError, DiskError

MANIFEST = "manifest.json"
RESUME = "resume"
BASIS = "basis.json"
FORMAT = 1

Kind = Literal["store", "model", "embeddings", "index", "run", "groups", "report"]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and what it was made from.

    fingerprint: digest of stage, code version, settings and the fingerprints of the inputs; equal fingerprint = same step.
    files: relative path -> {"bytes": int, "sha256": hex}.
    facts: what the stage reported of itself (counts, losses, best step ...); free-form JSON.
    seconds: wall time of all tries together; peak_memory_bytes: largest resident set of the process while it ran.
    """

    kind: Kind
    stage: str
    code_version: int
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    created: str
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Artifact:
    """A finished artifact that has been checked on opening."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name


def read_manifest(path: Path, kind: Kind | None = None) -> Manifest:
    """The manifest of a finished artifact; ArtifactError if there is none, or it is of another kind or a newer format."""
    path = Path(path)
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path}: no {MANIFEST} here, so this is not a finished artifact; run the step that makes it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path / MANIFEST}: not readable as JSON ({error}); delete the folder and run its step again") from None
    try:
        manifest = Manifest(**raw)
    except TypeError as error:
        raise ArtifactError(
            f"{path / MANIFEST}: not a manifest of this program ({error}); delete the folder and run its step again"
        ) from None
    if manifest.format > FORMAT:
        raise ArtifactError(f"{path}: written in format {manifest.format}, this version reads up to {FORMAT}; upgrade simlm")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path}: this is a {manifest.kind!r} artifact, a {kind!r} was expected; check which folder was given")
    return manifest


_verified: dict[tuple[str, int, int, str], bool] = {}


def open_artifact(path: Path | str, kind: Kind | None = None, *, verify: Literal["full", "sizes"] = "full") -> Artifact:
    """Open a finished artifact and check its files against the manifest.

    verify: "full" compares SHA-256 (each file once a process), "sizes" only the byte counts.
    Raises ArtifactError naming the first file that is absent, truncated or changed.
    """
    path = Path(path)
    manifest = read_manifest(path, kind)
    for name, recorded in manifest.files.items():
        file = path / name
        try:
            stat = file.stat()
        except FileNotFoundError:
            raise ArtifactError(f"{file}: named in the manifest but absent; delete {path} and run its step again") from None
        if stat.st_size != recorded["bytes"]:
            raise ArtifactError(
                f"{file}: {stat.st_size:,} bytes, the manifest says {recorded['bytes']:,}; delete {path} and run its step again"
            )
        key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns, recorded["sha256"])
        if verify == "full" and key not in _verified:
            if file_digest(file) != recorded["sha256"]:
                raise ArtifactError(f"{file}: its SHA-256 is not the one in the manifest; delete {path} and run its step again")
            _verified[key] = True
    return Artifact(path, manifest)


def file_digest(path: Path) -> str:
    """SHA-256 of a file as hex digits, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees either the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ArtifactBuilder:
    """The work folder of one artifact under construction; see the module's docstring for its life."""

    def __init__(self, path: Path, *, kind: Kind, stage: str, code_version: int, fingerprint: str) -> None:
        self.path = Path(path)
        self.kind: Kind = kind
        self.stage = stage
        self.code_version = code_version
        self.fingerprint = fingerprint
        self.work = self.path.parent / f".{self.path.name}.work"
        self.facts: dict[str, Any] = {}

    @property
    def resume(self) -> Path:
        """Folder for what lets a stage go on after a kill; dropped when the artifact is finished."""
        return self.work / RESUME

    def begin(self, basis: dict[str, Any] | None = None) -> bool:
        """Make the work folder; True if it holds an earlier, interrupted try with the same fingerprint.

        basis: what the fingerprint is the digest of, kept beside it, so that `interrupted_basis` can tell what has changed since.
        A work folder of another fingerprint is deleted. Raises DiskError if the folder cannot be written.
        """
        stamp = self.work / RESUME / "fingerprint"
        if self.work.exists():
            if stamp.exists() and stamp.read_text(encoding="utf-8") == self.fingerprint:
                # Left by a kill inside `finish` or `write_json`; they are no files of the artifact.
                (self.work / MANIFEST).unlink(missing_ok=True)
                for leftover in self.work.rglob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
                return True
            shutil.rmtree(self.work)
        try:
            stamp.parent.mkdir(parents=True)
            if basis is not None:
                write_json(stamp.with_name(BASIS), basis)
            temporary = stamp.with_name("fingerprint.tmp")
            temporary.write_text(self.fingerprint, encoding="utf-8")
            os.replace(temporary, stamp)
        except OSError as error:
            raise disk_error(error, self.work) from error
        return False

    def interrupted(self) -> Literal["no", "same", "other"]:
        """Whether there is an interrupted try, of the same fingerprint or of another one."""
        try:
            found = (self.resume / "fingerprint").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return "no"
        return "same" if found == self.fingerprint else "other"

    def interrupted_basis(self) -> dict[str, Any]:
        """What `begin` was given in the interrupted try; empty if it kept nothing."""
        try:
            basis: dict[str, Any] = json.loads((self.resume / BASIS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return basis

    def earlier_seconds(self) -> float:
        """Wall time that interrupted tries have spent so far."""
        file = self.resume / "seconds"
        return float(file.read_text(encoding="utf-8")) if file.exists() else 0.0

    def note_seconds(self, seconds: float) -> None:
        """Keep the wall time spent so far, for the case that this try is killed."""
        file = self.resume / "seconds"
        temporary = file.with_name("seconds.tmp")
        temporary.write_text(f"{seconds:.3f}", encoding="utf-8")
        os.replace(temporary, file)

    def finish(self, *, settings: dict[str, Any], inputs: dict[str, str], seed: int, seconds: float, peak_memory_bytes: int) -> Artifact:
        """Write the manifest, put the work folder in its final place, then drop `resume/`.

        In this order a kill at any point leaves either a folder that can be resumed or a finished artifact.
        """
        files: dict[str, dict[str, Any]] = {}
        for file in sorted(self.work.rglob("*")):
            relative = file.relative_to(self.work)
            if not file.is_file() or relative.parts[0] in (MANIFEST, RESUME):
                continue
            sync(file)
            files[relative.as_posix()] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        manifest = Manifest(
            kind=self.kind,
            stage=self.stage,
            code_version=self.code_version,
            fingerprint=self.fingerprint,
            settings=settings,
            inputs=inputs,
            seed=seed,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory_bytes,
            versions=library_versions(),
            hardware=hardware_facts(),
            files=files,
            facts=self.facts,
        )
        write_json(self.work / MANIFEST, asdict(manifest))
        for folder in [self.work, *(entry for entry in self.work.rglob("*") if entry.is_dir())]:
            sync(folder)
        old = self.path.parent / f".{self.path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            os.rename(self.path, old)
        os.rename(self.work, self.path)
        sync(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.path / RESUME, ignore_errors=True)
        return Artifact(self.path, manifest)


def sweep(path: Path) -> None:
    """Remove what a kill in the last moments of `finish` may leave beside or in a finished artifact."""
    shutil.rmtree(path.parent / f".{path.name}.old", ignore_errors=True)
    shutil.rmtree(path / RESUME, ignore_errors=True)


@contextlib.contextmanager
def build_artifact(
    path: Path | str,
    *,
    kind: Kind,
    stage: str = "manual",
    code_version: int = 0,
    settings: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    seed: int = 0,
) -> Iterator[ArtifactBuilder]:
    """Write one artifact outside a pipeline (tests, Python users): finished when the block ends without an error.

    inputs: role -> fingerprint of what it is made from; a Searcher refuses an index whose vectors are others than those beside it.
    """
    settings = settings or {}
    builder = ArtifactBuilder(
        Path(path), kind=kind, stage=stage, code_version=code_version, fingerprint=json_digest([stage, code_version, settings, seed])
    )
    started = time.monotonic()
    builder.begin()
    yield builder
    builder.finish(
        settings=settings, inputs=inputs or {}, seed=seed, seconds=time.monotonic() - started, peak_memory_bytes=peak_memory_bytes()
    )


def disk_error(error: OSError, path: Path) -> DiskError:
    """The DiskError that tells a user what an OSError on writing means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"{path}: the disk is full; finished steps are intact. Free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return DiskError(f"{path}: cannot be written ({error.strerror}); choose another output folder or change its permissions")
    return DiskError(f"{path}: {error}; finished steps are intact")


def peak_memory_bytes() -> int:
    """Largest resident set of this process since it started, or since `reset_peak_memory`; 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start a new peak (Linux only; elsewhere the peak stays that of the whole process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def library_versions() -> dict[str, str]:
    """Versions of what the numbers may depend on."""
    versions = {"python": platform.python_version()}
    for name in ("simlm", "torch", "transformers", "sentence-transformers", "tokenizers", "faiss-cpu", "bm25s", "numpy", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def hardware_facts() -> dict[str, Any]:
    """Processor, cores, memory and, if torch is loaded and sees one, the accelerator."""
    facts: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count() or 1}
    with contextlib.suppress(OSError, ValueError):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                facts["processor"] = line.split(":", 1)[1].strip()
                break
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["accelerators"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def sync(path: Path | str) -> None:
    """Have what was written to a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
