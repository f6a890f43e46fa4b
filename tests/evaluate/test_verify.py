"""Verification must notice a wrong file; that a right one passes is the smaller half."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import eager_outputs
from awq_trt.evaluate.verify import agreement, onnx_session, random_inputs, verify
from awq_trt.export.export import export_onnx
from awq_trt.export.trace import DecoderOptions


def ids(count: int = 64) -> torch.Tensor:
    return torch.randint(0, 384, (1, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@torch.inference_mode()
def test_block_by_block_is_the_model(models: Path, name: str) -> None:
    checkpoint = open_checkpoint(models / name)
    model = getattr(transformers, checkpoint.config.architectures[0]).from_pretrained(models / name).eval()
    (got,) = eager_outputs(checkpoint, [{"input_ids": ids()}])
    torch.testing.assert_close(got, model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_right_file_agrees(exported: Path, models: Path) -> None:
    found = verify(exported / "llama.onnx", exported / "llama.awq", open_checkpoint(models / "llama"))
    assert found["onnx"]["logits"] == 128 * 384
    assert found["onnx"]["relative"] < 5e-3
    assert found["onnx"]["top1"] > 0.98
    assert found["onnx"]["tokens"] == 32
    assert found["onnx"]["tokens_equal"] >= 30
    assert (found["onnx"]["gap"] == 0) == (found["onnx"]["tokens_equal"] == 32)
    assert found["onnx"]["gap"] < 2e-3
    assert list(found["held_out"]) == ["float", "rounding", "awq"]
    assert found["held_out"]["awq"]["top1"] > found["held_out"]["rounding"]["top1"]


def test_a_cache_smaller_than_what_is_read_otherwise(exported: Path, tmp_path: Path) -> None:
    export_onnx(exported / "llama.awq", tmp_path / "m.onnx", decoder=DecoderOptions(capacity=24))
    found = verify(tmp_path / "m.onnx", exported / "llama.awq", None)["onnx"]
    assert found["logits"] == 24 * 384
    assert (found["tokens"], found["tokens_equal"]) == (23, 23)
    assert found["relative"] < 5e-3


@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_a_wrong_weight_is_noticed(exported: Path, tmp_path: Path, factor: float) -> None:
    """Change the scales of one layer: the comparison must see it."""
    model = onnx.load(exported / "llama.onnx")
    scales = next(t for t in model.graph.initializer if "up_proj" in t.name and "scales" in t.name)
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * factor, scales.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    quantized = open_quantized(exported / "llama.awq")
    arguments = (quantized, [{"input_ids": ids()}], quantized.tokenizer)
    if math.isnan(factor):
        with pytest.raises(AwqTrtError, match="NaN"):
            agreement(tmp_path / "wrong.onnx", *arguments)
        return
    right, wrong = agreement(exported / "llama.onnx", *arguments), agreement(tmp_path / "wrong.onnx", *arguments)
    assert wrong.relative > 10 * right.relative
    assert wrong.tokens_equal < right.tokens_equal
    assert wrong.gap > 0.02


def test_files_onnx_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not onnx")
    with pytest.raises(AwqTrtError, match="not an ONNX file, or cut short"):
        onnx_session(tmp_path / "x.onnx")
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), tmp_path / "y.onnx")
    with pytest.raises(AwqTrtError, match="ONNX Runtime .* cannot load it"):
        onnx_session(tmp_path / "y.onnx")


def test_a_model_without_inputs_gets_random_ones(models: Path, tmp_path: Path) -> None:
    quantize(models / "vit", tmp_path / "vit.awq", QuantizeConfig(method="rtn"))
    export_onnx(tmp_path / "vit.awq", tmp_path / "vit.onnx")
    assert random_inputs(tmp_path / "vit.onnx")["pixel_values"].shape == (2, 3, 32, 32)
    found = verify(tmp_path / "vit.onnx", tmp_path / "vit.awq", None)
    assert found["held_out"] == {}
    assert found["onnx"]["relative"] < 5e-3
    assert found["onnx"]["tokens"] == 0
