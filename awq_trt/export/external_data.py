"""Weights of an ONNX file: initializers and the external data file they are in, written and read one at a time."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch

from awq_trt.errors import AwqTrtError
from awq_trt.export.onnx_file import place_of
from awq_trt.files import inside
from awq_trt.schema import regular_file

INLINE_LIMIT = 1024
"""Tensors of fewer bytes stay inside the .onnx file (ONNX external data is meant for large ones)."""

ALIGNMENT = 64
"""Tensors start at a multiple of it in the data file, so that a memory-mapped one can be read with any vector load."""

ELEM_TYPES = {
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.bool: onnx.TensorProto.BOOL,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int8: onnx.TensorProto.INT8,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
}
TORCH_DTYPES: dict[int, torch.dtype] = {elem_type: dtype for dtype, elem_type in ELEM_TYPES.items()}
PACKED_4_BIT = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)

Store = Callable[..., onnx.TensorProto]
"""(name, values, elem_type=None) -> initializer with the values inside it or in an external file. `elem_type` INT4 or
UINT4 packs integers, two to a byte; without it the type is that of the values."""

Read = Callable[[onnx.TensorProto], torch.Tensor]
"""Initializer -> its values."""


def inline(name: str, values: torch.Tensor, elem_type: int | None = None) -> onnx.TensorProto:
    """A tensor with its data inside the .onnx file."""
    proto = _header(name, values, elem_type)
    proto.raw_data = bytes(_bytes(values, elem_type))
    return proto


def values(proto: onnx.TensorProto) -> torch.Tensor:
    """The values, as fp32, of a floating-point tensor with its data inside the .onnx file.

    Raises:
        AwqTrtError: its data are not there.
    """
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raise AwqTrtError(f"the data of {proto.name} are not in the model: load them (onnx.load does) and try again.")
    return torch.from_numpy(onnx.numpy_helper.to_array(proto).astype(np.float32))


def stored_bytes(proto: onnx.TensorProto, folder: Path) -> memoryview:
    """The data of an initializer, mapped from its external file in `folder` or copied from the proto."""
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return memoryview(bytearray(proto.raw_data or onnx.numpy_helper.to_array(proto).tobytes()))
    place = place_of(proto)
    if not place.length:
        return memoryview(bytearray())
    with regular_file(inside(folder, place.location, f"tensor {proto.name}")).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return memoryview(mapped)[place.offset : place.offset + place.length]


def stored_values(proto: onnx.TensorProto, folder: Path) -> torch.Tensor:
    """The values of an initializer, in its dtype; UINT4 as uint8 0..15, INT4 too, plus 8."""
    if proto.data_type not in PACKED_4_BIT:
        dtype = TORCH_DTYPES[proto.data_type]
        if not math.prod(proto.dims):
            return torch.empty(list(proto.dims), dtype=dtype)
        return torch.frombuffer(stored_bytes(proto, folder), dtype=dtype).reshape(list(proto.dims))
    packed = torch.frombuffer(stored_bytes(proto, folder), dtype=torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], 1).flatten()[: math.prod(proto.dims)].reshape(list(proto.dims))
    return nibbles ^ 8 if proto.data_type == onnx.TensorProto.INT4 else nibbles


class DataFile:
    """The external data file of one ONNX model, written front to back."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        """`file` is open for writing and empty; `location` is what it will be called beside the .onnx file."""
        self._file, self._location, self.size, self._digest = file, location, 0, hashlib.sha256()

    @property
    def facts(self) -> dict[str, Any]:
        """What is written, for the metadata of the .onnx file."""
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}

    def store(self, name: str, values: torch.Tensor, elem_type: int | None = None) -> onnx.TensorProto:
        """Append a tensor to the file; small ones stay inline."""
        return self.place(_header(name, values, elem_type), _bytes(values, elem_type))

    def place(self, proto: onnx.TensorProto, data: memoryview) -> onnx.TensorProto:
        """Append the data of a tensor that is described already, and say in `proto` where they are."""
        if len(data) < INLINE_LIMIT:
            proto.raw_data = bytes(data)
            return proto
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        for piece in (bytes(offset - self.size), data):
            self._file.write(piece)
            self._digest.update(piece)
        self.size = offset + len(data)
        proto.data_location = onnx.TensorProto.EXTERNAL
        del proto.external_data[:]
        for key, value in (("location", self._location), ("offset", offset), ("length", len(data))):
            proto.external_data.add(key=key, value=str(value))
        return proto


def _header(name: str, values: torch.Tensor, elem_type: int | None) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, dims=list(values.shape), data_type=elem_type or ELEM_TYPES[values.dtype])


def _bytes(values: torch.Tensor, elem_type: int | None) -> memoryview:
    """Little-endian data; 4-bit types with the first of two values in the low half (ONNX IR, "4 bit integer types")."""
    if elem_type in PACKED_4_BIT:
        nibbles = values.flatten().to(torch.uint8) & 15
        if nibbles.numel() % 2:
            nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
        values = nibbles[::2] | nibbles[1::2] << 4
    return values.contiguous().flatten().view(torch.uint8).numpy().data
