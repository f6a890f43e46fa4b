"""The command lines, run in the process of the test."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from awq_trt.cli.main import main


@dataclass
class Result:
    """Exit code, and what was printed; standard error on one line."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> Result:
    """`awq-trt` in this process: importing torch and transformers anew for every case takes minutes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return Result(code, stdout.getvalue(), " ".join(stderr.getvalue().split()))


def export(*arguments: object) -> Result:
    """`awq-trt export`."""
    return command("export", *arguments)
