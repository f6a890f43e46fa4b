"""The machine code of every kernel: no spills, registers within the launch bound, loads and stores of full width."""

from __future__ import annotations

import itertools

import pytest
import sass
from sass import ARCHITECTURES, Kernel

EVERYWHERE = {f"DecodeKernel<{dtype}, {tiles}>" for dtype in ("Half", "Bfloat16") for tiles in (1, 2, 3, 4)}
EVERYWHERE |= {f"GemmKernel<{dtype}, {warps}, {tiles}>"
               for dtype, warps, tiles in itertools.product(("Half", "Bfloat16"), (4, 8), (8, 16))}  # fmt: skip
EVERYWHERE |= {f"DequantizeKernel<{dtype}>" for dtype in ("Half", "Bfloat16")}
ONLY_90A = {f"WgmmaKernel<{dtype}, {tile}>" for dtype in ("Half", "Bfloat16") for tile in ("1, 16", "2, 8", "2, 16")}
WITHOUT_90A = [a for a in ARCHITECTURES if a != "90a"]
EARLY = ("90", "90a", "100", "120")  # architectures on which a kernel may start before the previous one has ended
STATIC_BYTES = {"DecodeKernel": 16, "GemmKernel": 16, "DequantizeKernel": 0, "WgmmaKernel": 128}
"""Static shared memory of a block, at most; the host program adds as much to the dynamic memory that is planned."""

ASYNC_COPY = r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"


def of(kernels: list[Kernel], architecture: str, family: str = "") -> list[Kernel]:
    """Those of an architecture and a family; at least one."""
    found = [k for k in kernels if k.sm == architecture and k.family.startswith(family)]
    assert found
    return found


def test_parsing() -> None:
    listing = """
        /*0000*/                   @P2 LDGSTS.E.BYPASS.128 [R2+0x400], desc[UR4][R6.64] ;  /* 0x000000ff00037b82 */
                                                                                           /* 0x000fe20000000800 */
        /*0010*/                   @!PT LDS RZ, [RZ] ;                                     /* 0x000000ff00037b82 */
        /*0020*/                   STL [R1], R2 ;                                          /* 0x000000ff00037b82 */
    """
    assert sass.opcodes_of(listing) == ("LDGSTS.E.BYPASS.128", "STL")
    text = "Fatbin\n====\narch = sm_90\nhost = linux\none\narch = sm_90a\ntwo\narch = sm_90\nthree\n"
    assert sass.sections(text) == {"90": "host = linux\none\nthree\n", "90a": "two\n"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_an_architecture(kernels: list[Kernel], architecture: str) -> None:
    titles = [k.title for k in of(kernels, architecture)]
    assert len(titles) == len(set(titles))
    assert set(titles) == (ONLY_90A if architecture == "90a" else EVERYWHERE)


def _threads_and_registers(kernel: Kernel) -> tuple[int, int]:
    """The launch bound, and the registers of a thread with which as many blocks as intended fit on an SM."""
    if kernel.family == "WgmmaKernel":
        return 384, 168  # at the start; setmaxnreg moves registers from the producer's warps to those that multiply
    if kernel.family == "GemmKernel":
        blocks = 2 if kernel.numbers == (4, 8) else 1  # resident: plugins/plan/gemm_schedule.h
        return 32 * kernel.numbers[0], min(255, 65536 // (32 * kernel.numbers[0] * blocks))
    if kernel.family == "DequantizeKernel":
        return 256, 65536 // (256 * 4)
    threads, blocks = {1: (512, 2), 2: (512, 1), 3: (256, 1), 4: (256, 1)}[kernel.numbers[0]]
    return threads, min(255, 65536 // (threads * blocks))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_intended_blocks_fit(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture):
        threads, registers = _threads_and_registers(kernel)
        assert kernel.threads == threads, kernel.title
        assert kernel.registers <= registers, kernel.title
        assert (kernel.stack, kernel.local) == (0, 0), kernel.title
        assert not {"LDL", "STL"} & {*kernel.bases}, kernel.title
        reserved = 1024 if architecture in EARLY else 0  # which newer compilers count
        assert kernel.shared - reserved <= STATIC_BYTES[kernel.family], kernel.title


@pytest.mark.parametrize("architecture", WITHOUT_90A)
def test_tensor_cores_and_wide_copies(kernels: list[Kernel], architecture: str) -> None:
    for kernel in [*of(kernels, architecture, "Decode"), *of(kernels, architecture, "Gemm")]:
        mma = "HMMA.16816.F32.BF16" if kernel.dtype == "Bfloat16" else "HMMA.16816.F32"
        assert {o for o in kernel.opcodes if "MMA." in o} == {mma}, kernel.title
        assert kernel.has(r"LDSM\.16\.M88\.4"), f"{kernel.title} does not use ldmatrix"
        assert kernel.has(ASYNC_COPY), f"{kernel.title} does not use cp.async"
        assert kernel.has(r"LDG\.E\.(NA\.)?128.*"), f"{kernel.title} does not load 16 bytes at a time"
        assert kernel.has(r"ATOMG\.E\.ADD\.STRONG\.GPU"), f"{kernel.title} does not count arrivals"
        assert kernel.has(r"STG\.E\.128"), f"{kernel.title} does not store 16 bytes at a time"


@pytest.mark.parametrize("architecture", EARLY)
def test_weights_come_before_the_previous_kernel_has_ended(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture):
        if kernel.family == "DequantizeKernel":
            continue
        code = kernel.bases
        assert "PREEXIT" in code, f"{kernel.title} does not let the next kernel start"
        assert "ACQBULK" in code, f"{kernel.title} does not wait for the previous kernel"
        wait = len(code) - 1 - code[::-1].index("ACQBULK")  # the warps that multiply wait, too, and come first
        assert code.index("UTMALDG" if architecture == "90a" else "LDGSTS") < wait, kernel.title


@pytest.mark.parametrize("architecture", ["80", "86", "89"])
def test_nothing_starts_early_where_it_cannot(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture):
        assert not {"PREEXIT", "ACQBULK"} & {*kernel.bases}, kernel.title


def test_wgmma(kernels: list[Kernel]) -> None:
    """Warpgroup instructions of the tile's shape, TMA, barriers, and registers that change hands."""
    for kernel in of(kernels, "90a"):
        shape = f"HGMMA.64x{kernel.numbers[1] * 8}x16.F32" + (".BF16" if kernel.dtype == "Bfloat16" else "")
        assert {o for o in kernel.opcodes if "MMA." in o} == {shape}, kernel.title
        assert kernel.has(r"UTMALDG\.2D"), f"{kernel.title} does not use TMA"
        assert kernel.has(r"SYNCS\.PHASECHK.*TRYWAIT"), f"{kernel.title} does not wait for barriers"
        assert kernel.has(r"SYNCS\.ARRIVE.*"), f"{kernel.title} does not free stages"
        assert kernel.has(r"USETMAXREG\.DEALLOC.*"), f"{kernel.title}: the producer keeps its registers"
        assert kernel.has(r"USETMAXREG\.TRY_ALLOC.*"), f"{kernel.title}: the consumers get no registers"
        assert kernel.has(ASYNC_COPY), f"{kernel.title} does not copy scales"
        assert kernel.has(r"ATOMG\.E\.ADD\.STRONG\.GPU"), f"{kernel.title} does not count arrivals"
        assert kernel.has(r"STG\.E\.128"), f"{kernel.title} does not store 16 bytes at a time"


@pytest.mark.parametrize("architecture", WITHOUT_90A)
def test_dequantize_moves_16_bytes_at_a_time(kernels: list[Kernel], architecture: str) -> None:
    for kernel in of(kernels, architecture, "Dequantize"):
        assert kernel.has(r"LDG\.E\.(NA\.)?128\.CONSTANT"), kernel.title
        assert {o for o in kernel.opcodes if o.startswith("STG")} == {"STG.E.128"}, kernel.title
        assert kernel.has(r"LDSM\.16\.M88\.4"), kernel.title
        assert not kernel.has(r"[HQ]G?MMA.*"), kernel.title
