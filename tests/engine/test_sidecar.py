from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_onnx
from stand_ins import report_of

from awq_trt.engine import sidecar
from awq_trt.engine.plugin import library_path
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import read_graph
from awq_trt.files import sha256

QUANTIZED = [
    {"name": "linear_0", "n": 64, "k": 256, "group_size": 64, "zeros": True, "bias": False, "pre_scale": False}
]
FUSED = [{"name": "/mlp/gate_proj+up_proj", "layers": ["mlp.gate_proj", "mlp.up_proj"], "splits": [32, 32]}]
METADATA = {
    "version": "0.1.0",
    "format": "plugin",
    "dtype": "float16",
    "model_type": "llama",
    "quantized": QUANTIZED,
    "fused": FUSED,
    "left_in_float": {"lm_head": "output"},
}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan with its sidecar."""
    engine = tmp_path / "out.plan"
    graph = read_graph(tiny_onnx.quantized(tmp_path / "q.onnx", metadata=METADATA))
    sidecar.write(sidecar.path_of(engine), sidecar.describe(report_of(engine), graph, library_path(), None))
    return engine


def test_content(plan: Path) -> None:
    content = sidecar.read_sidecar(sidecar.path_of(plan))
    assert list(content) == list(sidecar.Sidecar.__annotations__)
    assert content["versions"] == {
        "awq_trt": "0.1.0",
        "runtime": "tensorrt",
        "runtime_version": "10.14",
        "onnx_opset": 23,
    }
    assert content["model"] == {"onnx": "q.onnx", "model_type": "llama", "format": "plugin", "dtype": "float16"}
    assert content["profiles"] == [
        {"name": "default", "inputs": {"x": {"min": [1, 1, 256], "opt": [2, 8, 256], "max": [2, 16, 256]}}}
    ]
    assert content["inputs"] == [
        {
            "name": "x",
            "dtype": "float16",
            "shape": [-1, -1, 256],
            "dims": ["batch_size", "sequence_length", 256],
        }
    ]
    assert content["outputs"][0]["shape"] == [-1, -1, 64]
    assert (content["quantized"], content["fused"]) == (QUANTIZED, FUSED)
    assert content["left_in_float"] == {"lm_head": "output"}
    library = library_path()
    assert content["plugin"] == {
        "file": "libawq_trt_plugins.so",
        "path": str(library.resolve()),
        "sha256": sha256(library),
        "version": "0.1.0",
        "embedded": True,
        "layers": 1,
    }
    assert content["sizes"]["quantized_weights"] == 64 * 256 // 2 + 64 * 4 * 2 + 64 * 4 // 2
    assert content["build"] == {
        "seconds": 1.2,
        "peak_bytes": 1 << 30,
        "strongly_typed": True,
        "gpu": None,
        "warnings": ["slow"],
        "sha256": {"plan": None, "onnx_data": None},
    }


def test_lines_stay_short_and_the_text_is_stable(plan: Path) -> None:
    path = sidecar.path_of(plan)
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 160
    assert '"x": {"min": [1, 1, 256], "opt": [2, 8, 256], "max": [2, 16, 256]}' in text
    sidecar.write(path, json.loads(text))
    assert path.read_text() == text


def test_the_first_schema_is_still_read(plan: Path) -> None:
    """It had launch lines beside the facts."""
    path = sidecar.path_of(plan)
    content = sidecar.read_sidecar(path)
    path.write_text(json.dumps(content | {"schema": 1, "launch": {"benchmark": {}}}))
    assert sidecar.read_sidecar(path)["model"] == content["model"]


@pytest.mark.parametrize("key", [k for k in sidecar.Sidecar.__annotations__ if k != "schema"])
def test_a_missing_key_or_a_wrong_type(plan: Path, key: str) -> None:
    path = sidecar.path_of(plan)
    content = sidecar.read_sidecar(path)
    path.write_text(json.dumps(content | {key: 7}))
    with pytest.raises(AwqTrtError, match=f"out.plan.json: key '{key}' holds a int"):
        sidecar.read_sidecar(path)
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(AwqTrtError, match=f"out.plan.json: key '{key}' is missing"):
        sidecar.read_sidecar(path)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ("versions.runtime", 7, "'versions.runtime' holds a int, 7"),
        ("sizes.plan", True, "'sizes.plan' holds a bool, True"),
        ("sizes.onnx", -1, "'sizes.onnx' holds a int, -1"),
        ("sizes.onnx_data", 10**400, "'sizes.onnx_data' holds a int"),
        ("sizes.quantized_weights", None, "'sizes.quantized_weights' holds a NoneType"),
        ("plugin.embedded", "yes", "'plugin.embedded' holds a str, 'yes'"),
        ("plugin.path", "/x\0", "'plugin.path' holds a str"),
        ("gpu_architectures", [8.6], "'gpu_architectures[0]' holds a float, 8.6"),
        ("profiles", [], "'profiles' holds a list, []"),
        ("profiles.0.inputs.x.max", [1, "2", 3], "'profiles[0].inputs.x.max[1]' holds a str, '2'"),
        ("profiles.0.inputs.x.max", [1, 2], "profile 'default' does not fit the inputs"),
        ("profiles.0.inputs", {}, "profile 'default' does not fit the inputs"),
        ("inputs.0.dims", [1, 2], "tensor 'x' has the shape [-1, -1, 256]"),
        ("inputs.0.dtype", "9" * 50, "'inputs[0].dtype' holds a str"),
        ("outputs.0.dims", [{}], "'outputs[0].dims[0]' holds a dict"),
        ("model.kv_cache", {"kind": "fixed", "capacity": 2}, "'model.kv_cache.prefill_chunk' is missing"),
        ("model.kv_cache", [], "'model.kv_cache' holds a list"),
        ("model.generation", {"eos_token_id": 2}, "'model.generation.eos_token_id' holds a int, 2"),
        ("left_in_float", {"lm_head": 1}, "'left_in_float.lm_head' holds a int, 1"),
        ("accuracy", {"held_out": {"float": {"top1": "1"}}}, "'accuracy.held_out.float.perplexity' is missing"),
    ],
)
def test_wrong_types_inside_are_named(plan: Path, at: str, value: object, words: str) -> None:
    path = sidecar.path_of(plan)
    content = json.loads(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in at.split(".")]
    place = content
    for part in parents:
        place = place[part]
    place[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(AwqTrtError, match=rf"out\.plan\.json: .*{re.escape(words)}"):
        sidecar.read_sidecar(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "it holds a list, []; it should be a JSON object"),
        ("{}", "schema None"),
        ('{"schema": 99}', "schema 99, this version reads 2"),
        ("\xff", "not JSON"),
    ],
)
def test_not_a_sidecar(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "out.plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(AwqTrtError, match=re.escape(words)):
        sidecar.read_sidecar(path)


def test_missing_or_of_another_plan(plan: Path) -> None:
    path = sidecar.path_of(plan)
    plan.write_bytes(b"another")
    with pytest.raises(AwqTrtError, match=r"a plan of 4000 bytes, but out\.plan has 7"):
        sidecar.read_sidecar(path)
    path.unlink()
    with pytest.raises(AwqTrtError, match=r"out\.plan\.json: no such file"):
        sidecar.read_sidecar(path)
