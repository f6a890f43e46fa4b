"""A copy of an exported model that computes in fp32, for ONNX Runtime: its CPU kernels have no bfloat16.

Weights keep the rounding they have: scales stay in their dtype, so a W4A16Gemm unpacks the very same 16-bit weights,
and widening the other constants is exact. Only the activations are no longer rounded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

import onnx
import torch

from awq_trt.export.external_data import DataFile, inline
from awq_trt.export.matmul_nbits import matmul_nbits
from awq_trt.export.operator import OP_TYPE
from awq_trt.files import replacing

NARROW = {onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16}
FLOAT = onnx.TensorProto.FLOAT


def float32_copy(onnx_path: str | Path, copy_path: str | Path, *, nbits: bool = False) -> None:
    """Write a copy of an ONNX file whose inputs, outputs and activations are fp32 instead of fp16 or bf16.

    Args:
        onnx_path: a file of export_onnx. copy_path: file to write; its weights go to `<copy_path>.data`.
        nbits: with quantized layers as MatMulNBits (matmul_nbits.py), to be run many times.

    Raises:
        AwqTrtError: the file or its data cannot be read, or the disk is full.
    """
    source, target = Path(onnx_path), Path(copy_path)
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    data_path = target.with_name(target.name + ".data")
    with replacing(data_path, target) as (data_tmp, tmp), data_tmp.open("wb") as file:
        data = DataFile(file, data_path.name)
        new = matmul_nbits(model, lambda tensor: _data(tensor, source.parent), data.store) if nbits else []
        kept = {node.input[2] for node in graph.node if node.op_type == OP_TYPE}
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                    attribute.i = FLOAT
                elif attribute.t.data_type in NARROW:
                    attribute.t.CopyFrom(inline(attribute.t.name, _float32(attribute.t, source.parent)))
        _widen(graph.input)
        _widen(graph.output)
        _widen(graph.value_info)
        for tensor in graph.initializer:
            if tensor.data_type in NARROW and tensor.name not in kept:
                tensor.CopyFrom(data.store(tensor.name, _float32(tensor, source.parent)))
            elif tensor.data_location == onnx.TensorProto.EXTERNAL:
                data.place(tensor, _data(tensor, source.parent))
        graph.initializer.extend(new)
        tmp.write_bytes(model.SerializeToString())


def _float32(tensor: onnx.TensorProto, folder: Path) -> torch.Tensor:
    dtype = next(dtype for elem_type, dtype in NARROW.items() if elem_type == tensor.data_type)
    return torch.frombuffer(_data(tensor, folder), dtype=dtype).reshape(list(tensor.dims)).float()


def _widen(values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = FLOAT


def _data(tensor: onnx.TensorProto, folder: Path) -> memoryview:
    """The bytes of an initializer, mapped from its external file or copied from the proto."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return memoryview(bytearray(tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()))
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / place["location"]).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return memoryview(mapped)[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
