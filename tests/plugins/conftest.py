"""Paths of what the build made, and the machine code in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sass

from awq_trt.engine.plugin import library_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin library of the installed package."""
    return library_path()


@pytest.fixture(scope="session")
def host_check() -> Path:
    """The test program that is built with the library: of several build folders, the newest."""
    found = sorted(ROOT.glob("build/*/awq_trt_host_check"), key=lambda path: path.stat().st_mtime)
    assert found, f"{ROOT}/build: no test program; pip install -e . builds it"
    return found[-1].resolve()


@pytest.fixture(scope="session")
def cuobjdump(library: Path) -> Callable[..., str]:
    """Callable: run cuobjdump with these options on the library, return what it prints."""
    return lambda *options: sass.cuobjdump(*options, library)


@pytest.fixture(scope="session")
def kernels(library: Path) -> list[sass.Kernel]:
    """Every kernel in the library, for all architectures: reading them takes half a minute."""
    return sass.read_library(library)
