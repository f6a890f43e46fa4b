"""Paths of what the build installed, and of the tools that read machine code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from bench.sass import listing

from awq_trt.plugin import HOST_CHECK, installed_file, library_path


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin library of the installed package."""
    return library_path()


@pytest.fixture(scope="session")
def host_check() -> Path:
    """The test program that is built with the library."""
    return installed_file(HOST_CHECK)


@pytest.fixture(scope="session")
def cuobjdump(library: Path) -> Callable[..., str]:
    """Callable: run cuobjdump with these options on the library, return what it prints."""
    return lambda *options: listing.cuobjdump(*options, library)


@pytest.fixture(scope="session")
def kernels(library: Path) -> list[listing.Kernel]:
    """The machine code of every kernel in the library, for all architectures: reading it takes half a minute."""
    return listing.read_library(library)
