"""Keeps the engine's process of a Triton model alive: starts it, talks to it, starts it again whenever it ends.

The other end is engine_process.py, which says what the lines mean. This one runs in Triton's process, on Python alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from awq_trt.engine.driver import visible

RETRY_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the engine is started again; the last for every further time. They begin anew when one has become ready."""


class Engine:
    """The engine's process: started, read, and started again whenever it ends.

    Args:
        folder: of the model's version. parameters: of config.pbtxt: `model`, the file's name; `python`, the
            interpreter, where it is not the one of Triton's stub; `max_batch` and `threads` for ONNX Runtime.
        limits: see model.LIMITS.
        device: number of its GPU among those that Triton sees, or None. on_news, on_loss: called by the thread that
            reads, with a line's content, and with the reason when the process has ended by itself. log: of Triton.

    Attributes:
        ready: what the engine said of itself, None while there is none. trouble: why there is none.
        stopping: set by `stop`.
    """

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, str],
        limits: dict[str, int | None],
        device: str | None,
        on_news: Callable[[dict[str, Any]], None],
        on_loss: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        settings = {"model": parameters["model"], "max_prompt_tokens": limits["max_prompt_tokens"]}
        settings |= {name: int(parameters[name]) for name in ("max_batch", "threads") if parameters.get(name)}
        python = parameters.get("python") or sys.executable or "python3"  # of Triton's stub: the first on PATH
        self._command = [python, "-m", "awq_trt.serve.triton.engine_process", str(folder), json.dumps(settings)]
        self._environment = environment(folder, device)
        self._on_news, self._on_loss, self._log = on_news, on_loss, log
        self._process: subprocess.Popen[str] | None = None
        self.ready: dict[str, Any] | None = None
        self.trouble = "it has not been started"
        self.stopping = threading.Event()

    def start(self) -> None:
        """Start the process and wait until it is ready, then read it in a thread.

        Raises:
            RuntimeError: it could not be started; says why.
        """
        if not self._launch():
            raise RuntimeError(self.trouble)
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Write a message; if the process has gone, its reader will notice."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    def stop(self) -> None:
        """End the process, gently at first."""
        self.stopping.set()
        process, self.ready = self._process, None
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.close()
            process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()

    def _run(self) -> None:
        while True:
            self._follow()
            for seconds in _then_the_last(RETRY_SECONDS):
                if self.stopping.wait(seconds):
                    return
                if self._launch():
                    break

    def _follow(self) -> None:
        """Read until the process ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        said = None
        for line in self._process.stdout:
            message = json.loads(line)
            if "failed" in message:
                said = message["failed"]
            else:
                self._on_news(message)
        self.ready = None
        self.trouble = said or _ending(self._process.wait())
        if not self.stopping.is_set():
            self._log(f"the engine's process has ended: {self.trouble}")
            self._on_loss(self.trouble)

    def _launch(self) -> bool:
        """Start a process and wait for its first line; `ready` or `trouble` says what came of it."""
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self.trouble = f"{self._command[0]} cannot be run: {error}"
            return False
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {}
        if "ready" not in message:
            self.trouble = message.get("failed") or _ending(self._process.wait())
            self._log(f"the engine could not be started: {self.trouble}")
            return False
        self.ready = message["ready"]
        self._log(f"engine ready: {json.dumps(self.ready)}")
        return True


def environment(folder: Path, device: str | None) -> dict[str, str]:
    """Variables of the engine's process: our modules first, and one GPU."""
    variables = dict(os.environ)
    paths = [str(folder / "awq_trt.zip"), *filter(None, [variables.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    if device is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible(int(device))
    return variables


def _ending(status: int) -> str:
    return f"it was killed by signal {-status}" if status < 0 else f"it ended with status {status}; see Triton's log"


def _then_the_last(seconds: tuple[float, ...]) -> Iterator[float]:
    yield from seconds
    while True:
        yield seconds[-1]
