"""W4A16Gemm and 4-bit DequantizeLinear as ONNX Runtime's MatMulNBits, which multiplies packed weights as they are.

The function of a W4A16Gemm, and a DequantizeLinear that is not fused, unpack a weight anew at every run: right, and far
too slow to generate with. MatMulNBits (com.microsoft, ONNX Runtime's ContribOperators.md) has the same numbers:

    B            uint8 [N, K / block, block / 2]    q, the lower half of a byte first
    scales       fp32  [N * K / block]
    zero_points  uint8 [N * ceil(K / block / 2)]    packed along the blocks of a row; without them 8

and computes with (q - zero) * scale in fp32, where QuantizedLinear.dequantize rounds that product to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper

from awq_trt import layout
from awq_trt.export.external_data import PACKED_4_BIT, Store, stored_values
from awq_trt.export.operator import DOMAIN, OP_TYPE, OPTIONAL_INPUTS

MS_DOMAIN = "com.microsoft"
FP32_COMPUTE = 1
"""accuracy_level: activations stay fp32 (4 would round them to int8)."""


def matmul_nbits(model: onnx.ModelProto, folder: Path, store: Store) -> list[onnx.TensorProto]:
    """Replace the quantized layers of an exported model, of either format, in place.

    Args:
        model: of export_onnx; the caller makes its activations fp32. folder: of its external data.
        store: takes the new constants, one layer at a time.

    Returns:
        The new initializers, which are not in the model yet. Those that nothing reads any more are gone from it.
    """
    graph, conversion = model.graph, _Conversion(model, folder, store)
    dequantize = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and conversion.is_4_bit_matrix(node.input[0])
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == OP_TYPE and node.domain == DOMAIN:
            nodes += conversion.gemm(node)
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] in dequantize:
            nodes += conversion.qdq_product(node, dequantize[node.input[1]])
        else:
            nodes.append(node)
    if not conversion.new:
        return []
    read = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
    read = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, kept in ((graph.node, nodes), (graph.initializer, weights), (model.functions, [])):
        del field[:]
        field.extend(kept)
    model.opset_import.append(helper.make_opsetid(MS_DOMAIN, 1))
    return conversion.new


class _Conversion:
    """Makes the nodes that replace one, and their constants, once for each weight."""

    def __init__(self, model: onnx.ModelProto, folder: Path, store: Store) -> None:
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.folder, self.store = folder, store
        self.packed: dict[str, tuple[list[str], dict[str, Any]]] = {}  # weight -> inputs and attributes of MatMulNBits
        self.new: list[onnx.TensorProto] = []

    def is_4_bit_matrix(self, name: str) -> bool:
        weight = self.initializers.get(name)
        return weight is not None and weight.data_type in PACKED_4_BIT and len(weight.dims) == 2

    def gemm(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A W4A16Gemm: [Mul,] MatMulNBits [, Add] [, Split]."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        n, k, group = (attributes[name] for name in ("out_features", "in_features", "group_size"))
        x, weight, scales, *others = node.input
        optional = dict(zip((name for name in OPTIONAL_INPUTS if attributes[f"has_{name}"]), others, strict=True))
        if weight not in self.packed:
            q = layout.unpack_qweight(self._values(weight), n, k)
            zeros = layout.unpack_zeros(self._values(optional["zeros"]), n) if "zeros" in optional else None
            self._pack(weight, q, layout.unpack_scales(self._values(scales), n), zeros, group)
        splits = attributes.get("splits")
        y = f"{node.name}/whole" if splits else node.output[0]
        if "pre_scale" in optional:
            scaled = f"{node.name}/scaled"
            yield helper.make_node("Mul", [x, optional["pre_scale"]], [scaled], name=f"{node.name}/Mul")
            x = scaled
        yield from self._product(node.name, x, weight, y, optional.get("bias"))
        if splits:
            sizes = self._constant(f"{node.name}/splits", torch.tensor(splits))
            yield helper.make_node("Split", [y, sizes], list(node.output), name=f"{node.name}/Split", axis=-1)

    def qdq_product(self, node: onnx.NodeProto, dequantize: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A product with the output [K, N] of a DequantizeLinear; as rewrite.py makes them, nothing is transposed."""
        weight, scales, *zeros = dequantize.input
        if weight not in self.packed:
            group = next(a.i for a in dequantize.attribute if a.name == "block_size")
            z = self._values(zeros[0]).t() if zeros else None
            self._pack(weight, self._values(weight).t(), self._values(scales).t(), z, group)
        bias = node.input[2] if len(node.input) > 2 else None
        yield from self._product(node.name, node.input[0], weight, node.output[0], bias)

    def _product(self, name: str, x: str, weight: str, y: str, bias: str | None) -> Iterator[onnx.NodeProto]:
        product = y if bias is None else f"{name}/product"
        inputs, attributes = self.packed[weight]
        yield helper.make_node("MatMulNBits", [x, *inputs], [product], name=name, domain=MS_DOMAIN, **attributes)
        if bias is not None:
            yield helper.make_node("Add", [product, bias], [y], name=f"{name}/Add")

    def _pack(self, name: str, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int) -> None:
        """Make the constants of a layer: q uint8 [N, K]; scales and, where there are zeros, uint8 zeros [N, G]."""
        n, k = q.shape
        block = group if group in layout.GROUP_SIZES else next(b for b in (128, 64, 32) if k % b == 0)
        repeat = group // block  # a whole row is many blocks with the same scale
        pairs = q.reshape(n, k // block, block // 2, 2)
        constants = {
            "B": pairs[..., 0] | pairs[..., 1] << 4,
            "scales": scales.float().repeat_interleave(repeat, 1).flatten(),
        }
        if zeros is not None:
            zeros = zeros.repeat_interleave(repeat, 1)
            zeros = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
            constants["zero_points"] = (zeros[:, ::2] | zeros[:, 1::2] << 4).flatten()
        inputs = [self._constant(f"{name}/{part}", value) for part, value in constants.items()]
        self.packed[name] = inputs, {"N": n, "K": k, "bits": 4, "block_size": block, "accuracy_level": FP32_COMPUTE}

    def _constant(self, name: str, value: torch.Tensor) -> str:
        self.new.append(self.store(name, value))
        return name

    def _values(self, name: str) -> torch.Tensor:
        return stored_values(self.initializers[name], self.folder)
