"""Digests of files."""

from __future__ import annotations

from pathlib import Path

from awq_trt.files import sha256


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")
