"""The command lines, run in the process of the test."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import types
from dataclasses import dataclass
from pathlib import Path

EXPORT = Path(__file__).parents[1] / "tools" / "export.py"


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def load_export() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("export", EXPORT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(*arguments: object) -> Result:
    """tools/export.py in this process: importing torch and transformers anew for every case takes minutes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = load_export().main([str(a) for a in arguments])
    return Result(code, stdout.getvalue(), " ".join(stderr.getvalue().split()))
