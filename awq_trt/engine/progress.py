"""The progress bar of an engine build: one line per running phase of the builder, indented under its parent."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

MAX_DEPTH = 3
"""Phases below that are not shown: they come and go in milliseconds."""


class Phases:
    """Shows the events of build_process.py on standard error; a context manager. Shows nothing when `quiet`."""

    def __init__(self, quiet: bool) -> None:
        columns = (TextColumn("{task.description:44}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
        self._tasks: dict[str, tuple[TaskID, int]] = {}  # phase name -> task, depth

    def __enter__(self) -> Phases:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: dict[str, Any]) -> None:
        """One event: a phase begins, is at a step, or ends."""
        if "phase" in event:
            depth = self._tasks[event["parent"]][1] + 1 if event["parent"] in self._tasks else 0
            if depth < MAX_DEPTH and (depth or not event["parent"]):
                task = self._bar.add_task("  " * depth + event["phase"], total=event["steps"])
                self._tasks[event["phase"]] = (task, depth)
        elif "step" in event and event["step"] in self._tasks:
            self._bar.update(self._tasks[event["step"]][0], completed=event["at"])
        elif "end" in event and event["end"] in self._tasks:
            self._bar.remove_task(self._tasks.pop(event["end"])[0])
