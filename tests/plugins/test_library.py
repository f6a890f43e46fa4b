"""The built library, read from outside: what it exports, what it needs, for which GPUs it has machine code."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from sass import ARCHITECTURES

MOST_BYTES = 25_000_000
ALLOWED_LIBRARIES = {
    "libc.so.6",
    "libstdc++.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",  # the loader, a part of libc: __tls_get_addr
}


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


def test_size(library: Path) -> None:
    assert library.stat().st_size <= MOST_BYTES


def test_machine_code_for_every_architecture(cuobjdump: Callable[..., str]) -> None:
    listed = re.findall(r"\.sm_(\d+a?)\.cubin", cuobjdump("--list-elf"))
    assert sorted(set(listed)) == sorted(ARCHITECTURES)
    assert set(re.findall(r"\.(sm_\d+a?)\.ptx", cuobjdump("--list-ptx"))) == {"sm_120"}


def test_both_libraries_hold_the_same_machine_code(library: Path) -> None:
    assert _machine_code(library) == _machine_code(library.with_name("libawq_trt_kernels.so")) != b""


def _machine_code(path: Path) -> bytes:
    table = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\.nv_fatbin +PROGBITS +\w+ (\w+) (\w+)", table)
    assert match
    offset, size = (int(v, 16) for v in match.groups())
    return path.read_bytes()[offset : offset + size]


def test_plain_c_library(library: Path) -> None:
    """The kernels as C functions, for benchmarks: what they are called, and what they say without a GPU."""
    path = library.with_name("libawq_trt_kernels.so")
    exported = sorted(line.split()[-1] for line in _symbols(path, "--defined-only"))
    names = ["counter_bytes", "error_text", "gemm", "tactics", "workspace_bytes"]
    assert exported == [f"awq_trt_{name}" for name in names]
    c = ctypes.CDLL(str(path))
    ids = (ctypes.c_int * 8)()
    count = c.awq_trt_tactics(ids, 8)
    assert len(set(ids[:count]) - {0}) == count == 5
    for name in ("counter_bytes", "workspace_bytes"):
        getattr(c, f"awq_trt_{name}").restype = ctypes.c_size_t
    assert c.awq_trt_counter_bytes(40) == 4 * 1024  # for tiles; more for layers of more than 1024 row tiles
    assert c.awq_trt_counter_bytes(1 << 15) == 4 * 2048
    assert c.awq_trt_workspace_bytes(1, 4096, 4096) % (256 * 512) == 0  # slices x row tiles x 512 bytes
    assert c.awq_trt_workspace_bytes(1, 64, 128) == 0  # one K-block of 128 columns is not split
    assert c.awq_trt_workspace_bytes(64, 4096, 4096) >= 2 * 128 * 64 * 4  # partial sums of a block's two tiles
    c.awq_trt_error_text.restype = ctypes.c_char_p
    assert b"no error" in c.awq_trt_error_text(0)
