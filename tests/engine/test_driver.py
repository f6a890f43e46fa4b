"""awq_trt/engine/driver.py against a small C library that answers as NVML does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from driver_stub import GIB, TWO, fake_driver

from awq_trt.engine.driver import visible

QUERY = """
import json
from dataclasses import asdict
from awq_trt.engine.driver import query
print(json.dumps(asdict(query())))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for NVML."""
    return fake_driver(tmp_path_factory.mktemp("driver"))


def query(libraries: Path, **environment: str) -> dict[str, Any]:
    """What driver.query() says in a new process."""
    env = os.environ | {"LD_LIBRARY_PATH": str(libraries)} | environment
    done = subprocess.run([sys.executable, "-c", QUERY], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def names(libraries: Path, **environment: str) -> list[str]:
    return [gpu["name"] for gpu in query(libraries, **environment)["gpus"]]


def test_gpus_versions_and_free_memory(driver: Path) -> None:
    assert query(driver, FAKE_GPUS=TWO, FAKE_CUDA="12080") == {
        "version": "580.65.06",
        "cuda": [12, 8],
        "gpus": [
            {"name": "NVIDIA GeForce RTX 4090", "capability": "8.9", "total_bytes": 24 * GIB, "free_bytes": 20 * GIB},
            {"name": "NVIDIA H100 80GB", "capability": "9.0", "total_bytes": 80 * GIB, "free_bytes": 7 * GIB},
        ],
        "problem": None,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", "b"), ("2, 0", "ca"), ("GPU-1", "b"), ("GPU-2000,0", "ca"), ("", ""), ("-1", ""), ("0,7,1", "a"),
        ("GPU-", ""), ("none", ""),
    ],
)  # fmt: skip
def test_cuda_visible_devices(driver: Path, value: str, expected: str) -> None:
    gpus = "a;8;9;8;8,b;8;9;8;8,c;8;9;8;8"
    assert names(driver, FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES=value) == [*expected]


def test_the_fastest_gpu_is_cudas_first(driver: Path) -> None:
    gpus = "slow;7;5;8;8;1000,fast;8;9;8;8;9000,same;8;9;8;8;9000"
    assert names(driver, FAKE_GPUS=gpus) == ["fast", "same", "slow"]
    assert names(driver, FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES="2") == ["slow"]
    assert names(driver, FAKE_GPUS=gpus, CUDA_DEVICE_ORDER="PCI_BUS_ID") == ["slow", "fast", "same"]


def test_parts_of_a_gpu(driver: Path) -> None:
    gpus = f"H100;9;0;{80 * GIB};{72 * GIB};1;2"
    (first,) = query(driver, FAKE_GPUS=gpus)["gpus"]
    assert first == {
        "name": "H100 MIG 1g.10gb", "capability": "9.0", "total_bytes": 10 * GIB, "free_bytes": 9 * GIB,
    }  # fmt: skip
    assert names(driver, FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES="MIG-02") == ["H100 MIG 1g.10gb"]
    assert names(driver, FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES="MIG-03") == []
    assert names(driver, FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES="GPU-00") == ["H100 MIG 1g.10gb"]


def test_memory_that_the_gpu_shares_with_the_host(driver: Path) -> None:
    (gpu,) = query(driver, FAKE_GPUS="NVIDIA GB10;12;1;0;0")["gpus"]
    assert (gpu["capability"], gpu["total_bytes"], gpu["free_bytes"]) == ("12.1", None, None)


@pytest.mark.parametrize(
    ("environment", "version", "problem"),
    [
        ({"FAKE_INIT": "9"}, None, "Driver Not Loaded (NVML error 9)"),
        ({"FAKE_COUNT": "999"}, "580.65.06", "Unknown Error (NVML error 999)"),
        ({}, "580.65.06", "no GPU is visible (CUDA_VISIBLE_DEVICES may hide them)"),
    ],
)
def test_no_gpu(driver: Path, environment: dict[str, str], version: str | None, problem: str) -> None:
    found = query(driver, **environment)
    assert found["problem"] == f"the NVIDIA driver offers no GPU: {problem}"
    assert (found["gpus"], found["version"], found["cuda"]) == ([], version, [13, 0] if version else None)


def test_no_driver(tmp_path: Path) -> None:
    assert query(tmp_path)["problem"] == "there is no NVIDIA driver here (libnvidia-ml.so.1 is missing)"


def test_one_gpu_of_several_is_the_only_one_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(2) == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert (visible(0), visible(1)) == ("5", "GPU-abc")


def test_what_triton_imports_needs_no_package() -> None:
    """`-S`: no site-packages; the process that Triton starts has this package's folder alone."""
    code = "from awq_trt.engine.driver import visible; print(visible(0))"
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "GPU-abc"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "GPU-abc\n", done.stderr
