"""This package, as a method of the benchmark: from a directory to a directory, reading and writing included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.quantize import quantize as quantize_directory
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.reader import Checkpoint

REMARKS = ["seconds include reading the weights and writing the quantized directory"]


def load(directory: str) -> Checkpoint:
    """The open checkpoint. Its weights are read by `quantize`; what transformers imports on first use is imported."""
    checkpoint = open_checkpoint(directory)
    empty_model(checkpoint.config)
    return checkpoint


def quantize(model: Checkpoint, ids: torch.Tensor, job: dict[str, Any]) -> None:
    """Quantize to `job["output"]`/model. The text is cut into the same windows as `ids`."""
    options = {} if job["effort"] is None else {"effort": job["effort"]}
    config = QuantizeConfig(
        method=job["method"],
        group_size=job["group_size"],
        symmetric=job["symmetric"],
        calibration=job["text"],
        calibration_samples=len(ids),
        calibration_length=ids.shape[1],
        **options,
    )
    quantize_directory(model, Path(job["output"]) / "model", config)


def deliver(model: Checkpoint, output: Path) -> list[str]:
    """It is there already."""
    return ["model"]
