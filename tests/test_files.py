"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from awq_trt.errors import AwqTrtError
from awq_trt.files import replacing, sha256


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_success_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a", tmp_path / "new" / "b") as (a, b):
        a.write_text("1")
        b.write_text("2")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "1"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "new", "new/b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x")])
def test_any_exception_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with replacing(tmp_path / "a") as (a,):
            a.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_full_disk_is_an_error_for_people(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "out") as (out,):
            out.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(AwqTrtError, match=r"No space left on device.*unchanged"):
        write()
    assert names(tmp_path) == []


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "stale").write_text("old")
    with replacing(tmp_path / "d") as (d,):
        d.mkdir()
        (d / "fresh").write_text("new")
    assert names(tmp_path / "d") == ["fresh"]
    assert names(tmp_path) == ["d"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")
