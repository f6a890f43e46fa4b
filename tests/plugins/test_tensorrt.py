"""The library inside a real TensorRT-RTX, as far as a machine without a GPU goes: registry, creator, logger.

Plugins enter its networks through the ONNX parser only; that is tested where engines are built.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")

PROGRAM = """
import sys
import numpy as np
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        if "W4A16Gemm" in text:
            print(severity, text, flush=True)

logger = Logger()
builder = trt.Builder(logger)
registry = builder.get_plugin_registry()
assert registry.load_library(sys.argv[1])
creator = registry.get_creator("W4A16Gemm", "1", "")

def create(**fields):
    made = [trt.PluginField(k, np.array([v], np.int32), trt.PluginFieldType.INT32) for k, v in fields.items()]
    return creator.create_plugin("layer", trt.PluginFieldCollection(made), trt.TensorRTPhase.BUILD)

assert create(out_features=12, in_features=64, group_size=64) is None
plugin = create(out_features=64, in_features=96, group_size=32)
print("created", plugin is not None)
"""


@needs_rtx
def test_registry_creator_and_logger(library: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Severity.ERROR W4A16Gemm: layer: out_features 12 is not a multiple of 8" in done.stdout
    assert "created True" in done.stdout
