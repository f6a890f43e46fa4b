"""NVIDIA ModelOpt's INT4_AWQ_CFG (awq_lite), as a method of the benchmark; symmetric is all it has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint

from bench import float_model

load = float_model.load


def quantize(model: Any, ids: torch.Tensor, job: dict[str, Any]) -> None:
    """Simulated quantization in place; ids int64 [windows, length]."""
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"][-1] = job["group_size"]
    mtq.quantize(model, config, forward_loop=lambda m: [m(row[None], use_cache=False) for row in ids])


@torch.inference_mode()
def deliver(model: Any, output: Path) -> list[str]:
    """The simulated model's weights ("before"), and its own export ("after")."""
    weights = float_model.parameters(model)
    for name, module in model.named_modules():
        if f"{name}.weight" in weights and getattr(module, "weight_quantizer", None) is not None:
            if not module.weight_quantizer.is_enabled:
                continue
            weight = module.weight_quantizer(module.weight)
            scale = module.input_quantizer.pre_quant_scale  # multiplies the layer's input
            weights[f"{name}.weight"] = weight if scale is None else weight * scale
    float_model.write(model.name_or_path, weights, output / "before")
    del weights
    export_hf_checkpoint(model, export_dir=output / "after")
    return ["before", "after"]
