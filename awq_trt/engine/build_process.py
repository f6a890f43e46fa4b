"""Builds one TensorRT engine; started by build.py, see child.py. Of this package it imports as little as it can: the
less is loaded, the less memory a build takes.

In: the job that build.py puts together. Out: the plan at `job["plan"]`, and one JSON object a line:

    {"log": [severity, text]}                        what TensorRT said, warnings and worse
    {"phase": name, "parent": name|null, "steps": n} a phase begins;  {"step": name, "at": i}  {"end": name}
"""

from __future__ import annotations

import hashlib
import importlib
import time
from pathlib import Path
from typing import Any

from awq_trt.engine.child import Send, run_job
from awq_trt.engine.driver import query
from awq_trt.engine.runtimes import trt_logger
from awq_trt.errors import AwqTrtError
from awq_trt.schema import regular_file

MAX_TIMING_CACHE = 256 << 20
"""Bytes; those of large models have tens of MB."""
STEP_SECONDS = 0.05
"""Progress is sent at most this often; a build has some hundred thousand steps."""


def build(job: dict[str, Any], send: Send) -> dict[str, Any]:
    """Parse the ONNX file, build the engine, write the plan. Returns facts for the report."""
    started = time.monotonic()
    trt = importlib.import_module(job["runtime"])
    logger = trt_logger(trt, lambda severity, text: send({"log": [severity, text]}))
    builder = trt.Builder(logger)
    if job["plugin"] and not builder.get_plugin_registry().load_library(job["plugin"]):
        raise AwqTrtError(f"{job['runtime']} {trt.__version__} could not load the plugin library {job['plugin']}.")
    # TensorRT 11 has strongly typed networks only, and may drop the flag
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)  # holds the weights: it must outlive the build
    if job.get("graph"):  # without weights of its own: they lie beside the ONNX file
        parsed = parser.parse(Path(job["graph"]).read_bytes(), job["onnx"])
    else:
        parsed = parser.parse_from_file(job["onnx"])
    if not parsed:
        raise AwqTrtError("\n".join(_parser_error(parser.get_error(i)) for i in range(parser.num_errors)))
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    plugin_layers = kinds.count(trt.LayerType.PLUGIN_V3)
    if plugin_layers != job["plugin_nodes"]:
        raise AwqTrtError(
            f"{job['plugin_nodes']} W4A16Gemm nodes are in the ONNX file, but the parser gave {plugin_layers} of them "
            'to the plugin. Every node must carry the attribute plugin_namespace="".'
        )
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, send)
    _set_architectures(trt, config, job["architectures"])
    if job["embed_plugin"] and job["plugin"]:
        config.plugins_to_serialize = [job["plugin"]]
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise AwqTrtError("TensorRT refused an optimization profile.")
    cache = _timing_cache(config, job["timing_cache"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise AwqTrtError("TensorRT could not build the engine.")
    Path(job["plan"]).write_bytes(memoryview(plan))
    if cache is not None:
        Path(job["timing_cache_out"]).write_bytes(memoryview(cache.serialize()))
    gpus = [] if job["architectures"] else query().gpus[:1]  # TensorRT has built for this one
    return {
        "plan_sha256": hashlib.sha256(memoryview(plan)).hexdigest(),
        "runtime_version": trt.__version__,
        "plugin_layers": plugin_layers,
        "architectures": job["architectures"] or [gpu.capability for gpu in gpus],
        "gpu": gpus[0].name if gpus else None,
        "peak_bytes": _peak_bytes(),
        "seconds": time.monotonic() - started,
    }


def _monitor(trt: Any, send: Send) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Passes on the phases, and a step now and then."""

        next_step = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            send({"phase": name, "parent": parent, "steps": steps})

        def step_complete(self, name: str, step: int) -> bool:
            if (now := time.monotonic()) >= self.next_step:
                self.next_step = now + STEP_SECONDS
                send({"step": name, "at": step + 1})
            return True

        def phase_finish(self, name: str) -> None:
            send({"end": name})

    return Monitor()


def _parser_error(error: Any) -> str:
    where = f"node {error.node_name() or error.node()} ({error.node_operator()})" if error.node() >= 0 else "the file"
    return f"the ONNX parser stopped at {where}: {error.desc()}"


def _set_architectures(trt: Any, config: Any, architectures: list[str]) -> None:
    """Compute capabilities to compile for, "8.6" as SM86. TensorRT-RTX only; TensorRT builds for the GPU it runs on."""
    if not architectures:
        return
    config.num_compute_capabilities = len(architectures)
    for i, architecture in enumerate(architectures):
        name = "SM" + architecture.replace(".", "")
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            known = [c[2:-1] + "." + c[-1] for c in dir(trt.ComputeCapability) if c.startswith("SM")]
            raise AwqTrtError(f"{trt.__name__} cannot build for compute capability {architecture}; it can for {known}.")
        config.set_compute_capability(capability, i)


def _timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    old = Path(path)
    if old.exists() and regular_file(old).stat().st_size > MAX_TIMING_CACHE:
        raise AwqTrtError(f"{path}: larger than any timing cache. Delete it, or give another path.")
    cache = config.create_timing_cache(old.read_bytes() if old.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise AwqTrtError(
            f"{path} is no timing cache of this TensorRT version and GPU. Delete it, or give another path."
        )
    return cache


def _peak_bytes() -> int:
    """Peak resident memory of this process alone; `ru_maxrss` would also count the parent's pages at the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    run_job(build)
