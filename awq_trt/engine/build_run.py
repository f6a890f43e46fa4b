"""Runs build_process.py in a child: shows how far the build is, and says why one failed."""

from __future__ import annotations

import os
import signal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from awq_trt.engine.child import Send, run_child
from awq_trt.errors import AwqTrtError
from awq_trt.export.operator import OP_TYPE

ERRORS = ("ERROR", "INTERNAL_ERROR")
NOISE = ("Int64 binding", "Thread context has not been set", "catchCudaError", "Attribute splits not found")
"""Parts of messages that say nothing about the model: printed at every build, wherever there is no GPU, or for every
W4A16Gemm with one output, which needs no attribute `splits`."""

SHOWN_DEPTH = 3
"""Phases of the builder below this depth come and go in milliseconds: they get no bar."""


def run_build(job: dict[str, Any], quiet: bool, on_event: Send | None) -> tuple[dict[str, Any], list[str]]:
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
