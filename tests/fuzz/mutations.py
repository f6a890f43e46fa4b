"""Files made wrong on purpose: JSON by its values, protobuf by its fields, anything by its bytes, and no files at all.

Every function takes a random.Random, and gives the same for the same seed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

DEEP, RAW = "\x01deep", "\x01raw"  # marks of what json.dumps would not write

INTEGERS = (0, 1, -1, 2, 3, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**64, -(2**31), -(2**63))
TEXTS = (
    "",
    " ",
    "x",
    "0",
    "-1",
    "true",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\n",
    "é😀",
    "‮",
    "%s%n",
    "{{ 7*7 }}",
    "..",
    "/",
)
ODD: tuple[Any, ...] = (
    *INTEGERS,
    *TEXTS,
    *(None, True, False, 1.5, -0.0, 1e-45, 1e308, float("nan"), float("inf"), 10**30, 10**400),
    *([], {}, [[]], [None], {"": 1}, {"a": {}}, [0] * 3000, "a" * 100_000),
    *(f"{RAW}1" + "0" * 5000, f"{RAW}1e999", f'{RAW}"\\ud800"', f"{RAW}nan", f"{DEEP}60", f"{DEEP}990", f"{DEEP}99999"),
)

Mutate = Callable[[bytes, Random], bytes]


def any_bytes(data: bytes, rng: Random) -> bytes:
    """Some bytes changed, left out, put in, or said twice; more often near the beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        at = min(at, rng.choice((8, 64, 512, 4096, len(out))))
        some = rng.choice((1, 1, 2, 4, 8, 64))
        what = rng.randrange(9)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + some] = rng.randbytes(some)
        elif what == 2:
            del out[at : at + some]
        elif what == 3:
            out[at:at] = rng.randbytes(some)
        elif what == 4:
            del out[at:]
        elif what == 5:
            out[at:at] = out[at : at + some]
        elif what == 6:
            value = rng.choice(INTEGERS) % 2**64
            out[at : at + 8] = struct.pack("<Q", value)
        elif what == 7:
            out[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) % 2**32)
        else:
            out += bytes(some)
    return bytes(out)


def any_json(data: bytes, rng: Random) -> bytes:
    """Values of another type, too large, too deep, missing, said twice, under another name; now and then any bytes."""
    if rng.random() < 0.1:
        return any_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        # a place at random depth first: a table of a thousand equal rows should not take every case
        depth = rng.choice(sorted({len(path) for path, _ in places}))
        path, parent = rng.choice([p for p in places if len(p[0]) == depth])
        key = path[-1]
        what = rng.randrange(8)
        if what <= 3:
            parent[key] = copy.deepcopy(rng.choice(ODD))  # else the next change is made in the table
        elif what == 4:
            del parent[key]
        elif what == 5 and isinstance(parent, dict):
            parent[rng.choice((*TEXTS, key + "x", key.upper()))] = parent.pop(key)
        elif what == 6:
            parent[key] = rng.choice(([parent[key]], {"x": parent[key]}, str(parent[key]), _near(parent[key], rng)))
        else:
            _, other = rng.choice(places)
            name = rng.choice(list(other) if isinstance(other, dict) else range(len(other))) if other else None
            parent[key] = json.loads(json.dumps(parent[key])) if name is None else json.loads(json.dumps(other[name]))
    return _dumps(value, rng)


def _near(value: Any, rng: Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value * 2 if isinstance(value, (str, list)) else None
    near = [value + 1, value - 1, value * 2, value // 2, -value, value * 2**40]
    return rng.choice([*near, float(value)] if abs(value) < 1e300 else near)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), value
        yield from _places(inner, (*path, key))


def _dumps(value: Any, rng: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    mark = json.dumps(RAW)[1:-1]
    while (at := text.find(f'"{mark}')) >= 0:
        end = at + 1 + len(mark)
        while text[end] != '"' or text[end - 1] == "\\":
            end += 1
        raw = json.loads(text[at : end + 1])[len(RAW) :]
        text = text[:at] + raw + text[end + 1 :]
    mark = json.dumps(DEEP)[1:-1]
    for depth in (60, 990, 99999):
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(f'"{mark}{depth}"', opening * depth + "1" + closing * depth)
    if rng.random() < 0.05 and text[0] == "{" and len(text) > 2:  # everything twice
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def safetensors(data: bytes, rng: Random) -> bytes:
    """The header by its values, its length, or any bytes."""
    if rng.random() < 0.2:
        return any_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = any_json(data[8 : 8 + length], rng), data[8 + length :]
    length = len(header) if rng.random() < 0.95 else rng.choice(INTEGERS) % 2**64
    return struct.pack("<Q", length) + header + rest


def protobuf(data: bytes, rng: Random) -> bytes:
    """An ONNX model by its fields, or any bytes."""
    if rng.random() < 0.2:
        return any_bytes(data, rng)
    model = onnx.load_model_from_string(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        fields = list(_fields(model))
        depth = rng.choice(sorted({d for d, _, _ in fields}))
        _, message, field = rng.choice([f for f in fields if f[0] == depth])
        _change(message, field, rng)
    return model.SerializeToString()


def _fields(message: Message, depth: int = 0) -> Iterator[tuple[int, Message, FieldDescriptor]]:
    for field, value in message.ListFields():
        yield depth, message, field
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                yield from _fields(inner, depth + 1)


def _change(message: Any, field: FieldDescriptor, rng: Random) -> None:
    name, kind = field.name, field.cpp_type
    if rng.random() < 0.2:
        message.ClearField(name)
    elif field.is_repeated:
        values = getattr(message, name)
        if kind == FieldDescriptor.CPPTYPE_MESSAGE:
            one = rng.randrange(len(values))
            if rng.random() < 0.5:
                values.add().CopyFrom(values[one])
            else:
                del values[one]
        elif rng.random() < 0.3:
            values.append(_scalar(field, rng))
        else:
            values[rng.randrange(len(values))] = _scalar(field, rng)
    elif kind == FieldDescriptor.CPPTYPE_MESSAGE:
        message.ClearField(name)
    else:
        setattr(message, name, _scalar(field, rng))


def _scalar(field: FieldDescriptor, rng: Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = rng.choice((*TEXTS, "a" * 100_000))
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    value = rng.choice(INTEGERS) % 2**bits
    signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    return value - 2**bits if signed and value >= 2 ** (bits - 1) else value


def no_file(path: Path, rng: Random) -> str:
    """Something else where a file was, or nothing; what, in a word."""
    what = rng.choice(("nothing", "pipe", "directory", "loop", "endless", "large", "empty"))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "endless":
        path.symlink_to("/dev/zero")
    elif what in ("large", "empty"):
        path.touch()
        os.truncate(path, 1 << 36 if what == "large" else 0)
    return what


BY_SUFFIX: dict[str, Mutate] = {".json": any_json, ".safetensors": safetensors, ".onnx": protobuf}
"""How a file is mutated; others by their bytes."""


def mutate(name: str, data: bytes, rng: Random) -> bytes:
    """A file of this name with other content."""
    return BY_SUFFIX.get(Path(name).suffix, any_bytes)(data, rng)
