"""Paths of what the build installed, and of the tools that read machine code."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from awq_trt.plugin import HOST_CHECK, installed_file, library_path


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin library of the installed package."""
    return library_path()


@pytest.fixture(scope="session")
def host_check() -> Path:
    """The test program that is built with the library."""
    return installed_file(HOST_CHECK)


def _tool(name: str) -> Path:
    """`cuobjdump` or `nvdisasm`: from NVIDIA's wheel, else from PATH."""
    try:
        for file in metadata.files(f"nvidia-cuda-{name}") or []:
            if file.name == name:
                return Path(str(file.locate()))
    except metadata.PackageNotFoundError:
        pass
    found = shutil.which(name)
    assert found, f"{name} is missing: pip install nvidia-cuda-{name} (it is in the extra 'test')"
    return Path(found)


@pytest.fixture(scope="session")
def cuobjdump(library: Path) -> Callable[..., str]:
    """Callable: run cuobjdump with these options on the library, return what it prints."""
    program = _tool("cuobjdump")
    path = f"{_tool('nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"

    def run(*options: str) -> str:
        done = subprocess.run(
            [program, *options, library], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        )
        return done.stdout

    return run
