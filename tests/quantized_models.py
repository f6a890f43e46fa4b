"""Tiny quantized checkpoints: ours by `Writer`, others' with the packers of the tools themselves (peers.py)."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from awq_trt.checkpoint.model import empty_model, find_blocks
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from awq_trt.checkpoint.writer import Writer
from awq_trt.linear import QuantizedLinear, quantize_weight

Parts = dict[str, torch.Tensor]


def rounded(
    source: Path,
    output: Path,
    *,
    save_format: str = "awq",
    symmetric: bool = False,
    group: int = 64,
    skip: tuple[str, ...] = (),
) -> Path:
    """A checkpoint rounded to nearest and saved by `Writer`; layers whose names end with one of `skip` stay float."""
    checkpoint = open_checkpoint(source)
    model = empty_model(checkpoint.config)
    prefix, blocks = find_blocks(model)
    writer = Writer(output, checkpoint, save_format)
    names = [n for n, _ in model.named_parameters()]
    writer.add_block("outside", "", {n: checkpoint.tensor(n) for n in names if not n.startswith(f"{prefix}.")})
    left = {n: "float" for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(f"{prefix}.")}
    for i, block in enumerate(blocks):
        name = f"{prefix}.{i}"
        tensors = {n: checkpoint.tensor(f"{name}.{n}") for n, _ in block.named_parameters()}
        layers = {}
        for n, m in block.named_modules():
            if not isinstance(m, nn.Linear):
                continue
            if n.endswith(skip or "nothing"):
                left[f"{name}.{n}"] = "float"
                continue
            size = m.in_features if group == -1 else group
            layers[n] = quantize_weight(tensors[f"{n}.weight"], size, symmetric, checkpoint.dtype)
        writer.add_block(f"block-{i:05}", name, tensors, layers)
    writer.finish(group, symmetric, {"left_in_float": left})
    return output


def ids() -> torch.Tensor:
    return torch.randint(0, 384, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def float_logits(model: Path, dtype: torch.dtype, weights: QuantizedCheckpoint | None = None) -> torch.Tensor:
    """The eager model, with every tensor as we read it from a quantized checkpoint if one is given."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    for name, parameter in network.named_parameters() if weights else ():
        parameter.copy_(weights.tensor(name))
    logits: torch.Tensor = network(ids()).logits
    return logits


def our_logits(directory: Path, float_model: Path) -> torch.Tensor:
    quantized = open_quantized(directory)
    return float_logits(float_model, quantized.dtype, quantized)


def repacked(
    source: Path, output: Path, pack: Callable[[QuantizedLinear], Parts], quantization: dict[str, Any]
) -> Path:
    """A quantized checkpoint with its layers packed another way, as one model.safetensors."""
    quantized = open_quantized(source)
    tensors: Parts = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, layer in quantized.linears.items():
        tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{name}.")}
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in pack(layer).items()}
    output.mkdir()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return output


def edited(source: Path, output: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A copy in one file with some tensors changed, and some of the configuration."""
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    output.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return output


def linear_of(layer: QuantizedLinear) -> nn.Linear:
    """A float layer that every packer rounds back to this one."""
    linear = nn.Linear(layer.q.shape[1], len(layer.q), bias=False, dtype=layer.scales.dtype)
    linear.weight.data = layer.dequantize()
    return linear


def zeros_of(layer: QuantizedLinear) -> torch.Tensor:
    """uint8 [N, G], 8 for a symmetric layer."""
    return torch.full(layer.scales.shape, 8, dtype=torch.uint8) if layer.zeros is None else layer.zeros


def autoawq(module: str) -> types.ModuleType:
    """AutoAWQ's `awq.modules.linear.<module>`; it imports accelerate without using it here."""
    stub = "accelerate" not in sys.modules
    sys.modules.setdefault("accelerate", types.ModuleType("accelerate"))
    try:
        return peers.module("autoawq", f"awq.modules.linear.{module}")
    finally:
        if stub:
            del sys.modules["accelerate"]


def autoawq_gemv(layer: QuantizedLinear) -> Parts:
    """AutoAWQ's packer for its GEMV layout."""
    theirs = autoawq("gemv").WQLinear_GEMV.from_linear(
        linear_of(layer), 4, layer.group_size, scales=layer.scales, zeros=zeros_of(layer)
    )
    return {part: getattr(theirs, part) for part in ("qweight", "qzeros", "scales")}


def autoawq_gemv_fast(layer: QuantizedLinear) -> Parts:
    """AutoAWQ's packer for its GEMV-fast layout."""
    theirs = autoawq("gemv_fast").WQLinear_GEMVFast.from_linear(
        linear_of(layer), 4, layer.group_size, scales=layer.scales, zeros=zeros_of(layer)
    )
    return {part: getattr(theirs, part) for part in ("qweight", "qzeros", "scales")}


def auto_gptq_linear(layer: QuantizedLinear) -> Any:
    """AutoGPTQ's layer, packed by itself. Its v1 layout cannot hold zero points of 0."""
    cuda = peers.module("auto-gptq", "auto_gptq.nn_modules.qlinear.qlinear_cuda")
    n, k = layer.q.shape
    theirs = cuda.QuantLinear(4, layer.group_size, k, n, bias=False)
    theirs.pack(linear_of(layer), layer.scales.clone(), zeros_of(layer).float())
    return theirs


def auto_gptq(layer: QuantizedLinear) -> Parts:
    """AutoGPTQ's v1 tensors, with the bias of zeros that it writes for every layer."""
    theirs = auto_gptq_linear(layer)
    parts = {part: getattr(theirs, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
    return parts | {"bias": torch.zeros(len(layer.q), dtype=layer.scales.dtype)}


def gptq_v2(layer: QuantizedLinear) -> Parts:
    """The same with zero points as they are, which is what v2 changed."""
    parts = auto_gptq(layer)
    words = parts["qzeros"].to(torch.int64) + 0x11111111
    return parts | {"qzeros": ((words + 2**31) % 2**32 - 2**31).to(torch.int32)}
