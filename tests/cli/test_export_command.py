"""The command line: the whole chain on tiny models, and bad input: exit code 2, a clear line, nothing written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
from commands import Result, export

from awq_trt.export.metadata import read_graph

ROOT = Path(__file__).parents[2]
SHORT = ("--calibration-samples", "2", "--calibration-length", "128")


def refused(result: Result, message: str) -> None:
    """Exit code 2, one readable message, no stack trace."""
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def everything_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "llama", tmp_path / "in" / "llama"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize(("name", "layers"), [("llama", 14), ("bert", 12)])
def test_checkpoint_to_plan(models: Path, out: Path, name: str, layers: int) -> None:
    result = export(
        "--model", models / name, "--engine", out / "m.plan", "--triton-repo", out / "repo", "--max-seq", 256, *SHORT
    )
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((out / "m.plan.json").read_text())
    assert len(sidecar["quantized"]) == layers
    assert (out / "m.plan").stat().st_size == sidecar["sizes"]["plan"]
    assert sidecar["accuracy"]["onnx"]["relative"] < 5e-3
    files = {"m.awq", "m.onnx", "m.onnx.data", "m.plan", "m.plan.json", "m.trtexec.sh", "m.trtexec.bin", "repo"}
    assert files == {p.name for p in out.iterdir()}
    assert f"{layers} quantized layers" in result.stderr
    if name == "llama":
        assert re.search(r"(3[0-2]) of 32 greedy tokens equal", result.stderr)
        assert [p["name"] for p in sidecar["profiles"]] == ["decode", "prefill"]


def test_vision_model_to_plan(models: Path, out: Path) -> None:
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    np.savez(out / "images.npz", pixel_values=images)
    result = export("--model", models / "vit", "--engine", out / "m.plan", "--calibration", out / "images.npz")
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((out / "m.plan.json").read_text())
    assert len(sidecar["quantized"]) == 12
    assert sidecar["accuracy"]["onnx"]["relative"] < 5e-3
    assert sidecar["accuracy"]["held_out"]["awq"]["top1"] >= 0.5


def test_every_stage_starts_from_the_file_before_it(models: Path, out: Path) -> None:
    first = export("--model", models / "llama", "--awq", out / "q", "--quiet", *SHORT)
    assert (first.returncode, first.stdout, first.stderr) == (0, "", "")
    second = export("--model", out / "q", "--onnx", out / "q.onnx", "--no-verify", "--max-seq", 64)
    assert second.returncode == 0, second.stderr
    served = export("--model", out / "q.onnx", "--triton-repo", out / "repo")
    assert served.returncode == 0, served.stderr
    assert f"tritonserver --model-repository={out / 'repo'}" in served.stderr
    assert (out / "repo" / "q" / "1" / "q.onnx.data").read_bytes() == (out / "q.onnx.data").read_bytes()
    third = export("--model", out / "q.onnx", "--engine", out / "q.plan", "--max-seq", 64, "--no-embed-plugin")
    assert third.returncode == 0, third.stderr
    assert json.loads((out / "q.plan.json").read_text())["plugin"]["embedded"] is False


def test_fusion_is_in_the_sidecar_and_can_be_left_out(models: Path, out: Path) -> None:
    assert export("--model", models / "llama", "--awq", out / "q", "--quiet", *SHORT).returncode == 0
    for name, flags, nodes in (("fused", (), 8), ("alone", ("--no-fuse",), 14)):
        result = export("--model", out / "q", "--onnx", out / f"{name}.onnx", "--no-verify", "--max-seq", 64, *flags)
        assert f"14 quantized layers, {(14 - nodes) * 2 // 3} fused nodes" in result.stderr
        graph = read_graph(out / f"{name}.onnx")
        assert (len(graph.metadata["quantized"]), graph.plugin_nodes) == (14, nodes)
    assert graph.metadata["fused"] == []
    result = export("--model", out / "fused.onnx", "--engine", out / "m.plan", "--max-seq", 64)
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((out / "m.plan.json").read_text())
    assert (len(sidecar["quantized"]), sidecar["plugin"]["layers"]) == (14, 8)
    assert len(sidecar["fused"]) == 4
    attention = "model.layers.0.self_attn."
    layers = {node["name"]: node["layers"] for node in sidecar["fused"]}
    assert layers["/model/layers.0/self_attn/q_proj+k_proj+v_proj"] == [f"{attention}{part}_proj" for part in "qkv"]
    features = {layer["name"]: layer["n"] for layer in sidecar["quantized"]}
    for node in sidecar["fused"]:
        assert node["splits"] == [features[layer] for layer in node["layers"]]


@pytest.mark.parametrize("symmetric", [(), ("--symmetric",)])
def test_portable_flavour(models: Path, out: Path, symmetric: tuple[str, ...]) -> None:
    result = export("--model", models / "llama", "--onnx", out / "m.onnx", "--format", "qdq", *symmetric, *SHORT)
    assert result.returncode == 0, result.stderr
    assert float(re.findall(r"relative\s+difference\s+(\S+),", result.stderr)[0]) < 5e-3


def test_bfloat16(models: Path, out: Path) -> None:
    result = export("--model", models / "llama", "--engine", out / "m.plan", "--dtype", "bfloat16", *SHORT)
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((out / "m.plan.json").read_text())
    assert {t["dtype"] for t in sidecar["inputs"] if t["name"].startswith("past_key")} == {"bfloat16"}
    assert sidecar["accuracy"]["onnx"]["relative"] < 3e-2


# Bad input. Each leaves the output folder as it was.


def test_missing_shard(llama: Path, out: Path) -> None:
    tensors = safetensors.torch.load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()  # which goes before an index, as for transformers
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")})
    )
    refused(export("--model", llama, "--engine", out / "m.plan"), "shard model-00001-of-00002.safetensors is missing")
    assert everything_in(out) == []


def test_truncated_shard(llama: Path, out: Path) -> None:
    data = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(export("--model", llama, "--engine", out / "m.plan"), "model.safetensors is truncated or damaged")
    assert everything_in(out) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_inf_in_a_weight(llama: Path, out: Path, bad: float) -> None:
    tensors = safetensors.torch.load_file(llama / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = bad
    safetensors.torch.save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    refused(
        export("--model", llama, "--engine", out / "m.plan", *SHORT),
        r"tensor model\.layers\.1\.self_attn\.k_proj\.weight holds 1 NaN or Inf",
    )
    assert everything_in(out) == []


def test_group_that_does_not_divide_leaves_layers_in_float(llama: Path, out: Path) -> None:
    result = export("--model", llama, "--onnx", out / "m.onnx", "--group-size", 128, "--no-verify", *SHORT)
    assert result.returncode == 0, result.stderr
    assert "2 quantized layers" in result.stderr
    assert "in float: 2 x self_attn.q_proj (in_features 64 is not a multiple of the group size 128)" in result.stderr


def test_unknown_architecture(llama: Path, out: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "zebra", "architectures": ["Zebra"]}))
    refused(export("--model", llama, "--engine", out / "m.plan"), "does not know this architecture .*'zebra'")
    assert everything_in(out) == []


@pytest.mark.parametrize("text", ["", "too short"])
def test_empty_or_short_calibration_text(llama: Path, out: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    refused(
        export("--model", llama, "--engine", out / "m.plan", "--calibration", tmp_path / "text.txt"),
        r"text\.txt: \d+ tokens of text, but one calibration window needs 512",
    )
    assert everything_in(out) == []


def test_plugin_library_of_another_version(
    llama: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.so").write_bytes(b"\x7fELF...AWQ_TRT_PLUGIN_VERSION=9.9.9;...")
    monkeypatch.setenv("AWQ_TRT_PLUGIN", str(tmp_path / "other.so"))
    refused(export("--model", llama, "--engine", out / "m.plan"), r"other\.so is version 9\.9\.9, this is awq_trt")
    assert everything_in(out) == []


def test_no_tensorrt_module(llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n.startswith("tensorrt") else real(n, *a))
    refused(export("--model", llama, "--engine", out / "m.plan"), r"pip install tensorrt-rtx-cu13")
    assert everything_in(out) == []


def test_disk_full(llama: Path, out: Path) -> None:
    """A file system of 300 kB: the chain runs out of space, the old file stays, and nothing else is there."""
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", out], check=False).returncode
    ):
        pytest.skip("needs root to mount a small file system")
    try:
        (out / "m.plan.json").write_text(old := '{"gpu_architectures": [], "old": true}')
        result = export("--model", llama, "--engine", out / "m.plan", "--no-verify", "--max-seq", 64, *SHORT)
        refused(result, r"could not be written: No space left on device.*unchanged")
        assert (out / "m.plan.json").read_text() == old
        assert not list(out.rglob(".*")), "temporary files are left"
    finally:
        subprocess.run(["umount", out], check=True)


def test_onnx_node_with_wrong_field_types(llama: Path, out: Path) -> None:
    assert export("--model", llama, "--onnx", out / "m.onnx", "--no-verify", *SHORT).returncode == 0
    model = onnx.load(out / "m.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "W4A16Gemm")
    for attribute in node.attribute:
        if attribute.name == "group_size":
            attribute.CopyFrom(onnx.helper.make_attribute("group_size", 32.0))
    onnx.save(model, out / "wrong.onnx")
    before = everything_in(out)
    refused(export("--model", out / "wrong.onnx", "--engine", out / "m.plan"), "group_size")
    assert everything_in(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to write"),
        (("--awq", "x.awq", "--triton-repo", "r"), "give --engine or --onnx too"),
        (("--engine", "x.plan", "--format", "qdq"), "symmetric only"),
        (("--engine", "x.plan", "--max-batch", "0"), "--max-batch 0"),
    ],
)
def test_contradictions(llama: Path, out: Path, arguments: tuple[str, ...], message: str) -> None:
    refused(export("--model", llama, *(str(out / a) if a[0] in "xr" else a for a in arguments)), message)
    assert everything_in(out) == []


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_nothing(llama: Path, out: Path, sent: signal.Signals, status: int) -> None:
    """A signal while the blocks are being quantized."""
    command = [sys.executable, "-m", "awq_trt", "export", "--model", str(llama), "--engine", str(out / "m.plan")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / ".m.awq.partial" / "key.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert everything_in(out), "the export never began to write"
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    kept = [name for name in everything_in(out) if name.startswith(".")]  # if it was late: some blocks are finished
    assert ("blocks are kept in" if kept else "nothing half-written is left") in stderr
    assert all(name.startswith(".m.awq.partial") for name in kept)
    assert "Traceback" not in stderr
    assert not [name for name in everything_in(out) if "plan" in name]


def test_public_functions() -> None:
    import awq_trt

    for name in awq_trt.__all__:
        assert getattr(awq_trt, name).__doc__
    code = "import awq_trt, sys; assert 'torch' not in sys.modules; awq_trt.AwqTrtError"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
