"""awq_trt/engine/memory.py: bytes of caches, inputs and outputs, and the estimate of activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_onnx
from onnx import TensorProto, helper
from stand_ins import CACHE, plan_in

from awq_trt.engine import memory, sidecar
from awq_trt.export.metadata import optimization_profiles, read_graph


def test_bytes_of_a_fixed_cache(tmp_path: Path) -> None:
    """2 x layers x batch x kv_heads x capacity x head_dim x 2, and here values of half the head_dim."""
    names = {"key": 64, "value": 32}
    tensors = [
        {"name": f"past_key_values.{layer}.{name}", "dtype": "float16", "dims": ["batch_size", 3, 2048, dim]}
        for layer in range(5)
        for name, dim in names.items()
    ]
    ids = {"name": "input_ids", "dtype": "int64", "dims": ["batch_size", "sequence_length"]}
    logits = {"name": "logits", "dtype": "float16", "dims": ["batch_size", 1, 1000]}

    def shapes(tokens: int) -> dict[str, Any]:
        largest = {t["name"]: {"max": [4, *t["dims"][1:]]} for t in tensors}
        return {"inputs": largest | {"input_ids": {"max": [4, tokens]}}}

    content = {
        "model": {"kv_cache": CACHE},
        "inputs": [ids, *tensors],
        "outputs": [logits, *({**t, "name": t["name"].replace("past_key_values", "present")} for t in tensors)],
        "profiles": [shapes(1), shapes(1024)],
    }
    cache, others = memory.cache_and_io(content)
    assert cache == 5 * 4 * 3 * 2048 * (64 + 32) * 2
    assert others == 4 * 1024 * 8 + 4 * 1000 * 2
    assert memory.max_batch(content) == 4
    content["model"] = {"kv_cache": {"kind": "dynamic"}}
    assert memory.cache_and_io(content)[0] == 2 * cache


def test_bytes_of_a_dynamic_cache(tmp_path: Path) -> None:
    content = sidecar.read_sidecar(sidecar.path_of(plan_in(tmp_path, kind="decoder", max_batch=4, max_seq=64)))
    cache, others = memory.cache_and_io(content)
    past, present = (2 * 4 * tiny_onnx.KV_HEADS * tokens * tiny_onnx.HEAD_DIM * 2 for tokens in (63, 64))
    assert cache == past + present
    assert others == 4 * 64 * 8 * 2 + 4 * 64 * tiny_onnx.VOCAB * 2
    assert memory.max_batch(content) == 4


def test_activations_are_what_lives_at_a_time(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wide"]),
        helper.make_node("Reshape", ["wide", "flat"], ["view"]),
        helper.make_node("Relu", ["view"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Abs", ["b"], ["y"]),
    ]
    weights = [
        tiny_onnx.initializer("w", np.zeros((8, 100), np.float32)),
        tiny_onnx.initializer("flat", np.array([-1, 50])),
    ]
    x = value("x", TensorProto.FLOAT, ["batch_size", "sequence_length", 8])
    model = tiny_onnx.save(tmp_path / "m.onnx", nodes, [x], [value("y", TensorProto.FLOAT, None)], weights)
    profiles = optimization_profiles(read_graph(model), 3, 10)
    wide = 3 * 10 * 100 * 4
    assert memory.activation_bytes(model, profiles) == 2 * wide  # wide and a, then a and b; the view costs nothing
    for domain in ("awq_trt", "foreign"):
        nodes[2] = helper.make_node("Unknown", ["view"], ["a"], domain=domain)
        tiny_onnx.save(model, nodes, [x], [value("y", TensorProto.FLOAT, None)], weights)
        assert memory.activation_bytes(model, profiles) is None


def test_the_plugins_workspace_counts(tmp_path: Path) -> None:
    model = tiny_onnx.quantized(tmp_path / "q.onnx")
    for tokens, workspace in ((8, 0), (9, 48 << 20), (255, 48 << 20), (256, 160 << 20)):
        assert memory.activation_bytes(model, optimization_profiles(read_graph(model), 4, tokens)) == workspace


def test_estimate_of_a_real_export(exported: Path) -> None:
    graph = read_graph(exported / "llama.onnx")
    few, many = (memory.activation_bytes(graph.path, optimization_profiles(graph, batch, None)) for batch in (1, 4))
    assert few is not None
    assert many is not None
    assert few < many < 1 << 30
