"""The built library, read from outside: what it exports, what it needs, which machine code it holds."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
ALLOWED_LIBRARIES = {
    "libc.so.6",
    "libstdc++.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",  # the loader, a part of libc: __tls_get_addr
}
KERNELS = 14  # (decode with 1, 2, 3, 4 token tiles, gemm with 4, 8, 16) x (fp16, bf16)


def _symbols(library: Path, option: str) -> list[str]:
    lines = subprocess.run(
        ["nm", "-D", option, library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line.strip() for line in lines]


def test_exports_exactly_two_functions(library: Path) -> None:
    exported = _symbols(library, "--defined-only")
    assert sorted(line.split()[1:] for line in exported) == [["T", "getCreators"], ["T", "setLoggerFinder"]]


def test_nothing_unresolved_beyond_the_c_and_cpp_libraries(library: Path) -> None:
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed
    assert needed <= ALLOWED_LIBRARIES
    for line in _symbols(library, "--undefined-only"):
        weak, versioned = line.startswith("w "), re.search(r"@(GLIBC|GLIBCXX|CXXABI)_", line)
        assert weak or versioned, f"{line} does not come from libc or libstdc++"


def test_all_symbols_resolve_at_load_time(library: Path) -> None:
    """As TensorRT opens it, in a process that has nothing of CUDA or TensorRT."""
    code = f"import ctypes, os; ctypes.CDLL({str(library)!r}, mode=os.RTLD_NOW | os.RTLD_LOCAL).getCreators"
    subprocess.run(["python3", "-c", code], check=True)


def test_machine_code_for_every_architecture(cuobjdump: Callable[..., str]) -> None:
    listed = re.findall(r"\.(sm_\d+a?)\.cubin", cuobjdump("--list-elf"))
    assert sorted(set(listed)) == sorted(ARCHITECTURES)
    assert set(re.findall(r"\.(sm_\d+a?)\.ptx", cuobjdump("--list-ptx"))) == {"sm_120"}


def _launch_bound(name: str) -> int:
    """Registers per thread with which a kernel's largest block, or two of them, fit on a multiprocessor."""
    decode = re.search(r"DecodeKernelINS_\d+\w+?ELi(\d)E", name)
    if decode is None:
        return 255
    threads, blocks = {"1": (512, 2), "2": (512, 1), "3": (256, 1), "4": (256, 1)}[decode.group(1)]
    return min(255, 65536 // (threads * blocks))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(cuobjdump: Callable[..., str], architecture: str) -> None:
    usage = cuobjdump("-res-usage", "-arch", architecture)
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(found) == KERNELS
    for name, registers, stack, shared, local in found:
        assert int(registers) <= _launch_bound(name), name
        assert (int(stack), int(local)) == (0, 0), name
        assert int(shared) <= 49 * 1024 + 1024  # static limit, and the 1 KiB that newer architectures reserve


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_cores_and_wide_loads(cuobjdump: Callable[..., str], architecture: str) -> None:
    code = cuobjdump("-sass", "-arch", architecture)
    functions = code.split("Function : ")[1:]
    assert len(functions) == KERNELS
    for function in functions:
        name = function.split(maxsplit=1)[0]
        mma = "HMMA.16816.F32.BF16" if "Bfloat16" in name else "HMMA.16816.F32 "
        assert mma in function, f"{name} does not use tensor cores"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name} uses local memory"
        assert "LDSM.16.M88.4" in function, f"{name} does not use ldmatrix"
        assert re.search(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", function), f"{name} does not use cp.async"
        if "GemmKernel" in name:
            assert re.search(r"LDG\.E\.(NA\.)?128", function), f"{name} does not load weights 16 bytes at a time"
            continue
        assert "ATOMG.E.ADD.STRONG.GPU" in function, f"{name} does not count arrivals"
        early = int(re.findall(r"\d+", architecture)[0]) >= 90
        assert ("ACQBULK" in function) == early, f"{name} does not wait for the kernel before"
        assert ("PREEXIT" in function) == early, f"{name} does not let the next kernel start"
        if early:  # weights are under way before the wait
            assert function.index("LDGSTS") < function.index("ACQBULK")


def test_plain_c_library(library: Path) -> None:
    """The kernels as C functions, for benchmarks: what they are called, and what they say without a GPU."""
    path = library.with_name("libawq_trt_kernels.so")
    exported = sorted(line.split()[-1] for line in _symbols(path, "--defined-only"))
    names = ["counter_bytes", "error_text", "gemm", "tactics", "workspace_bytes"]
    assert exported == [f"awq_trt_{name}" for name in names]
    c = ctypes.CDLL(str(path))
    ids = (ctypes.c_int * 8)()
    count = c.awq_trt_tactics(ids, 8)
    assert len(set(ids[:count]) - {0}) == count > 1
    for name in ("counter_bytes", "workspace_bytes"):
        getattr(c, f"awq_trt_{name}").restype = ctypes.c_size_t
    assert c.awq_trt_counter_bytes(40) == 3 * 4
    assert c.awq_trt_workspace_bytes(1, 4096, 4096, 128, 0) % (256 * 512) == 0  # slices x strips x 512 bytes
    assert c.awq_trt_workspace_bytes(1, 64, 128, 128, 0) == 0  # one unit of 128 columns is not split
    c.awq_trt_error_text.restype = ctypes.c_char_p
    assert b"no error" in c.awq_trt_error_text(0)
