"""awq_trt/engine/driver.py against a small C library that answers as libcuda and libnvidia-ml do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from driver_stub import GIB, TWO, fake_driver

QUERY = """
import json
from dataclasses import asdict
from awq_trt.engine.driver import query
print(json.dumps(asdict(query())))
"""


def query(libraries: Path, **environment: str) -> dict[str, Any]:
    """What driver.query() says in a new process."""
    env = os.environ | {"LD_LIBRARY_PATH": str(libraries)} | environment
    done = subprocess.run([sys.executable, "-c", QUERY], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_gpus_versions_and_free_memory(tmp_path: Path) -> None:
    found = query(fake_driver(tmp_path), FAKE_GPUS=TWO, FAKE_CUDA="12080")
    assert found == {
        "version": "580.65.06",
        "cuda": [12, 8],
        "gpus": [
            {"name": "NVIDIA GeForce RTX 4090", "capability": "8.9", "total_bytes": 24 * GIB, "free_bytes": 20 * GIB},
            {"name": "NVIDIA H100 80GB", "capability": "9.0", "total_bytes": 80 * GIB, "free_bytes": 7 * GIB},
        ],
        "problem": None,
    }


def test_a_part_of_a_gpu(tmp_path: Path) -> None:
    found = query(fake_driver(tmp_path), FAKE_GPUS=TWO, FAKE_KIND="MIG")
    assert [gpu["free_bytes"] for gpu in found["gpus"]] == [20 * GIB, 7 * GIB]
    found = query(tmp_path, FAKE_GPUS=TWO, FAKE_KIND="another")
    assert [gpu["free_bytes"] for gpu in found["gpus"]] == [None, None]


@pytest.mark.parametrize("environment", [{}, {"FAKE_NVML": "9"}])
def test_without_nvml(tmp_path: Path, environment: dict[str, str]) -> None:
    names = ("libcuda.so.1", "libnvidia-ml.so.1") if environment else ("libcuda.so.1",)
    found = query(fake_driver(tmp_path, *names), FAKE_GPUS=TWO, **environment)
    assert found["version"] is None
    assert [(gpu["capability"], gpu["free_bytes"]) for gpu in found["gpus"]] == [("8.9", None), ("9.0", None)]


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"FAKE_INIT": "3", "FAKE_GPUS": TWO}, "the NVIDIA driver offers no GPU: initialization error (CUDA error 3)"),
        ({"FAKE_INIT": "999"}, "the NVIDIA driver offers no GPU: CUDA error 999"),
        ({}, "the NVIDIA driver offers no GPU: no GPU is visible (CUDA_VISIBLE_DEVICES may hide them)"),
    ],
)
def test_no_gpu(tmp_path: Path, environment: dict[str, str], problem: str) -> None:
    found = query(fake_driver(tmp_path), **environment)
    assert (found["gpus"], found["problem"], found["cuda"]) == ([], problem, [13, 0])


def test_no_driver(tmp_path: Path) -> None:
    found = query(tmp_path)
    assert found["problem"] == "there is no NVIDIA driver here (libcuda.so.1 is missing)"
    found = query(fake_driver(tmp_path, "libnvidia-ml.so.1"))
    assert (found["version"], found["gpus"]) == ("580.65.06", [])
