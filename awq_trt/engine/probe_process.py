"""Asks TensorRT itself about a plan; started by check.py, see child.py. Of this package it imports as little as it can.

In: {"runtime": module, "plan": path, "plugin": path|null, "device": number, "load": bool}.
Out: {"log": [...]}, warnings and worse; {"validity": "VALID"|..., "reasons": [...]} where the runtime can judge a plan
by its header (TensorRT-RTX: IRuntime.get_engine_validity); with `load` {"loaded": bool, "device_memory": bytes}
(ICudaEngine.device_memory_size_v2: activations of the largest profile).
"""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

from awq_trt.engine.child import Send, run_job
from awq_trt.engine.driver import visible
from awq_trt.engine.runtimes import trt_logger

PROBE_SECONDS = 900


def probe(job: dict[str, Any], send: Send) -> dict[str, Any]:
    """The answer to a job."""
    signal.alarm(PROBE_SECONDS)  # ends this process, wherever in TensorRT it hangs
    os.environ["CUDA_VISIBLE_DEVICES"] = visible(job["device"])
    trt = importlib.import_module(job["runtime"])
    words: list[str] = []
    logger = trt_logger(trt, lambda severity, text: words.append(text))
    runtime = trt.Runtime(logger)
    answer: dict[str, Any] = {"log": words}
    plan = Path(job["plan"])
    if hasattr(runtime, "get_engine_validity"):
        with plan.open("rb") as file:
            validity, bits = runtime.get_engine_validity(file.read(runtime.engine_header_size))
        known = trt.EngineInvalidityDiagnostics.__members__
        answer |= {"validity": validity.name, "reasons": [name for name, bit in known.items() if bits & int(bit)]}
    if job["load"]:
        runtime.engine_host_code_allowed = True  # an embedded plugin
        if job["plugin"]:
            runtime.get_plugin_registry().load_library(job["plugin"])
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        answer["loaded"] = engine is not None
        if engine is not None:
            answer["device_memory"] = engine.device_memory_size_v2
    return answer


if __name__ == "__main__":
    run_job(probe)
