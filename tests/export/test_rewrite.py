"""The rewriter on graphs made by hand: every form of a linear layer, and everything that is not one."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from tiny_onnx import random_linear

from awq_trt import layout
from awq_trt.errors import AwqTrtError
from awq_trt.export.external_data import ELEM_TYPES, inline
from awq_trt.export.fusion import FusedNode
from awq_trt.export.rewrite import FORMATS, module_path, rewrite
from awq_trt.linear import QuantizedLinear

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


def run_all(model: onnx.ModelProto, x: torch.Tensor) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"X": x.numpy()})]


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
@pytest.mark.parametrize("n", [1, 39, 41])
@pytest.mark.parametrize("form", ["transposed", "bias after", "gemm transB"])
def test_features_that_8_does_not_divide(form: str, n: int, format: str) -> None:
    """As the head of a GPT-2 has them: the node computes up to 7 more, and a Slice takes them away."""
    nodes, _, rank, biased = FORMS[form]
    linear = random_linear(n, K, 32, zeros=form != "bias after", pre_scale=True)
    bias = torch.linspace(-2, 2, n).half() if biased else None
    constants = {WEIGHT: torch.zeros(n, K).half(), **({"bias": bias} if bias is not None else {})}
    model, done, fused = rewrite(graph_of(nodes, constants, rank=rank, n=n), {WEIGHT: linear}, format=format)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(*[2, 3][: rank - 1], K, generator=torch.Generator().manual_seed(1)).half()
    check_close(run(model, x), expected(linear, x, bias))
    assert (done[0].n, done[0].k, done[0].bias, fused) == (n, K, biased, [])
    if format == "plugin":
        assert [node.op_type for node in model.graph.node] == ["W4A16Gemm", "Slice"]
        gemm = model.graph.node[0]
        (features,) = [a.i for a in gemm.attribute if a.name == "out_features"]
        assert features == layout.padded_features(n) == -(-n // 8) * 8
        packed = next(t for t in model.graph.initializer if t.name == gemm.input[1])
        q = torch.from_numpy(onnx.numpy_helper.to_array(packed).copy())
        assert torch.equal(layout.unpack_qweight(q, n, K), linear.q)


@pytest.mark.parametrize("format", FORMATS)
def test_a_padded_layer_applied_twice(format: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["X", WEIGHT], ["a"]),
        helper.make_node("MatMul", ["X", WEIGHT], ["b"]),
        helper.make_node("Add", ["b", "bias"], ["c"]),
        helper.make_node("Concat", ["a", "c"], ["Y"], axis=-1),
    ]
    linear, bias = random_linear(12, K, 32, zeros=True), torch.linspace(-2, 2, 12).half()
    constants = {WEIGHT: torch.zeros(K, 12).half(), "bias": bias}
    model, _, _ = rewrite(graph_of(nodes, constants, n=24), {WEIGHT: linear}, format=format)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1)).half()
    check_close(run(model, x), torch.cat([expected(linear, x), expected(linear, x, bias)], -1))


def test_rows_that_8_does_not_divide_keep_layers_apart() -> None:
    """12 and 4 rows would make 16, but the kernels store the rows of each by eights."""
    model = graph_of(
        [
            helper.make_node("MatMul", ["X", WEIGHT], ["a"]),
            helper.make_node("MatMul", ["X", "other.weight"], ["b"]),
            helper.make_node("Concat", ["a", "b"], ["Y"], axis=-1),
        ],
        {WEIGHT: torch.zeros(K, 12).half(), "other.weight": torch.zeros(K, 4).half()},
        n=16,
    )
    linears = {WEIGHT: random_linear(12, K, 32, zeros=True), "other.weight": random_linear(4, K, 32, zeros=True)}
    result, _, fused = rewrite(model, linears)
    assert fused == []
    assert [node.op_type for node in result.graph.node].count("W4A16Gemm") == 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pre_scale", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_layer(form: str, pre_scale: bool, format: str) -> None:
    nodes, stored_kn, rank, biased = FORMS[form]
    linear = random_linear(N, K, 32, zeros=not pre_scale, pre_scale=pre_scale)
    bias = torch.linspace(-2, 2, N).half() if biased else None
    placeholder = torch.zeros((K, N) if stored_kn else (N, K)).half()  # its values must not matter
    constants = {WEIGHT: placeholder, **({"bias": bias} if bias is not None else {})}
    model, done, _ = rewrite(graph_of(nodes, constants, rank=rank), {WEIGHT: linear}, format=format)
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
    model, *_ = rewrite(graph_of(nodes, constants), {WEIGHT: linear}, format=format)
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
        model, (node,), _ = rewrite(graph_of(nodes, {WEIGHT: weight, **constants}), {WEIGHT: linear})
        assert not node.bias
        assert [n.op_type for n in model.graph.node] == ["W4A16Gemm", "Add"]
        check_close(run(model, x), expected(linear, x) + addend)
    shared = graph_of(
        [product, helper.make_node("Add", ["m", "bias"], ["Y"])], {WEIGHT: weight, "bias": torch.ones(N).half()}
    )
    shared.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT16, ["B", N]))
    model, (node,), _ = rewrite(shared, {WEIGHT: linear})
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
    model, done, _ = rewrite(graph_of(nodes, {WEIGHT: torch.zeros(K, K).half()}, n=K), {WEIGHT: linear}, format=format)
    assert len(done) == 1
    assert len(model.graph.initializer) == 4
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    x = torch.randn(2, K).half()
    first = expected(linear, x).half().relu()
    y, reference = run(model, x).double(), expected(linear, first)
    assert (y - reference).abs().max() <= reference.abs().max() * 2**-8


def on_one_tensor(linears: dict[str, QuantizedLinear], biases: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """X -> Relu -> a product for each weight [-> Add], each an output with the name of its weight; forms take turns."""
    nodes = [helper.make_node("Relu", ["X"], ["x"])]
    constants = {f"{name}.bias": value for name, value in biases.items()}
    for i, (name, linear) in enumerate(linears.items()):
        n, k = linear.q.shape
        addend = [f"{name}.bias"] if name in biases else []
        if i % 2:  # the form of torch.nn.Linear on matrices, and on anything else
            nodes.append(helper.make_node("Gemm", ["x", name, *addend], [f"{name}.y"], transB=1))
        else:
            products = [f"{name}.m" if addend else f"{name}.y"]
            nodes.append(helper.make_node("Transpose", [name], [f"{name}.t"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", ["x", f"{name}.t"], products))
            nodes += [helper.make_node("Add", [f"{name}.m", bias], [f"{name}.y"]) for bias in addend]
        constants[name] = torch.zeros(n, k, dtype=linear.scales.dtype)
    elem_type = ELEM_TYPES[linear.scales.dtype]
    outputs = [
        helper.make_tensor_value_info(f"{name}.y", elem_type, ["B", q.q.shape[0]]) for name, q in linears.items()
    ]
    x = helper.make_tensor_value_info("X", elem_type, ["B", k])
    stored = [inline(name, value) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "test", [x], outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def fused_and_alone(
    linears: dict[str, QuantizedLinear], biases: dict[str, torch.Tensor] | None = None
) -> tuple[onnx.ModelProto, list[list[str]]]:
    """The fused graph, whose every output is checked to have the bits of the unfused one, and its groups of layers."""
    model = on_one_tensor(linears, biases or {})
    fused, done, groups = rewrite(model, linears)
    alone, done_alone, none = rewrite(model, linears, fuse=False)
    assert none == []
    assert [node.name for node in done] == list(linears)
    assert done == done_alone
    onnx.checker.check_model(fused, full_check=True)
    x = torch.randn(3, fused.graph.input[0].type.tensor_type.shape.dim[1].dim_value).half()
    for y, reference in zip(run_all(fused, x), run_all(alone, x), strict=True):
        assert torch.equal(y, reference)
    gemms = {node.name: node for node in fused.graph.node if node.op_type == "W4A16Gemm"}
    assert len(gemms) == len(linears) - sum(len(group.layers) - 1 for group in groups)
    for group in groups:
        splits = next(list(a.ints) for a in gemms.pop(group.name).attribute if a.name == "splits")
        assert splits == list(group.splits) == [linears[layer].q.shape[0] for layer in group.layers]
    assert not [a for node in gemms.values() for a in node.attribute if a.name == "splits"]
    assert {node.op_type for node in fused.graph.node} == {"Relu", "W4A16Gemm"}
    return fused, [list(group.layers) for group in groups]


def layers_of(*widths: int, k: int = K, **options: Any) -> dict[str, QuantizedLinear]:
    return {f"l.{i}": random_linear(n, k, 32, seed=i, **({"zeros": True} | options)) for i, n in enumerate(widths)}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("widths", [(64, 32, 32), (40, 24), (8, 72, 16, 24)])
def test_layers_on_one_tensor_become_one_node(widths: tuple[int, ...], zeros: bool, biased: bool) -> None:
    linears = layers_of(*widths, zeros=zeros)
    biases = {name: torch.linspace(-i, 2, q.q.shape[0]).half() for i, (name, q) in enumerate(linears.items())}
    model, groups = fused_and_alone(linears, biases if biased else {})
    assert groups == [list(linears)]
    gemm = model.graph.node[1]
    assert gemm.name == "/l.0" + "".join(f"+l.{i}" for i in range(1, len(widths)))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    q = torch.cat([linear.q for linear in linears.values()])
    assert torch.equal(layout.unpack_qweight(torch.from_numpy(tensors[f"{gemm.name}/qweight"].copy()), *q.shape), q)
    assert len(tensors) == 2 + zeros + biased
    if biased:
        assert np.array_equal(tensors[gemm.input[-1]], torch.cat(list(biases.values())).numpy())


def test_outputs_are_in_the_order_of_the_graph_whatever_that_of_the_weights() -> None:
    linears = layers_of(40, 24, 8)
    model = on_one_tensor(linears, {})
    backwards = dict(reversed(linears.items()))
    fused, done, (group,) = rewrite(model, backwards)
    assert [node.name for node in done] == list(backwards)
    assert group == FusedNode("/l.0+l.1+l.2", ("l.0", "l.1", "l.2"), (40, 24, 8))
    assert list(fused.graph.node[1].output) == ["l.0.y", "l.1.y", "l.2.y"]


def test_no_node_takes_more_than_four_layers_or_more_rows_than_the_kernels() -> None:
    _, groups = fused_and_alone(layers_of(8, 16, 24, 32, 40))
    assert groups == [["l.0", "l.1", "l.2", "l.3"]]
    _, groups = fused_and_alone(layers_of(8, 16, 24, 32, 40, 8))
    assert groups == [["l.0", "l.1", "l.2", "l.3"], ["l.4", "l.5"]]


def test_rows_of_all_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_FEATURES", K)
    assert fused_and_alone(layers_of(64, 32))[1] == [["l.0", "l.1"]]
    assert fused_and_alone(layers_of(64, 40))[1] == []
    assert fused_and_alone(layers_of(64, 40, 32))[1] == [["l.0", "l.2"]]


@pytest.mark.parametrize("what", ["group_size", "zeros", "pre_scale", "pre_scale_is_none", "bias"])
def test_layers_that_differ_stay_apart_and_others_are_fused(what: str) -> None:
    linears = layers_of(40, 24, 8, pre_scale=what == "pre_scale")
    scale = next(iter(linears.values())).pre_scale
    linears = {
        name: replace(linear, pre_scale=None if scale is None else scale.clone()) for name, linear in linears.items()
    }
    assert fused_and_alone(linears)[1] == [["l.0", "l.1", "l.2"]]
    other = {
        "group_size": random_linear(24, K, K, zeros=True),
        "zeros": random_linear(24, K, 32, zeros=False),
        "pre_scale": replace(linears["l.1"], pre_scale=None if scale is None else scale * (torch.arange(K) != 50)),
        "pre_scale_is_none": replace(linears["l.1"], pre_scale=torch.ones(K).half()),
        "bias": linears["l.1"],
    }[what]
    biases = {"l.1": torch.ones(24).half()} if what == "bias" else {}
    _, groups = fused_and_alone({**linears, "l.1": other}, biases)
    assert groups == [["l.0", "l.2"]]


def test_weight_applied_twice_is_not_fused() -> None:
    linears = layers_of(K, 40, 24)
    model = on_one_tensor(linears, {})
    model.graph.node.append(helper.make_node("MatMul", ["x", "l.0.t"], ["again"]))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT16, ["B", K]))
    fused, _, groups = rewrite(model, linears)
    assert [group.layers for group in groups] == [("l.1", "l.2")]
    assert sorted(n.name for n in fused.graph.node if n.domain) == ["/l.0", "/l.0.1", "/l.1+l.2"]
    x = torch.randn(3, K).half()
    for y, reference in zip(run_all(fused, x), run_all(rewrite(model, linears, fuse=False)[0], x), strict=True):
        assert torch.equal(y, reference)


def test_fused_node_stands_where_the_first_layer_stood() -> None:
    """What the first layer feeds comes before the second layer; and a tensor of the same values is another tensor."""
    linears = layers_of(K, K, K, K)
    nodes = [
        helper.make_node("MatMul", ["X", "l.0.weight"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "l.1.weight"], ["b"]),
        helper.make_node("MatMul", ["X", "l.2.weight"], ["c"]),
        helper.make_node("Identity", ["X"], ["i"]),
        helper.make_node("MatMul", ["i", "l.3.weight"], ["d"]),
        helper.make_node("Sum", ["b", "c", "d"], ["Y"]),
    ]
    weights = {f"{name}.weight": linear for name, linear in linears.items()}
    constants = {name: torch.zeros(K, K).half() for name in weights}
    model = graph_of(nodes, {**constants, WEIGHT: torch.zeros(1).half()}, n=K)
    fused, _, groups = rewrite(model, weights)
    onnx.checker.check_model(fused, full_check=True)  # topologically sorted, too
    assert [(group.name, group.layers) for group in groups] == [("/l.0+l.2", ("l.0", "l.2"))]
    x = torch.randn(2, K).half()
    assert torch.equal(run(fused, x), run(rewrite(model, weights, fuse=False)[0], x))


def test_qdq_keeps_every_layer_to_itself() -> None:
    linears = layers_of(40, 24)
    model, done, groups = rewrite(on_one_tensor(linears, {}), linears, format="qdq")
    assert (len(done), groups) == (2, [])
    assert [n.op_type for n in model.graph.node].count("DequantizeLinear") == 2


def test_a_lazy_mapping_is_asked_once_and_only_one_group_is_held() -> None:
    asked: list[str] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Lazy(dict[str, int]):
        def __getitem__(self, name: str) -> Any:
            nonlocal most
            asked.append(name)
            linear = random_linear(K, K, 32, zeros=True)
            alive.append(weakref.ref(linear.q))
            most = max(most, sum(ref() is not None for ref in alive))
            return linear

    nodes = []
    for i in range(12):
        source = "X" if i < 3 else f"y{i // 3 * 3 - 1}"
        nodes.append(helper.make_node("MatMul", [source, f"w{i}"], [f"y{i}"]))
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(12)], ["Y"]))
    names = {f"w{i}": 0 for i in range(12)}
    constants = {name: torch.zeros(K, K).half() for name in names}
    _, _, groups = rewrite(graph_of(nodes, {**constants, WEIGHT: torch.zeros(1).half()}, n=K), Lazy(names))
    assert sorted(asked) == sorted(names)
    assert [len(group.layers) for group in groups] == [3] * 4
    assert most == 3


def test_biases_without_data_are_read_by_the_caller() -> None:
    linears = layers_of(40, 24)
    biases = {name: torch.ones(q.q.shape[0]).half() for name, q in linears.items()}
    model = on_one_tensor(linears, biases)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    with pytest.raises(AwqTrtError, match=r"the data of l\.0\.bias are not in the model"):
        rewrite(model, linears)
    fused, *_ = rewrite(model, linears, read=lambda tensor: biases[tensor.name.removesuffix(".bias")] * 2)
    (bias,) = [t for t in fused.graph.initializer if t.name.endswith("/bias")]
    assert np.array_equal(onnx.numpy_helper.to_array(bias), np.full(64, 2, np.float16))


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
    with pytest.raises(AwqTrtError, match="group size 24 is not 32, 64, 128 or the whole row"):
        rewrite(good, {WEIGHT: random_linear(N, K, 24, zeros=True)})
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
