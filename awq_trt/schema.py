"""JSON that others wrote, checked where it is read: a regular file, of bounded size and depth, of the declared types.

A type is a TypedDict, or anything else that pydantic knows. Keys that it does not name may be there and are kept. What
is wrong becomes one sentence: the file, the key, what it holds, what should stand there.
"""

from __future__ import annotations

import json
import stat
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from awq_trt.errors import AwqTrtError

MAX_BYTES = 64 << 20
"""Of a JSON file. The largest that is known, an index of 700,000 tensors, has 60 MB."""
MAX_DEPTH = 64
"""Lists and objects within each other. Python's own functions give up at about 1000, at less when called from deep."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""Of a dimension, or a token's id: what an int32 holds."""
Bytes = Annotated[int, Field(ge=0, le=2**53)]
Name = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]
"""Anything that may become a part of a path, a line on the screen, or a line of another file."""


def regular_file(path: Path, what: str = "file") -> Path:
    """`path`, if opening it cannot hang and reading it ends: a file, or a symlink to one.

    Raises:
        AwqTrtError: there is none, or it is a directory, a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AwqTrtError(f"{path}: no such {what} ({getattr(error, 'strerror', None) or error}).") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise AwqTrtError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, and should be a regular file.")
    return path


def read_json(path: Path, kind: Any, advice: str = "Download it again.") -> Any:
    """The content of a JSON file, in UTF-8, unchanged.

    Args:
        kind: the type that it must have. advice: what to do where it has not, a sentence.

    Raises:
        AwqTrtError: no such file, no regular one, too large, not JSON, nested too deeply, or not of this type.
    """
    try:
        with regular_file(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AwqTrtError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return parse_json(data, kind, str(path), advice)


def parse_json(data: bytes | str, kind: Any, what: str, advice: str = "Download it again.") -> Any:
    """The same from bytes or text; `what` begins the messages."""
    if len(data) > MAX_BYTES:
        raise AwqTrtError(f"{what}: more than {MAX_BYTES >> 20} MiB of JSON. {advice}")
    try:
        value = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError as error:
        raise AwqTrtError(f"{what}: nested more than {MAX_DEPTH} levels deep. {advice}") from error
    except ValueError as error:
        raise AwqTrtError(f"{what}: not JSON ({error}). {advice}") from error
    _check_text(value, what, advice)
    return check(value, kind, what, advice)


def check(value: Any, kind: Any, what: str, advice: str = "Download it again.") -> Any:
    """`value`, if it is of this type, without conversions: "3" and 3.0 and true are not the number 3.

    Raises:
        AwqTrtError: it is not.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        missing = first["type"] == "missing"
        key = _key(value, first["loc"], missing)
        if missing:
            trouble = f"key {key!r} is missing"
        else:
            found = repr(first["input"])
            found = found if len(found) <= 60 else found[:57] + "..."
            should = first["msg"].replace("Input should be", "it should be").replace("valid dictionary", "JSON object")
            trouble = f"{f'key {key!r}' if key else 'it'} holds a {type(first['input']).__name__}, {found}; {should}"
        raise AwqTrtError(f"{what}: {trouble}. {advice}") from error
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What checks a type; making it takes milliseconds."""
    return TypeAdapter(kind)


def _key(value: Any, location: tuple[int | str, ...], missing: bool) -> str:
    """Where in a JSON value: "profiles[0].inputs.x"; pydantic's own words for the members of a union are left out."""
    text = ""
    for i, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list):
            text, value = f"{text}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (missing and i == len(location) - 1)):
            text, value = f"{text}.{part}" if text else str(part), value.get(part)
    return text


def _check_text(value: Any, what: str, advice: str) -> None:
    """Refuse what is nested too deeply, and strings that cannot be written: half of a surrogate pair is no text."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise AwqTrtError(f"{what}: nested more than {MAX_DEPTH} levels deep. {advice}")
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, (dict, list))
        ]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AwqTrtError(f"{what}: holds a string that is no Unicode text ({error.reason}). {advice}") from error
