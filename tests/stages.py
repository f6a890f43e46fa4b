"""The chain of a tiny model, in forked processes that can be killed: torch is imported once."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models

from awq_trt import publishing
from awq_trt.cli.main import main
from awq_trt.export import export

STAGES = ("quantize", "onnx", "engine", "triton")
WRITTEN = {
    "quantize": ("out.awq",),
    "onnx": ("out.onnx", "out.onnx.data"),
    "engine": ("out.plan.json", "out.plan", "out.trtexec.sh", "out.trtexec.bin"),
    "triton": ("repo/out",),
}
"""Stage -> what it writes; of several files, the first one names the others."""
CALIBRATION = ("--calibration-samples", "2", "--calibration-length", "64")
MARK = "AWQ_TRT_TEST_CHAIN"
"""Environment variable of every process of a chain: its folder."""


def command(stage: str, other: bool) -> list[str]:
    """A stage of the chain, in the current folder; `other` writes something else that fits as well."""
    change = {"quantize": ("--symmetric",), "onnx": ("--max-seq", "128"), "engine": ("--max-batch", "2"), "triton": ()}
    words = {
        "quantize": ("quantize", "model", "--output", "out.awq", *CALIBRATION),
        "onnx": ("onnx", "out.awq", "--output", "out.onnx", "--no-verify", "--max-seq", "64"),
        "engine": ("engine", "out.onnx", "--output", "out.plan", "--runtime", "tensorrt_rtx"),
        "triton": ("triton", "out.plan", "--output", "repo"),
    }
    return [*words[stage], "--quiet", *(change[stage] if other else ())]


WHOLE = (
    *("export", "--model", "model", "--engine", "out.plan", "--triton-repo", "repo"),
    *("--no-verify", "--max-seq", "64", "--runtime", "tensorrt_rtx", *CALIBRATION),
)
"""The same by one command."""


@dataclass
class Child:
    """A forked process that runs a command."""

    pid: int
    said_file: Path
    status: int | None = None

    @property
    def said(self) -> str:
        """What it printed, on one line."""
        return " ".join(self.said_file.read_text().split())

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


def start(
    words: Sequence[str], folder: Path, prepare: Callable[[], object] = lambda: None, tmp: Path | None = None
) -> Child:
    """Run `awq-trt` in a folder, in a forked process; `prepare` is called in it first. tmp: TMPDIR, or `folder`/tmp."""
    tmp = tmp or folder / "tmp"
    said = (tmp.parent if tmp.parent != folder else folder.parent) / f"{folder.name}.said"
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.chdir(folder)
            tempfile.tempdir = os.environ["TMPDIR"] = str(tmp)
            os.environ[MARK] = str(folder)
            prepare()
            text = io.StringIO()
            with redirect_stderr(text), redirect_stdout(text):
                status = main(words)
            said.write_text(text.getvalue())
        finally:
            os._exit(status)
    return Child(pid, said)


def at_rename(k: int, do: Callable[[], object]) -> Callable[[], None]:
    """For `start`: do something just before the k-th rename, of files or directories, or exchange of them."""

    def prepare() -> None:
        calls = [0]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **keywords: Any) -> Any:
                calls[0] += 1
                if calls[0] == k:
                    do()
                return call(*arguments, **keywords)

            return wrapper

        os.rename, os.replace = counted(os.rename), counted(os.replace)  # type: ignore[assignment]
        publishing._exchange = counted(publishing._exchange)

    return prepare


def kill_self() -> None:
    """SIGKILL: no handler runs, nothing is cleaned."""
    os.kill(os.getpid(), signal.SIGKILL)


def trace_once(patch: Callable[[object, str, object], None]) -> None:
    """Trace a graph once for all exports of the same limits: tracing writes nothing, and takes most of the time."""
    trace, known = export.trace, {}

    def traced(model: Any, dtype: Any, options: Any) -> Any:
        key = (str(dtype), str(options))
        if key not in known:
            known[key] = trace(model, dtype, options)
        return copy.deepcopy(known[key])

    patch(export, "trace", traced)


def content(folder: Path, stage: str) -> dict[str, bytes] | None:
    """What a stage wrote, by path; None where the file that names the others is missing. Times are left out, and a plan
    is only what the files beside it say of it: TensorRT-RTX does not always build the same bits from the same graph."""
    first, *_ = WRITTEN[stage]
    if not (folder / first).exists():
        return None
    found: dict[str, bytes] = {}
    for name in WRITTEN[stage]:
        path = folder / name
        found |= tiny_models.content(path) if path.is_dir() else {name: path.read_bytes()} if path.exists() else {}
    for name in [name for name in found if name.endswith(".plan.json")]:
        sidecar = json.loads(found[name])
        del sidecar["created"], sidecar["build"]["seconds"], sidecar["build"]["peak_bytes"]
        found[name] = json.dumps(sidecar).encode()
    for name in [name for name in found if name.endswith(".plan")]:
        digest = hashlib.sha256(found.pop(name)).hexdigest().encode()
        found = {other: text.replace(digest, b"of the plan") for other, text in found.items()} | {name: b""}
    return found


def everything(folder: Path) -> list[str]:
    """Every path in a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def orphans(folder: Path) -> list[str]:
    """Command lines of processes of the folder's chain that still run after some seconds."""
    for _ in range(100):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.1)
    return found


def fill(disk: Path, leave: int) -> None:
    """Fill a file system but for some bytes."""
    with (disk / "filling").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def copied(made: Path, target: Path, stages: dict[str, str]) -> Path:
    """A new folder with the model, and what stages wrote: stage -> "old" or "new", a folder in `made`."""
    shutil.copytree(made / "model", target / "model")
    for stage, which in stages.items():
        for name in WRITTEN[stage]:
            source, place = made / which / name, target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, place)
    (target / "tmp").mkdir()
    return target
