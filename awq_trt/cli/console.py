"""Consoles: progress on standard error, tables on standard output."""

from __future__ import annotations

import os

from rich.console import Console

FILE_WIDTH = 160
"""Columns where the output goes to a file or a pipe."""


def first_rank() -> bool:
    """Of the processes that torchrun starts to share the calibration, the first one prints and goes on after it."""
    return os.environ.get("RANK", "0") == "0"


def progress_console(quiet: bool = False) -> Console:
    """Standard error, silent with --quiet and on other ranks."""
    return Console(stderr=True, quiet=quiet or not first_rank())


def table_console() -> Console:
    """Standard output, wide where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)
