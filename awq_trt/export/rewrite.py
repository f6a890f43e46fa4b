"""Replaces the matrix products of quantized layers, in any ONNX graph.

    format "plugin"   MatMul(x, Transpose(w)) [+ b]   ->  W4A16Gemm(x, qweight, scales[, zeros][, bias][, pre_scale])
                      several of the same x           ->  one W4A16Gemm with an output for each
    format "qdq"      MatMul(x, Transpose(w)) [+ b]   ->  MatMul(x [* pre_scale], DequantizeLinear(...)) [+ b]

and the same for MatMul(x, w) and Gemm(x, w[, b]) with or without transB. A layer is found by the name of its weight's
initializer; what the model is does not matter. Everything else stays as it is.

The kernels store 8 output features at a time, so out_features of a W4A16Gemm is a multiple of 8: a layer of another
number (a head for 50257 tokens, say) gets rows of zeros, and a Slice behind the node drops their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from awq_trt import layout
from awq_trt.errors import AwqTrtError
from awq_trt.export import operator
from awq_trt.export.external_data import ELEM_TYPES, Read, Store, inline, values
from awq_trt.export.fusion import FusedNode, Layer, agreeing, same_input, stacked
from awq_trt.linear import QuantizedLinear

FORMATS = ("plugin", "qdq")
G_LOGGER.severity = G_LOGGER.ERROR  # it warns of bfloat16, which NumPy does not have and which it leaves as it is


@dataclass(frozen=True)
class QuantizedNode:
    """One rewritten layer."""

    name: str  # of the module
    n: int  # output features
    k: int  # input features
    group_size: int
    zeros: bool  # whether it has this optional input; the next two likewise
    bias: bool
    pre_scale: bool


def rewrite(
    model: onnx.ModelProto,
    linears: Mapping[str, QuantizedLinear],
    *,
    format: str = "plugin",
    fuse: bool = True,
    store: Store = inline,
    read: Read = values,
) -> tuple[onnx.ModelProto, list[QuantizedNode], list[FusedNode]]:
    """Replace the layers whose weights were quantized.

    Args:
        model: any ONNX model of opset 21 or later; its initializers need no data where `read` has the biases.
        linears: initializer name of a weight -> its quantized form, q as [N out, K in] whichever way round the graph
            holds the weight. Each is asked for once, and not held for longer than its node takes to make, so a lazy
            mapping keeps memory small.
        format: "plugin" for W4A16Gemm nodes with their functions, "qdq" for DequantizeLinear and MatMul.
        fuse: in format "plugin", layers that read the very same tensor become one node, up to four, in the order of the
            graph, where group size, dtype and pre-scale are equal and all or none have zeros, and a bias (fusion.py).
        store: where the new constants go; by default into the model itself.
        read: values of an initializer of `model`, asked for the biases of fused layers; by default those in the model.

    Returns:
        The new model, its quantized layers in the order of `linears`, and which of its nodes are several of them. A
        layer applied twice is never fused; its nodes share their constants.

    Raises:
        AwqTrtError: a weight is not in the graph, is used by something else than a matrix product, or differs in shape
            or dtype; the opset is too old; an unknown format; `read` has no bias.
    """
    if format not in FORMATS:
        raise AwqTrtError(f"format {format!r} is not one of {', '.join(FORMATS)}.")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < operator.OPSET:
        raise AwqTrtError(f"the graph has opset {opset}; INT4 needs {operator.OPSET} or later: export it again so.")
    graph = gs.import_onnx(model)
    tensors = graph.tensors()
    products = {name: _products_of(name, tensors.get(name)) for name in linears}
    nodes = {name: [node for node, _ in uses] for name, uses in products.items()}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    done: dict[str, QuantizedNode] = {}
    fused: list[FusedNode] = []

    def layers(names: Iterable[str]) -> Iterator[Layer]:
        for name in names:
            linear = linears[name]
            for node, transposed in products[name]:
                _check(tensors[name], node, transposed, linear)
            take = _take_bias if format == "plugin" else _find_bias
            biases = [take(graph, node, linear.q.shape[0]) for node in nodes[name]]
            layer, (n, k) = name.removesuffix(".weight"), linear.q.shape
            optional = (linear.zeros is not None, any(biases), linear.pre_scale is not None)
            done[name] = QuantizedNode(layer, n, k, linear.group_size, *optional)
            yield Layer(layer, linear, nodes[name], biases)

    if format == "qdq":
        for layer in layers(linears):
            _emit_qdq(graph, layer, store)
    else:
        for names in same_input(graph, nodes) if fuse else [[name] for name in nodes]:
            for group in agreeing(layers(names)):
                node = _emit_plugin(graph, group, store, lambda bias: read(initializers[bias.name]))
                if len(group) > 1:
                    fused.append(node)
                del group  # free these layers before others are read
    graph.cleanup()
    result = gs.export_onnx(graph, do_type_check=False)
    result.metadata_props.extend(model.metadata_props)
    operator.add_functions(result)
    return result, [done[name] for name in nodes], fused


def module_path(name: str) -> str:
    """A module's name as a path: "model.layers.0.mlp.up_proj" -> "/model/layers.0/mlp/up_proj"; "" stays ""."""
    path = ""
    for part in name.split(".") if name else ():
        path += f".{part}" if part.isdigit() else f"/{part}"
    return path


def _products_of(name: str, weight: gs.Tensor | None) -> list[tuple[gs.Node, bool]]:
    """The products that apply a weight, and whether each takes it transposed; at least one."""
    if not isinstance(weight, gs.Constant):
        raise AwqTrtError(
            f"the quantized weight {name} is not among the graph's initializers; was the graph exported from another "
            "model, or with its weights renamed?"
        )
    products = list(_products(weight, weight, transposed=False))
    if not products:
        raise AwqTrtError(f"the quantized weight {name} is not used by any node of the graph.")
    return products


def _products(weight: gs.Constant, tensor: gs.Tensor, *, transposed: bool) -> Iterator[tuple[gs.Node, bool]]:
    """Every product x @ B whose B is the weight (False) or the weight transposed (True)."""
    for node in list(tensor.outputs):
        attrs = node.attrs
        is_second = [i for i, operand in enumerate(node.inputs) if operand is tensor] == [1]
        is_plain = attrs.get("alpha", 1.0) == attrs.get("beta", 1.0) == 1.0 and not attrs.get("transA", 0)
        if node.op == "Transpose" and list(attrs.get("perm", (1, 0))) == [1, 0]:
            yield from _products(weight, node.outputs[0], transposed=not transposed)
        elif node.op == "Identity":
            yield from _products(weight, node.outputs[0], transposed=transposed)
        elif node.op in ("MatMul", "Gemm") and is_second and is_plain:
            yield node, transposed != bool(attrs.get("transB", 0))
        else:
            raise AwqTrtError(
                f"the quantized weight {weight.name} is used by the {node.op} node {node.name!r}, which is not a "
                "matrix product x @ weight. Leave this layer out of the quantization."
            )


def _check(weight: gs.Constant, node: gs.Node, transposed: bool, linear: QuantizedLinear) -> None:
    n, k = linear.q.shape
    expected = [n, k] if transposed else [k, n]
    if list(weight.shape) != expected:
        raise AwqTrtError(
            f"weight {weight.name} is {list(weight.shape)} in the graph; node {node.name!r} would need {expected} for "
            f"the quantized layer of {n} outputs and {k} inputs. The graph is of another model, or it is transposed."
        )
    dtype = linear.scales.dtype
    in_graph = onnx.TensorProto.DataType.Name(gs.exporters.onnx_exporter.dtype_to_onnx(weight.dtype))
    wanted = onnx.TensorProto.DataType.Name(ELEM_TYPES[dtype])
    if in_graph != wanted:
        raise AwqTrtError(
            f"weight {weight.name} is {in_graph} in the graph and {wanted} in the scales; export in {dtype}."
        )
    rows, name = layout.padded_features(n), str(dtype).removeprefix("torch.")
    if reason := layout.unsupported_reason(rows, k, linear.group_size, name):
        raise AwqTrtError(f"layer {weight.name}: {reason}. Leave this layer out of the quantization.")


def _constant(name: str, values: torch.Tensor, store: Store, elem_type: int | None = None) -> gs.Constant:
    """A graph constant whose data are wherever `store` put them."""
    return gs.Constant(name, LazyValues(store(name, values, elem_type)))


def _index(graph: gs.Graph, node: gs.Node) -> int:
    """Position of a node in the graph; `list.index` would find the first equal one."""
    return next(i for i, other in enumerate(graph.nodes) if other is node)


def _emit_plugin(
    graph: gs.Graph, group: list[Layer], store: Store, read: Callable[[gs.Constant], torch.Tensor]
) -> FusedNode:
    """Make a W4A16Gemm of several layers, or of each product of one; their biases are detached already.

    The node of several stands where the first of them stood: it needs nothing but what they read, and constants.
    """
    linear = stacked([layer.linear for layer in group])
    splits = [layer.linear.q.shape[0] for layer in group]
    n, k = layout.padded_features(len(linear.q)), linear.q.shape[1]
    first, *others = [module_path(layer.name) for layer in group]
    path = "+".join([first, *(other.rpartition("/")[2] for other in others)])
    weights = [  # packing adds the rows of zeros
        _constant(f"{path}/qweight", layout.pack_qweight(linear.q), store),
        _constant(f"{path}/scales", layout.pack_scales(linear.scales), store),
    ]
    if linear.zeros is not None:
        weights.append(_constant(f"{path}/zeros", layout.pack_zeros(linear.zeros), store))
    scale = [] if linear.pre_scale is None else [_constant(f"{path}/pre_scale", linear.pre_scale, store)]
    nodes, biases = group[0].nodes, group[0].biases
    if others:
        outputs = [layer.nodes[0].outputs[0] for layer in group]
        for layer in group:
            layer.nodes[0].outputs.clear()
        nodes[0].outputs = outputs
        if any(biases):
            bias = torch.cat([read(layer.biases[0][0]) for layer in group]).to(linear.scales.dtype)
            biases = [[_constant(f"{path}/bias", bias, store)]]
    elif missing := n - len(linear.q):
        _drop_features(graph, path, nodes, n, missing)
        padded = [[F.pad(read(b).to(linear.scales.dtype), (0, missing)) for b in addend] for addend in biases]
        biases = [[_constant(f"{path}/bias.{i}", b, store) for b in addend] for i, addend in enumerate(padded)]
    for i, (node, addend) in enumerate(zip(nodes, biases, strict=True)):
        node.op, node.domain = operator.OP_TYPE, operator.DOMAIN
        node.name = path if i == 0 else f"{path}.{i}"
        node.inputs = [node.inputs[0], *weights, *addend, *scale]
        node.attrs = {
            "out_features": n,
            "in_features": k,
            "group_size": linear.group_size,
            "has_zeros": int(linear.zeros is not None),
            "has_bias": len(addend),
            "has_pre_scale": len(scale),
            **({"splits": splits} if others else {}),
            **operator.PLUGIN_ATTRIBUTES,
        }
    return FusedNode(path, tuple(layer.name for layer in group), tuple(splits))


def _drop_features(graph: gs.Graph, path: str, nodes: list[gs.Node], n: int, missing: int) -> None:
    """Put a Slice behind nodes of n output features that drops the last `missing` ones."""
    ends = {"starts": [0], "ends": [n - missing], "axes": [-1]}
    operands = [gs.Constant(f"{path}/{name}", np.array(value)) for name, value in ends.items()]
    for i, node in enumerate(nodes):
        y = node.outputs[0]
        whole = gs.Variable(f"{path}/padded.{i}", y.dtype, y.shape and [*y.shape[:-1], n])
        node.outputs = [whole]
        slice_node = gs.Node("Slice", f"{path}/Slice.{i}", None, [whole, *operands], [y])
        graph.nodes.insert(_index(graph, node) + 1, slice_node)


def _find_bias(graph: gs.Graph, node: gs.Node, n: int) -> list[gs.Tensor]:
    """[bias] of a product: a Gemm's third operand, or the constant [n] of an Add that is its only user; else []."""
    if len(node.inputs) > 2:
        return [node.inputs[2]]
    product = node.outputs[0]
    if len(product.outputs) != 1 or product.outputs[0].op != "Add" or any(product is out for out in graph.outputs):
        return []
    return [t for t in product.outputs[0].inputs if _is_vector(t, n)][:1]


def _take_bias(graph: gs.Graph, node: gs.Node, n: int) -> list[gs.Constant]:
    """Detach the constant [n] that is added to a product, so that `node` gives the sum; [] where there is none.

    The third operand of a Gemm that is not such a constant becomes an Add of its own.
    """
    found, product = _find_bias(graph, node, n), node.outputs[0]
    if len(node.inputs) > 2:
        if _is_vector(found[0], n):
            return found
        node.outputs = [gs.Variable(f"{product.name}/product", product.dtype, product.shape)]
        add = gs.Node("Add", f"{node.name}/Add", None, [node.outputs[0], found[0]], [product])
        graph.nodes.insert(_index(graph, node) + 1, add)
        return []
    if found:
        add = product.outputs[0]
        node.outputs = [add.outputs[0]]
        add.outputs.clear()
    return found


def _is_vector(tensor: gs.Tensor, n: int) -> bool:
    return isinstance(tensor, gs.Constant) and tuple(tensor.shape) == (n,)


def _emit_qdq(graph: gs.Graph, layer: Layer, store: Store) -> None:
    """Give the products a weight [K, N] that DequantizeLinear makes of integers, in blocks along K.

    Asymmetric weights are UINT4 with zero points, symmetric ones INT4 (q - 8) without. A bias stays what it was: the
    third operand of Gemm, or an Add.
    """
    linear, nodes, path = layer.linear, layer.nodes, module_path(layer.name)
    q, elem_type = linear.q.t(), onnx.TensorProto.UINT4
    if linear.zeros is None:
        q, elem_type = q.to(torch.int8) - 8, onnx.TensorProto.INT4
    parts = [_constant(f"{path}/qweight", q, store, elem_type), _constant(f"{path}/scales", linear.scales.t(), store)]
    if linear.zeros is not None:
        parts.append(_constant(f"{path}/zeros", linear.zeros.t(), store, elem_type))
    weight = gs.Variable(f"{path}/weight", nodes[0].outputs[0].dtype, list(q.shape))
    attrs = {"axis": 0, "block_size": linear.group_size}
    dequantize = gs.Node("DequantizeLinear", f"{path}/DequantizeLinear", attrs, parts, [weight])
    graph.nodes.insert(min(_index(graph, node) for node in nodes), dequantize)
    scale = None if linear.pre_scale is None else _constant(f"{path}/pre_scale", linear.pre_scale, store)
    for i, node in enumerate(nodes):
        node.inputs[1] = weight
        node.attrs.pop("transB", None)
        if scale is not None:
            x = node.inputs[0]
            scaled = gs.Variable(f"{path}/scaled.{i}", x.dtype, x.shape)
            graph.nodes.insert(_index(graph, node), gs.Node("Mul", f"{path}/pre_scale.{i}", None, [x, scale], [scaled]))
            node.inputs[0] = scaled
