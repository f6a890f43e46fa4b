"""Writing a safetensors file tensor by tensor, in pieces, so that nothing is held twice.

Layout of the format: 8 bytes little-endian length of the header; the header, JSON padded with spaces to a multiple of
8, {"__metadata__": {...}, name: {"dtype": "F16", "shape": [...], "data_offsets": [begin, end]}}; then the data, without
gaps, offsets counted from the end of the header. Source: https://github.com/huggingface/safetensors#format. Its own
`save_file` makes a `bytes` of every tensor before it writes the first, which for an embedding of 1 GB is 1 GB more.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from awq_trt.errors import AwqTrtError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 1 << 20
"""Elements converted at once: 4 MiB of fp32."""


@dataclass(frozen=True)
class Stored:
    """One tensor on its way to the file.

    Attributes:
        tensor: any shape and strides. dtype: what it is stored as. Values that were finite must stay so.
    """

    tensor: torch.Tensor
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.tensor.numel() * self.dtype.itemsize

    def pieces(self) -> Iterator[torch.Tensor]:
        """The values in row-major order, converted, as flat contiguous tensors of about PIECE elements.

        Raises:
            AwqTrtError: a value is NaN or Inf, or too large for `dtype`.
        """
        rows = self.tensor.unsqueeze(0) if self.tensor.dim() == 0 else self.tensor
        step = max(1, PIECE // max(1, math.prod(rows.shape[1:])))
        for begin in range(0, len(rows) if rows.numel() else 0, step):
            piece = rows[begin : begin + step]
            converted = piece.to(self.dtype).contiguous().flatten()
            if converted.is_floating_point() and not all(math.isfinite(bound) for bound in converted.aminmax()):
                kind, largest = str(self.dtype).removeprefix("torch."), float(piece.abs().max())
                raise AwqTrtError(f"overflows {kind} (largest value {largest:.4g}); use --dtype bfloat16.")
            yield converted


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed.

    Raises:
        AwqTrtError: a value is NaN or Inf, or too large for the dtype it is stored as.
        OSError: no space, not writable.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].bytes
        shape = list(tensors[name].tensor.shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                for piece in tensors[name].pieces():
                    file.write(piece.view(torch.uint8).numpy().data)
        temporary.replace(path)
    except AwqTrtError as error:
        raise AwqTrtError(f"tensor {name} {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape, its dtype as the format names it, and its size."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> what the header says of it, checked against the length of the file.

    Raises:
        AwqTrtError: truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        entries = {}
        for name, entry in header.items():
            begin, after = entry["data_offsets"]
            entries[name] = Entry(tuple(entry["shape"]), entry["dtype"], after - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise AwqTrtError(f"{path}: not a safetensors file ({error}); write it again.") from error
    if path.stat().st_size != 8 + length + end:
        raise AwqTrtError(f"{path}: truncated, {path.stat().st_size} bytes instead of {8 + length + end}.")
    return entries
