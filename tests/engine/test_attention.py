"""The builder says which attention it has a kernel for; another is written out. Engines are built for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import onnx
import pytest
import transformers as t
from commands import export
from onnx import TensorProto

from awq_trt.engine import attention
from awq_trt.engine.attention import without_kernel
from awq_trt.engine.sidecar import read_sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.export.attention import Attention, alone

pytest.importorskip("tensorrt_rtx_libs")

FEW = Attention(2, 1, 64, 64, 128, TensorProto.FLOAT16)
RTN = (
    "--method",
    "rtn",
    "--group-size",
    "32",
    "--no-verify",
    "--runtime",
    "tensorrt_rtx",
    "--max-seq",
    "256",
    "--quiet",
)


@pytest.mark.parametrize("kind", [FEW, Attention(3, 3, 100, 100, 64, TensorProto.BFLOAT16)], ids=str)
def test_what_has_no_kernel_builds_written_out(kind: Attention) -> None:
    assert without_kernel(alone(kind).graph, "tensorrt_rtx") == [kind]


def test_what_has_a_kernel_stays() -> None:
    assert without_kernel(alone(Attention(8, 2, 64, 64, 128, TensorProto.FLOAT16)).graph, "tensorrt_rtx") == []


def test_what_cannot_be_built_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention._has_kernel.cache_clear()
    monkeypatch.setattr(attention, "run_build", lambda *_, **__: _no("no luck"))
    with pytest.raises(AwqTrtError, match="no kernel for attention in float16 with 2 query heads.*either: no luck"):
        without_kernel(alone(FEW).graph, "tensorrt_rtx")


def _no(text: str) -> Any:
    raise AwqTrtError(text)


def checkpoint(folder: Path, heads: int, kv_heads: int, head_dim: int) -> Path:
    shape = {"hidden_size": 96, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 1}
    families.checkpoint(t.LlamaConfig(**{**families.GQA, **shape}, head_dim=head_dim), folder)
    return folder


def test_a_model_of_two_heads_to_a_plan(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m", 2, 1, 32)
    result = export("--model", model, "--engine", tmp_path / "out.plan", *RTN)
    assert result.returncode == 0, result.stderr
    files = {
        "m",
        "out.awq",
        "out.onnx",
        "out.onnx.data",
        "out.plan",
        "out.plan.json",
        "out.trtexec.sh",
        "out.trtexec.bin",
    }
    assert files == {p.name for p in tmp_path.iterdir()}
    (warning,) = read_sidecar(tmp_path / "out.plan.json")["build"]["warnings"]
    assert "has no kernel for attention in float16 with 2 query heads" in warning
    assert warning.endswith("plain products stand for it, 1 times.")
    nodes = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.node
    assert [n.op_type for n in nodes].count("Attention") == 1, "ONNX Runtime has a kernel"


def test_the_builder_is_asked_before_the_model_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_trt.awq.quantize.quantize", lambda *_, **__: pytest.fail("the model was quantized"))
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: _no("neither as it is nor written out"))
    model = checkpoint(tmp_path / "m", 4, 2, 16)
    result = export("--model", model, "--engine", tmp_path / "out.plan", *RTN)
    assert result.returncode == 2
    assert "neither as it is nor written out" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


HEADS = [(4, 2), (1, 1), (3, 1), (4, 4)]
HEAD_DIMS = [64, 72, 80, 96, 100, 112, 120, 128, 160, 192, 256, 512]


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "heads"), list(zip(HEAD_DIMS, 3 * HEADS, strict=True)), ids=str)
def test_heads_that_real_models_have(tmp_path: Path, heads: tuple[int, int], head_dim: int) -> None:
    """64 Llama 3.2, 72 and 80 Phi-2 and Pythia, 96 Phi-3, 100 OpenLLaMA 3B, 120 Danube3, 192 MLA, 256 and 512 Gemma."""
    model = checkpoint(tmp_path / "m", *heads, head_dim)
    result = export("--model", model, "--engine", tmp_path / "out.plan", *RTN)
    assert result.returncode == 0, result.stderr
