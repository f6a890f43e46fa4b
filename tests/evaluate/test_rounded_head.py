"""Rounding to nearest, to compare with, of a model whose head is quantized too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from awq_trt.awq.calibration import HELD_OUT_TEXT, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.evaluate.accuracy import RoundedWeights, accuracy
from awq_trt.evaluate.evaluate import evaluate
from awq_trt.linear import quantize_weight

EMBEDDING = "model.embed_tokens.weight"


def test_rounding_to_compare_with_rounds_the_head_too(models: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models / "llama")
    rounded = RoundedWeights(checkpoint, QuantizeConfig(group_size=64), head=True)
    expected = quantize_weight(checkpoint.tensor(EMBEDDING), 64, False, torch.float16).dequantize()
    assert torch.equal(rounded.tensor("lm_head.weight"), expected)
    assert torch.equal(rounded.tensor(EMBEDDING), checkpoint.tensor(EMBEDDING))
    assert not torch.equal(rounded.tensor("model.norm.weight"), torch.ones(64))
    options = {"calibration_samples": 3, "calibration_length": 64, "lm_head": "int4"}
    quantize(models / "llama", tmp_path / "awq", QuantizeConfig(**options))
    rows = evaluate([tmp_path / "awq"], float_model=models / "llama", samples=2, length=64)
    weights: dict[str, Any] = {
        "float": checkpoint,
        "with": rounded,
        "without": RoundedWeights(checkpoint, QuantizeConfig(group_size=64)),
    }
    found = accuracy(weights, windows(HELD_OUT_TEXT, checkpoint.tokenizer, 2, 64))
    assert rows["rounding"]["perplexity"] == found["with"].perplexity != found["without"].perplexity
    assert list(rows) == ["float", "rounding", str(tmp_path / "awq")]
    assert rows[str(tmp_path / "awq")]["top1"] > rows["rounding"]["top1"]
