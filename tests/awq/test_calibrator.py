"""What a block's search gets: inputs behind the rounded blocks before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from awq_trt.awq import pipeline
from awq_trt.awq.calibration import DEFAULT_TEXT, windows
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import open_quantized

OPTIONS: dict[str, Any] = {"calibration_samples": 3, "calibration_length": 64}


def second_block_inputs(model: torch.nn.Module, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What q_proj of block 1 reads, [tokens, K]."""
    found: list[torch.Tensor] = []
    q_proj = model.get_submodule("model.layers.1.self_attn.q_proj")
    q_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    return torch.cat(found)


def test_blocks_see_the_rounded_blocks_before_them(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[list[str], torch.Tensor]]] = []  # of the dry run, block 0, block 1
    quantize_block = pipeline.quantize_block

    def noted(block: Any, groups: Any, first_output: Any, *rest: Any, **options: Any) -> Any:
        seen.append([(g.names, g.statistics.hessian.clone()) for g in groups])
        return quantize_block(block, groups, first_output, *rest, **options)

    monkeypatch.setattr(pipeline, "quantize_block", noted)
    quantize(models / "llama", tmp_path / "out", QuantizeConfig(**OPTIONS))

    checkpoint, quantized = open_checkpoint(models / "llama"), open_quantized(tmp_path / "out")
    samples = windows(DEFAULT_TEXT, checkpoint.tokenizer, *OPTIONS.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.float32)
    x_float = second_block_inputs(model, samples)
    for name, parameter in model.get_submodule("model.layers.0").named_parameters():
        parameter.data = quantized.tensor(f"model.layers.0.{name}").float()
    x = second_block_inputs(model, samples)
    assert float((x - x_float).norm() / x.norm()) > 0.005, "the first block was not rounded at all"

    names, hessian = seen[2][0]
    assert "self_attn.q_proj" in names
    assert float((hessian - x.t() @ x).norm() / hessian.norm()) < 1e-3
    assert float((hessian - x_float.t() @ x_float).norm() / hessian.norm()) > 1e-3
