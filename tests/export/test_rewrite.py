"""The rewriter on graphs made by hand: every form of a linear layer, and everything that is not one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny_onnx import model_of, node, random_linear, run_all

from awq_trt import layout
from awq_trt.errors import AwqTrtError
from awq_trt.export.external_data import ELEM_TYPES, inline
from awq_trt.export.rewrite import FORMATS, QuantizedNode, module_path, rewrite
from awq_trt.linear import QuantizedLinear

N, K = 40, 96
WEIGHT = "block.0.proj.weight"


def run(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    return run_all(model, x)[0]


def expected(linear: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    scaled = x if linear.pre_scale is None else x * linear.pre_scale
    y = scaled.double() @ linear.dequantize().double().t()
    return y if bias is None else y + bias.double()


def check_close(y: torch.Tensor, reference: torch.Tensor) -> None:
    """Two roundings to fp16 (a product and its sum with a bias) of values no larger than the largest."""
    assert y.shape == reference.shape
    assert (y.double() - reference).abs().max() <= reference.abs().max() * 2**-10 * 1.01


TRANSPOSE = node("Transpose", WEIGHT, "t", perm=[1, 0])
# name -> (nodes, is the weight stored as [K, N], rank, is there a bias)
FORMS = {
    "matmul": ([node("MatMul", f"X {WEIGHT}", "Y")], True, 3, False),
    "transposed": ([TRANSPOSE, node("MatMul", "X t", "Y")], False, 3, False),
    "twice transposed": (
        [
            node("Transpose", WEIGHT, "t"),
            node("Identity", "t", "i"),
            node("Transpose", "i", "u", perm=[1, 0]),
            node("MatMul", "X u", "Y"),
        ],
        True,
        2,
        False,
    ),
    "bias after": ([TRANSPOSE, node("MatMul", "X t", "m"), node("Add", "m bias", "Y")], False, 3, True),
    "bias before": ([node("MatMul", f"X {WEIGHT}", "m"), node("Add", "bias m", "Y")], True, 2, True),
    "gemm": ([node("Gemm", f"X {WEIGHT}", "Y")], True, 2, False),
    "gemm transB": ([node("Gemm", f"X {WEIGHT} bias", "Y", transB=1)], False, 2, True),
    "gemm of transposed": ([TRANSPOSE, node("Gemm", "X t bias", "Y")], False, 2, True),
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_padded_layer_applied_twice(format: str) -> None:
    nodes = [
        node("MatMul", f"X {WEIGHT}", "a"),
        node("MatMul", f"X {WEIGHT}", "b"),
        node("Add", "b bias", "c"),
        node("Concat", "a c", "Y", axis=-1),
    ]
    linear, bias = random_linear(12, K, 32, zeros=True), torch.linspace(-2, 2, 12).half()
    constants = {WEIGHT: torch.zeros(K, 12).half(), "bias": bias}
    model, _, _ = rewrite(model_of(nodes, constants, n=24), {WEIGHT: linear}, format=format)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1)).half()
    check_close(run(model, x), torch.cat([expected(linear, x), expected(linear, x, bias)], -1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pre_scale", [False, True])
@pytest.mark.parametrize("n", [1, 39, N])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_layer(form: str, n: int, pre_scale: bool, format: str) -> None:
    """And of features that 8 does not divide, as the head of a GPT-2 has them: a Slice drops up to 7 more."""
    nodes, stored_kn, rank, biased = FORMS[form]
    linear = random_linear(n, K, 32, zeros=not pre_scale, pre_scale=pre_scale)
    bias = torch.linspace(-2, 2, n).half() if biased else None
    placeholder = torch.zeros((K, n) if stored_kn else (n, K)).half()  # its values must not matter
    constants = {WEIGHT: placeholder, **({"bias": bias} if bias is not None else {})}
    model, (done,), fused = rewrite(model_of(nodes, constants, rank=rank, n=n), {WEIGHT: linear}, format=format)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(*[2, 3][: rank - 1], K, generator=torch.Generator().manual_seed(1)).half()
    check_close(run(model, x), expected(linear, x, bias))
    assert (done, fused) == (QuantizedNode("block.0.proj", n, K, 32, not pre_scale, biased, pre_scale), [])
    tensors = {t.name: t for t in model.graph.initializer}
    assert WEIGHT not in tensors
    if format == "plugin":
        gemm, *others = model.graph.node  # the transposition, the product and the bias are one node now
        assert [node.op_type for node in others] == ([] if n == N else ["Slice"])
        assert (gemm.op_type, gemm.domain, gemm.name) == ("W4A16Gemm", "awq_trt", "/block.0/proj")
        assert {a.name: helper.get_attribute_value(a) for a in gemm.attribute} == {
            "out_features": -(-n // 8) * 8,
            "in_features": K,
            "group_size": 32,
            "has_zeros": int(not pre_scale),
            "has_bias": int(biased),
            "has_pre_scale": int(pre_scale),
            "plugin_version": b"1",
            "plugin_namespace": b"",
        }
        q = torch.from_numpy(onnx.numpy_helper.to_array(tensors[gemm.input[1]]).copy())
        assert torch.equal(layout.unpack_qweight(q, n, K), linear.q)
    else:
        assert not model.functions
        (dequantize,) = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
        assert tensors[dequantize.input[0]].data_type == (TensorProto.INT4 if pre_scale else TensorProto.UINT4)
        assert len(dequantize.input) == (2 if pre_scale else 3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 96])
def test_groups_and_dtypes_are_in_the_file_as_in_the_layer(group: int, dtype: torch.dtype, format: str) -> None:
    linear = random_linear(N, K, group, zeros=True, dtype=dtype)
    nodes, *_ = FORMS["gemm transB"]
    constants = {WEIGHT: torch.zeros(N, K, dtype=dtype), "bias": torch.zeros(N, dtype=dtype)}
    model, *_ = rewrite(model_of(nodes, constants), {WEIGHT: linear}, format=format)
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
    product = node("MatMul", f"X {WEIGHT}", "m")
    weight = torch.zeros(K, N).half()
    for nodes, constants, addend in (
        ([product, node("Add", "m rows", "Y")], {"rows": torch.ones(1, N).half()}, 1.0),
        ([node("Gemm", f"X {WEIGHT} one", "Y")], {"one": torch.ones(1).half()}, 1.0),
    ):
        model, (done,), _ = rewrite(model_of(nodes, {WEIGHT: weight, **constants}), {WEIGHT: linear})
        assert not done.bias
        assert [n.op_type for n in model.graph.node] == ["W4A16Gemm", "Add"]
        check_close(run(model, x), expected(linear, x) + addend)
    shared = model_of([product, node("Add", "m bias", "Y")], {WEIGHT: weight, "bias": torch.ones(N).half()})
    shared.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT16, ["B", N]))
    model, (done,), _ = rewrite(shared, {WEIGHT: linear})
    assert not done.bias
    assert [n.op_type for n in model.graph.node] == ["W4A16Gemm", "Add"]


@pytest.mark.parametrize("format", FORMATS)
def test_layer_applied_twice_shares_its_constants(format: str) -> None:
    linear = random_linear(K, K, 32, zeros=True, pre_scale=True)
    nodes = [
        node("Transpose", WEIGHT, "t", perm=[1, 0]),
        node("MatMul", "X t", "h", "first"),
        node("Relu", "h", "r", "relu"),
        node("MatMul", "r t", "Y", "second"),
    ]
    model, done, _ = rewrite(model_of(nodes, {WEIGHT: torch.zeros(K, K).half()}, n=K), {WEIGHT: linear}, format=format)
    assert len(done) == 1
    assert len(model.graph.initializer) == 4
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    x = torch.randn(2, K).half()
    first = expected(linear, x).half().relu()
    y, reference = run(model, x).double(), expected(linear, first)
    assert (y - reference).abs().max() <= reference.abs().max() * 2**-8


def test_everything_else_stays_as_it_was() -> None:
    nodes = [
        node("MatMul", "X other", "h", name="float layer"),
        node("Softmax", "h", "s", name="softmax", axis=-1),
        node("MatMul", f"s {WEIGHT}", "Y", name="quantized"),
    ]
    other = torch.randn(K, K).half()
    before = model_of(nodes, {WEIGHT: torch.zeros(K, N).half(), "other": other})
    before.metadata_props.add(key="k", value="v")
    before.graph.value_info.append(helper.make_tensor_value_info("s", TensorProto.FLOAT16, ["B", K]))
    after, *_ = rewrite(before, {WEIGHT: random_linear(N, K, 32, zeros=True)})
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
        (node("Gather", f"{WEIGHT} ids", "Y"), (N, K)),
        (node("Gemm", f"X {WEIGHT}", "Y", alpha=2.0), (K, N)),
        (node("MatMul", f"{WEIGHT} X", "Y"), (N, K)),
        (node("Transpose", WEIGHT, "Y", perm=[0, 1]), (N, K)),
        (node("Mul", f"{WEIGHT} X", "Y"), (K, N)),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "",
)
def test_weight_used_otherwise_is_an_error(node: onnx.NodeProto, shape: tuple[int, int]) -> None:
    node.name = "/the/node"
    model = model_of([node], {WEIGHT: torch.zeros(shape).half(), "ids": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(AwqTrtError, match=f"{WEIGHT} is used by the {node.op_type} node '/the/node'"):
        rewrite(model, {WEIGHT: random_linear(N, K, 32, zeros=True)})


def test_wrong_inputs_are_errors_that_say_what_is_wrong() -> None:
    linear = random_linear(N, K, 32, zeros=True)
    matmul = FORMS["matmul"][0]
    good = model_of(matmul, {WEIGHT: torch.zeros(K, N).half()})
    with pytest.raises(AwqTrtError, match="'int8' is not one of plugin, qdq"):
        rewrite(good, {WEIGHT: linear}, format="int8")
    with pytest.raises(AwqTrtError, match=r"other\.weight is not among the graph's initializers"):
        rewrite(good, {"other.weight": linear})
    with pytest.raises(AwqTrtError, match=r"is \[96, 40\] in the graph; node '' would need \[64, 40\]"):
        rewrite(good, {WEIGHT: random_linear(N, 64, 32, zeros=True)})
    with pytest.raises(AwqTrtError, match=r"is \[40, 96\] in the graph; node '' would need \[96, 40\]"):
        rewrite(model_of(matmul, {WEIGHT: torch.zeros(N, K).half()}), {WEIGHT: linear})
    with pytest.raises(AwqTrtError, match=r"is FLOAT in the graph and FLOAT16 in the scales; export in torch\.float16"):
        rewrite(model_of(matmul, {WEIGHT: torch.zeros(K, N)}), {WEIGHT: linear})
    with pytest.raises(AwqTrtError, match="opset 17; INT4 needs 21"):
        rewrite(model_of(matmul, {WEIGHT: torch.zeros(K, N).half()}, opset=17), {WEIGHT: linear})
    with pytest.raises(AwqTrtError, match="group size 24 is not 32, 64, 128 or the whole row"):
        rewrite(good, {WEIGHT: random_linear(N, K, 24, zeros=True)})
    unused = model_of([node("Relu", "X", "Y")], {WEIGHT: torch.zeros(K, N).half()}, n=K)
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
