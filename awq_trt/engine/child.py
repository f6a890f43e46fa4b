"""Runs work in a process of its own: TensorRT, because a failing build or load may abort the process it runs in.

The parent starts one of the `*_process.py` modules with `run_child`; that module works in `run_job`. The job, one
JSON object, comes on standard input. What the child sends, one JSON object a line, goes through a pipe, not through
standard output, where TensorRT and the plugin print. The last one is {"done": {...}} or
{"failed": text, "errno": number|null}.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError
from awq_trt.files import PACKAGE
from awq_trt.publishing import scratch

Send = Callable[[dict[str, Any]], None]


def run_child(module: str, job: dict[str, Any], on_event: Send | None = None) -> tuple[dict[str, Any], int, str]:
    """Run a job in a child, which is gone with whatever it started however this ends.

    Args:
        module: of this room, "build_process" say, or the whole name of another. job: what it gets; where it is to load
            TensorRT, with the `runtime`. on_event: is called with everything that the child sends.

    Returns:
        what it sent last, {} if it died before; its exit status; what was printed.
    """
    whole_name = module if "." in module else f"awq_trt.engine.{module}"
    read_end, write_end = os.pipe()
    with scratch() as links, tempfile.TemporaryFile("w+", errors="replace") as printed:
        if "runtime" in job:
            _link_unversioned(job["runtime"], links)
        first = {"LD_LIBRARY_PATH": str(links), "PYTHONPATH": str(PACKAGE.parent)}
        paths = {name: ":".join(filter(None, [place, os.environ.get(name)])) for name, place in first.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", whole_name, str(write_end), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            pass_fds=[write_end],
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the child
            env=os.environ | paths,
            text=True,
        )
        try:
            os.close(write_end)
            with os.fdopen(read_end) as lines:
                assert process.stdin is not None
                with process.stdin:
                    process.stdin.write(json.dumps(job))
                event: dict[str, Any] = {}
                for line in lines:
                    event = json.loads(line)
                    if on_event is not None:
                        on_event(event)
            status = process.wait()
            printed.seek(0)
            return event if event.keys() & {"done", "failed"} else {}, status, printed.read()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_job(work: Callable[[dict[str, Any], Send], dict[str, Any]]) -> None:
    """The child's side: read the job, do it, send the outcome. The exit status is 0 whenever an outcome was sent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive a parent that was killed,
    if os.getppid() != int(sys.argv[2]):  # be it before that line
        sys.exit(1)
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as pipe:

        def send(event: dict[str, Any]) -> None:
            pipe.write(json.dumps(event) + "\n")

        try:
            send({"done": work(json.load(sys.stdin), send)})
        except Exception as error:  # whatever TensorRT's bindings raise becomes text for the parent
            text = str(error) if isinstance(error, (AwqTrtError, OSError)) else f"{type(error).__name__}: {error}"
            send({"failed": text, "errno": getattr(error, "errno", None)})


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
