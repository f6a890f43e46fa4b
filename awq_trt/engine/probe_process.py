"""Asks TensorRT itself about a plan, in a process of its own, because loading may abort the process it runs in.

Started by `awq_trt.engine.check` as `python -m awq_trt.engine.probe_process FD`. In: one JSON object on standard input,

    {"runtime": module, "plan": path, "plugin": path|null, "device": number, "load": bool}

Out, on file descriptor FD: {"validity": "VALID"|..., "reasons": [...]} where the runtime can judge a plan by its header
(TensorRT-RTX: IRuntime.get_engine_validity), and with `load` {"loaded": bool, "device_memory": bytes} (ICudaEngine.
device_memory_size_v2: activations of the largest profile); {"log": [...]}, warnings and worse, in both cases.
Of this package only driver.py is imported.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

from awq_trt.engine.driver import visible


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible(job["device"])
    trt = importlib.import_module(job["runtime"])
    words: list[str] = []
    logger = collecting_logger(trt, words)
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


def collecting_logger(trt: Any, words: MutableSequence[str]) -> Any:
    """An ILogger that appends warnings and worse to `words`."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                words.append(text.strip())

    return Logger()


def main() -> int:
    """Read the job, ask, answer."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive a parent that was killed
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        try:
            answer = probe(json.load(sys.stdin))
        except Exception as error:  # whatever TensorRT's bindings raise becomes text for the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        json.dump(answer, pipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
