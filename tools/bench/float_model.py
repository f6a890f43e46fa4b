"""The float model as a plain transformers object, and rounded weights as a directory that looks like the original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = "model.safetensors"


def load(directory: str) -> Any:
    """The model in fp32, in evaluation mode."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.name_or_path = directory
    return model.eval()


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter under its name in the file: tied ones once, and no buffers or parameters of a quantizer."""
    with safe_open(f"{model.name_or_path}/{WEIGHTS}", "pt") as file:
        names = set(file.keys())
    return {name: value.data for name, value in model.named_parameters() if name in names}


def write(original: str, weights: dict[str, torch.Tensor], output: Path) -> None:
    """Copy the float directory `original` with some weights replaced, in fp32.

    Raises:
        KeyError: a name that the original does not have.
    """
    output.mkdir(parents=True)
    for file in Path(original).iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, output)
    with safe_open(f"{original}/{WEIGHTS}", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if unknown := weights.keys() - tensors.keys():
        raise KeyError(f"{original} has no {sorted(unknown)[:3]}")
    tensors |= {name: value.detach().float().contiguous() for name, value in weights.items()}
    save_file(tensors, str(output / WEIGHTS), metadata={"format": "pt"})
