"""What the build says when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake outside of the isolated build")


def _configure(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@needs_cmake
def test_compiler_and_headers_that_are_not_there(tmp_path: Path) -> None:
    message = _configure(tmp_path / "build", CUDACXX=str(tmp_path / "nvcc"))
    assert f"CUDACXX is {tmp_path}/nvcc, which is not a program. Correct it, or unset it" in message
    message = _configure(tmp_path / "build", TENSORRT_ROOT=str(tmp_path))
    assert f"TENSORRT_ROOT is {tmp_path}, which has no include/NvInferRuntime.h" in message
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").write_text("")
    (tmp_path / "include" / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8 //!< major\n")
    message = _configure(tmp_path / "build", TENSORRT_ROOT=str(tmp_path))
    assert "are of version 8; version 10 or newer is needed" in message


@needs_cmake
@pytest.mark.skipif(not (Path("/usr/local/cuda/bin/nvcc").exists() or shutil.which("nvcc")), reason="needs an nvcc")
def test_wheels_that_cannot_be_fetched(tmp_path: Path) -> None:
    """No headers on the machine and an index without them: the message says what to install and how to name it."""
    if any(Path(d, "NvInferRuntime.h").exists() for d in ("/usr/include", "/usr/include/x86_64-linux-gnu")):
        pytest.skip("this machine has TensorRT headers")
    if "TENSORRT_ROOT" in os.environ:
        pytest.skip("TENSORRT_ROOT names headers")
    message = _configure(
        tmp_path / "build", PIP_INDEX_URL=f"file://{tmp_path}", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
    )
    assert "Could not fetch the TensorRT headers" in message
    assert "TENSORRT_ROOT for TensorRT" in message
