"""The rewriter on graphs made by hand: every form of a linear layer, and everything that is not one."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from test_onnx_functions import random_linear

from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear
from awq_trt.onnx_data import ELEM_TYPES, inline
from awq_trt.rewrite import FORMATS, module_path, rewrite

N, K = 40, 96
WEIGHT = "block.0.proj.weight"


def graph_of(
    nodes: list[onnx.NodeProto], constants: dict[str, torch.Tensor], *, rank: int = 2, opset: int = 21, n: int = N
) -> onnx.ModelProto:
    """X [.., K] -> nodes -> Y [.., n]; X and Y have the dtype of the weight."""
    elem_type = ELEM_TYPES[constants[WEIGHT].dtype]
    lead = ["B", "S"][: rank - 1]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("X", elem_type, [*lead, K])],
        [helper.make_tensor_value_info("Y", elem_type, [*lead, n])],
        [inline(name, value) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"X": x.numpy()})[0])


def expected(linear: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    scaled = x if linear.pre_scale is None else x * linear.pre_scale
    y = scaled.double() @ linear.dequantize().double().t()
    return y if bias is None else y + bias.double()


def check_close(y: torch.Tensor, reference: torch.Tensor) -> None:
    """Two roundings to fp16 (a product and its sum with a bias) of values no larger than the largest."""
    assert y.shape == reference.shape
    assert (y.double() - reference).abs().max() <= reference.abs().max() * 2**-10 * 1.01


# name -> (nodes, is the weight stored as [K, N], rank, is there a bias)
FORMS = {
    "matmul": ([helper.make_node("MatMul", ["X", WEIGHT], ["Y"])], True, 3, False),
    "transposed": (
        [helper.make_node("Transpose", [WEIGHT], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["X", "t"], ["Y"])],
        False,
        3,
        False,
    ),
    "twice transposed": (
        [
            helper.make_node("Transpose", [WEIGHT], ["t"]),
            helper.make_node("Identity", ["t"], ["i"]),
            helper.make_node("Transpose", ["i"], ["u"], perm=[1, 0]),
            helper.make_node("MatMul", ["X", "u"], ["Y"]),
        ],
        True,
        2,
        False,
    ),
    "bias after": (
        [
            helper.make_node("Transpose", [WEIGHT], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["X", "t"], ["m"]),
            helper.make_node("Add", ["m", "bias"], ["Y"]),
        ],
        False,
        3,
        True,
    ),
    "bias before": (
        [helper.make_node("MatMul", ["X", WEIGHT], ["m"]), helper.make_node("Add", ["bias", "m"], ["Y"])],
        True,
        2,
        True,
    ),
    "gemm": ([helper.make_node("Gemm", ["X", WEIGHT], ["Y"])], True, 2, False),
    "gemm transB": ([helper.make_node("Gemm", ["X", WEIGHT, "bias"], ["Y"], transB=1)], False, 2, True),
    "gemm of transposed": (
        [
            helper.make_node("Transpose", [WEIGHT], ["t"], perm=[1, 0]),
            helper.make_node("Gemm", ["X", "t", "bias"], ["Y"]),
        ],
        False,
        2,
        True,
    ),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pre_scale", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_layer(form: str, pre_scale: bool, format: str) -> None:
    nodes, stored_kn, rank, biased = FORMS[form]
    linear = random_linear(N, K, 32, zeros=not pre_scale, pre_scale=pre_scale)
    bias = torch.linspace(-2, 2, N).half() if biased else None
    placeholder = torch.zeros((K, N) if stored_kn else (N, K)).half()  # its values must not matter
    constants = {WEIGHT: placeholder, **({"bias": bias} if bias is not None else {})}
    model, done = rewrite(graph_of(nodes, constants, rank=rank), {WEIGHT: linear}, format=format)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(*[2, 3][: rank - 1], K, generator=torch.Generator().manual_seed(1)).half()
    check_close(run(model, x), expected(linear, x, bias))
    (node,) = done
    assert (node.name, node.n, node.k, node.group_size) == ("block.0.proj", N, K, 32)
    assert (node.zeros, node.bias, node.pre_scale) == (not pre_scale, biased, pre_scale)
    assert WEIGHT not in {t.name for t in model.graph.initializer}
    if format == "plugin":
        (gemm,) = model.graph.node  # the transposition, the product and the bias are one node now
        assert (gemm.op_type, gemm.domain, gemm.name) == ("W4A16Gemm", "awq_trt", "/block.0/proj")
        attributes = {a.name: helper.get_attribute_value(a) for a in gemm.attribute}
        assert attributes == {
            "out_features": N,
            "in_features": K,
            "group_size": 32,
            "has_zeros": int(not pre_scale),
            "has_bias": int(biased),
            "has_pre_scale": int(pre_scale),
            "plugin_version": b"1",
            "plugin_namespace": b"",
        }
    else:
        assert not model.functions
        (dequantize,) = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
        stored = next(t for t in model.graph.initializer if t.name == dequantize.input[0])
        assert stored.data_type == (TensorProto.INT4 if pre_scale else TensorProto.UINT4)
        assert len(dequantize.input) == (2 if pre_scale else 3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 96])
def test_groups_and_dtypes_are_in_the_file_as_in_the_layer(group: int, dtype: torch.dtype, format: str) -> None:
    linear = random_linear(N, K, group, zeros=True, dtype=dtype)
    nodes, *_ = FORMS["gemm transB"]
    constants = {WEIGHT: torch.zeros(N, K, dtype=dtype), "bias": torch.zeros(N, dtype=dtype)}
    model, _ = rewrite(graph_of(nodes, constants), {WEIGHT: linear}, format=format)
    onnx.checker.check_model(model, full_check=True)
    tensors = {t.name: t for t in model.graph.initializer}
    scales = tensors["/block.0/proj/scales"]
    assert scales.data_type == ELEM_TYPES[dtype]
    values = torch.frombuffer(bytearray(scales.raw_data), dtype=dtype)
    if format == "plugin":
        assert list(scales.dims) == [3, K // group, 8, 2]
        assert torch.equal(values.reshape(3, K // group, 8, 2)[0, :, 1, 0], linear.scales[1])
    else:
        assert torch.equal(values.reshape(K // group, N), linear.scales.t())
        assert len(tensors["/block.0/proj/qweight"].raw_data) == N * K // 2


def test_addend_that_is_not_a_bias_stays_an_addition() -> None:
    """A residual, a matrix, and a product that is also an output of the graph."""
    linear = random_linear(N, K, 32, zeros=True)
    x = torch.randn(2, K).half()
    product = helper.make_node("MatMul", ["X", WEIGHT], ["m"])
    weight = torch.zeros(K, N).half()
    for nodes, constants, addend in (
        ([product, helper.make_node("Add", ["m", "rows"], ["Y"])], {"rows": torch.ones(1, N).half()}, 1.0),
        ([helper.make_node("Gemm", ["X", WEIGHT, "one"], ["Y"])], {"one": torch.ones(1).half()}, 1.0),
    ):
        model, (node,) = rewrite(graph_of(nodes, {WEIGHT: weight, **constants}), {WEIGHT: linear})
        assert not node.bias
        assert [n.op_type for n in model.graph.node] == ["W4A16Gemm", "Add"]
        check_close(run(model, x), expected(linear, x) + addend)
    shared = graph_of(
        [product, helper.make_node("Add", ["m", "bias"], ["Y"])], {WEIGHT: weight, "bias": torch.ones(N).half()}
    )
    shared.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT16, ["B", N]))
    model, (node,) = rewrite(shared, {WEIGHT: linear})
    assert not node.bias
    assert [n.op_type for n in model.graph.node] == ["W4A16Gemm", "Add"]


@pytest.mark.parametrize("format", FORMATS)
def test_layer_applied_twice_shares_its_constants(format: str) -> None:
    linear = random_linear(K, K, 32, zeros=True, pre_scale=True)
    nodes = [
        helper.make_node("Transpose", [WEIGHT], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["X", "t"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "t"], ["Y"], "second"),
    ]
    model, done = rewrite(graph_of(nodes, {WEIGHT: torch.zeros(K, K).half()}, n=K), {WEIGHT: linear}, format=format)
    assert len(done) == 1
    assert len(model.graph.initializer) == 4
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    x = torch.randn(2, K).half()
    first = expected(linear, x).half().relu()
    y, reference = run(model, x).double(), expected(linear, first)
    assert (y - reference).abs().max() <= reference.abs().max() * 2**-8


def test_everything_else_stays_as_it_was() -> None:
    nodes = [
        helper.make_node("MatMul", ["X", "other"], ["h"], name="float layer"),
        helper.make_node("Softmax", ["h"], ["s"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["s", WEIGHT], ["Y"], name="quantized"),
    ]
    other = torch.randn(K, K).half()
    before = graph_of(nodes, {WEIGHT: torch.zeros(K, N).half(), "other": other})
    before.metadata_props.add(key="k", value="v")
    before.graph.value_info.append(helper.make_tensor_value_info("s", TensorProto.FLOAT16, ["B", K]))
    after, _ = rewrite(before, {WEIGHT: random_linear(N, K, 32, zeros=True)})
    assert list(after.graph.node[:2]) == list(before.graph.node[:2])
    assert next(t for t in after.graph.initializer if t.name == "other") == before.graph.initializer[1]
    assert (list(after.graph.input), list(after.graph.output)) == (list(before.graph.input), list(before.graph.output))
    assert next(v for v in after.graph.value_info if v.name == "s") == before.graph.value_info[0]
    assert [(p.key, p.value) for p in after.metadata_props] == [("k", "v")]
    assert len(before.graph.node) == 3
    assert before.graph.node[2].op_type == "MatMul"


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (helper.make_node("Gather", [WEIGHT, "ids"], ["Y"]), (N, K)),
        (helper.make_node("Gemm", ["X", WEIGHT], ["Y"], alpha=2.0), (K, N)),
        (helper.make_node("MatMul", [WEIGHT, "X"], ["Y"]), (N, K)),
        (helper.make_node("Transpose", [WEIGHT], ["Y"], perm=[0, 1]), (N, K)),
        (helper.make_node("Mul", [WEIGHT, "X"], ["Y"]), (K, N)),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "",
)
def test_weight_used_otherwise_is_an_error(node: onnx.NodeProto, shape: tuple[int, int]) -> None:
    node.name = "/the/node"
    model = graph_of([node], {WEIGHT: torch.zeros(shape).half(), "ids": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(AwqTrtError, match=f"{WEIGHT} is used by the {node.op_type} node '/the/node'"):
        rewrite(model, {WEIGHT: random_linear(N, K, 32, zeros=True)})


def test_wrong_inputs_are_errors_that_say_what_is_wrong() -> None:
    linear = random_linear(N, K, 32, zeros=True)
    matmul = FORMS["matmul"][0]
    good = graph_of(matmul, {WEIGHT: torch.zeros(K, N).half()})
    with pytest.raises(AwqTrtError, match="'int8' is not one of plugin, qdq"):
        rewrite(good, {WEIGHT: linear}, format="int8")
    with pytest.raises(AwqTrtError, match=r"other\.weight is not among the graph's initializers"):
        rewrite(good, {"other.weight": linear})
    with pytest.raises(AwqTrtError, match=r"is \[96, 40\] in the graph; node '' would need \[64, 40\]"):
        rewrite(good, {WEIGHT: random_linear(N, 64, 32, zeros=True)})
    with pytest.raises(AwqTrtError, match=r"is \[40, 96\] in the graph; node '' would need \[96, 40\]"):
        rewrite(graph_of(matmul, {WEIGHT: torch.zeros(N, K).half()}), {WEIGHT: linear})
    with pytest.raises(AwqTrtError, match=r"is FLOAT in the graph and FLOAT16 in the scales; export in torch\.float16"):
        rewrite(graph_of(matmul, {WEIGHT: torch.zeros(K, N)}), {WEIGHT: linear})
    with pytest.raises(AwqTrtError, match="opset 17; INT4 needs 21"):
        rewrite(graph_of(matmul, {WEIGHT: torch.zeros(K, N).half()}, opset=17), {WEIGHT: linear})
    with pytest.raises(AwqTrtError, match="out_features 12 is not a multiple of 8"):
        rewrite(
            graph_of(matmul, {WEIGHT: torch.zeros(K, 12).half()}, n=12), {WEIGHT: random_linear(12, K, 32, zeros=True)}
        )
    unused = graph_of([helper.make_node("Relu", ["X"], ["Y"])], {WEIGHT: torch.zeros(K, N).half()}, n=K)
    with pytest.raises(AwqTrtError, match="is not"):
        rewrite(unused, {WEIGHT: linear})


def test_names_of_modules_become_paths() -> None:
    assert module_path("model.layers.0.self_attn.q_proj") == "/model/layers.0/self_attn/q_proj"
    assert module_path("h.1.2.fc") == "/h.1.2/fc"
    assert module_path("") == ""


def test_4_bit_constants_put_the_first_value_in_the_low_half() -> None:
    proto = inline("t", torch.tensor([[1, 15, 2]], dtype=torch.uint8), TensorProto.UINT4)
    assert proto.raw_data == b"\xf1\x02"
    signed = inline("t", torch.tensor([-8, 7], dtype=torch.int8), TensorProto.INT4)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(signed).astype(np.int8), [-8, 7])
