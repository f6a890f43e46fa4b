"""llm-awq's published procedure, as a method of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import float_model, llm_awq

load = float_model.load


def quantize(model: Any, ids: torch.Tensor, job: dict[str, Any]) -> None:
    """In place; ids int64 [windows, length]."""
    llm_awq.quantize(model, ids, llm_awq.Rounding(job["group_size"], job["symmetric"]))


def deliver(model: Any, output: Path) -> list[str]:
    """The rounded weights, and the norms with scales folded in."""
    float_model.write(model.name_or_path, float_model.parameters(model), output / "model")
    return ["model"]
