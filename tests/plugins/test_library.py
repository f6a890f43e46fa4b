"""The built library, read from outside: what it exports, what it needs, which machine code it holds."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bench.sass.listing import ARCHITECTURES, Kernel

EVERYWHERE = {f"DecodeKernel<{dtype}, {tiles}>" for dtype in ("Half", "Bfloat16") for tiles in (1, 2, 3, 4)}
EVERYWHERE |= {f"GemmKernel<{dtype}, {warps}, {tiles}>"
               for dtype, warps, tiles in itertools.product(("Half", "Bfloat16"), (4, 8), (8, 16))}  # fmt: skip
EVERYWHERE |= {f"DequantizeKernel<{dtype}>" for dtype in ("Half", "Bfloat16")}
ONLY_90A = {f"WgmmaKernel<{dtype}, {tile}>" for dtype in ("Half", "Bfloat16") for tile in ("1, 16", "2, 8", "2, 16")}
EARLY = ("90", "90a", "100", "120")  # architectures on which a kernel may start before the one before has ended
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


def of(kernels: list[Kernel], architecture: str, family: str = "") -> list[Kernel]:
    """Those of an architecture and a family; there is one at least."""
    found = [k for k in kernels if k.sm == architecture and k.family.startswith(family)]
    assert found
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_an_architecture(kernels: list[Kernel], architecture: str) -> None:
    titles = [k.title for k in of(kernels, architecture)]
    assert len(titles) == len(set(titles))
    assert set(titles) == (ONLY_90A if architecture == "90a" else EVERYWHERE)


def _threads_and_registers(kernel: Kernel) -> tuple[int, int]:
    """The launch bound, and the registers with which so many blocks as are meant to fit on a multiprocessor do."""
    if kernel.family == "WgmmaKernel":
        return 384, 168  # at the start; setmaxnreg gives to the warps that multiply what the others do not need
    if kernel.family == "GemmKernel":
        blocks = 2 if kernel.numbers == (4, 8) else 1  # resident: plugins/plan/gemm_plan.h
        return 32 * kernel.numbers[0], min(255, 65536 // (32 * kernel.numbers[0] * blocks))
    if kernel.family == "DequantizeKernel":
        return 256, 65536 // (256 * 4)
    threads, blocks = {1: (512, 2), 2: (512, 1), 3: (256, 1), 4: (256, 1)}[kernel.numbers[0]]
    return threads, min(255, 65536 // (threads * blocks))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture):
        threads, registers = _threads_and_registers(kernel)
        assert kernel.threads == threads, kernel.title
        assert kernel.registers <= registers, kernel.title
        assert (kernel.stack, kernel.local) == (0, 0), kernel.title
        assert not {"LDL", "STL"} & {i.base for i in kernel.code}, kernel.title
        reserved = 1024 if architecture in EARLY else 0  # which newer compilers count
        assert kernel.shared - reserved <= 128, kernel.title  # all but counters and barriers is dynamic


def opcodes(kernel: Kernel) -> list[str]:
    """In the order of the listing."""
    return [i.opcode for i in kernel.code if not i.never]


def has(kernel: Kernel, pattern: str) -> bool:
    """Whether there is such an opcode, modifiers and all."""
    return any(re.fullmatch(pattern, opcode) for opcode in opcodes(kernel))


COPY = r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "90a"])
def test_tensor_cores_and_wide_copies(kernels: list[Kernel], architecture: str) -> None:
    for kernel in [*of(kernels, architecture, "Decode"), *of(kernels, architecture, "Gemm")]:
        mma = "HMMA.16816.F32.BF16" if kernel.dtype == "Bfloat16" else "HMMA.16816.F32"
        assert {o for o in opcodes(kernel) if o.startswith("HMMA")} == {mma}, kernel.title
        assert has(kernel, r"LDSM\.16\.M88\.4"), f"{kernel.title} does not use ldmatrix"
        assert has(kernel, COPY), f"{kernel.title} does not use cp.async"
        assert has(kernel, r"ATOMG\.E\.ADD\.STRONG\.GPU"), f"{kernel.title} does not count arrivals"
        assert has(kernel, r"STG\.E\.128"), f"{kernel.title} does not store 16 bytes at a time"


@pytest.mark.parametrize("architecture", EARLY)
def test_weights_come_before_the_kernel_before_has_ended(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture):
        if kernel.family == "DequantizeKernel":
            continue
        code = [i.base for i in kernel.code]
        assert "PREEXIT" in code, f"{kernel.title} does not let the next kernel start"
        assert "ACQBULK" in code, f"{kernel.title} does not wait for the kernel before"
        wait = len(code) - 1 - code[::-1].index("ACQBULK")  # the warps that multiply wait, too, and come first
        assert code.index("UTMALDG" if architecture == "90a" else "LDGSTS") < wait, kernel.title


@pytest.mark.parametrize("architecture", ["80", "86", "89"])
def test_nothing_starts_early_where_it_cannot(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture):
        assert not {"PREEXIT", "ACQBULK"} & {i.base for i in kernel.code}, kernel.title


def test_wgmma(kernels: list[Kernel]) -> None:
    """Warpgroup instructions of the tile's shape, the copy engine, barriers, and registers that change hands."""
    for kernel in of(kernels, "90a"):
        shape = f"HGMMA.64x{kernel.numbers[1] * 8}x16.F32" + (".BF16" if kernel.dtype == "Bfloat16" else "")
        assert {o for o in opcodes(kernel) if "MMA." in o} == {shape}, kernel.title
        assert has(kernel, r"UTMALDG\.2D"), f"{kernel.title} does not use the copy engine"
        assert has(kernel, r"SYNCS\.PHASECHK.*TRYWAIT"), f"{kernel.title} does not wait for barriers"
        assert has(kernel, r"SYNCS\.ARRIVE.*"), f"{kernel.title} does not free stages"
        assert has(kernel, r"USETMAXREG\.DEALLOC.*"), f"{kernel.title}: the producer keeps its registers"
        assert has(kernel, r"USETMAXREG\.TRY_ALLOC.*"), f"{kernel.title}: the consumers get no registers"
        assert has(kernel, COPY), f"{kernel.title} does not copy scales"
        assert has(kernel, r"ATOMG\.E\.ADD\.STRONG\.GPU"), f"{kernel.title} does not count arrivals"
        assert has(kernel, r"STG\.E\.128"), f"{kernel.title} does not store 16 bytes at a time"


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "90a"])
def test_dequantize_moves_16_bytes_at_a_time(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture, "Dequantize"):
        assert has(kernel, r"LDG\.E\.(NA\.)?128\.CONSTANT"), kernel.title
        assert {o for o in opcodes(kernel) if o.startswith("STG")} == {"STG.E.128"}, kernel.title
        assert has(kernel, r"LDSM\.16\.M88\.4"), kernel.title
        assert not has(kernel, r"[HQ]G?MMA.*"), kernel.title


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
    assert c.awq_trt_counter_bytes(40) == 4 * 1024  # for tiles; more for layers of more than 1024 strips
    assert c.awq_trt_counter_bytes(1 << 15) == 4 * 2048
    assert c.awq_trt_workspace_bytes(1, 4096, 4096) % (256 * 512) == 0  # slices x strips x 512 bytes
    assert c.awq_trt_workspace_bytes(1, 64, 128) == 0  # one unit of 128 columns is not split
    assert c.awq_trt_workspace_bytes(64, 4096, 4096) >= 2 * 128 * 64 * 4  # partial sums of a block's two tiles
    c.awq_trt_error_text.restype = ctypes.c_char_p
    assert b"no error" in c.awq_trt_error_text(0)
