"""ONNX file in, TensorRT plan and its sidecar out. One code path for `tensorrt` and `tensorrt_rtx`.

The build runs in a child process (`build_process.py`), because a failing build may abort the process it runs in. The
plan, `<plan>.json` and the script that times it (trtexec.py) appear together at the end, or none does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_trt.engine import sidecar, trtexec
from awq_trt.engine.plugin import library_path
from awq_trt.engine.progress import Phases
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import Profile, optimization_profiles, read_graph
from awq_trt.export.operator import OP_TYPE
from awq_trt.files import PACKAGE, replacing

RUNTIMES = {
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13==1.7.1.116   (builds without a GPU; runs on GeForce/RTX)",
    "tensorrt": "pip install tensorrt-cu13   (builds on the GPU it is to run on; for Triton and trtexec)",
}
"""Python module of each TensorRT, and how to get it."""

RTX_ARCHITECTURES = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for and the plugin has machine code for."""

ERRORS = ("ERROR", "INTERNAL_ERROR")
NOISE = ("Int64 binding", "Thread context has not been set", "catchCudaError", "Attribute splits not found")
"""Parts of messages that say nothing about the model: printed at every build, wherever there is no GPU, or for every
W4A16Gemm with one output, which needs no attribute `splits`."""

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class EngineReport:
    """What was built.

    Attributes:
        engine, sidecar: the two files written. runtime: Python module that built it. architectures: compute
        capabilities like "8.6". seconds, peak_bytes: of the build, peak resident memory of the child process.
        plugin_layers: W4A16Gemm layers of the engine, each one layer of the model or several.
        warnings: TensorRT's, without the ones at every build. gpu: that it was tuned on; None for
        TensorRT-RTX.
    """

    engine: Path
    sidecar: Path
    runtime: str
    runtime_version: str
    architectures: tuple[str, ...]
    profiles: tuple[Profile, ...]
    plugin_layers: int
    plugin_embedded: bool
    plan_bytes: int
    seconds: float
    peak_bytes: int
    warnings: tuple[str, ...]
    gpu: str | None = None


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
    on_event: OnEvent | None = None,
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
        AwqTrtError: bad input, no TensorRT, or a failed build with TensorRT's own messages. Nothing is written then.
    """
    if engine_path.is_dir():
        raise AwqTrtError(f"{engine_path} is a folder; give the name of a file to write.")
    graph = read_graph(onnx_path)
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

    # the plan last: none is ever without the others
    targets = [sidecar.path_of(engine_path), trtexec.path_of(engine_path), engine_path]
    if timing_cache is not None:
        targets.append(timing_cache)
    with replacing(*targets) as (sidecar_file, script_file, plan_file, *cache_file):
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
            "timing_cache_out": str(cache_file[0].resolve()) if cache_file else None,
        }
        done, warnings = _run_child(job, quiet, on_event)
        report = EngineReport(
            engine=engine_path,
            sidecar=targets[0],
            runtime=runtime,
            runtime_version=done["runtime_version"],
            architectures=tuple(done["architectures"]),
            profiles=profiles,
            plugin_layers=done["plugin_layers"],
            plugin_embedded=plugin is not None and embed_plugin,
            plan_bytes=plan_file.stat().st_size,
            seconds=done["seconds"],
            peak_bytes=done["peak_bytes"],
            warnings=(*notes, *warnings),
            gpu=done["gpu"],
        )
        sidecar.write(sidecar_file, sidecar.describe(report, graph, plugin, accuracy))
        trtexec.write(script_file, trtexec.script(report, graph, plugin))
    return report


def choose_runtime(runtime: str) -> str:
    """The Python module to build with.

    Raises:
        AwqTrtError: unknown name, or the module is not installed (the message says the pip line).
    """
    if runtime not in ("auto", *RUNTIMES):
        raise AwqTrtError(f"runtime {runtime!r} is unknown; choose auto, {' or '.join(RUNTIMES)}.")
    installed = [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]
    if runtime == "auto":
        if "tensorrt" in installed and ("tensorrt_rtx" not in installed or has_gpu()):
            return "tensorrt"
        runtime = "tensorrt_rtx"
        lines = list(RUNTIMES.values())
    else:
        lines = [RUNTIMES[runtime]]
    if runtime not in installed:
        raise AwqTrtError("\n    ".join([f"no {'TensorRT' if len(lines) > 1 else runtime} is installed. Run:", *lines]))
    return runtime


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU with its driver loaded; asks no library."""
    return Path("/dev/nvidiactl").exists()


def _run_child(job: dict[str, Any], quiet: bool, on_event: OnEvent | None) -> tuple[dict[str, Any], list[str]]:
    """Run one build. Returns what the child reports and the warnings; no child is left however this ends."""
    logs: list[tuple[str, str]] = []  # severity, text
    outcome: dict[str, Any] = {}
    with _child(job) as (process, events, output), Phases(quiet) as phases:
        for line in events:
            event = json.loads(line)
            if "log" in event:
                logs.append((event["log"][0], event["log"][1].strip()))
            elif "done" in event or "failed" in event:
                outcome = event
            else:
                phases.show(event)
            if on_event is not None:
                on_event(event)
        status = process.wait()
        output.seek(0)
        printed = output.read().splitlines()
    if "done" in outcome:
        said = [text for _, text in logs] + [line for line in printed if line.startswith(OP_TYPE)]
        return outcome["done"], _without_noise(said)
    if outcome.get("errno"):
        raise OSError(outcome["errno"], os.strerror(outcome["errno"]))
    errors = [text for severity, text in logs if severity in ERRORS and not text.startswith("ModelImporter.cpp")]
    raise AwqTrtError(_why(job, outcome, status, [*errors, *printed]))


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


@contextmanager
def _child(job: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], Any, Any]]:
    """Start the child and hand it the job; kill it and whatever it started when the block ends for any reason."""
    read_end, write_end = os.pipe()
    root = str(PACKAGE.parent)
    with tempfile.TemporaryDirectory() as links, tempfile.TemporaryFile("w+", errors="replace") as output:
        libraries = [links, os.environ.get("LD_LIBRARY_PATH", "")]
        path = [root, os.environ.get("PYTHONPATH", "")]
        _link_unversioned(job["runtime"], Path(links))
        process = subprocess.Popen(
            [sys.executable, "-m", "awq_trt.engine.build_process", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[write_end],
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the child
            env=os.environ
            | {"LD_LIBRARY_PATH": ":".join(filter(None, libraries)), "PYTHONPATH": ":".join(filter(None, path))},
            text=True,
        )
        try:
            os.close(write_end)
            with os.fdopen(read_end) as events:
                assert process.stdin is not None
                with process.stdin:
                    process.stdin.write(json.dumps(job))
                yield process, events, output
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _link_unversioned(runtime: str, folder: Path) -> None:
    """Give every `libX.so.N` of the wheel its plain name `libX.so` in `folder`, for LD_LIBRARY_PATH.

    The ONNX parser of TensorRT-RTX opens `libtensorrt_rtx.so` at the first plugin node, a name the wheel does not
    have, and aborts the process when it is not found.
    """
    spec = importlib.util.find_spec(f"{runtime}_libs")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(place).glob("lib*.so.*"):
            link = folder / (library.name.split(".so.")[0] + ".so")
            if not link.exists():
                link.symlink_to(library)
