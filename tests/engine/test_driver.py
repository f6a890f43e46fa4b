"""awq_trt/engine/driver.py against a small C library that answers as NVML does."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest
from driver_stub import GIB, TWO, fake_driver

from awq_trt.engine import driver
from awq_trt.engine.driver import Driver, Gpu, visible

Query = Callable[..., Driver]


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stand-in for NVML."""
    return ctypes.CDLL(str(fake_driver(tmp_path_factory.mktemp("driver")) / "libnvidia-ml.so.1"))


@pytest.fixture
def query(nvml: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Query:
    """driver.query() with these environment variables, of which the stand-in takes its answers."""
    monkeypatch.setattr(pynvml, "nvmlLib", nvml)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def ask(**environment: str) -> Driver:
        for name in ("FAKE_GPUS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return driver.query()

    return ask


def names(found: Driver) -> list[str]:
    return [gpu.name for gpu in found.gpus]


def test_gpus_versions_and_free_memory(query: Query) -> None:
    gpus = (
        Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 * GIB, 20 * GIB),
        Gpu("NVIDIA H100 80GB", "9.0", 80 * GIB, 7 * GIB),
    )
    assert query(FAKE_GPUS=TWO, FAKE_CUDA="12080") == Driver("580.65.06", (12, 8), gpus)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", "b"), ("2, 0", "ca"), ("GPU-1", "b"), ("GPU-2000,0", "ca"), ("", ""), ("-1", ""), ("0,7,1", "a"),
        ("GPU-", ""), ("none", ""),
    ],
)  # fmt: skip
def test_cuda_visible_devices(query: Query, value: str, expected: str) -> None:
    assert names(query(FAKE_GPUS="a;8;9;8;8,b;8;9;8;8,c;8;9;8;8", CUDA_VISIBLE_DEVICES=value)) == [*expected]


def test_the_fastest_gpu_is_cudas_first(query: Query) -> None:
    gpus = "slow;7;5;8;8;1000,fast;8;9;8;8;9000,same;8;9;8;8;9000"
    assert names(query(FAKE_GPUS=gpus)) == ["fast", "same", "slow"]
    assert names(query(FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES="2")) == ["slow"]
    assert names(query(FAKE_GPUS=gpus, CUDA_DEVICE_ORDER="PCI_BUS_ID")) == ["slow", "fast", "same"]


def test_parts_of_a_gpu(query: Query) -> None:
    gpus, part = f"H100;9;0;{80 * GIB};{72 * GIB};1;2", Gpu("H100 MIG 1g.10gb", "9.0", 10 * GIB, 9 * GIB)
    assert query(FAKE_GPUS=gpus).gpus == (part,), "CUDA takes the first"
    for name, count in (("MIG-02", 1), ("MIG-03", 0), ("GPU-00", 1)):
        assert query(FAKE_GPUS=gpus, CUDA_VISIBLE_DEVICES=name).gpus == (part,) * count


def test_memory_that_the_gpu_shares_with_the_host(query: Query) -> None:
    assert query(FAKE_GPUS="NVIDIA GB10;12;1;0;0").gpus == (Gpu("NVIDIA GB10", "12.1", None, None),)


@pytest.mark.parametrize(
    ("environment", "version", "problem"),
    [
        ({"FAKE_INIT": "9"}, None, "the NVIDIA driver offers no GPU: Driver Not Loaded (NVML error 9)"),
        ({"FAKE_COUNT": "999"}, "580.65.06", "the NVIDIA driver offers no GPU: Unknown Error (NVML error 999)"),
        ({"FAKE_CUDA": "0"}, "580.65.06", "there is no NVIDIA driver here (libcuda.so.1 is missing)"),
        (
            {}, "580.65.06",
            "the NVIDIA driver offers no GPU: no GPU is visible (CUDA_VISIBLE_DEVICES may hide them)",
        ),
    ],
)  # fmt: skip
def test_no_gpu(query: Query, environment: dict[str, str], version: str | None, problem: str) -> None:
    found = query(**environment)
    assert (found.gpus, found.version, found.problem) == ((), version, problem)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", lambda name: ctypes.CDLL("no-such-library.so"))
    assert driver.query() == Driver(problem="there is no NVIDIA driver here (libnvidia-ml.so.1 is missing)")


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
