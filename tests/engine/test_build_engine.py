"""Engines are built for real, by TensorRT-RTX on the CPU; a stand-in `tensorrt` package covers what RTX has not."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
import torch
from driver_stub import TWO, fake_driver
from onnx import TensorProto, helper

from awq_trt.engine.build import build_engine
from awq_trt.engine.plugin import ENVIRONMENT_VARIABLE
from awq_trt.engine.runtimes import RTX_ARCHITECTURES, choose_runtime
from awq_trt.engine.sidecar import EngineReport, path_of, read_sidecar
from awq_trt.errors import AwqTrtError

tensorrt_rtx_libs = pytest.importorskip("tensorrt_rtx_libs")

ABORTS = (
    "import os, sys\ndef __getattr__(name):\n    print('last words', file=sys.stderr, flush=True)\n    os.abort()\n"
)
NO_GPU = "def __getattr__(name):\n    raise RuntimeError('CUDA initialization failure with error: 35')\n"
RTX_IN_DISGUISE = """
from tensorrt_rtx import *
from tensorrt_rtx import __version__
create = IBuilderConfig.create_timing_cache  # does nothing in RTX; TensorRT refuses what it did not write
IBuilderConfig.create_timing_cache = lambda self, blob: None if blob.startswith(b"not") else create(self, blob)
"""


def build(onnx_path: Path, **options: Any) -> EngineReport:
    return build_engine(
        onnx_path, onnx_path.with_suffix(".plan"), **({"runtime": "tensorrt_rtx", "quiet": True} | options)
    )


def refusal(onnx_path: Path, **options: Any) -> str:
    """The message of a build that must fail, and must leave nothing behind."""
    before = sorted(onnx_path.parent.iterdir())
    with pytest.raises(AwqTrtError) as error:
        build(onnx_path, **options)
    assert sorted(onnx_path.parent.iterdir()) == before
    return str(error.value)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a package called `tensorrt` with the given source where this process and its children find it."""

    def make(source: str) -> None:
        package = tmp_path / "packages" / "tensorrt"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        (package.parent / "tensorrt_libs").symlink_to(Path(tensorrt_rtx_libs.__file__).parent)
        monkeypatch.syspath_prepend(str(package.parent))
        monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)

    return make


# ---- what is built


def test_a_decoder_gets_two_profiles_and_a_sidecar(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    report = build(tiny_onnx.decoder(tmp_path / "d.onnx"), max_batch=4, max_seq=64, on_event=events.append)
    assert [p.name for p in report.profiles] == ["decode", "prefill"]
    decode, prefill = (p.shapes for p in report.profiles)
    assert decode["input_ids"] == ((1, 1), (4, 1), (4, 1))
    assert decode["attention_mask"] == ((1, 2), (4, 33), (4, 64))
    assert decode["past_key_values.0.key"] == ((1, 2, 1, 16), (4, 2, 32, 16), (4, 2, 63, 16))
    assert prefill["input_ids"] == prefill["attention_mask"] == ((1, 1), (4, 32), (4, 64))
    assert prefill["past_key_values.0.value"] == ((1, 2, 0, 16), (4, 2, 0, 16), (4, 2, 0, 16))
    assert report.engine.stat().st_size == report.plan_bytes > 100_000
    assert report.architectures == RTX_ARCHITECTURES
    assert report.peak_bytes > 100 << 20  # the builder's own libraries; the parent holds torch and has far more
    assert report.warnings == ()
    assert read_sidecar(report.sidecar)["sizes"]["plan"] == report.plan_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "d.onnx", "d.plan", "d.plan.json", "d.trtexec.bin", "d.trtexec.sh",
    ]  # fmt: skip
    assert os.access(tmp_path / "d.trtexec.sh", os.X_OK)

    started = [e["phase"] for e in events if "phase" in e]
    assert started[0] == "Building engine"
    assert started.count("Building engine from subgraph") == 1
    assert sorted(e["end"] for e in events if "end" in e) == sorted(started)
    assert any("step" in e for e in events)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_quantized_layers_run_in_the_plugin(tmp_path: Path, dtype: torch.dtype, group_size: int) -> None:
    options = {"zeros": group_size < 128, "bias": group_size != 64, "pre_scale": group_size > 64}
    model = tiny_onnx.quantized(tmp_path / "q.onnx", dtype=dtype, group_size=group_size, layers=3, **options)
    report = build(model, max_batch=2, max_seq=16)
    assert (report.plugin_layers, report.plugin_embedded) == (3, True)
    assert report.profiles[0].shapes == {"x": ((1, 1, 256), (2, 8, 256), (2, 16, 256))}
    facts = read_sidecar(report.sidecar)
    assert facts["plugin"]["layers"] == 3
    assert facts["plugin"]["version"] == "0.1.0"
    assert len(facts["plugin"]["sha256"]) == 64


@pytest.mark.parametrize("splits", [(64, 32, 32), (8, 40), (8, 16, 24, 8)])
def test_fused_layers_are_one_layer_of_the_engine(tmp_path: Path, splits: tuple[int, ...]) -> None:
    report = build(tiny_onnx.quantized(tmp_path / "q.onnx", n=sum(splits), splits=splits, layers=2), max_batch=2)
    assert report.plugin_layers == 2
    outputs = read_sidecar(report.sidecar)["outputs"]
    assert [output["dims"][-1] for output in outputs] == [*splits, *splits]
    assert report.warnings == ()


def test_the_plugin_is_embedded_unless_told_otherwise(tmp_path: Path) -> None:
    model = tiny_onnx.quantized(tmp_path / "q.onnx", external=True)
    embedded = build(model)
    assert embedded.warnings == (), "nodes without splits are no reason for one"
    without = build(model, embed_plugin=False)
    assert embedded.plan_bytes - without.plan_bytes > 300_000
    assert not without.plugin_embedded
    content = read_sidecar(without.sidecar)
    assert content["plugin"]["embedded"] is False
    # 64 x 256 in 4 bits, 64 x 4 fp16 scales, 64 x 4 4-bit zeros
    assert content["sizes"]["quantized_weights"] == 64 * 256 // 2 + 64 * 4 * 2 + 64 * 4 // 2
    assert content["sizes"]["other_weights"] == 0
    assert content["sizes"]["onnx_data"] == (tmp_path / "q.onnx.data").stat().st_size


def test_chosen_architectures(tmp_path: Path) -> None:
    model = tiny_onnx.quantized(tmp_path / "q.onnx")
    assert build(model, architectures=["8.9"]).architectures == ("8.9",)
    assert read_sidecar(path_of(tmp_path / "q.plan"))["gpu_architectures"] == ["8.9"]
    message = refusal(model, architectures=["9.0"])
    assert "cannot build for compute capability 9.0" in message
    assert "8.6" in message


def test_tensorrt_takes_the_same_path_and_keeps_a_timing_cache(tmp_path: Path, stand_in: Any) -> None:
    stand_in(RTX_IN_DISGUISE)
    cache = tmp_path / "timing.cache"
    model = tiny_onnx.quantized(tmp_path / "q.onnx")
    report = build(model, runtime="tensorrt", timing_cache=cache)
    assert report.runtime == "tensorrt"
    assert cache.stat().st_size > 0
    assert build(model, runtime="tensorrt", timing_cache=cache).plan_bytes == report.plan_bytes
    cache.write_bytes(b"not a cache" * 100)
    assert "is no timing cache" in refusal(model, runtime="tensorrt", timing_cache=cache)
    assert cache.read_bytes().startswith(b"not a cache")
    assert "tensorrt_rtx only" in refusal(model, runtime="tensorrt", architectures=["8.9"])


def test_tensorrt_names_the_gpu_that_it_built_on(
    tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(RTX_IN_DISGUISE)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_driver(tmp_path / "driver")))
    monkeypatch.setenv("FAKE_GPUS", TWO)
    report = build(tiny_onnx.quantized(tmp_path / "q.onnx"), runtime="tensorrt")
    assert (report.gpu, report.architectures) == ("NVIDIA GeForce RTX 4090", ("8.9",))
    assert build(tmp_path / "q.onnx").gpu is None, "TensorRT-RTX builds for many"


def test_tensorrt_rtx_says_that_it_has_no_timing_cache(tmp_path: Path) -> None:
    report = build(tiny_onnx.quantized(tmp_path / "q.onnx"), timing_cache=tmp_path / "timing.cache")
    assert "timing cache was neither read nor written" in report.warnings[0]
    assert not (tmp_path / "timing.cache").exists()


# ---- which TensorRT


def test_choice_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    with pytest.raises(AwqTrtError, match=r"(?s)no TensorRT is installed.*pip install tensorrt-rtx-cu13") as error:
        choose_runtime("auto")
    assert "pip install tensorrt-cu13" in str(error.value)
    with pytest.raises(AwqTrtError, match=r"(?s)no tensorrt_rtx is installed.*pip install tensorrt-rtx-cu13"):
        choose_runtime("tensorrt_rtx")
    with pytest.raises(AwqTrtError, match="'onnxruntime' is unknown; choose auto, tensorrt_rtx or tensorrt"):
        choose_runtime("onnxruntime")
    installed.add("tensorrt")
    assert choose_runtime("auto") == "tensorrt"
    installed.add("tensorrt_rtx")
    for gpu, expected in ((True, "tensorrt"), (False, "tensorrt_rtx")):
        monkeypatch.setattr("awq_trt.engine.runtimes.has_gpu", lambda gpu=gpu: gpu)
        assert choose_runtime("auto") == expected


def test_tensorrt_without_a_gpu_points_to_rtx(tmp_path: Path, stand_in: Any) -> None:
    stand_in(NO_GPU)
    message = refusal(tiny_onnx.decoder(tmp_path / "d.onnx"), runtime="tensorrt")
    assert "CUDA initialization failure with error: 35" in message
    assert "build with the runtime tensorrt_rtx" in message


# ---- bad input: a clear message, nothing written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 48}, ["group size 48", "32, 64, 128"]),
        ({"out_features": "many"}, ["'out_features'", "INT32"]),
        ({"out_features": 60}, ["out_features 60", "multiple of 8"]),
        ({"has_zeros": 0}, ["4 inputs", "need 3"]),
        ({"plugin_version": "7"}, ["Plugin not found"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_fields_of_a_node(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    message = refusal(tiny_onnx.quantized(tmp_path / "q.onnx", change=change))
    for word in ["linear_0 (W4A16Gemm)", *words]:
        assert word in message
    assert "Traceback" not in message


def test_an_operator_tensorrt_does_not_know(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size", 4])
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="layer_7/frob", domain="awq_trt")
    message = refusal(tiny_onnx.save(tmp_path / "u.onnx", [node], [x], [y], []))
    assert "the ONNX parser stopped at node layer_7/frob (Frobnicate)" in message


def test_a_plan_that_cannot_be_built(tmp_path: Path) -> None:
    """The parser admits a Reshape that no shape of the profile satisfies; the builder does not."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    model = tiny_onnx.save(tmp_path / "r.onnx", [node], [x], [y], [tiny_onnx.initializer("shape", np.array([3, 5]))])
    message = refusal(model, max_batch=2)
    assert "TensorRT could not build the engine" in message
    assert "reshape" in message.lower()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_seq": -1}, "max_seq is -1"),
        ({"max_seq": 1}, "at least 2"),
        ({"runtime": "tensorflow"}, "'tensorflow' is unknown"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    assert words in refusal(tiny_onnx.decoder(tmp_path / "d.onnx"), **options)


def test_files_that_are_missing_or_no_model(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.onnx")
    for content in (b"", b"PK\x03\x04 a zip, say", b"\x08\x0a"):
        (tmp_path / "x.onnx").write_bytes(content)
        assert "not an ONNX" in refusal(tmp_path / "x.onnx")
    model = tiny_onnx.quantized(tmp_path / "q.onnx", external=True)
    data = tmp_path / "q.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    message = refusal(model)
    assert "q.onnx.data" in message
    assert "cut short" in message
    data.unlink()
    assert "q.onnx.data, which is missing" in refusal(model)


@pytest.mark.parametrize(("dim", "words"), [("height", "is called 'height'"), (None, "has neither a size nor a name")])
def test_dimensions_of_unknown_meaning(tmp_path: Path, dim: str | None, words: str) -> None:
    x = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch_size", dim])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_size", dim])
    message = refusal(tiny_onnx.save(tmp_path / "i.onnx", [helper.make_node("Relu", ["pixels"], ["y"])], [x], [y], []))
    assert f"dimension 1 of input 'pixels' {words}" in message
    assert "sequence_length" in message


def test_a_plugin_library_of_another_version_and_a_folder_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_onnx.quantized(tmp_path / "q.onnx")
    (tmp_path / "old.so").write_bytes(b"\x7fELF AWQ_TRT_PLUGIN_VERSION=0.0.9;")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "old.so"))
    assert "is version 0.0.9" in refusal(model)
    (tmp_path / "old.so").write_bytes(b"\x7fELF AWQ_TRT_PLUGIN_VERSION=0.1.0;")
    assert "could not load the plugin library" in refusal(model)
    (tmp_path / "q.plan").mkdir()
    assert "this is a directory. Name a file" in refusal(model)


def test_a_full_disk_leaves_the_old_plan(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the same failing write in the child process."""
    model = tiny_onnx.quantized(tmp_path / "q.onnx")
    (tmp_path / "q.plan").write_bytes(b"old plan")
    (tmp_path / "q.plan.json").write_text('{"gpu_architectures": []}')  # an old sidecar: it is ours
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        message = refusal(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written: File too large" in message
    assert "unchanged" in message
    assert (tmp_path / "q.plan").read_bytes() == b"old plan"


def test_a_build_that_aborts_is_an_error_with_its_last_words(tmp_path: Path, stand_in: Any) -> None:
    stand_in(ABORTS)
    message = refusal(tiny_onnx.decoder(tmp_path / "d.onnx"), runtime="tensorrt")
    assert "TensorRT aborted the build (SIGABRT)" in message
    assert "last words" in message
