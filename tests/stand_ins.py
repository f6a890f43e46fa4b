"""Files that stand for plans, with the sidecars that builds would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_onnx

from awq_trt.engine import sidecar
from awq_trt.engine.driver import Gpu
from awq_trt.engine.plugin import library_path
from awq_trt.engine.runtimes import RTX_ARCHITECTURES
from awq_trt.engine.sidecar import EngineReport
from awq_trt.export.metadata import Profile, optimization_profiles, read_graph

GIB = 1 << 30
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 * GIB, 20 * GIB)
CACHE = {
    "kind": "fixed",
    "capacity": 2048,
    "prefill_chunk": 1024,
    "dtype": "float16",
    "layers": [{"kv_heads": 3, "head_dim": 64, "value_head_dim": 32, "slots": 2048, "window": None}],
}

SHAPES = {"x": ((1, 1, 256), (2, 8, 256), (2, 16, 256))}


def report_of(engine: Path, runtime: str = "tensorrt", embedded: bool = True, **changes: Any) -> EngineReport:
    """A report as a build gives it, for a plan that is not one."""
    engine.write_bytes(b"plan" * 1000)
    facts = {
        "engine": engine,
        "sidecar": sidecar.path_of(engine),
        "runtime": runtime,
        "runtime_version": "10.14",
        "architectures": ("9.0",),
        "profiles": (Profile("default", SHAPES),),
        "plugin_layers": 1,
        "plugin_embedded": embedded,
        "plan_bytes": 4000,
        "seconds": 1.25,
        "peak_bytes": 1 << 30,
        "warnings": ("slow",),
    }
    return EngineReport(**(facts | changes))


def plan_of(onnx_path: Path, max_batch: int = 4, plugin: bool = True, max_seq: int | None = 64, **options: Any) -> Path:
    """A stand-in for a plan, with the sidecar that a build of this ONNX file would write."""
    engine = onnx_path.with_suffix(".plan")
    graph = read_graph(onnx_path)
    max_seq = None if (graph.metadata.get("kv_cache") or {}).get("kind") == "fixed" else max_seq
    options = {"profiles": optimization_profiles(graph, max_batch, max_seq)} | options
    content = sidecar.describe(report_of(engine, **options), graph, library_path() if plugin else None, None)
    sidecar.write(sidecar.path_of(engine), content)
    return engine


def plan_in(folder: Path, runtime: str = "tensorrt_rtx", kind: str = "quantized", **options: Any) -> Path:
    """A stand-in for a plan in a folder, built by `runtime` as it is today, of a graph of `tiny_onnx`."""
    metadata = {"kv_cache": None, **options.pop("metadata", {})}
    built = {"runtime_version": "1.7.1.116", "architectures": RTX_ARCHITECTURES}
    if runtime == "tensorrt":
        built = {"runtime_version": "10.14.1.48", "architectures": ("8.9",), "gpu": RTX_4090.name}
    model = getattr(tiny_onnx, kind)(folder / "out.onnx", metadata=metadata)
    return plan_of(model, runtime=runtime, **({"warnings": ()} | built | options))
