"""The ONNX operator Attention (ai.onnx 24) as our exporter uses it, and the same written out in plain operators.

A builder of engines may have no kernel for some numbers and widths of heads. Then the attention is written out as
transformers' eager implementation computes it: products in the dtype of the model, the softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT)


@dataclass(frozen=True, order=True)
class Attention:
    """What a kernel for attention on a fixed cache depends on."""

    heads: int  # of the queries
    kv_heads: int
    head_dim: int  # of queries and keys
    value_head_dim: int
    slots: int  # keys and values in the cache
    dtype: int  # ONNX's number of it

    def __str__(self) -> str:
        name, width = TensorProto.DataType.Name(self.dtype).lower(), f"{self.head_dim}"
        width += f" (values {self.value_head_dim})" if self.value_head_dim != self.head_dim else ""
        return f"attention in {name} with {self.heads} query heads, {self.kv_heads} key heads and a head_dim of {width}"


def attentions(graph: onnx.GraphProto) -> Iterator[tuple[int, Attention]]:
    """The Attention nodes that can be written out: their places in the graph, and what they are.

    Those with queries [batch, heads, new, head_dim], keys [batch, kv_heads, slots, head_dim], values [...,
    value_head_dim], a bool mask [batch, 1, new, slots], and no attribute but perhaps a scale.
    """
    types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output, *graph.value_info)}
    for i, node in enumerate(graph.node):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            continue
        if len(node.input) != 4 or any(a.name != "scale" for a in node.attribute) or not {*node.input} <= {*types}:
            continue
        query, key, value, mask = (types[name] for name in node.input)
        if any(len(t.shape.dim) != 4 for t in (query, key, value, mask)) or mask.elem_type != TensorProto.BOOL:
            continue
        dims = [query.shape.dim[1], *key.shape.dim[1:], value.shape.dim[3]]
        heads, kv_heads, slots, head_dim, value_head_dim = (d.dim_value for d in dims)  # 0 where it is dynamic
        if query.elem_type in FLOATS and all(d.dim_value for d in dims) and heads % kv_heads == 0:
            yield i, Attention(heads, kv_heads, head_dim, value_head_dim, slots, query.elem_type)


def write_out(graph: onnx.GraphProto, chosen: Collection[Attention]) -> int:
    """Replace the nodes of these kinds by plain operators that give the same; returns how many there were."""
    found = {i: kind for i, kind in attentions(graph) if kind in chosen}
    nodes = list(graph.node)
    del graph.node[:]
    for i, node in enumerate(nodes):
        graph.node.extend(_written_out(node, found[i]) if i in found else [node])
    return len(found)


def _written_out(node: onnx.NodeProto, kind: Attention) -> Iterator[onnx.NodeProto]:
    """The queries that share a key head are one matrix: [batch, kv_heads, group * new, head_dim].

    Scores are keys times queries, turned round: TensorRT-RTX 1.7 knows queries times keys as attention again, and fails
    where head_dim is no multiple of 8.
    """
    base = node.name or node.output[0]
    query, key, value, mask = node.input

    def name(of: str) -> str:
        return f"{base}/{of}"

    def numbers(of: str, values: list[int]) -> onnx.NodeProto:
        tensor = helper.make_tensor("", TensorProto.INT64, [len(values)], values)
        return helper.make_node("Constant", [], [name(of)], name(of), value=tensor)

    def number(of: str, value: float) -> onnx.NodeProto:
        tensor = helper.make_tensor("", TensorProto.FLOAT, [], [value])
        return helper.make_node("Constant", [], [name(of)], name(of), value=tensor)

    def operator(op: str, inputs: list[str], of: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [name(of)], name(of), **attributes)

    yield numbers("grouped_shape", [0, kind.kv_heads, -1, kind.head_dim])
    yield numbers("scores_shape", [0, kind.heads, -1, kind.slots])
    yield numbers("weights_shape", [0, kind.kv_heads, -1, kind.slots])
    yield numbers("output_shape", [0, kind.heads, -1, kind.value_head_dim])
    yield number("scale", node.attribute[0].f if node.attribute else kind.head_dim**-0.5)
    yield number("nothing", float("-inf"))
    yield operator("Reshape", [query, name("grouped_shape")], "grouped")
    yield operator("Transpose", [name("grouped")], "queries", perm=[0, 1, 3, 2])
    yield operator("MatMul", [key, name("queries")], "turned")
    yield operator("Transpose", [name("turned")], "products", perm=[0, 1, 3, 2])
    yield operator("Cast", [name("products")], "products_fp32", to=TensorProto.FLOAT)
    yield operator("Mul", [name("products_fp32"), name("scale")], "scaled")
    yield operator("Reshape", [name("scaled"), name("scores_shape")], "scores")
    yield operator("Where", [mask, name("scores"), name("nothing")], "masked")
    yield operator("Softmax", [name("masked")], "softmax", axis=-1)
    yield operator("Cast", [name("softmax")], "softmax_cast", to=kind.dtype)
    yield operator("Reshape", [name("softmax_cast"), name("weights_shape")], "weights")
    yield operator("MatMul", [name("weights"), value], "attended")
    yield helper.make_node("Reshape", [name("attended"), name("output_shape")], [*node.output], name("output"))


def alone(kind: Attention) -> onnx.ModelProto:
    """A graph of one Attention on a fixed cache, as the decoders of our exporter have it.

    Inputs query [batch_size, heads, sequence_length, head_dim], mask, past_length and past and new keys and values.
    """

    def tensor(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    new = "sequence_length"
    inputs = [
        tensor("query", kind.dtype, "batch_size", kind.heads, new, kind.head_dim),
        tensor("mask", TensorProto.BOOL, "batch_size", 1, new, kind.slots),
        tensor("past_length", TensorProto.INT64, "batch_size"),
    ]
    outputs = [tensor("attended", kind.dtype, "batch_size", kind.heads, new, kind.value_head_dim)]
    nodes = []
    for part, width in (("key", kind.head_dim), ("value", kind.value_head_dim)):
        past, given, present = f"past_{part}", f"new_{part}", f"present_{part}"
        inputs.append(tensor(past, kind.dtype, "batch_size", kind.kv_heads, kind.slots, width))
        inputs.append(tensor(given, kind.dtype, "batch_size", kind.kv_heads, new, width))
        outputs.append(tensor(present, kind.dtype, "batch_size", kind.kv_heads, kind.slots, width))
        scatter = helper.make_node("TensorScatter", [past, given, "past_length"], [present], axis=2, mode="linear")
        nodes.append(scatter)
    read = ["query", "present_key", "present_value", "mask"]
    nodes.append(helper.make_node("Attention", read, ["attended"], "attention", scale=kind.head_dim**-0.5))
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
