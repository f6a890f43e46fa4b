"""config.pbtxt is read back with Triton's own schema; test_triton_server.py runs what generates."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
import torch
from google.protobuf import text_format
from stand_ins import plan_of

from awq_trt.engine import sidecar
from awq_trt.engine.build import build_engine
from awq_trt.errors import AwqTrtError
from awq_trt.serve.triton.model import FIELDS, OUTPUTS
from awq_trt.serve.triton.repository import PARAMETERS, write_triton_repo

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")


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
    assert (config.max_batch_size, config.input[0].dims, config.output[0].dims) == (0, [-1, -1], [1, -1, 64])


def test_the_lines_that_serve_a_plan(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.quantized(tmp_path / "q.onnx"))
    repo = tmp_path / "my repo"
    report = write_triton_repo(engine, repo)
    assert report.command == (
        f"tritonserver '--model-repository={repo}' --backend-config=tensorrt,version-compatible=true"
    )
    assert report.warnings == ()
    assert report.docker == (
        f"docker run --rm -it --gpus all --shm-size 256m -p 8000:8000 -p 8001:8001 -p 8002:8002 -v '{repo}:/models' "
        "nvcr.io/nvidia/tritonserver:YY.MM-py3 sh -c "
        "'tritonserver --model-repository=/models --backend-config=tensorrt,version-compatible=true'"
    )
    assert "launch" not in sidecar.read_sidecar(sidecar.path_of(engine))


def test_a_plan_without_plugin_needs_no_option(tmp_path: Path) -> None:
    engine = plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"), plugin=False, plugin_embedded=False)
    assert write_triton_repo(engine, tmp_path).command == f"tritonserver --model-repository={tmp_path}"


def test_plans_that_triton_cannot_load_say_so(tmp_path: Path) -> None:
    rtx = write_triton_repo(
        plan_of(tiny_onnx.quantized(tmp_path / "r.onnx"), runtime="tensorrt_rtx"), tmp_path / "repo"
    )
    assert rtx.command is rtx.docker is None
    assert "built by TensorRT-RTX" in rtx.warnings[0]
    outside = write_triton_repo(plan_of(tiny_onnx.quantized(tmp_path / "o.onnx"), embedded=False), tmp_path / "repo")
    assert outside.command is None
    assert "with the plugin embedded" in outside.warnings[0]


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
    with pytest.raises(AwqTrtError, match=r"holds 2/model\.plan, which awq_trt did not write"):
        write_triton_repo(engine, tmp_path / "repo")
    assert other.read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "repo").rglob("*")) == ["2", "d", "model.plan"]


def test_no_plan_no_sidecar_no_such_type_no_name(tmp_path: Path) -> None:
    engine = tmp_path / "d.plan"
    with pytest.raises(AwqTrtError, match="Build the engine first"):
        write_triton_repo(engine, tmp_path / "repo")
    engine.write_bytes(b"plan")
    with pytest.raises(AwqTrtError, match="keep the two together"):
        write_triton_repo(engine, tmp_path / "repo")
    plan_of(tiny_onnx.decoder(tmp_path / "d.onnx"))
    content = sidecar.read_sidecar(sidecar.path_of(engine))
    content["inputs"][0]["dtype"] = "int4"
    sidecar.write(sidecar.path_of(engine), content)
    with pytest.raises(AwqTrtError, match="'input_ids' is int4"):
        write_triton_repo(engine, tmp_path / "repo")
    for name in ("", "a/b", ".hidden"):
        with pytest.raises(AwqTrtError, match="cannot be a Triton model's name"):
            write_triton_repo(engine, tmp_path / "repo", model_name=name)
    assert not (tmp_path / "repo").exists()


def tokenizer_of(folder: Path) -> Path:
    """What a tokenizer's directory may hold, and the rest of a checkpoint beside it."""
    folder.mkdir(parents=True)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "spiece.model")
    for name in (*names, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".cache"):
        (folder / name).write_text(name)
    (folder / "1_Pooling").mkdir()
    return folder


def files_of(model: Path) -> set[str]:
    return {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}


def test_a_decoder_with_a_fixed_cache_generates(tmp_path: Path) -> None:
    tokenizer_of(tmp_path / "smol.awq")
    engine = plan_of(tiny_onnx.fixed_decoder(tmp_path / "smol.onnx", tokenizer="smol.awq"))
    report = write_triton_repo(engine, tmp_path / "repo")
    config = config_of(report.model)
    assert (config.name, config.backend, config.platform, config.max_batch_size) == ("smol", "python", "", 1)
    assert config.model_transaction_policy.decoupled
    assert [(g.count, g.kind) for g in config.instance_group] == [(1, schema.ModelInstanceGroup.KIND_GPU)]
    assert {t.name: (schema.DataType.Name(t.data_type), list(t.dims), t.optional) for t in config.input} == {
        name: (f"TYPE_{kind}", [size], True) for name, (kind, size) in FIELDS.items()
    }
    assert {t.name: (schema.DataType.Name(t.data_type), list(t.dims)) for t in config.output} == {
        name: (f"TYPE_{kind}", [1]) for name, kind in OUTPUTS.items()
    }
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "model": "model.plan",
        "python": "",
        "max_batch": "",
        "threads": "",
        "max_queue": "64",
        "max_prompt_tokens": "63",
        "max_tokens": "64",
        "default_max_tokens": "64",
    }
    assert set(config.parameters) == {"model", *PARAMETERS}
    assert files_of(report.model) == {
        "awq_trt.json",
        "config.pbtxt",
        "1/model.py",
        "1/awq_trt.zip",
        "1/model.plan",
        "1/model.plan.json",
        "1/tokenizer/tokenizer.json",
        "1/tokenizer/tokenizer_config.json",
        "1/tokenizer/chat_template.jinja",
        "1/tokenizer/merges.txt",
        "1/tokenizer/spiece.model",
        "warmup/text_input",
        "warmup/max_tokens",
    }
    assert sidecar.read_sidecar(report.model / "1" / "model.plan.json")["model"]["tokenizer"] == "tokenizer"
    assert sidecar.read_sidecar(sidecar.path_of(engine))["model"]["tokenizer"] == "smol.awq"
    with zipfile.ZipFile(report.model / "1" / "awq_trt.zip") as archive:
        assert {"awq_trt/__init__.py", "awq_trt/serve/triton/engine_process.py", "awq_trt/serve/generator.py"} <= set(
            archive.namelist()
        )


def test_the_warmup_is_a_request(tmp_path: Path) -> None:
    client = pytest.importorskip("tritonclient.utils")
    tokenizer_of(tmp_path / "t")
    engine = plan_of(tiny_onnx.fixed_decoder(tmp_path / "smol.onnx", tokenizer="t"))
    model = write_triton_repo(engine, tmp_path / "repo").model
    (warmup,) = config_of(model).model_warmup
    assert (warmup.batch_size, set(warmup.inputs)) == (1, {"text_input", "max_tokens"})
    assert all(list(value.dims) == [1] for value in warmup.inputs.values())
    text, count = (
        (model / "warmup" / warmup.inputs[n].input_data_file).read_bytes() for n in ("text_input", "max_tokens")
    )
    assert client.deserialize_bytes_tensor(text).tolist() == [b"Hello"]
    assert np.frombuffer(count, np.int32).tolist() == [4]


@pytest.mark.parametrize(
    ("runtime", "wheel"), [("tensorrt", "tensorrt==10.15.1.29"), ("tensorrt_rtx", "tensorrt-rtx-cu13==1.7.1.116")]
)
def test_the_container_of_a_generating_model_installs_its_runtime(tmp_path: Path, runtime: str, wheel: str) -> None:
    tokenizer_of(tmp_path / "t")
    version = wheel.partition("==")[2]
    onnx_path = tiny_onnx.fixed_decoder(tmp_path / "smol.onnx", tokenizer="t")
    engine = plan_of(onnx_path, runtime=runtime, runtime_version=version)
    report = write_triton_repo(engine, tmp_path / "repo")
    assert report.warnings == ()
    assert report.command == f"tritonserver --model-repository={tmp_path / 'repo'}"
    assert report.docker is not None
    serve = shlex.split(report.docker)[-1]
    assert shlex.split(serve)[-2:] == ["tritonserver", "--model-repository=/models"]
    assert wheel in shlex.split(serve)


def test_parameters_and_another_tokenizer(tmp_path: Path) -> None:
    given = tokenizer_of(tmp_path / "given")
    (given / "tokenizer.json").write_text("given")
    engine = plan_of(tiny_onnx.fixed_decoder(tmp_path / "d.onnx"))
    with pytest.raises(AwqTrtError, match=r"d\.plan names no tokenizer"):
        write_triton_repo(engine, tmp_path / "repo")
    with pytest.raises(AwqTrtError, match="nowhere: no such directory"):
        write_triton_repo(engine, tmp_path / "repo", tokenizer=tmp_path / "nowhere")
    with pytest.raises(AwqTrtError, match="'max_rows' is not a parameter .* max_batch"):
        write_triton_repo(engine, tmp_path / "repo", tokenizer=given, parameters={"max_rows": "8"})
    (given / "endless.json").symlink_to("/dev/zero")
    with pytest.raises(AwqTrtError, match=r"endless\.json is a device"):
        write_triton_repo(engine, tmp_path / "repo", tokenizer=given)
    (given / "endless.json").unlink()
    assert not (tmp_path / "repo").exists()
    parameters = {"max_tokens": "8", "python": '/opt/a "b"/python'}
    model = write_triton_repo(engine, tmp_path / "repo", tokenizer=given, parameters=parameters).model
    found = config_of(model).parameters
    assert {key: found[key].string_value for key in parameters} == parameters
    assert (model / "1" / "tokenizer" / "tokenizer.json").read_text() == "given"
    (model / "1" / "__pycache__").mkdir()
    (model / "1" / "__pycache__" / "model.cpython-312.pyc").write_text("Triton made this")
    write_triton_repo(engine, tmp_path / "repo", tokenizer=given)
    assert config_of(model).parameters["max_tokens"].string_value == "64"
    encoder = plan_of(tiny_onnx.quantized(tmp_path / "q.onnx"))
    with pytest.raises(AwqTrtError, match="does not generate text"):
        write_triton_repo(encoder, tmp_path / "repo", parameters={"max_tokens": "8"})


def test_an_onnx_decoder_runs_on_the_cpu(tmp_path: Path) -> None:
    tokenizer_of(tmp_path / "t")
    path = tiny_onnx.fixed_decoder(tmp_path / "d.onnx", tokenizer="t")
    model = write_triton_repo(path, tmp_path / "repo").model
    config = config_of(model)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert config.parameters["model"].string_value == "d.onnx"
    assert (model / "1" / "d.onnx").read_bytes() == path.read_bytes()
    with pytest.raises(AwqTrtError, match=r"q\.onnx: .* kv_cache=.fixed"):
        write_triton_repo(tiny_onnx.quantized(tmp_path / "q.onnx"), tmp_path / "repo")


def test_external_data_goes_with_an_onnx_decoder(exported: Path, tmp_path: Path) -> None:
    model = write_triton_repo(exported / "llama.onnx", tmp_path / "repo").model
    assert (model / "1" / "llama.onnx.data").read_bytes() == (exported / "llama.onnx.data").read_bytes()
    for path in (exported / "llama.onnx", model / "1" / "llama.onnx"):
        onnx.load(path)  # refuses a file of external data with two links
    assert "1/tokenizer/tokenizer.json" in files_of(model)
    assert not any(name.endswith(".safetensors") for name in files_of(model))
    write_triton_repo(exported / "llama.onnx", tmp_path / "repo")
