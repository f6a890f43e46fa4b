"""llm-compressor's AWQModifier and GPTQModifier, as methods of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

from bench import float_model

REMARKS = [
    "patched: IntermediatesCache.pin_memory does nothing, because AWQModifier calls it and torch refuses on a CPU"
]

load = float_model.load
IntermediatesCache.pin_memory = lambda self, batch_index: None


def quantize(model: Any, ids: torch.Tensor, job: dict[str, Any]) -> None:
    """In place; ids int64 [windows, length]. job["method"]: "awq" or "gptq"."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": job["group_size"],
        "symmetric": job["symmetric"],
    }
    layers = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[GPTQModifier(**layers)] if job["method"] == "gptq" else [AWQModifier(), QuantizationModifier(**layers)],
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )


@torch.inference_mode()
def deliver(model: Any, output: Path) -> list[str]:
    """Weights as the quantized model's own layers would compute them."""
    weights = float_model.parameters(model)
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            arguments = module.quantization_scheme.weights
            weights[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", arguments)
    float_model.write(model.name_or_path, weights, output / "model")
    return ["model"]
