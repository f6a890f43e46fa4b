"""The machine code of a library's kernels, as cuobjdump lists it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

PIPES = {
    "tensor": "HMMA",
    "load_store": "LDSM LDS STS LDGSTS LDG STG LDC LDL STL LD ST ATOM ATOMG ATOMS RED",
    "fma": "HFMA2 HADD2 HMUL2 FFMA FADD FMUL IMAD IDP",
    "alu": "LOP3 SHF IADD3 IADD ISETP SEL PRMT LEA VIADD MOV VIMNMX VIADDMNMX IMNMX IABS PLOP3 P2R R2P FSETP FSEL "
    "FMNMX F2FP SGXT BMSK CS2R",
    "uniform": "UMOV ULDC LDCU USHF ULOP3 UIADD3 UISETP USEL UIMAD ULEA UPLOP3 UVIMNMX UPRMT R2UR S2UR",
    "control": "BRA EXIT BSSY BSYNC BREAK WARPSYNC ENDCOLLECTIVE DEPBAR LDGDEPBAR NOP BAR CALL RET YIELD MEMBAR ERRBAR "
    "CGAERRBAR CCTL PREEXIT ACQBULK",
    "other": "S2R MUFU I2F F2I F2F SHFL VOTE POPC FLO",
}
"""Execution pipe -> opcodes. Moves to and from constants and special registers are where their results go."""

PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_NAME = re.compile(r"([A-Z][a-z]+Kernel)INS_\d+(Half|Bfloat16)ELi(\d+)EE")
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

    family: str  # DecodeKernel, GemmKernel
    dtype: str  # Half, Bfloat16
    token_tiles: int
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    code: tuple[Instruction, ...]

    @property
    def title(self) -> str:
        """As in the source: DecodeKernel<Half, 2>."""
        return f"{self.family}<{self.dtype}, {self.token_tiles}>"


def parse(lines: str) -> tuple[Instruction, ...]:
    """The instructions in one function's listing."""
    return tuple(
        Instruction(int(address, 16), guard, opcode, operands.strip())
        for address, guard, opcode, operands in _LINE.findall(lines)
    )


def count(code: Iterable[Instruction]) -> dict[str, int]:
    """How many 128-bit loads from global memory, HMMA, LDSM, LDS and local-memory instructions."""
    found = Counter(i.base + (".128" if ".128" in i.opcode else "") for i in code if not i.never)
    names = ("LDG.128", "LDGSTS.128", "HMMA", "LDSM")
    local = sum(n for name, n in found.items() if name.split(".")[0] in ("LDL", "STL"))
    return {name: found[name] for name in names} | {"LDS": found["LDS"] + found["LDS.128"], "local": local}


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


def read_kernels(library: Path, architecture: int) -> list[Kernel]:
    """All kernels of a library for one architecture, in the order of their names."""
    options = ("-arch", f"sm_{architecture}", library)
    threads = launch_bounds(cuobjdump("-elf", *options))
    usage = {name: [int(v) for v in rest] for name, *rest in _USAGE.findall(cuobjdump("-res-usage", *options))}
    kernels = []
    for listing in cuobjdump("-sass", *options).split("Function : ")[1:]:
        name = listing.split(maxsplit=1)[0]
        match = _NAME.search(name)
        if match is None:
            raise ValueError(f"sm_{architecture}: {name} is not called as our kernels are")
        family, dtype, token_tiles = match.groups()
        registers, stack, shared, local = usage[name]
        sizes = (registers, stack, local, shared, threads[name])
        kernels.append(Kernel(family, dtype, int(token_tiles), *sizes, parse(listing)))
    return sorted(kernels, key=lambda k: (k.family, k.dtype != "Half", k.token_tiles))


def versions(library: Path) -> dict[str, str]:
    """Of cuobjdump, and of the assembler that made the machine code, as it wrote into it."""
    made = re.search(r"Tool Name: ptxas\s+Tool Version:.*?(V[\d.]+)", cuobjdump("-elf", "-arch", "sm_90", library))
    own = re.search(r"V[\d.]+", cuobjdump("--version"))
    return {"cuobjdump": own.group() if own else "", "ptxas": made.group(1) if made else ""}
