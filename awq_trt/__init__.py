"""Hugging Face checkpoint in, TensorRT plan out, with 4-bit AWQ weights.

The four stages, each starting from the file the one before it wrote:

    quantize            checkpoint            -> AWQ checkpoint (Hugging Face directory, AutoAWQ layout)
    export_onnx         AWQ checkpoint        -> model.onnx + model.onnx.data
    build_engine        model.onnx            -> out.plan + out.plan.json
    write_triton_repo   out.plan              -> Triton model repository

and `generate`, which continues prompts with model.onnx on a CPU or out.plan on a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awq_trt.awq.config import QuantizeConfig
    from awq_trt.awq.quantize import quantize
    from awq_trt.engine.build import build_engine
    from awq_trt.errors import AwqTrtError
    from awq_trt.export.export import export_onnx
    from awq_trt.serve.generate import generate
    from awq_trt.serve.sampling import Sampling
    from awq_trt.serve.triton.repository import write_triton_repo

__all__ = [
    "AwqTrtError",
    "QuantizeConfig",
    "Sampling",
    "build_engine",
    "export_onnx",
    "generate",
    "quantize",
    "write_triton_repo",
]

_HOME = {
    "AwqTrtError": "awq_trt.errors",
    "QuantizeConfig": "awq_trt.awq.config",
    "Sampling": "awq_trt.serve.sampling",
    "build_engine": "awq_trt.engine.build",
    "export_onnx": "awq_trt.export.export",
    "generate": "awq_trt.serve.generate",
    "quantize": "awq_trt.awq.quantize",
    "write_triton_repo": "awq_trt.serve.triton.repository",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the engine's child process must not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'awq_trt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
