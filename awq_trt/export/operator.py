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

import onnx
import onnx.inliner
import onnx.parser

DOMAIN = "awq_trt"
OP_TYPE = "W4A16Gemm"
OPSET = 21
IR_VERSION = 10
"""The first IR version with overloads of functions."""

ATTRIBUTES = ("out_features", "in_features", "group_size", "has_zeros", "has_bias", "has_pre_scale")
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}

# Weights are unpacked to [K, N], what MatMul wants. Bytes first (Cast to uint8 keeps the low bits: ONNX, Cast, "discard
# higher bits"), then nibbles: they end up in the order (p, c, h) of layout.unpack_qweight. Every step is kept small
# because ONNX Runtime holds all intermediate results of a session's constants until the last one is folded.
_UNPACK_WEIGHT = """
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

    q_words = Cast <to = 12> (qweight)
    q_word_column = Unsqueeze(q_words, last)
    q_shifted = BitShift <direction = "RIGHT"> (q_word_column, byte_shifts)
    q_bytes = Cast <to = 2> (q_shifted)
    q_byte_column = Unsqueeze(q_bytes, last)
    q_halves = BitShift <direction = "RIGHT"> (q_byte_column, nibble_shifts)
    q_nibbles = BitwiseAnd(q_halves, nibble_mask)
    q_fragment_shape = Constant <value_ints = [0, 0, 8, 4, 4, 2, 2, 2]> ()
    q_fragments = Reshape(q_nibbles, q_fragment_shape)
    q_tiles = Transpose <perm = [1, 4, 6, 3, 5, 0, 7, 2]> (q_fragments)
    q_padded = Flatten <axis = 5> (q_tiles)
    q = Slice(q_padded, corner, columns_rows)
    q_grouped = Reshape(q, grouped_shape)

    s_tiles = Transpose <perm = [1, 0, 3, 2]> (scales)
    s_padded = Flatten <axis = 1> (s_tiles)
    s_rows = Slice(s_padded, origin, rows, one)
    s_float = Cast <to = 1> (s_rows)
    s = Unsqueeze(s_float, one)
"""

_UNPACK_ZEROS = """
    z_words = Cast <to = 12> (zeros)
    z_word_column = Unsqueeze(z_words, last)
    z_shifted = BitShift <direction = "RIGHT"> (z_word_column, byte_shifts)
    z_bytes = Cast <to = 2> (z_shifted)
    z_byte_column = Unsqueeze(z_bytes, last)
    z_halves = BitShift <direction = "RIGHT"> (z_byte_column, nibble_shifts)
    z_nibbles = BitwiseAnd(z_halves, nibble_mask)
    z_fragment_shape = Constant <value_ints = [0, 0, 8, 2]> ()
    z_fragments = Reshape(z_nibbles, z_fragment_shape)
    z_tiles = Transpose <perm = [1, 0, 3, 2]> (z_fragments)
    z_padded = Flatten <axis = 1> (z_tiles)
    z_rows = Slice(z_padded, origin, rows, one)
    z_float = Cast <to = 1> (z_rows)
    z = Unsqueeze(z_float, one)
"""

_PRE_SCALE = """
    x_scaled = Mul(X, pre_scale)
    x = Cast <to = 1> (x_scaled)
"""

_NO_PRE_SCALE = """
    x = Cast <to = 1> (X)
"""

_BIAS = """
    b = Cast <to = 1> (bias)
"""

# What follows is there once for each output; {i} is its number, or nothing where it is the only one.
_SYMMETRIC_ZERO = """
    z{i} = Constant <value = float {{8.0}}> ()
"""

_DEQUANTIZE = """
    q_float{i} = Cast <to = 1> (q_grouped{i})
    q_centred{i} = Sub(q_float{i}, z{i})
    w_exact{i} = Mul(q_centred{i}, s{i})
    w_rounded{i} = CastLike(w_exact{i}, scales)
    w_columns{i} = Flatten <axis = 2> (w_rounded{i})
    w{i} = Cast <to = 1> (w_columns{i})
"""

_MULTIPLY = """
    y{i} = MatMul(x, w{i})
    Y{i} = CastLike(y{i}, X)
"""

_MULTIPLY_ADD = """
    product{i} = MatMul(x, w{i})
    y{i} = Add(product{i}, b{i})
    Y{i} = CastLike(y{i}, X)
"""


def optional_inputs(*, zeros: bool, bias: bool, pre_scale: bool) -> list[str]:
    """Names of the optional inputs that are there, in the operator's order."""
    return [name for name, there in (("zeros", zeros), ("bias", bias), ("pre_scale", pre_scale)) if there]


def overload(*, zeros: bool, bias: bool, pre_scale: bool, outputs: int = 1) -> str:
    """Name of the function for a combination: "plain", "zeros_bias", "zeros_bias_3" with three outputs."""
    names = optional_inputs(zeros=zeros, bias=bias, pre_scale=pre_scale) or ["plain"]
    return "_".join(names if outputs == 1 else [*names, str(outputs)])


def function(*, zeros: bool, bias: bool, pre_scale: bool, outputs: int = 1) -> onnx.FunctionProto:
    """The function of one combination of optional inputs and number of outputs.

    Inputs, shapes and dtypes are those of the operator: X [..., K], qweight int32 [ceil(N/16), ceil(K/64), 32, 4],
    scales [ceil(N/16), G, 8, 2], then zeros int32 [ceil(N/16), G, 2], bias [N], pre_scale [K] where they are there.
    Output: Y [..., N]; or, with several, Y0 [..., splits[0]], Y1 [..., splits[1]] and so on.
    """
    inputs = ["X", "qweight", "scales", *optional_inputs(zeros=zeros, bias=bias, pre_scale=pre_scale)]
    numbers = [""] if outputs == 1 else [str(i) for i in range(outputs)]
    body = _UNPACK_WEIGHT + (_UNPACK_ZEROS if zeros else "") + (_BIAS if bias else "")
    body += _PRE_SCALE if pre_scale else _NO_PRE_SCALE
    if outputs > 1:
        body += "    splits = Constant <value_ints: ints = @splits> ()\n"
        for whole in ("q_grouped", "s", *(["z"] if zeros else []), *(["b"] if bias else [])):
            parts = ", ".join(whole + i for i in numbers)
            body += f"    {parts} = Split <axis = -1> ({whole}, splits)\n"
    each = ("" if zeros else _SYMMETRIC_ZERO) + _DEQUANTIZE + (_MULTIPLY_ADD if bias else _MULTIPLY)
    body += "".join(each.format(i=i) for i in numbers)
    attributes = ", ".join((*ATTRIBUTES, *PLUGIN_ATTRIBUTES, *(["splits"] if outputs > 1 else [])))
    proto = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]> {OP_TYPE} <{attributes}> '
        f"({', '.join(inputs)}) => ({', '.join('Y' + i for i in numbers)}) {{{body}}}"
    )
    proto.overload = overload(zeros=zeros, bias=bias, pre_scale=pre_scale, outputs=outputs)
    return proto


def add_functions(model: onnx.ModelProto) -> None:
    """Give a model the functions that its W4A16Gemm nodes need, each once, and name them in the nodes (in place)."""
    found: dict[str, onnx.FunctionProto] = {}
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if node.op_type == OP_TYPE and node.domain == DOMAIN:
            flags = {a.name.removeprefix("has_"): bool(a.i) for a in node.attribute if a.name.startswith("has_")}
            node.overload = overload(**flags, outputs=len(node.output))
            if node.overload not in found:
                found[node.overload] = function(**flags, outputs=len(node.output))
                found[node.overload].opset_import[0].version = opset  # onnx.checker wants that of the model
    if found:
        model.functions.extend(found.values())
        model.ir_version = max(model.ir_version, IR_VERSION)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every W4A16Gemm replaced by its function's body, for tools that know neither of the two."""
    return onnx.inliner.inline_local_functions(model)
