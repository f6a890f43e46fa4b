"""The machine code (SASS) of a library's kernels, as NVIDIA's cuobjdump lists it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)[^;]*;")
_NAME = re.compile(r"([A-Z][a-z]+Kernel)INS_\d+(Half|Bfloat16)E((?:Li\d+E)*)E")
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LAUNCH_BOUND = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    sm: str  # one of ARCHITECTURES
    family: str  # DecodeKernel, GemmKernel, WgmmaKernel, DequantizeKernel
    dtype: str  # Half, Bfloat16
    numbers: tuple[int, ...]  # arguments of the template after the dtype
    registers: int  # of a thread
    stack: int  # bytes of a thread
    local: int  # bytes of a thread
    shared: int  # bytes of a block, static
    threads: int  # of the launch bound
    opcodes: tuple[str, ...]  # with modifiers (LDGSTS.E.BYPASS.128), in the order of the code

    @property
    def title(self) -> str:
        """As in the source: DecodeKernel<Half, 2>."""
        return f"{self.family}<{', '.join([self.dtype, *map(str, self.numbers)])}>"

    @property
    def bases(self) -> list[str]:
        """The opcodes without modifiers."""
        return [opcode.split(".")[0] for opcode in self.opcodes]

    def has(self, pattern: str) -> bool:
        """Whether an opcode, modifiers included, matches the regular expression as a whole."""
        return any(re.fullmatch(pattern, opcode) for opcode in self.opcodes)


def opcodes_of(listing: str) -> tuple[str, ...]:
    """The opcodes of a function's listing, without instructions that are never executed (predicate !PT)."""
    return tuple(opcode for guard, opcode in _INSTRUCTION.findall(listing) if guard != "!PT")


def cuobjdump(*options: str | Path) -> str:
    """What cuobjdump prints with these options; it and nvdisasm come from NVIDIA's wheels, else from PATH."""
    path = os.pathsep.join([*map(_wheel_folder, ("cuobjdump", "nvdisasm")), os.environ["PATH"]])
    program = shutil.which("cuobjdump", path=path)
    assert program, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm (extra 'test')"
    return subprocess.run(
        [program, *options], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout


def _wheel_folder(program: str) -> str:
    try:
        files = metadata.files(f"nvidia-cuda-{program}") or []
    except metadata.PackageNotFoundError:
        files = []
    return next((str(Path(str(file.locate())).parent) for file in files if file.name == program), "")


def sections(text: str) -> dict[str, str]:
    """Architecture -> what cuobjdump prints of it: asked for sm_90, it lists sm_90a, too, and each file by itself."""
    found: dict[str, str] = {}
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        name, rest = part.split("\n", 1)
        found[name] = found.get(name, "") + rest
    return found


def _launch_bounds(elf: str) -> dict[str, int]:
    """Mangled name -> threads of the launch bound, from `cuobjdump -elf`."""
    found = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        if bound := _LAUNCH_BOUND.search(section):
            x, y, z = (int(v, 16) for v in bound.groups())
            found[section.split(maxsplit=1)[0]] = x * y * z
    return found


def _read(library: Path, architecture: str) -> list[Kernel]:
    elf, usage, code = (sections(cuobjdump(o, "-arch", f"sm_{architecture}", library))
                        for o in ("-elf", "-res-usage", "-sass"))  # fmt: skip
    kernels = []
    for sm, listings in code.items():
        threads = _launch_bounds(elf[sm])
        sizes = {name: [int(v) for v in rest] for name, *rest in _USAGE.findall(usage[sm])}
        for listing in listings.split("Function : ")[1:]:
            name = listing.split(maxsplit=1)[0]
            match = _NAME.search(name)
            assert match, f"sm_{sm}: {name} is not called as our kernels are"
            family, dtype, numbers = match.groups()
            registers, stack, shared, local = sizes[name]
            template = tuple(map(int, re.findall(r"\d+", numbers)))
            bound = (registers, stack, local, shared, threads[name])
            kernels.append(Kernel(sm, family, dtype, template, *bound, opcodes_of(listing)))
    return kernels


def read_library(library: Path) -> list[Kernel]:
    """All kernels of all architectures."""
    with ThreadPoolExecutor(2) as pool:  # cuobjdump takes seconds for each
        found = pool.map(lambda architecture: _read(library, architecture), filter(str.isdigit, ARCHITECTURES))
        return [kernel for kernels in found for kernel in kernels]
