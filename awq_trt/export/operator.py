"""What `W4A16Gemm` means, written in standard ONNX operators, so that plain ONNX Runtime runs the file TensorRT builds.

Each node of the operator carries the same attributes but not the same inputs (zeros, bias and pre_scale are left out
where a layer has none) and outputs (one for each of the layers that a node computes; where there are several, the
attribute `splits` says their features), and an ONNX function has fixed lists of both. So there is one function per
combination, told apart by the field `overload` (ONNX IR version 10). TensorRT's parser takes the plugin instead of the
function because the nodes say `plugin_namespace = ""` explicitly.

The body first unpacks the weights from the packed layout (see layout.py) by operators whose inputs are all constants,
so a runtime folds them once, when the session is created; then it multiplies. Rounding is that of
`QuantizedLinear.dequantize`: the weight is an exact fp32 product, rounded once to the dtype of X. X * pre_scale is
rounded to the dtype of X, products are summed in fp32, the bias is added in fp32 and the sum rounded once.

With several outputs the weights are split, not the product: ONNX Runtime sums in an order that depends on the number of
columns, and each output is to have the very bits that its layer alone would give.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.parser

DOMAIN = "awq_trt"
OP_TYPE = "W4A16Gemm"
OPSET = 21
IR_VERSION = 10
"""The first IR version with overloads of functions."""

OPTIONAL_INPUTS = ("zeros", "bias", "pre_scale")
"""After X, qweight and scales, in this order."""

ATTRIBUTES = ("out_features", "in_features", "group_size", "has_zeros", "has_bias", "has_pre_scale")
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}

# Weights are unpacked to [K, N], what MatMul wants. Bytes first (Cast to uint8 keeps the low bits: ONNX, Cast, "discard
# higher bits"), then nibbles: they end up in the order (p, c, h) of layout.unpack_qweight. Every step is kept small
# because ONNX Runtime holds all intermediate results of a session's constants until the last one is folded.
_CONSTANTS = """
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    origin = Constant <value_ints = [0]> ()
    corner = Constant <value_ints = [0, 0]> ()
    n = Constant <value_int: int = @out_features> ()
    k = Constant <value_int: int = @in_features> ()
    group = Constant <value_int: int = @group_size> ()
    rows = Reshape(n, last)
    columns = Reshape(k, last)
    group_columns = Reshape(group, last)
    columns_rows = Concat <axis = 0> (columns, rows)
    grouped_shape = Concat <axis = 0> (last, group_columns, rows)
    byte_shifts = Constant <value = uint32[4] {0, 8, 16, 24}> ()
    nibble_shifts = Constant <value = uint8[2] {0, 4}> ()
    nibble_mask = Constant <value = uint8 {15}> ()
"""

_NIBBLES = """
    {p}_words = Cast <to = 12> ({packed})
    {p}_word_column = Unsqueeze({p}_words, last)
    {p}_shifted = BitShift <direction = "RIGHT"> ({p}_word_column, byte_shifts)
    {p}_bytes = Cast <to = 2> ({p}_shifted)
    {p}_byte_column = Unsqueeze({p}_bytes, last)
    {p}_halves = BitShift <direction = "RIGHT"> ({p}_byte_column, nibble_shifts)
    {p}_nibbles = BitwiseAnd({p}_halves, nibble_mask)
    {p}_fragment_shape = Constant <value_ints = {shape}> ()
    {p}_fragments = Reshape({p}_nibbles, {p}_fragment_shape)
"""

_WEIGHT = """
    q_tiles = Transpose <perm = [1, 4, 6, 3, 5, 0, 7, 2]> (q_fragments)
    q_padded = Flatten <axis = 5> (q_tiles)
    q = Slice(q_padded, corner, columns_rows)
    q_grouped = Reshape(q, grouped_shape)
"""

_PER_GROUP = """
    {p}_tiles = Transpose <perm = [1, 0, 3, 2]> ({tiles})
    {p}_padded = Flatten <axis = 1> ({p}_tiles)
    {p}_rows = Slice({p}_padded, origin, rows, one)
    {p}_float = Cast <to = 1> ({p}_rows)
    {p} = Unsqueeze({p}_float, one)
"""

_UNPACK_WEIGHT_AND_SCALES = (
    _CONSTANTS
    + _NIBBLES.format(p="q", packed="qweight", shape=[0, 0, 8, 4, 4, 2, 2, 2])
    + _WEIGHT
    + _PER_GROUP.format(p="s", tiles="scales")
)
_UNPACK_ZEROS = _NIBBLES.format(p="z", packed="zeros", shape=[0, 0, 8, 2]) + _PER_GROUP.format(
    p="z", tiles="z_fragments"
)

# Once for each output; {i} is its number, or nothing where it is the only one.
_DEQUANTIZE = """
    q_float{i} = Cast <to = 1> (q_grouped{i})
    q_centred{i} = Sub(q_float{i}, z{i})
    w_exact{i} = Mul(q_centred{i}, s{i})
    w_rounded{i} = CastLike(w_exact{i}, scales)
    w_columns{i} = Flatten <axis = 2> (w_rounded{i})
    w{i} = Cast <to = 1> (w_columns{i})
"""


def overload(optional: Sequence[str], outputs: int = 1) -> str:
    """Name of the function for a combination: "plain", "zeros_bias", "zeros_bias_3" with three outputs."""
    return "_".join([*(optional or ["plain"]), *([str(outputs)] if outputs > 1 else [])])


def function(optional: Sequence[str], outputs: int = 1) -> onnx.FunctionProto:
    """The function of one combination of optional inputs, in the order of `OPTIONAL_INPUTS`, and number of outputs.

    Inputs, shapes and dtypes are those of the operator: X [..., K], qweight int32 [ceil(N/16), ceil(K/64), 32, 4],
    scales [ceil(N/16), G, 8, 2], zeros int32 [ceil(N/16), G, 2], bias [N], pre_scale [K].
    Output: Y [..., N]; or, with several, Y0 [..., splits[0]], Y1 [..., splits[1]] and so on.
    """
    zeros, bias, pre_scale = (name in optional for name in OPTIONAL_INPUTS)
    numbers = [""] if outputs == 1 else [str(i) for i in range(outputs)]
    body = _UNPACK_WEIGHT_AND_SCALES + (_UNPACK_ZEROS if zeros else "") + ("b = Cast <to = 1> (bias)\n" if bias else "")
    body += "x_scaled = Mul(X, pre_scale)\n x = Cast <to = 1> (x_scaled)\n" if pre_scale else "x = Cast <to = 1> (X)\n"
    if outputs > 1:
        body += "splits = Constant <value_ints: ints = @splits> ()\n"
        for whole in ("q_grouped", "s", *(["z"] if zeros else []), *(["b"] if bias else [])):
            body += f"{', '.join(whole + i for i in numbers)} = Split <axis = -1> ({whole}, splits)\n"
    for i in numbers:
        body += "" if zeros else f"z{i} = Constant <value = float {{8.0}}> ()\n"
        body += _DEQUANTIZE.format(i=i)
        product = f"product{i}" if bias else f"y{i}"
        body += f"{product} = MatMul(x, w{i})\n" + (f"y{i} = Add({product}, b{i})\n" if bias else "")
        body += f"Y{i} = CastLike(y{i}, X)\n"
    attributes = ", ".join((*ATTRIBUTES, *PLUGIN_ATTRIBUTES, *(["splits"] if outputs > 1 else [])))
    proto = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]> {OP_TYPE} <{attributes}> '
        f"({', '.join(['X', 'qweight', 'scales', *optional])}) => ({', '.join('Y' + i for i in numbers)}) {{{body}}}"
    )
    proto.overload = overload(optional, outputs)
    return proto


def add_functions(model: onnx.ModelProto) -> None:
    """Give a model the functions that its W4A16Gemm nodes need, each once, and name them in the nodes (in place)."""
    functions: dict[str, onnx.FunctionProto] = {}
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if node.op_type == OP_TYPE and node.domain == DOMAIN:
            has = {a.name: a.i for a in node.attribute}
            optional = [name for name in OPTIONAL_INPUTS if has[f"has_{name}"]]
            node.overload = overload(optional, len(node.output))
            if node.overload not in functions:
                functions[node.overload] = function(optional, len(node.output))
                functions[node.overload].opset_import[0].version = opset  # onnx.checker wants that of the model
    if functions:
        model.functions.extend(functions.values())
        model.ir_version = max(model.ir_version, IR_VERSION)
