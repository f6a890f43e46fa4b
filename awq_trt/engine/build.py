"""ONNX file in, TensorRT plan and its sidecar out. One code path for `tensorrt` and `tensorrt_rtx`.

The build runs in a child process (build_process.py). The plan, the script that times it, the inputs of that script
(trtexec.py) and, last, `<plan>.json` appear together at the end, or none does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awq_trt.engine import attention, sidecar, trtexec
from awq_trt.engine.build_run import run_build
from awq_trt.engine.child import Send
from awq_trt.engine.plugin import library_path
from awq_trt.engine.runtimes import RTX_ARCHITECTURES, choose_runtime
from awq_trt.engine.sidecar import EngineReport
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import external_files, optimization_profiles, read_graph
from awq_trt.export.onnx_file import open_onnx
from awq_trt.outputs import Output
from awq_trt.publishing import check_outputs, publishing


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    runtime: str = "auto",
    max_batch: int = 1,
    max_seq: int | None = None,
    embed_plugin: bool = True,
    timing_cache: Path | None = None,
    architectures: Sequence[str] | None = None,
    accuracy: dict[str, Any] | None = None,
    quiet: bool = False,
    on_event: Send | None = None,
) -> EngineReport:
    """Build a strongly typed engine and write it with its sidecar (`sidecar.path_of(engine_path)`).

    Args:
        onnx_path: the model; its dynamic dimensions carry the names that `metadata.optimization_profiles` knows.
        runtime: "tensorrt", "tensorrt_rtx", or "auto": TensorRT where it is installed and there is a GPU, else RTX.
        max_batch, max_seq: largest batch, and largest number of tokens including the cached ones; see
            `metadata.optimization_profiles`.
        embed_plugin: put the plugin library into the plan, so that the plan loads without it.
        timing_cache: read if it exists, written back (TensorRT only; TensorRT-RTX times no kernels when it builds).
        architectures: compute capabilities to build for, like "8.6" (TensorRT-RTX only); None is `RTX_ARCHITECTURES`.
        accuracy: results of the verification, for the sidecar.
        quiet: no progress bar. on_event: is called with every event of the child (see build_process.py).

    Raises:
        AwqTrtError: bad input, no TensorRT, or a failed build with TensorRT's own messages; or something would be lost
            at `engine_path`, or another run writes there. Nothing is written then.
    """
    graph = read_graph(onnx_path)
    sources = [onnx_path, *external_files(onnx_path)]
    outputs = [sidecar.output(engine_path), *([Output(timing_cache)] if timing_cache else [])]
    check_outputs(outputs, sources)
    profiles = optimization_profiles(graph, max_batch, max_seq)
    runtime = choose_runtime(runtime)
    plugin = library_path() if graph.plugin_nodes else None
    notes: list[str] = []
    if runtime == "tensorrt_rtx":
        architectures = list(RTX_ARCHITECTURES if architectures is None else architectures)
        if timing_cache is not None:
            notes.append("TensorRT-RTX times no kernels when it builds: the timing cache was neither read nor written.")
            timing_cache = None
    elif architectures:
        raise AwqTrtError("architectures can be chosen for tensorrt_rtx only; tensorrt builds for the GPU it runs on.")

    with publishing(outputs[0], sources) as (sidecar_file, plan_file, script_file, inputs_file):
        new_cache = plan_file.parent.with_name("timing.cache")
        written_out = plan_file.parent.with_name("written_out.onnx")
        notes += attention.prepared(open_onnx(onnx_path), runtime, tuple(architectures or ()), written_out)
        job = {
            "runtime": runtime,
            "onnx": str(onnx_path.resolve()),
            "graph": str(written_out.resolve()) if written_out.exists() else None,
            "plan": str(plan_file.resolve()),
            "plugin": str(plugin.resolve()) if plugin else None,
            "plugin_nodes": graph.plugin_nodes,
            "embed_plugin": embed_plugin,
            "profiles": [p.shapes for p in profiles],
            "architectures": list(architectures or ()),
            "timing_cache": str(timing_cache.resolve()) if timing_cache else None,
            "timing_cache_out": str(new_cache.resolve()),
        }
        done, warnings = run_build(job, quiet, on_event)
        report = EngineReport(
            engine=engine_path,
            sidecar=sidecar.path_of(engine_path),
            runtime=runtime,
            profiles=profiles,
            plugin_embedded=plugin is not None and embed_plugin,
            plan_bytes=plan_file.stat().st_size,
            warnings=(*notes, *warnings),
            **done | {"architectures": tuple(done["architectures"])},
        )
        sidecar.write(sidecar_file, sidecar.describe(report, graph, plugin, accuracy))
        trtexec.write(script_file, inputs_file, report, graph, plugin)
        if timing_cache is not None:
            with publishing(outputs[1]) as (file,):
                shutil.copyfile(new_cache, file)
    return report
