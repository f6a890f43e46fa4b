"""W4A16Gemm and 4-bit DequantizeLinear as ONNX Runtime's MatMulNBits, which multiplies packed weights as they are.

The function of a W4A16Gemm, and a DequantizeLinear that is not fused, unpack a weight anew at every run: right, and far
too slow to generate with. MatMulNBits (com.microsoft, ONNX Runtime's ContribOperators.md) has the same numbers:

    B            uint8 [N, K / block, block / 2]    q, the lower half of a byte first
    scales       fp32  [N * K / block]
    zero_points  uint8 [N * ceil(K / block / 2)]    packed along the blocks of a row; without them 8

and computes with (q - zero) * scale in fp32, where QuantizedLinear.dequantize rounds that product to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
import torch
from onnx import helper

from awq_trt import layout
from awq_trt.export.external_data import ELEM_TYPES, PACKED_4_BIT, Store
from awq_trt.export.operator import DOMAIN, OP_TYPE, optional_inputs

MS_DOMAIN = "com.microsoft"
FP32_COMPUTE = 1
"""accuracy_level: activations stay fp32 (4 would round them to int8)."""

Raw = Callable[[onnx.TensorProto], memoryview]
"""The bytes of an initializer, wherever they are."""


def matmul_nbits(model: onnx.ModelProto, raw: Raw, store: Store) -> list[onnx.TensorProto]:
    """Replace the quantized layers of an exported model, of either format, in place.

    Args:
        model: of export_onnx; its activations are to become fp32, which is not done here. raw: reads its initializers.
        store: takes the new constants, one layer at a time.

    Returns:
        The new initializers. Those of the model that nothing reads any more are gone; the new ones are not in it yet.
    """
    return _Conversion(model, raw, store).run()


@dataclass(frozen=True)
class _Packed:
    """The constants of one layer: `inputs` of MatMulNBits after the first, N, K and the columns of a block."""

    inputs: list[str]
    n: int
    k: int
    block: int


class _Conversion:
    def __init__(self, model: onnx.ModelProto, raw: Raw, store: Store) -> None:
        self.model, self.raw, self.store = model, raw, store
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.packed: dict[str, _Packed] = {}  # by the name of the weight they were made from
        self.new: list[onnx.TensorProto] = []

    def run(self) -> list[onnx.TensorProto]:
        graph = self.model.graph
        unpacked = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and self._is_4_bit(n)}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.op_type == OP_TYPE and node.domain == DOMAIN:
                nodes += self._gemm(node)
            elif node.op_type in ("MatMul", "Gemm") and node.input[1] in unpacked:
                nodes += self._product(node, unpacked[node.input[1]])
            else:
                nodes.append(node)
        if not self.packed:
            return []
        read = {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
        read = {name for node in nodes for name in node.input}
        weights = [tensor for tensor in graph.initializer if tensor.name in read]
        for field, kept in ((graph.node, nodes), (graph.initializer, weights), (self.model.functions, [])):
            del field[:]
            field.extend(kept)
        self.model.opset_import.append(helper.make_opsetid(MS_DOMAIN, 1))
        return self.new

    def _is_4_bit(self, node: onnx.NodeProto) -> bool:
        weight = self.initializers.get(node.input[0])
        return weight is not None and weight.data_type in PACKED_4_BIT and len(weight.dims) == 2

    def _gemm(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A W4A16Gemm: [Mul,] MatMulNBits [, Add] [, Split]."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        n, k, group = (attributes[name] for name in ("out_features", "in_features", "group_size"))
        x, weight, scales, *others = node.input
        names = optional_inputs(**{flag: bool(attributes[f"has_{flag}"]) for flag in ("zeros", "bias", "pre_scale")})
        optional = dict(zip(names, others, strict=True))
        if weight not in self.packed:
            q, s = layout.unpack_qweight(self._values(weight), n, k), layout.unpack_scales(self._values(scales), n)
            zeros = layout.unpack_zeros(self._values(optional["zeros"]), n) if "zeros" in optional else None
            self._pack(weight, q, s, zeros, group)
        splits = attributes.get("splits")
        y = f"{node.name}/whole" if splits else node.output[0]
        yield from self._multiply(node.name, x, weight, y, optional.get("bias"), optional.get("pre_scale"))
        if splits:
            sizes = self._constant(f"{node.name}/splits", torch.tensor(splits))
            yield helper.make_node("Split", [y, sizes], list(node.output), name=f"{node.name}/Split", axis=-1)

    def _product(self, node: onnx.NodeProto, unpack: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A product with the output [K, N] of a DequantizeLinear; as rewrite.py makes them, nothing is transposed."""
        weight, scales, *zeros = unpack.input
        if weight not in self.packed:
            group = next(a.i for a in unpack.attribute if a.name == "block_size")
            z = self._nibbles(zeros[0]).t() if zeros else None
            self._pack(weight, self._nibbles(weight).t(), self._values(scales).t(), z, group)
        bias = node.input[2] if len(node.input) > 2 else None
        yield from self._multiply(node.name, node.input[0], weight, node.output[0], bias, None)

    def _multiply(
        self, name: str, x: str, weight: str, y: str, bias: str | None, pre_scale: str | None
    ) -> Iterator[onnx.NodeProto]:
        packed = self.packed[weight]
        if pre_scale is not None:
            yield helper.make_node("Mul", [x, pre_scale], [f"{name}/scaled"], name=f"{name}/Mul")
            x = f"{name}/scaled"
        yield helper.make_node(
            "MatMulNBits",
            [x, *packed.inputs],
            [y if bias is None else f"{name}/product"],
            name=name,
            domain=MS_DOMAIN,
            N=packed.n,
            K=packed.k,
            bits=4,
            block_size=packed.block,
            accuracy_level=FP32_COMPUTE,
        )
        if bias is not None:
            yield helper.make_node("Add", [f"{name}/product", bias], [y], name=f"{name}/Add")

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
        self.packed[name] = _Packed(inputs, n, k, block)

    def _constant(self, name: str, value: torch.Tensor) -> str:
        self.new.append(self.store(name, value))
        return name

    def _values(self, name: str) -> torch.Tensor:
        tensor = self.initializers[name]
        dtype = next(t for t, elem_type in ELEM_TYPES.items() if elem_type == tensor.data_type)
        return torch.frombuffer(self.raw(tensor), dtype=dtype).reshape(list(tensor.dims))

    def _nibbles(self, name: str) -> torch.Tensor:
        """An INT4 or UINT4 initializer as uint8 0..15; INT4 is shifted by 8."""
        tensor = self.initializers[name]
        packed = torch.frombuffer(self.raw(tensor), dtype=torch.uint8)
        count = torch.Size(tensor.dims).numel()
        values = torch.stack([packed & 15, packed >> 4], 1).flatten()[:count].reshape(list(tensor.dims))
        return values ^ 8 if tensor.data_type == onnx.TensorProto.INT4 else values
