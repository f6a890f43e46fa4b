"""The functions of W4A16Gemm in ONNX Runtime against layout.py and QuantizedLinear."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny_onnx import random_linear, run_all

from awq_trt import layout
from awq_trt.export import operator
from awq_trt.export.external_data import ELEM_TYPES, inline
from awq_trt.linear import QuantizedLinear

COMBINATIONS = list(itertools.product([False, True], repeat=3))


def one_node(
    linear: QuantizedLinear, bias: torch.Tensor | None = None, nodes: int = 1, splits: Sequence[int] = ()
) -> onnx.ModelProto:
    """Float X [B, S, K] -> Cast -> W4A16Gemm -> Cast -> float Y, because numpy has no bfloat16; `nodes` times N = K.

    With `splits` the one node has several outputs, and the graph as many: Y0, Y1, ...
    """
    n, k = linear.q.shape
    elem_type = ELEM_TYPES[linear.scales.dtype]
    constants = {
        "qweight": layout.pack_qweight(linear.q),
        "scales": layout.pack_scales(linear.scales),
        "zeros": None if linear.zeros is None else layout.pack_zeros(linear.zeros),
        "bias": bias,
        "pre_scale": linear.pre_scale,
    }
    present = {name: value for name, value in constants.items() if value is not None}
    flags = {f"has_{name}": int(name in present) for name in ("zeros", "bias", "pre_scale")}
    sizes = {"out_features": n, "in_features": k, "group_size": linear.group_size}
    attributes = {**sizes, **flags, **operator.PLUGIN_ATTRIBUTES, **({"splits": splits} if splits else {})}
    outputs = {f"Y{i}": width for i, width in enumerate(splits)} or {"Y": n}
    body = [helper.make_node("Cast", ["X"], ["x0"], to=elem_type)]
    for i in range(nodes):
        results = [name.replace("Y", f"x{i + 1}") for name in outputs]
        body.append(
            helper.make_node("W4A16Gemm", [f"x{i}", *present], results, f"/layer.{i}", domain="awq_trt", **attributes)
        )
    for result, name in zip(results, outputs, strict=True):
        body.append(helper.make_node("Cast", [result], [name], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        body,
        "test",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["B", "S", k])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["B", "S", width]) for y, width in outputs.items()],
        [inline(name, value) for name, value in present.items()],
    )
    opsets = [helper.make_opsetid("", operator.OPSET), helper.make_opsetid("awq_trt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    operator.add_functions(model)
    return model


def run(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    return run_all(model, x)[0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 6), st.sampled_from([32, 64, 128, None]), st.booleans(), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_unpacked_weight_is_dequantize_bit_for_bit(
    rows: int, columns: int, group: int | None, zeros: bool, half: bool, seed: int
) -> None:
    """The identity matrix as X: every product is w * 1 + 0, so Y is the weight itself, unrounded by the sum."""
    n, k, dtype = 8 * rows, (group or 32) * columns, torch.float16 if half else torch.bfloat16
    linear = random_linear(n, k, group or k, zeros=zeros, dtype=dtype, seed=seed)
    y = run(one_node(linear), torch.eye(k)[None])
    assert torch.equal(y[0].t(), linear.dequantize().float())


@pytest.mark.parametrize(("zeros", "bias", "pre_scale"), COMBINATIONS)
def test_every_combination_of_optional_inputs(zeros: bool, bias: bool, pre_scale: bool) -> None:
    """Against the definition in fp64, of values rounded where the operator rounds: Y differs in its last bit only."""
    linear = random_linear(40, 96, 32, zeros=zeros, pre_scale=pre_scale)
    b = torch.linspace(-3, 3, 40).half() if bias else None
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).half()
    y = run(one_node(linear, b), x.float())
    scaled = x if linear.pre_scale is None else x * linear.pre_scale
    expected = scaled.double() @ linear.dequantize().double().t()
    expected = expected if b is None else expected + b.double()
    assert (y.double() - expected).abs().max() <= expected.abs().max() * 2**-11 * 1.01


def test_roundings_in_the_letter_of_onnx() -> None:
    """X * pre_scale is rounded to fp16; the sum with the bias is rounded once, not after the product as well.

    By ONNX's reference evaluator: ONNX Runtime's CPU kernels compute fp16 in fp32 and drop roundings in between.
    """
    weight, scale = torch.full((8, 32), 9, dtype=torch.uint8), torch.full((32,), 1 + 2**-10).half()
    linear = QuantizedLinear(weight, torch.ones(8, 1).half(), None, 32, scale)  # W is 1 everywhere
    x = np.zeros((1, 1, 32), np.float32)
    x[..., 0] = 1 + 2**-10  # its square is 1 + 2**-9 + 2**-20, of which fp16 keeps 1 + 2**-9

    def evaluate(bias: float) -> float:
        flat = onnx.inliner.inline_local_functions(one_node(linear, torch.full((8,), bias).half()))
        (y,) = onnx.reference.ReferenceEvaluator(flat).run(None, {"X": x})
        return float(y.max())

    assert evaluate(-1 - 2**-9) == 0
    x[..., 0], x[..., 1] = 2046.0, 5.0  # the product is 2053.004; fp16 is spaced by 2 here, so that would become 2054
    assert evaluate(1.0) == 2054  # 2054.004 rounded once; twice is 2054 + 1 = 2055, a tie, which goes to 2056


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_rounded_before_they_are_multiplied(dtype: torch.dtype) -> None:
    """With -round(w) as the bias, Y = w - round(w) is 0 if w was rounded."""
    linear = random_linear(64, 32, 32, zeros=True, dtype=dtype)
    first = linear.dequantize()[:, 0]
    exact = (linear.q[:, 0].float() - linear.zeros[:, 0].float()) * linear.scales[:, 0].float()
    assert (exact != first.float()).any()
    assert (run(one_node(linear, -first), torch.eye(32)[:1, None]) == 0).all()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("splits", [(64, 32), (8, 40, 24), (16, 8, 24, 8)])
@pytest.mark.parametrize(("zeros", "bias", "pre_scale"), COMBINATIONS)
def test_each_of_several_outputs_is_its_layer_alone_bit_for_bit(
    zeros: bool, bias: bool, pre_scale: bool, splits: tuple[int, ...], fold: bool
) -> None:
    """K is so long that ONNX Runtime sums in parts, which it makes shorter the more columns there are."""
    n, k = sum(splits), 512
    whole = random_linear(n, k, 64, zeros=zeros, pre_scale=pre_scale)
    b = torch.linspace(-3, 3, n).half() if bias else None
    x = torch.randn(2, 9, k, generator=torch.Generator().manual_seed(1)).half().float()
    model = one_node(whole, b, splits=splits)
    (function,) = model.functions
    assert function.overload == model.graph.node[1].overload
    assert function.overload.endswith(f"_{len(splits)}")
    onnx.checker.check_model(model, full_check=True)
    disabled = [] if fold else ["ConstantFolding"]  # weights are unpacked once, or in each run
    outputs = run_all(model, x, disabled)
    rows = torch.arange(n).split(splits)
    assert [y.shape[-1] for y in outputs] == list(splits)
    for y, index in zip(outputs, rows, strict=True):
        (alone,) = run_all(one_node(whole.rows(index), None if b is None else b[index]), x, disabled)
        assert torch.equal(y, alone)


def test_several_outputs_in_bfloat16() -> None:
    linear = random_linear(48, 64, 32, zeros=True, dtype=torch.bfloat16)
    bias = torch.zeros(48).bfloat16()
    y = torch.cat(run_all(one_node(linear, bias, splits=(8, 40)), torch.eye(64)[None]), -1)
    assert torch.equal(y[0].t(), linear.dequantize().float())


def test_one_function_per_combination_in_use() -> None:
    model = one_node(random_linear(32, 32, 32, zeros=True), nodes=3)
    assert [f.overload for f in model.functions] == ["zeros"]
    assert {n.overload for n in model.graph.node if n.domain} == {"zeros"}
    assert model.ir_version == operator.IR_VERSION
    subsets = [list(itertools.compress(operator.OPTIONAL_INPUTS, flags)) for flags in COMBINATIONS]
    names = {operator.overload(optional, outputs=n) for optional in subsets for n in (1, 2, 3, 4)}
    assert len(names) == 32
    assert {"plain", "zeros_bias_3", "plain_2"} <= names


@pytest.mark.parametrize(("zeros", "bias", "pre_scale"), COMBINATIONS)
def test_checker_and_shape_inference_accept_the_function(zeros: bool, bias: bool, pre_scale: bool) -> None:
    linear = random_linear(40, 96, 32, zeros=zeros, pre_scale=pre_scale)
    model = one_node(linear, torch.zeros(40).half() if bias else None)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    (y,) = [v for v in inferred.graph.value_info if v.name == "x1"]
    assert y.type.tensor_type.elem_type == TensorProto.FLOAT16
    assert [d.dim_param for d in y.type.tensor_type.shape.dim][:2] == ["B", "S"]


@pytest.mark.parametrize("splits", [(), (24, 40)])
def test_weights_are_unpacked_once_when_the_session_is_created(tmp_path: Path, splits: tuple[int, ...]) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    model = one_node(random_linear(64, 64, 32, zeros=True, pre_scale=True), torch.zeros(64).half(), splits=splits)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMul" in left
    assert set(left) <= {"Cast", "Mul", "MatMul", "Add"}
