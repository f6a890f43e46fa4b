"""safetensors files: read tensor by tensor through memory maps, and written in pieces, so that nothing is held twice.

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
from safetensors import SafetensorError, safe_open

from awq_trt.errors import AwqTrtError, brief
from awq_trt.schema import regular_file

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
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}
PIECE = 1 << 20
"""Elements converted at once: 4 MiB of fp32."""


@dataclass(frozen=True)
class SafetensorsReader:
    """Reads one tensor of a file through a memory map of its own, which lives as long as the tensor.

    A map for the whole file would keep every page that was ever read resident, and what one caller changes in place
    would be changed for the next.
    """

    file: Path
    written: int  # when the file was, in ns since 1970
    begin: int  # byte of the file where the tensor begins
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> torch.Tensor:
        """The tensor.

        Raises:
            AwqTrtError: the file is another one than when it was opened.
        """
        state = self.file.stat()
        if state.st_mtime_ns != self.written:
            raise AwqTrtError(f"{self.file}: was written again while it was being read; start again.")
        data = torch.from_file(str(self.file), shared=False, size=state.st_size, dtype=torch.uint8)
        part = data[self.begin : self.begin + self.bytes]
        aligned = self.begin % self.dtype.itemsize == 0  # not in every file: the format leaves the header's length open
        return (part if aligned else part.clone()).view(self.dtype).view(self.shape)


def open_safetensors(file: Path, source: str) -> dict[str, SafetensorsReader]:
    """Tensor name -> what reads it, in the order of the data.

    The header is read here, once, and checked against the length of the file.

    Raises:
        AwqTrtError: truncated or damaged, or a dtype that torch has not; `source` begins the message.
    """
    known = {name: dtype for dtype, name in DTYPES.items()}
    state = regular_file(file).stat()
    try:
        with safe_open(str(file), framework="pt") as handle:
            facts = {name: handle.get_slice(name) for name in handle.offset_keys()}
            entries = {name: (fact.get_dtype(), tuple(fact.get_shape())) for name, fact in facts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise AwqTrtError(
            f"{source}: shard {file.name} is truncated or damaged ({brief(error)}); download it again."
        ) from error
    for name, (dtype, _) in entries.items():
        if dtype not in known:
            raise AwqTrtError(f"{source}: tensor {name} in shard {file.name} is {dtype}, a dtype that is not read.")
    readers = {}
    begin = state.st_size - sum(math.prod(shape) * known[dtype].itemsize for dtype, shape in entries.values())
    for name, (dtype, shape) in entries.items():  # in the order of the data, which has no gaps
        readers[name] = SafetensorsReader(file, state.st_mtime_ns, begin, known[dtype], shape)
        begin += readers[name].bytes
    return readers


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], floats: torch.dtype | None = None) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed.

    Args:
        tensors: of any shape and strides. floats: what floating-point values are stored as; None keeps their dtype.

    Raises:
        AwqTrtError: a value is NaN or Inf, or too large for the dtype it is stored as.
        OSError: no space, not writable.
    """
    dtypes = {n: floats if floats and t.is_floating_point() else t.dtype for n, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                for piece in _pieces(name, tensors[name], dtypes[name]):
                    file.write(piece.view(torch.uint8).numpy().data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The values in row-major order, converted, as flat contiguous tensors of about PIECE elements."""
    rows = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
    for piece in rows.split(max(1, PIECE // max(1, math.prod(rows.shape[1:])))) if rows.numel() else ():
        converted = piece.to(dtype).contiguous().flatten()
        bounds = converted.aminmax() if converted.is_floating_point() and dtype.itemsize > 1 else ()
        if not all(map(math.isfinite, bounds)):
            kind, largest = str(dtype).removeprefix("torch."), float(piece.abs().max())
            raise AwqTrtError(f'tensor {name} overflows {kind} (largest value {largest:.4g}); use dtype="bfloat16".')
        yield converted
