"""What is read of an ONNX file without its weights, and the optimization profiles made from that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import tiny_onnx
import torch
from onnx import helper

from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import optimization_profiles, read_graph


def test_graph_facts(tmp_path: Path) -> None:
    metadata = {"format": "plugin", "quantized": [{"name": "linear_0"}]}
    graph = read_graph(tiny_onnx.quantized(tmp_path / "q.onnx", dtype=torch.bfloat16, layers=2, metadata=metadata))
    assert (graph.opset, graph.plugin_nodes, graph.metadata) == (23, 2, metadata)
    assert graph.inputs[0].dtype == "bfloat16"
    assert graph.inputs[0].shape == ("batch_size", "sequence_length", 256)
    assert graph.outputs[1].dims == (-1, -1, 64)
    assert graph.onnx_bytes == (tmp_path / "q.onnx").stat().st_size
    assert json.dumps(optimization_profiles(graph, 1, 1)[0].shapes) == '{"x": [[1, 1, 256], [1, 1, 256], [1, 1, 256]]}'


def test_learned_positions_limit_the_sequence(tmp_path: Path) -> None:
    graph = read_graph(tiny_onnx.quantized(tmp_path / "m.onnx"))
    assert optimization_profiles(graph, 1, None)[0].shapes["x"][2] == (1, 2048, 256)
    bert = replace(graph, metadata={"max_positions": 512})
    assert optimization_profiles(bert, 1, None)[0].shapes["x"][2] == (1, 512, 256)
    assert optimization_profiles(bert, 1, 100)[0].shapes["x"][2] == (1, 100, 256)
    with pytest.raises(AwqTrtError, match="max_seq is 513, and the model of .* has positions for 512 tokens"):
        optimization_profiles(bert, 1, 513)


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    path = tiny_onnx.quantized(tmp_path / "q.onnx")
    model = onnx.load(str(path))
    for text in ("{", "[]"):
        helper.set_model_props(model, {"awq_trt": text})
        onnx.save(model, str(path))
        with pytest.raises(AwqTrtError, match="its metadata 'awq_trt' is not"):
            read_graph(path)
