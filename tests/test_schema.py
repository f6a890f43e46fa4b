from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import NotRequired, TypedDict

from awq_trt import schema
from awq_trt.errors import AwqTrtError
from awq_trt.schema import Count, Name, parse_json, read_json, regular_file


class Part(TypedDict):
    sizes: list[Count | Name]


class Whole(TypedDict):
    name: Name
    parts: dict[str, Part]
    half: NotRequired[float | None]


GOOD: dict[str, Any] = {"name": "x", "parts": {"a b": {"sizes": [1, "n"]}}, "unknown": [{"kept": float("inf")}]}


def written(folder: Path, content: object) -> Path:
    path = folder / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_what_fits_is_returned_unchanged(tmp_path: Path) -> None:
    assert read_json(written(tmp_path, GOOD), Whole) == GOOD
    assert list(read_json(written(tmp_path, GOOD), Whole)) == list(GOOD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 3}, "key 'name' holds a int, 3; it should be a valid string."),
        ({"name": "a\0b"}, "key 'name' holds a str, 'a\\x00b'; "),
        ({"name": "a" * 5000}, "key 'name' holds a str, 'aaaa"),
        ({"parts": []}, "key 'parts' holds a list, []; it should be a JSON object."),
        ({"parts": {"a": {}}}, "key 'parts.a.sizes' is missing."),
        ({"parts": {"a": {"sizes": [2**40]}}}, "key 'parts.a.sizes[0]' holds a int, 1099511627776; it should be less "),
        ({"parts": {"a": {"sizes": [1, True]}}}, "key 'parts.a.sizes[1]' holds a bool, True; "),
        ({"parts": {"a": {"sizes": [1.0]}}}, "key 'parts.a.sizes[0]' holds a float, 1.0; "),
        ({"half": "0.5"}, "key 'half' holds a str, '0.5'; it should be a valid number."),
    ],
)
def test_another_type_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = written(tmp_path, GOOD | change)
    with pytest.raises(AwqTrtError, match=re.escape(f"x.json: {words}")) as caught:
        read_json(path, Whole, "Write it again.")
    assert str(caught.value).endswith(". Write it again.")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"name": "\xff"}', "not JSON ('utf-8' codec can't decode"),
        (b"\xef\xbb\xbf{}", "not JSON (Unexpected UTF-8 BOM"),
        (b'{"name": 1' + b"0" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b"[" * 100 + b"]" * 100, "nested more than 64 levels"),
        (b"[" * 100_000, "nested more than 64 levels"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "nested more than 64 levels"),
        (b'{"name": "\\ud800"}', "no Unicode text"),
        (b'{"\\udfff": {}}', "no Unicode text"),
        (b"null", "it holds a NoneType, None; it should be a JSON object"),
    ],
)
def test_no_json_and_too_deep(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(AwqTrtError, match=re.escape(words)):
        read_json(written(tmp_path, content), dict[str, Any])


def test_too_large_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MAX_BYTES", 1 << 20)
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(AwqTrtError, match=r"large\.json: more than 1 MiB"):
        read_json(path, dict[str, Any])


def test_pipes_devices_directories_and_nothing(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
    for name, words in (
        ("pipe", "is a pipe, and should be a regular file"),
        ("link", "is a pipe"),
        ("socket", "is a socket"),
        (".", "is a directory"),
        ("/dev/zero", "is a device"),
        ("missing", "no such file"),
        ("loop", "no such file"),
        ("a\0b", "no such file"),
    ):
        with pytest.raises(AwqTrtError, match=words):
            read_json(tmp_path / name, dict[str, Any])
    (tmp_path / "good").symlink_to(written(tmp_path, {}))
    assert regular_file(tmp_path / "good") == tmp_path / "good"


def test_text_that_is_no_file() -> None:
    assert parse_json('{"a": 1}', dict[str, int], "the answer") == {"a": 1}
    with pytest.raises(AwqTrtError, match="^the answer: not JSON"):
        parse_json("{", dict[str, int], "the answer")
