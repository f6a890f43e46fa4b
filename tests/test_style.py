"""ruff, mypy and clang-format have nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def clean(tool: str, *arguments: str) -> None:
    command = [str(Path(sys.executable).with_name(tool)), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff() -> None:
    clean("ruff", "check", ".")
    clean("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy() -> None:
    clean("mypy")


def test_clang_format() -> None:
    sources = sorted(str(p) for s in ("cpp", "h", "cu", "cuh") for p in (ROOT / "plugins").rglob(f"*.{s}"))
    assert len(sources) > 10
    clean("clang-format", "--dry-run", "-Werror", *sources)
