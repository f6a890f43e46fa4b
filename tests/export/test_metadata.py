"""What is read of an ONNX file without its weights, and the optimization profiles made from that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny_onnx
import torch
from onnx import helper

from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.verify import onnx_session
from awq_trt.export.fp32 import float32_copy
from awq_trt.export.metadata import external_files, optimization_profiles, read_graph


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
        with pytest.raises(AwqTrtError, match="its metadata 'awq_trt': (not JSON|it holds a)"):
            read_graph(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.initializer[0].dims.append(-1), r"has the shape \["),
        (lambda g: setattr(g.initializer[0], "data_type", 99), "is of the unknown type 99"),
        (lambda g: setattr(g.input[0].type.tensor_type, "elem_type", 77), "is of the unknown type 77"),
        (lambda g: attribute(g, batch_dims=-(2**31)), r"has the batch_dims \[-2147483648\]"),
        (lambda g: attribute(g, axis=65), r"has the axis \[65\]"),
        (lambda g: attribute(g, axes=[0, -65]), r"has the axes \[0, -65\]"),
        (lambda g: attribute(g, perm=[1, -1]), r"has the perm \[1, -1\]"),
    ],
)
def test_numbers_that_no_file_has(tmp_path: Path, change: Callable[[onnx.GraphProto], object], words: str) -> None:
    """ONNX Runtime ends the process with some of them, as with the batch_dims; so it does not get them."""
    path = tiny_onnx.quantized(tmp_path / "m.onnx")
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    for read in (read_graph, onnx_session):
        with pytest.raises(AwqTrtError, match=rf"m\.onnx: .*{words}"):
            read(path)


def attribute(graph: onnx.GraphProto, **attributes: Any) -> None:
    graph.node.append(helper.make_node("Identity", ["x"], ["copy"], **attributes))


@pytest.mark.parametrize(
    "location",
    ["../private.key", "sub/../../private.key", "{folder}/private.key", "", pytest.param("é" * 128, id="256 bytes")],
)
@pytest.mark.parametrize("where", ["initializer", "node", "function"])
def test_data_of_other_folders_are_not_read(tmp_path: Path, location: str, where: str) -> None:
    """Whatever tensor of the file says so; every way to open the file refuses it."""
    (tmp_path / "private.key").write_bytes(b"secret" * 100)
    folder = tmp_path / "model"
    folder.mkdir()
    path = tiny_onnx.quantized(folder / "m.onnx")
    model = onnx.load(path)
    constant = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", onnx.TensorProto.FLOAT16, [4], [0] * 4)
    )
    function = helper.make_function("d", "F", [], ["c"], [constant], [helper.make_opsetid("", 23)])
    if where == "node":
        model.graph.node.insert(0, constant)
    elif where == "function":
        model.functions.append(function)
    tensor = {
        "initializer": lambda: next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16),
        "node": lambda: model.graph.node[0].attribute[0].t,
        "function": lambda: model.functions[-1].node[0].attribute[0].t,
    }[where]()
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location.format(folder=tmp_path))
    path.write_bytes(model.SerializeToString())
    message = r"m\.onnx: names the file .*, which is (not in its folder|none)"
    for read in (read_graph, external_files, onnx_session):
        with pytest.raises(AwqTrtError, match=message):
            read(path)
    if where == "initializer":
        with pytest.raises(AwqTrtError, match="names the file"):
            float32_copy(path, tmp_path / "copy.onnx")
        assert not (tmp_path / "copy.onnx").exists()


def test_a_link_to_data_elsewhere_is_followed(tmp_path: Path) -> None:
    """As the hub's cache has them."""
    tiny_onnx.quantized(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save_model(model, tmp_path / "n.onnx", save_as_external_data=True, location="n.data", size_threshold=0)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "n.data").rename(tmp_path / "blobs" / "0")
    (tmp_path / "n.data").symlink_to("blobs/0")
    assert read_graph(tmp_path / "n.onnx").data_bytes > 0
    assert external_files(tmp_path / "n.onnx") == [tmp_path / "n.data"]
