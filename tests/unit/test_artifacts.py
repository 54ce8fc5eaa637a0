"""Artifacts: whole or refused; nothing half-written passes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from simlm import artifacts
from simlm.artifacts import ArtifactBuilder, build_artifact, disk_error, open_artifact, read_manifest, write_json
from simlm.errors import ArtifactError


def make(path: Path, content: bytes = b"abc") -> Path:
    with build_artifact(path, kind="run", settings={"a": 1}) as builder:
        (builder.work / "sub").mkdir()
        (builder.work / "sub" / "x.bin").write_bytes(content)
        (builder.resume / "partial").write_text("dropped", encoding="utf-8")
        builder.facts["n"] = 3
    return path


def test_a_finished_artifact_opens_and_keeps_no_leftovers(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    artifact = open_artifact(path, "run")
    assert artifact.manifest.facts == {"n": 3}
    assert artifact.manifest.files == {
        "sub/x.bin": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    }
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]
    assert not (path / "resume").exists()


def test_an_error_in_the_middle_leaves_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), build_artifact(tmp_path / "a", kind="run"):
        raise RuntimeError("boom")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(tmp_path / "a")


def test_a_reader_refuses_what_is_not_whole(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    file = path / "sub" / "x.bin"
    file.write_bytes(b"abcd")
    with pytest.raises(ArtifactError, match="4 bytes, the manifest says 3"):
        open_artifact(path, verify="sizes")
    file.write_bytes(b"abX")
    open_artifact(path, verify="sizes")
    with pytest.raises(ArtifactError, match="SHA-256 is not the one"):
        open_artifact(path)
    file.unlink()
    with pytest.raises(ArtifactError, match="named in the manifest but absent"):
        open_artifact(path)
    (path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        open_artifact(path)
    (path / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not a manifest of this program"):
        open_artifact(path)


def test_another_kind_or_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="'run' artifact, a 'store' was expected"):
        open_artifact(path, "store")
    raw = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    write_json(path / "manifest.json", raw | {"format": 99})
    with pytest.raises(ArtifactError, match="format 99"):
        read_manifest(path)


def test_a_work_folder_goes_on_only_for_the_same_fingerprint(tmp_path: Path) -> None:
    def builder(fingerprint: str) -> ArtifactBuilder:
        return ArtifactBuilder(tmp_path / "a", kind="run", stage="s", code_version=1, fingerprint=fingerprint)

    first = builder("one")
    assert first.begin() is False
    (first.resume / "checkpoint").write_text("x", encoding="utf-8")
    first.note_seconds(5.0)
    again = builder("one")
    assert again.begin() is True
    assert again.earlier_seconds() == 5.0
    assert (again.resume / "checkpoint").exists()
    other = builder("two")
    assert other.begin() is False
    assert not (other.resume / "checkpoint").exists()


def test_a_kill_before_the_final_rename_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = ArtifactBuilder(tmp_path / "a", kind="run", stage="s", code_version=1, fingerprint="one")
    builder.begin()
    (builder.work / "x").write_text("x", encoding="utf-8")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        builder.finish(settings={}, inputs={}, seed=0, seconds=1, peak_memory_bytes=1)
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    assert builder.begin() is True
    builder.finish(settings={}, inputs={}, seed=0, seconds=1, peak_memory_bytes=1)
    assert open_artifact(tmp_path / "a").manifest.files.keys() == {"x"}


def test_a_new_artifact_replaces_a_stale_one(tmp_path: Path) -> None:
    make(tmp_path / "a", b"old")
    make(tmp_path / "a", b"new")
    assert (tmp_path / "a" / "sub" / "x.bin").read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]


def test_disk_errors_say_what_to_do(tmp_path: Path) -> None:
    assert "disk is full" in str(disk_error(OSError(errno.ENOSPC, "no space"), tmp_path))
    assert "cannot be written" in str(disk_error(OSError(errno.EACCES, "denied"), tmp_path))
