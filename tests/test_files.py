"""Digests of files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from awq_trt import files
from awq_trt.errors import AwqTrtError
from awq_trt.files import known_sha256, sha256, verify


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and for large files in others, too (an emptied memory stands for one)."""
    reads: list[Path] = []
    monkeypatch.setattr(files, "sha256", lambda path: reads.append(path) or sha256(path))
    monkeypatch.setattr(files, "DIGESTS", tmp_path / "cache")
    monkeypatch.setattr(files, "_known", {})
    monkeypatch.setattr(files, "LARGE", 4)
    path = tmp_path / "f"
    path.write_bytes(b"abcd")
    first = known_sha256(path)
    assert known_sha256(path) == first
    assert len(reads) == 2  # it was written just now, and may be written again at the same time
    monkeypatch.setattr(files, "SETTLED", -1.0)
    for _ in range(3):
        assert known_sha256(path) == first
        files._known.clear()
    assert len(reads) == 3
    state = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"abce")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, inode and time
    assert known_sha256(path) != first
    monkeypatch.setattr(files, "LARGE", 5)
    files._known.clear()
    known_sha256(path)
    assert len(reads) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"abc")
    verify(tmp_path / "plan", sha256(tmp_path / "plan"), tmp_path / "plan.json")
    with pytest.raises(AwqTrtError, match=r"plan: is not the file that .*plan\.json was written with"):
        verify(tmp_path / "plan", "0" * 64, tmp_path / "plan.json")
