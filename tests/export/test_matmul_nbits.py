"""MatMulNBits in place of the operators of both formats: the same numbers, and nothing of the old ones left."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_onnx
import torch
from onnx import TensorProto, helper
from tiny_onnx import random_linear

from awq_trt.export.external_data import inline
from awq_trt.export.fp32 import float32_copy
from awq_trt.export.rewrite import rewrite
from awq_trt.linear import QuantizedLinear

N, K = 40, 384
OPTIONS = list(itertools.product([False, True], repeat=3))


def exact(linear: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In double precision, the product (q - zero) * scale not rounded."""
    zeros = 8 if linear.zeros is None else linear.zeros.double().repeat_interleave(linear.group_size, 1)
    weight = (linear.q.double() - zeros) * linear.scales.double().repeat_interleave(linear.group_size, 1)
    scaled = x.double() if linear.pre_scale is None else x.double() * linear.pre_scale.double()
    return scaled @ weight.t() + (0 if bias is None else bias.double())


def save(path: Path, linears: list[QuantizedLinear], bias: torch.Tensor | None, format: str) -> Path:
    """X [B, S, K] times each layer, [+ bias], in the given format, 16-bit activations; weights beside the file."""
    dtype = linears[0].scales.dtype
    elem_type = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]
    nodes, weights, outputs = [], [], []
    for i, linear in enumerate(linears):
        n, k = linear.q.shape
        weights.append(inline(f"l{i}.weight", torch.zeros(k, n, dtype=dtype)))
        product = f"p{i}" if bias is not None else f"Y{i}"
        nodes.append(helper.make_node("MatMul", ["X", f"l{i}.weight"], [product], name=f"m{i}"))
        if bias is not None:
            weights.append(inline(f"l{i}.bias", bias.to(dtype)))
            nodes.append(helper.make_node("Add", [product, f"l{i}.bias"], [f"Y{i}"]))
        outputs.append(helper.make_tensor_value_info(f"Y{i}", elem_type, ["B", "S", n]))
    x = helper.make_tensor_value_info("X", elem_type, ["B", "S", linears[0].q.shape[1]])
    graph = helper.make_graph(nodes, "test", [x], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    names = {f"l{i}.weight": linear for i, linear in enumerate(linears)}
    rewritten, _, _ = rewrite(model, names, format=format)
    onnx.save(rewritten, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def run(path: Path, x: torch.Tensor) -> list[np.ndarray]:
    copy = path.with_name("copy.onnx")
    float32_copy(path, copy, nbits=True)
    session = onnxruntime.InferenceSession(str(copy), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def check(found: list[np.ndarray], expected: list[torch.Tensor]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=float(wanted.abs().max()) * 1e-5)


@pytest.mark.parametrize("format", ["plugin", "qdq"])
@pytest.mark.parametrize("group", [32, 64, 128, K])
@pytest.mark.parametrize(("zeros", "bias", "pre_scale"), OPTIONS)
def test_products(tmp_path: Path, format: str, group: int, zeros: bool, bias: bool, pre_scale: bool) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        linear = random_linear(N, K, group, zeros=zeros, pre_scale=pre_scale, dtype=dtype)
        b = torch.randn(N).to(dtype) if bias else None
        for tokens in (1, 7):
            x = torch.randn(2, tokens, K)
            check(run(save(tmp_path / "m.onnx", [linear], b, format), x), [exact(linear, x, b)])


@pytest.mark.parametrize("bias", [False, True])
def test_a_node_of_several_layers(tmp_path: Path, bias: bool) -> None:
    linears = [random_linear(n, K, 64, zeros=True, seed=i) for i, n in enumerate((24, N, N))]
    b = torch.randn(N).half() if bias else None
    if b is not None:
        linears = linears[1:]
    path, x = save(tmp_path / "m.onnx", linears, b, "plugin"), torch.randn(1, 3, K)
    assert [n.op_type for n in onnx.load(path).graph.node] == ["W4A16Gemm"]
    check(run(path, x), [exact(linear, x, b) for linear in linears])


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_a_row_of_odd_blocks(tmp_path: Path, blocks: int) -> None:
    """Zero points of a row are padded to whole bytes."""
    linear = random_linear(N, 32 * blocks, 32, zeros=True)
    x = torch.randn(1, 1, 32 * blocks)
    check(run(save(tmp_path / "m.onnx", [linear], None, "plugin"), x), [exact(linear, x, None)])


@pytest.mark.parametrize("format", ["plugin", "qdq"])
def test_nothing_of_the_old_operator_is_left(tmp_path: Path, format: str) -> None:
    linears = [random_linear(N, K, 64, zeros=True, pre_scale=True, seed=i) for i in range(2)]
    path = save(tmp_path / "m.onnx", linears, None, format)
    before = path.with_name("m.onnx.data").read_bytes()
    float32_copy(path, tmp_path / "copy.onnx", nbits=True)
    model = onnx.load(tmp_path / "copy.onnx")
    assert {n.op_type for n in model.graph.node} == {"Mul", "MatMulNBits"}
    made = {"X", *(name for node in model.graph.node for name in node.output)}
    assert {t.name for t in model.graph.initializer} == {i for node in model.graph.node for i in node.input} - made
    assert not model.functions
    assert {t.data_type for t in model.graph.initializer} == {TensorProto.FLOAT, TensorProto.UINT8}
    assert path.with_name("m.onnx.data").read_bytes() == before


def test_weights_that_several_nodes_share_are_converted_once(tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx.quantized(tmp_path / "m.onnx", n=64, k=64, group_size=32))
    again = onnx.NodeProto()
    again.CopyFrom(model.graph.node[0])
    again.name, again.input[0], again.output[0] = "again", "y_0", "y_1"
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("y_1", TensorProto.FLOAT16, ["B", "S", 64]))
    onnx.save(model, tmp_path / "m.onnx")
    float32_copy(tmp_path / "m.onnx", tmp_path / "copy.onnx", nbits=True)
    assert len(onnx.load(tmp_path / "copy.onnx").graph.initializer) == 3
    x = torch.randn(1, 2, 64)
    once, twice = run(tmp_path / "m.onnx", x)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", torch.from_numpy(once))[0], twice, rtol=1e-5, atol=1e-3)


def test_a_model_without_quantized_layers_is_only_widened(tmp_path: Path) -> None:
    float32_copy(tiny_onnx.decoder(tmp_path / "m.onnx"), tmp_path / "copy.onnx", nbits=True)
    model = onnx.load(tmp_path / "copy.onnx")
    assert "com.microsoft" not in {o.domain for o in model.opset_import}
    assert TensorProto.FLOAT16 not in {t.data_type for t in model.graph.initializer}


def test_constants_inside_nodes_are_widened(tmp_path: Path) -> None:
    half = inline("", torch.tensor([0.5, -2.0], dtype=torch.bfloat16))
    nodes = [helper.make_node("Constant", [], ["c"], value=half), helper.make_node("Mul", ["X", "c"], ["Y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2]) for name in "XY"]
    tiny_onnx.save(tmp_path / "m.onnx", nodes, values[:1], values[1:], [])
    assert run(tmp_path / "m.onnx", torch.tensor([3.0, 3.0]))[0].tolist() == [1.5, -6]
