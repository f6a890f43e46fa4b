"""A copy of an exported model that computes in fp32, for ONNX Runtime: its CPU kernels have no bfloat16.

Weights keep the rounding they have: scales stay in their dtype, so a W4A16Gemm unpacks the very same 16-bit weights,
and widening the other constants is exact. Only the activations are no longer rounded.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from awq_trt.export.external_data import DataFile, inline, stored_bytes, stored_values
from awq_trt.export.matmul_nbits import matmul_nbits
from awq_trt.export.metadata import METADATA_KEY, data_path
from awq_trt.export.onnx_file import open_onnx
from awq_trt.export.operator import OP_TYPE

NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
FLOAT = onnx.TensorProto.FLOAT


def float32_copy(onnx_path: str | Path, copy_path: str | Path, *, nbits: bool = False) -> None:
    """Write a copy of an ONNX file whose inputs, outputs and activations are fp32 instead of fp16 or bf16.

    Args:
        onnx_path: a file of export_onnx. copy_path: file to write, in a folder of the caller's own; its weights go to
            `<copy_path>.data`.
        nbits: with quantized layers as MatMulNBits (matmul_nbits.py), to be run many times.

    Raises:
        AwqTrtError: the file or its data cannot be read.
        OSError: the disk is full.
    """
    source, target = Path(onnx_path), Path(copy_path)
    model = open_onnx(source)
    graph, folder = model.graph, source.parent
    with data_path(target).open("wb") as file:
        data = DataFile(file, data_path(target).name)
        new = matmul_nbits(model, folder, data.store) if nbits else []
        scales = {node.input[2] for node in graph.node if node.op_type == OP_TYPE}
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                    attribute.i = FLOAT
                elif attribute.t.data_type in NARROW:
                    attribute.t.CopyFrom(inline(attribute.t.name, stored_values(attribute.t, folder).float()))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in NARROW:
                value.type.tensor_type.elem_type = FLOAT
        for tensor in graph.initializer:
            if tensor.data_type in NARROW and tensor.name not in scales:
                tensor.CopyFrom(data.store(tensor.name, stored_values(tensor, folder).float()))
            elif tensor.data_location == onnx.TensorProto.EXTERNAL:
                data.place(tensor, stored_bytes(tensor, folder))
        graph.initializer.extend(new)
        for entry in model.metadata_props:
            if entry.key == METADATA_KEY:
                entry.value = json.dumps(json.loads(entry.value) | {"data": data.facts})
        target.write_bytes(model.SerializeToString())
