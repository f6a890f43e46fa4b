"""Layers that read the same tensor become one node, where they agree, and compute the same bits."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny_onnx import model_of, node, random_linear, run_all

from awq_trt import layout
from awq_trt.errors import AwqTrtError
from awq_trt.export.external_data import ELEM_TYPES, inline
from awq_trt.export.fusion import FusedNode
from awq_trt.export.rewrite import rewrite
from awq_trt.linear import QuantizedLinear

K = 96


def test_rows_that_8_does_not_divide_keep_layers_apart() -> None:
    """12 and 4 rows would make 16, but the kernels store 8 rows of a layer at a time."""
    model = model_of(
        [
            node("MatMul", "X l.0", "a"),
            node("MatMul", "X l.1", "b"),
            node("Concat", "a b", "Y", axis=-1),
        ],
        {"l.0": torch.zeros(K, 12).half(), "l.1": torch.zeros(K, 4).half()},
        n=16,
    )
    linears = {"l.0": random_linear(12, K, 32, zeros=True), "l.1": random_linear(4, K, 32, zeros=True)}
    result, _, fused = rewrite(model, linears)
    assert fused == []
    assert [node.op_type for node in result.graph.node].count("W4A16Gemm") == 2


def on_one_tensor(linears: dict[str, QuantizedLinear], biases: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """X -> Relu -> a product for each weight [-> Add], each an output with the name of its weight; forms take turns."""
    nodes = [node("Relu", "X", "x")]
    constants = {f"{name}.bias": value for name, value in biases.items()}
    for i, (name, linear) in enumerate(linears.items()):
        n, k = linear.q.shape
        addend = [f"{name}.bias"] if name in biases else []
        if i % 2:  # the form of torch.nn.Linear on matrices, and on anything else
            nodes.append(node("Gemm", " ".join(["x", name, *addend]), f"{name}.y", transB=1))
        else:
            nodes.append(node("Transpose", name, f"{name}.t", perm=[1, 0]))
            nodes.append(node("MatMul", f"x {name}.t", f"{name}.m" if addend else f"{name}.y"))
            nodes += [node("Add", f"{name}.m {bias}", f"{name}.y") for bias in addend]
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
    model.graph.node.append(node("MatMul", "x l.0.t", "again"))
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
        node("MatMul", "X l.0.weight", "a"),
        node("Relu", "a", "r"),
        node("MatMul", "r l.1.weight", "b"),
        node("MatMul", "X l.2.weight", "c"),
        node("Identity", "X", "i"),
        node("MatMul", "i l.3.weight", "d"),
        node("Sum", "b c d", "Y"),
    ]
    weights = {f"{name}.weight": linear for name, linear in linears.items()}
    constants = {name: torch.zeros(K, K).half() for name in weights}
    model = model_of(nodes, constants, n=K)
    fused, _, groups = rewrite(model, weights)
    onnx.checker.check_model(fused, full_check=True)  # topologically sorted, too
    assert [(group.name, group.layers) for group in groups] == [("/l.0+l.2", ("l.0", "l.2"))]
    x = torch.randn(2, K).half()
    assert torch.equal(run_all(fused, x)[0], run_all(rewrite(model, weights, fuse=False)[0], x)[0])


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
        nodes.append(node("MatMul", f"{source} w{i}", f"y{i}"))
    nodes.append(node("Sum", " ".join(f"y{i}" for i in range(12)), "Y"))
    names = {f"w{i}": 0 for i in range(12)}
    constants = {name: torch.zeros(K, K).half() for name in names}
    _, _, groups = rewrite(model_of(nodes, constants, n=K), Lazy(names))
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
