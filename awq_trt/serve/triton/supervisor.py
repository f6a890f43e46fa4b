"""Keeps the engine's process of a Triton model alive: starts it, talks to it, starts it again whenever it ends.

The other end is engine_process.py, which says what the lines mean. This one runs in Triton's process, on Python alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from awq_trt.engine.driver import visible

RETRY_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the engine is started again; the last for every further time. They begin anew when one has become ready."""


class Engine:
    """The engine's process: started, read, and started again whenever it ends.

    Args:
        folder: of the model's version. parameters: of config.pbtxt: `model`, the file's name; `python`, the
            interpreter, where it is not the one of Triton's stub; `max_batch` and `threads` for ONNX Runtime;
            `max_prompt_tokens`.
        device: number of its GPU among those that Triton sees, or None. on_events, on_loss: called by the thread that
            reads, with a line's content, and with the reason when the process has ended by itself. log: of Triton.
    """

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, str],
        device: str | None,
        on_events: Callable[[dict[str, Any]], None],
        on_loss: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        numbers = ("max_batch", "threads", "max_prompt_tokens")
        settings = {"model": parameters["model"]} | {n: int(parameters[n]) for n in numbers if parameters.get(n)}
        python = parameters.get("python") or sys.executable or "python3"  # of Triton's stub: the first on PATH
        self._command = [python, "-m", "awq_trt.serve.triton.engine_process", str(folder), json.dumps(settings)]
        paths = [str(folder / "awq_trt.zip"), *filter(None, [os.environ.get("PYTHONPATH")])]  # our modules first
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if device is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = visible(int(device))
        self._on_events, self._on_loss, self._log = on_events, on_loss, log
        self._process: Any = None
        self.ready: dict[str, Any] | None = None  # what the engine said of itself, None while there is none
        self.trouble = "it has not been started"  # why there is none
        self.stopping = threading.Event()  # set by `stop`

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
        line = json.dumps(message)
        with contextlib.suppress(OSError, ValueError):
            print(line, file=self._process.stdin, flush=True)

    def stop(self) -> None:
        """End the process, gently at first."""
        self.stopping.set()
        self.ready = None
        if self._process is not None:
            try:
                self._process.stdin.close()
                self._process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()

    def _run(self) -> None:
        """Read the process until it ends, then start it again."""
        while True:
            failure = None
            for line in self._process.stdout:
                message = _message(line)
                if "failed" in message:
                    failure = message["failed"]
                elif message:
                    self._guarded(self._on_events, message)
            self.ready, self.trouble = None, failure or _ending(self._process.wait())
            if not self.stopping.is_set():
                self._log(f"the engine's process has ended: {self.trouble}")
                self._guarded(self._on_loss, self.trouble)
            for seconds in chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1])):
                if self.stopping.wait(seconds):
                    return
                if self._launch():
                    break

    def _guarded(self, call: Callable[[Any], None], argument: Any) -> None:
        """Whatever goes wrong with a message, the thread that reads goes on: all requests need it."""
        try:
            call(argument)
        except Exception as error:
            self._log(f"{type(error).__name__}: {error}")

    def _launch(self) -> bool:
        """Start a process and wait for its first line; `ready` or `trouble` says what came of it."""
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=pipe, stdout=pipe, text=True, encoding="utf-8"
            )
        except OSError as error:
            self.trouble = f"{self._command[0]} cannot be run: {error}"
            return False
        message = _message(self._process.stdout.readline())
        self.ready = message.get("ready")
        if self.ready is None:
            self.trouble = message.get("failed") or _ending(self._process.wait())
            self._log(f"the engine could not be started: {self.trouble}")
            return False
        self._log(f"engine ready: {json.dumps(self.ready)}")
        return True


def _message(line: str) -> dict[str, Any]:
    """What a line says; {} for one that was cut short because the process was killed."""
    return dict(json.loads(line)) if line.endswith("\n") else {}


def _ending(status: int) -> str:
    return f"it was killed by signal {-status}" if status < 0 else f"it ended with status {status}; see Triton's log"
