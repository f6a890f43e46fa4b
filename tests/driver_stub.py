"""A small C library that answers as NVML does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("driver_stub.c")
GIB = 1 << 30
TWO = f"NVIDIA GeForce RTX 4090;8;9;{24 * GIB};{20 * GIB},NVIDIA H100 80GB;9;0;{80 * GIB};{7 * GIB}"


def fake_driver(folder: Path) -> Path:
    """The folder, with the stand-in in it, for LD_LIBRARY_PATH."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "a C compiler is needed to install this package at all"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", SOURCE, "-o", library], check=True)
    return folder
