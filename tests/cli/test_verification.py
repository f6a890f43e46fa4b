"""The check decides: what it finds wrong is not published, and what was there before stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as t
from commands import command, export
from safetensors.torch import load_file, save_file

from awq_trt import publishing
from awq_trt.awq.calibration import HELD_OUT_TEXT
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.evaluate.verify import verify
from awq_trt.export import export as export_module
from awq_trt.export import kv_cache
from awq_trt.export.export import export_onnx
from awq_trt.export.interface import DecoderOptions

SHORT = ("--calibration-samples", 2, "--calibration-length", 64, "--max-seq", 96)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edited(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The checkpoint in bfloat16, with other weights."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    tensors = {name: value.bfloat16().contiguous() for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return directory


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return families.checkpoint(t.LlamaConfig(**families.GQA), tmp_path / "in" / "m")


def test_a_wrong_file_is_not_published(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of every layer come out 1.5 times too large: exit code 2, and an older file stays what it was."""
    quantize(llama, tmp_path / "q", QuantizeConfig(method="rtn"))
    monkeypatch.setattr(export_module, "check_outputs", lambda *_: None)  # which refuse what we did not write
    monkeypatch.setattr(publishing, "check", lambda *_: None)
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    right = export_module._Linears.__getitem__

    def wrong(self: Any, weight: str) -> Any:
        linear = right(self, weight)
        return replace(linear, scales=linear.scales * 1.5)

    monkeypatch.setattr(export_module._Linears, "__getitem__", wrong)
    result = command("onnx", tmp_path / "q", "--output", tmp_path / "m.onnx", "--max-seq", 96)
    assert result.returncode == 2
    assert "m.onnx does not compute what the model does, and is not kept: relative difference" in result.stderr
    assert names(tmp_path) == ["in", "m.onnx", "m.onnx.data", "q"]
    assert {(tmp_path / name).read_text() for name in ("m.onnx", "m.onnx.data")} == {"old"}


@pytest.mark.parametrize("repaired", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_that_masks_by_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repaired: bool) -> None:
    """GPT-Neo, whose masks are rows of a table counted from the end of the keys: right, or else not published. All 128
    tokens of one call are right either way; those that come one by one are not."""
    source = families.checkpoint(families.DECODERS["gpt-neo"](), tmp_path / "m")
    quantize(source, tmp_path / "q", QuantizeConfig(method="rtn"))
    if not repaired:
        monkeypatch.setattr(kv_cache, "own_masks", lambda *_: nullcontext())
    options = DecoderOptions(capacity=128, prefill_chunk=128)
    if not repaired:
        result = command("onnx", tmp_path / "q", "--output", tmp_path / "m.onnx", "--max-seq", 128)
        assert result.returncode == 2
        assert names(tmp_path) == ["m", "q"]
        return
    export_onnx(tmp_path / "q", tmp_path / "m.onnx", decoder=options)
    found = verify(tmp_path / "m.onnx", tmp_path / "q", None)["onnx"]
    assert found["tokens_equal"] >= 31
    assert found["gap"] < 0.02 * found["spread"]


def test_what_is_read_wrong_stops_before_the_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader gives the embedding where the file has a head of its own: nothing at all is written."""
    from awq_trt.cli import quantize as command_module

    right = command_module.open_model

    def wrong(args: Any) -> Any:
        checkpoint = right(args)
        assert checkpoint is not None
        embedding = checkpoint.readers["model.embed_tokens.weight"]
        return replace(checkpoint, readers={**checkpoint.readers, "lm_head.weight": embedding})

    monkeypatch.setattr(command_module, "open_model", wrong)
    result = export("--model", llama, "--onnx", tmp_path / "out" / "m.onnx", *SHORT)
    assert result.returncode == 2
    assert f"lm_head.weight: what was read is not what transformers {t.__version__} loads" in result.stderr
    assert names(tmp_path) == ["in"]


def stream_overflows(tensors: dict[str, torch.Tensor]) -> None:
    """Attention adds up to 1e6 to the residual stream; every layer reads what a norm made of it, and weights fit."""
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1e3
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1e4


OVERFLOW = r"activations reach \S+ in \S+, and float16 ends at 65504: the engine would give NaN. Use --dtype bfloat16"


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_overflow_of_float16(llama: Path, tmp_path: Path, method: str) -> None:
    edited(llama, stream_overflows)
    for more in ([], ["--no-verify"] if method == "awq" else []):
        result = export(
            "--model", llama, "--onnx", tmp_path / "m.onnx", "--dtype", "float16", "--method", method, *more, *SHORT
        )
        assert result.returncode == 2
        assert re.search(OVERFLOW, result.stderr)
        assert names(tmp_path) == ["in"]


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_weights_beyond_float16(llama: Path, tmp_path: Path, method: str) -> None:
    """What is computed of them fits: the norm before them is as small as they are large."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"] /= 1e6
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e6

    edited(llama, change)
    result = export("--model", llama, "--awq", tmp_path / "q", "--dtype", "float16", "--method", method, *SHORT)
    assert result.returncode == 2
    assert re.search(r"weight model\.layers\.1\.mlp\.gate_proj\.weight holds \d\.\d+e\+05 itself", result.stderr)
    assert "Use --dtype bfloat16" in result.stderr
    assert names(tmp_path) == ["in"]


def test_overflow_of_a_quantized_directory(llama: Path, tmp_path: Path) -> None:
    """ONNX Runtime sees nothing of it: it computes float16 in fp32 on a CPU."""
    quantize(edited(llama, stream_overflows), tmp_path / "q", QuantizeConfig(method="rtn"))
    result = command("onnx", tmp_path / "q", "--output", tmp_path / "m.onnx", "--max-seq", 96, "--dtype", "float16")
    assert result.returncode == 2
    assert re.search(OVERFLOW, result.stderr)
    assert names(tmp_path) == ["in", "q"]


@pytest.mark.slow
def test_near_the_end_of_float16_is_a_warning(llama: Path, tmp_path: Path) -> None:
    text = HELD_OUT_TEXT.read_text()[:2000]
    tokens = open_checkpoint(llama).tokenizer(text)["input_ids"]
    model = t.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    seen: list[float] = []
    model.get_submodule("model.layers.0.self_attn.o_proj").register_forward_hook(
        lambda module, args, output: seen.append(float(output.abs().max()))
    )
    with torch.no_grad():
        model(torch.tensor(tokens[:128])[None])
    factor = 30000 / seen[0]

    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight"] *= factor

    edited(llama, large)
    for dtype, said in (("float16", 2), ("bfloat16", 0)):
        result = export("--model", llama, "--onnx", tmp_path / f"{dtype}.onnx", "--dtype", dtype, *SHORT)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("and float16 ends at 65504: the engine may overflow to NaN in") == said
