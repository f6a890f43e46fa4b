"""The two TensorRTs: which one is here, how to get it, and the logger that both ask for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError

RUNTIMES = {
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13==1.7.1.116   (builds without a GPU; runs on GeForce/RTX)",
    "tensorrt": "pip install tensorrt-cu13   (builds on the GPU it is to run on; for Triton and trtexec)",
}
"""Python module of each TensorRT, and how to get it."""

RTX_ARCHITECTURES = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for and the plugin has machine code for."""


def choose_runtime(runtime: str) -> str:
    """The Python module to build with.

    Raises:
        AwqTrtError: unknown name, or the module is not installed (the message says the pip line).
    """
    if runtime not in ("auto", *RUNTIMES):
        raise AwqTrtError(f"runtime {runtime!r} is unknown; choose auto, {' or '.join(RUNTIMES)}.")
    installed = [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]
    wanted = [runtime] if runtime != "auto" else ["tensorrt", "tensorrt_rtx"] if has_gpu() else [*RUNTIMES]
    for name in wanted:
        if name in installed:
            return name
    missing = "TensorRT" if runtime == "auto" else runtime
    raise AwqTrtError("\n    ".join([f"no {missing} is installed. Run:", *(RUNTIMES[name] for name in wanted)]))


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU with its driver loaded; asks no library."""
    return Path("/dev/nvidiactl").exists()


def trt_logger(trt: Any, say: Callable[[str, str], object]) -> Any:
    """An ILogger of the module `trt` that passes on warnings and worse as say("WARNING", text)."""

    class Logger(trt.ILogger):
        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                say(getattr(severity, "name", str(severity)), text.strip())

    return Logger()
