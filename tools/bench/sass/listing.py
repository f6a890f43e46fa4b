"""The machine code of a library's kernels, as cuobjdump lists it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")

PIPES = {
    "tensor": "HMMA HGMMA",
    "load_store": "LDSM LDS STS LDGSTS LDG STG LDC LDL STL LD ST ATOM ATOMG ATOMS RED SYNCS",
    "fma": "HFMA2 HADD2 HMUL2 FFMA FADD FMUL IMAD IDP",
    "alu": "LOP3 SHF IADD3 IADD ISETP SEL PRMT LEA VIADD MOV VIMNMX VIADDMNMX IMNMX IABS PLOP3 P2R R2P FSETP FSEL "
    "FMNMX F2FP SGXT BMSK CS2R",
    "uniform": "UMOV ULDC LDCU USHF ULOP3 UIADD3 UISETP USEL UIMAD ULEA UPLOP3 UVIMNMX UPRMT R2UR S2UR",
    "control": "BRA EXIT BSSY BSYNC BREAK WARPSYNC ENDCOLLECTIVE DEPBAR LDGDEPBAR NOP BAR CALL RET YIELD MEMBAR ERRBAR "
    "CGAERRBAR CCTL PREEXIT ACQBULK WARPGROUP",
    "other": "S2R MUFU I2F F2I F2F SHFL VOTE POPC FLO",
}
"""Execution pipe -> opcodes. Moves to and from constants and special registers are where their results go."""

PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_NAME = re.compile(r"([A-Z][a-z]+Kernel)INS_\d+(Half|Bfloat16)E((?:Li\d+E)*)E")
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `guard` is its predicate or empty, `opcode` has the modifiers (LDGSTS.E.BYPASS.128)."""

    address: int
    guard: str
    opcode: str
    operands: str

    @cached_property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """A key of PIPES, or "unknown"."""
        return PIPE_OF.get(self.base, "unknown")

    @property
    def never(self) -> bool:
        """Guarded by a predicate that is always false: it takes an issue slot and does nothing."""
        return self.guard == "!PT"


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture; bytes as the compiler reports them, `threads` of its launch bound."""

    sm: str  # of ARCHITECTURES
    family: str  # DecodeKernel, GemmKernel, WgmmaKernel, DequantizeKernel
    dtype: str  # Half, Bfloat16
    numbers: tuple[int, ...]  # the template's; the last one, if there is one, is the tiles of 8 tokens
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    code: tuple[Instruction, ...]

    @property
    def title(self) -> str:
        """As in the source: DecodeKernel<Half, 2>."""
        return f"{self.family}<{', '.join([self.dtype, *map(str, self.numbers)])}>"


def parse(lines: str) -> tuple[Instruction, ...]:
    """The instructions in one function's listing."""
    return tuple(
        Instruction(int(address, 16), guard, opcode, operands.strip())
        for address, guard, opcode, operands in _LINE.findall(lines)
    )


COUNTED = (
    "LDG.128",
    "LDGSTS.128",
    "STG.128",
    "LDSM",
    "LDS",
    "ATOMG",
    "HMMA",
    "HGMMA",
    "UTMALDG",
    "USETMAXREG",
    "SYNCS",
)


def count(code: Iterable[Instruction]) -> dict[str, int]:
    """How many of COUNTED, with .128 those of 128 bits only, and how many accesses to local memory."""
    found: Counter[str] = Counter()
    for i in code:
        if not i.never:
            found[i.base] += 1
            found[f"{i.base}.128"] += ".128" in i.opcode
    return {name: found[name] for name in COUNTED} | {"local": found["LDL"] + found["STL"]}


def find_tool(name: str) -> Path:
    """`cuobjdump` or `nvdisasm`: from NVIDIA's wheel, else from PATH.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    try:
        for file in metadata.files(f"nvidia-cuda-{name}") or []:
            if file.name == name:
                return Path(str(file.locate()))
    except metadata.PackageNotFoundError:
        pass
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-{name} (it is in the extra 'test')")
    return Path(found)


def cuobjdump(*options: str | Path) -> str:
    """What cuobjdump prints with these options."""
    path = f"{find_tool('nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"
    command = [find_tool("cuobjdump"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout


def launch_bounds(elf: str) -> dict[str, int]:
    """Mangled name -> threads of the launch bound, from `cuobjdump -elf`."""
    found = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", section)
        if bound:
            x, y, z = (int(v, 16) for v in bound.groups())
            found[section.split(maxsplit=1)[0]] = x * y * z
    return found


def sections(text: str) -> dict[str, str]:
    """What cuobjdump prints, by architecture: asked for sm_90, it lists sm_90a, too."""
    found: dict[str, str] = {}
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        name, rest = part.split("\n", 1)
        found[name] = found.get(name, "") + rest
    return found


def read_kernels(library: Path, architecture: str) -> list[Kernel]:
    """All kernels of a library for one architecture and its variants, in the order of their names."""
    elf, usage, code = (sections(cuobjdump(o, "-arch", f"sm_{architecture}", library))
                        for o in ("-elf", "-res-usage", "-sass"))  # fmt: skip
    kernels = []
    for sm, listings in code.items():
        threads = launch_bounds(elf[sm])
        sizes = {name: [int(v) for v in rest] for name, *rest in _USAGE.findall(usage[sm])}
        for listing in listings.split("Function : ")[1:]:
            name = listing.split(maxsplit=1)[0]
            match = _NAME.search(name)
            if match is None:
                raise ValueError(f"sm_{sm}: {name} is not called as our kernels are")
            family, dtype, numbers = match.groups()
            registers, stack, shared, local = sizes[name]
            template = tuple(map(int, re.findall(r"\d+", numbers)))
            bound = (registers, stack, local, shared, threads[name])
            kernels.append(Kernel(sm, family, dtype, template, *bound, parse(listing)))
    return sorted(kernels, key=lambda k: (k.sm, k.family, k.dtype != "Half", k.numbers))


def read_library(library: Path) -> list[Kernel]:
    """All kernels of all architectures."""
    with ThreadPoolExecutor(2) as pool:  # cuobjdump takes seconds for each
        asked = [a for a in ARCHITECTURES if a.isdigit()]
        found = pool.map(lambda architecture: read_kernels(library, architecture), asked)
        return [kernel for kernels in found for kernel in kernels]


def versions(library: Path) -> dict[str, str]:
    """Of cuobjdump, and of the assembler that made the machine code, as it wrote into it."""
    made = re.search(r"Tool Name: ptxas\s+Tool Version:.*?(V[\d.]+)", cuobjdump("-elf", "-arch", "sm_90", library))
    own = re.search(r"V[\d.]+", cuobjdump("--version"))
    return {"cuobjdump": own.group() if own else "", "ptxas": made.group(1) if made else ""}
