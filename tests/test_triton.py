"""config.pbtxt is read back with Triton's own schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_onnx
import torch
from google.protobuf import text_format
from test_sidecar import report_of

from awq_trt import sidecar
from awq_trt.engine import build_engine
from awq_trt.errors import AwqTrtError
from awq_trt.graph_facts import Profile, optimization_profiles, read_graph
from awq_trt.plugin import library_path
from awq_trt.triton import write_triton_repo

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")


def plan_of(onnx_path: Path, max_batch: int = 4, plugin: bool = True, **options: Any) -> Path:
    """A stand-in for a plan, with the sidecar that a build of this ONNX file would write."""
    engine = onnx_path.with_suffix(".plan")
    graph = read_graph(onnx_path)
    options = {"profiles": optimization_profiles(graph, max_batch, 64)} | options
    content = sidecar.describe(report_of(engine, **options), graph, library_path() if plugin else None, None)
    sidecar.write(sidecar.path_of(engine), content)
    return engine


def config_of(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())


def test_decoder(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.decoder(tmp_path / "smol.onnx"))
    report = write_triton_repo(engine, tmp_path / "repo")
    assert report.model == tmp_path / "repo" / "smol"
    config = config_of(report.model)
    assert (config.name, config.platform, config.max_batch_size) == ("smol", "tensorrt_plan", 4)
    assert config.default_model_filename == "model.plan"
    assert {t.name: (schema.DataType.Name(t.data_type), list(t.dims)) for t in config.input} == {
        "input_ids": ("TYPE_INT64", [-1]),
        "attention_mask": ("TYPE_INT64", [-1]),
        "past_key_values.0.key": ("TYPE_FP16", [2, -1, 16]),
        "past_key_values.0.value": ("TYPE_FP16", [2, -1, 16]),
    }
    assert {t.name: (schema.DataType.Name(t.data_type), list(t.dims)) for t in config.output} == {
        "logits": ("TYPE_FP16", [-1, 64]),
        "present.0.key": ("TYPE_FP16", [2, -1, 16]),
        "present.0.value": ("TYPE_FP16", [2, -1, 16]),
    }
    (group,) = config.instance_group
    assert (list(group.profile), group.kind, group.count) == (["0", "1"], schema.ModelInstanceGroup.KIND_GPU, 1)
    assert config.HasField("dynamic_batching")
    assert not config.HasField("optimization")
    assert (report.model / "1" / "model.plan").samefile(engine)
    assert sorted(p.name for p in (tmp_path / "repo").iterdir()) == ["smol"]


def test_bf16_one_profile_and_a_name(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.quantized(tmp_path / "q.onnx", dtype=torch.bfloat16), max_batch=1)
    config = config_of(write_triton_repo(engine, tmp_path / "repo", model_name="a b").model)
    assert (config.name, config.max_batch_size) == ("a b", 1)
    assert schema.DataType.Name(config.input[0].data_type) == "TYPE_BF16"
    assert list(config.instance_group[0].profile) == ["0"]
    assert not config.HasField("dynamic_batching")


def test_a_fixed_batch_dimension_is_part_of_the_dims(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"))
    content = sidecar.read_sidecar(sidecar.path_of(engine))
    content["outputs"][0]["dims"][0] = content["outputs"][0]["shape"][0] = 1
    sidecar.write(sidecar.path_of(engine), content)
    config = config_of(write_triton_repo(engine, tmp_path / "repo").model)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, -1]
    assert list(config.output[0].dims) == [1, -1, 64]


def test_the_launch_line_goes_into_both_sidecars(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.quantized(tmp_path / "q.onnx"))
    repo = tmp_path / "my repo"
    report = write_triton_repo(engine, repo)
    assert report.command == (
        f"tritonserver '--model-repository={repo}' --backend-config=tensorrt,version-compatible=true"
    )
    assert report.warnings == ()
    for path in (sidecar.path_of(engine), report.model / "1" / "model.plan.json"):
        assert sidecar.read_sidecar(path)["launch"]["triton"] == {"command": report.command, "warnings": []}


def test_a_plan_without_plugin_needs_no_option(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"), plugin=False, plugin_embedded=False)
    report = write_triton_repo(engine, tmp_path / "repo")
    assert report.command == f"tritonserver --model-repository={tmp_path / 'repo'}"


def test_plans_that_triton_cannot_load_say_so(tmp_path: Path) -> None:
    rtx = write_triton_repo(
        plan_of(tiny_onnx.quantized(tmp_path / "r.onnx"), runtime="tensorrt_rtx"), tmp_path / "repo"
    )
    assert rtx.command is None
    assert "built by TensorRT-RTX" in rtx.warnings[0]
    outside = write_triton_repo(plan_of(tiny_onnx.quantized(tmp_path / "o.onnx"), embedded=False), tmp_path / "repo")
    assert outside.command is None
    assert "with the plugin embedded" in outside.warnings[0]
    assert sidecar.read_sidecar(sidecar.path_of(tmp_path / "o.plan"))["launch"]["triton"]["warnings"]


def test_a_real_plan(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = tmp_path / "out.plan"
    options: dict[str, Any] = {"runtime": "tensorrt_rtx", "quiet": True}
    build_engine(tiny_onnx.quantized(tmp_path / "q.onnx"), engine, max_batch=2, max_seq=8, **options)
    report = write_triton_repo(engine, tmp_path / "repo")
    config = config_of(report.model)
    assert (config.max_batch_size, list(config.input[0].dims)) == (2, [-1, 256])
    assert (report.model / "1" / "model.plan").read_bytes() == engine.read_bytes()
    # a new build replaces the plan, not the file that the repository holds
    old = engine.read_bytes()
    build_engine(tiny_onnx.quantized(tmp_path / "q.onnx", layers=2), engine, max_batch=2, max_seq=8, **options)
    assert (report.model / "1" / "model.plan").read_bytes() == old
    write_triton_repo(engine, tmp_path / "repo")
    assert (report.model / "1" / "model.plan").read_bytes() == engine.read_bytes()


def test_foreign_files_are_not_replaced(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"))
    other = tmp_path / "repo" / "d" / "2" / "model.plan"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(AwqTrtError, match=r"holds something else already \(2, 2/model\.plan\)"):
        write_triton_repo(engine, tmp_path / "repo")
    assert other.read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "repo").rglob("*")) == ["2", "d", "model.plan"]


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    engine = plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"))
    with pytest.raises(AwqTrtError, match="cannot be a Triton model's name"):
        write_triton_repo(engine, tmp_path / "repo", model_name=name)
    assert not (tmp_path / "repo").exists()


def test_no_plan_no_sidecar_no_such_type(tmp_path: Path) -> None:
    engine = tmp_path / "d.plan"
    with pytest.raises(AwqTrtError, match="Build the engine first"):
        write_triton_repo(engine, tmp_path / "repo")
    engine.write_bytes(b"plan")
    with pytest.raises(AwqTrtError, match="keep the two together"):
        write_triton_repo(engine, tmp_path / "repo")
    plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"), profiles=(Profile("decode", {"input_ids": ((1, 1),) * 3}),))
    content = sidecar.read_sidecar(sidecar.path_of(engine))
    content["inputs"][0]["dtype"] = "int4"
    sidecar.write(sidecar.path_of(engine), content)
    with pytest.raises(AwqTrtError, match="'input_ids' is int4"):
        write_triton_repo(engine, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
