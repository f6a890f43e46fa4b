"""ONNX file in, TensorRT plan and its sidecar out. One code path for `tensorrt` and `tensorrt_rtx`.

The build runs in a child process (build_process.py). The plan, the script that times it, the inputs of that script
(trtexec.py) and, last, `<plan>.json` appear together at the end, or none does.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from awq_trt.engine import sidecar, trtexec
from awq_trt.engine.child import Send, run_child
from awq_trt.engine.plugin import library_path
from awq_trt.engine.runtimes import RTX_ARCHITECTURES, choose_runtime
from awq_trt.engine.sidecar import EngineReport
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import external_files, optimization_profiles, read_graph
from awq_trt.export.operator import OP_TYPE
from awq_trt.outputs import Output
from awq_trt.publishing import check_outputs, publishing

ERRORS = ("ERROR", "INTERNAL_ERROR")
NOISE = ("Int64 binding", "Thread context has not been set", "catchCudaError", "Attribute splits not found")
"""Parts of messages that say nothing about the model: printed at every build, wherever there is no GPU, or for every
W4A16Gemm with one output, which needs no attribute `splits`."""

SHOWN_DEPTH = 3
"""Phases of the builder below this depth come and go in milliseconds: they get no bar."""


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
        job = {
            "runtime": runtime,
            "onnx": str(onnx_path.resolve()),
            "plan": str(plan_file.resolve()),
            "plugin": str(plugin.resolve()) if plugin else None,
            "plugin_nodes": graph.plugin_nodes,
            "embed_plugin": embed_plugin,
            "profiles": [p.shapes for p in profiles],
            "architectures": list(architectures or ()),
            "timing_cache": str(timing_cache.resolve()) if timing_cache else None,
            "timing_cache_out": str(new_cache.resolve()),
        }
        done, warnings = _run(job, quiet, on_event)
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


def _run(job: dict[str, Any], quiet: bool, on_event: Send | None) -> tuple[dict[str, Any], list[str]]:
    """Run one build. Returns what the child reports and the warnings."""
    logs: list[tuple[str, str]] = []  # severity, text
    columns = (TextColumn("{task.description:44}"), BarColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
    phases: dict[str, tuple[TaskID, int]] = {}

    def show(event: dict[str, Any]) -> None:
        if "log" in event:
            logs.append(event["log"])
        _show(bars, phases, event)
        if on_event is not None:
            on_event(event)

    with bars:
        outcome, status, printed = run_child("build_process", job, show)
    lines = printed.splitlines()
    if "done" in outcome:
        said = [text for _, text in logs] + [line for line in lines if line.startswith(OP_TYPE)]
        return outcome["done"], _without_noise(said)
    if outcome.get("errno"):
        raise OSError(outcome["errno"], os.strerror(outcome["errno"]))
    errors = [text for severity, text in logs if severity in ERRORS and not text.startswith("ModelImporter.cpp")]
    raise AwqTrtError(_why(job, outcome, status, [*errors, *lines]))


def _show(bars: Progress, phases: dict[str, tuple[TaskID, int]], event: dict[str, Any]) -> None:
    """A phase of the builder begins, is at a step, or ends. phases: name -> its bar, and its depth below the first."""
    if "phase" in event:
        depth = phases[event["parent"]][1] + 1 if event["parent"] in phases else 0
        if depth < SHOWN_DEPTH and (depth or not event["parent"]):
            phases[event["phase"]] = bars.add_task("  " * depth + event["phase"], total=event["steps"]), depth
    elif event.get("step") in phases:
        bars.update(phases[event["step"]][0], completed=event["at"])
    elif event.get("end") in phases:
        bars.remove_task(phases.pop(event["end"])[0])


def _why(job: dict[str, Any], outcome: dict[str, Any], status: int, said: list[str]) -> str:
    """The message of a failed build: what happened, then the last words of TensorRT and of the plugin."""
    if outcome:
        what, *rest = outcome["failed"].splitlines()
        said = [*rest, *said]
    elif status == -signal.SIGKILL:
        what = "the build was killed, most likely because the machine ran out of memory"
    elif status < 0:
        what = f"TensorRT aborted the build ({signal.Signals(-status).name})"
    else:
        what = f"the build process ended with status {status} and no result"
    words = [line for line in _without_noise("\n".join(said).splitlines()) if line not in what][-8:]
    if job["runtime"] == "tensorrt" and any("cuda" in text.lower() for text in (what, *said)):
        words.append("TensorRT needs a GPU to build. Without one, build with the runtime tensorrt_rtx.")
    return "\n    ".join([f"{job['onnx']}: no engine was built. {what}", *words])


def _without_noise(lines: list[str]) -> list[str]:
    """The lines without repetitions and without those that come with every build."""
    return [line for line in dict.fromkeys(lines) if line.strip() and not any(part in line for part in NOISE)]
