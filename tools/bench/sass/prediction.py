"""How long a call ought to take, from instructions and bytes: predicted, not measured.

The busiest multiprocessor decides. Its time is a start (LAUNCH_US and FIRST_BYTE_US), the time of the resource that it
needs longest, and, where K is split over blocks, the reduction. The rings are filled while X is brought to shared
memory; work on the weights begins when X is there. Taken as granted: schedulers issue in every clock while they have
work, no bank conflicts, the other warps hide the latency of dependent instructions, a multiprocessor gets its even
share of the bandwidth. Blocks that do not fit at once come in waves. Left out: the instructions before and after the
main loop.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gemm.shapes import Shape
from bench.sass.paths import Steady

LAUNCH_US = 1.2
"""From the end of a kernel to the first instruction of the next one in a CUDA graph; assumed."""
FIRST_BYTE_US = 0.8
"""Until the first weights arrive from a memory that was idle; assumed."""
SPLIT_US = 1.1
"""Fence, atomic addition, one more trip to L2: kSplitNanoseconds of plugins/plan/decode_plan.cpp."""
LOADED_NS = 1000
"""Latency of a busy memory: what is under way arrives within it. As plugins/plan/decode_plan.cpp assumes."""
L2_RATIO = 2
"""Bandwidth of L2, where X and partial sums come from, over that of memory: kL2Ratio of decode_plan.cpp."""
L2_BYTES_PER_CLOCK = 64
"""That one multiprocessor can read from L2 while others do not, as the last arrivers of a reduction do; assumed."""
SCHEDULERS = 4
ALU_PER_CLOCK = IMAD_PER_CLOCK = 2
"""Warp instructions of a multiprocessor: 64 results per clock for logic, shifts, comparisons and integer multiply-add
on every architecture here (CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic Instructions"; that 12.0
adds integers at twice the rate is not counted)."""
WGMMA_PER_CLOCK = 1.0
"""What an m16n8k16 would be: 2048 multiply-adds per clock of a multiprocessor of the H100, twice those of the A100
(H100 whitepaper; 989.4 TFLOPS = 132 x 2048 x 2 x 1.83 GHz, so 949 at the 1.755 GHz below)."""
WAVEFRONT_BYTES = 128
WAVE_US = 1.0
"""Until the rings of the next wave of blocks are full: kWaveNanoseconds of plugins/plan/decode_plan.cpp."""
TACTICS = (1, 2, 3, 4)
DEFAULT_TACTIC = TACTICS[0]


@dataclass(frozen=True)
class Gpu:
    """A row of GPUS. Rates are warp instructions per clock of one multiprocessor."""

    name: str
    sm: int
    multiprocessors: int
    shared_bytes: int
    bandwidth: float  # bytes per nanosecond of the datasheet
    achievable: float  # fraction of it that a streaming kernel gets
    ghz: float
    hmma: float  # m16n8k16 with fp32 sums, 2048 multiply-adds
    half: float  # fp16 pairs
    single: float  # fp32
    peak: float  # TFLOP/s of the tensor cores, 16 bits with fp32 sums

    @property
    def share(self) -> float:
        """Bytes per nanosecond that one multiprocessor can count on."""
        return self.bandwidth * self.achievable / self.multiprocessors


GPUS = (
    # NVIDIA H100 datasheet (SXM5); 3.0 TB/s, 790 TFLOP/s achievable and 1.755 GHz as the targets assume. mma.sync
    # reaches about 62 % of the 2048 multiply-adds per clock that wgmma has (Luo et al. 2024, arXiv 2402.13499).
    Gpu("H100 SXM", 90, 132, 228 << 10, 3350, 3000 / 3350, 1.755, 0.62, 4, 4, 790),
    # NVIDIA A100 80GB datasheet (SXM4); A100 whitepaper: 1024 multiply-adds per clock.
    Gpu("A100 80GB", 80, 108, 164 << 10, 2039, 0.9, 1.41, 0.5, 4, 2, 312),
    # NVIDIA Ada whitepaper, RTX 4090: 165.2 TFLOPS dense with fp32 sums at 2.52 GHz = 256 multiply-adds per clock.
    Gpu("RTX 4090", 89, 128, 100 << 10, 1008, 0.9, 2.52, 0.125, 2, 4, 165.2),
    # NVIDIA L40S datasheet: 362 TFLOPS dense at 2.52 GHz = 512 multiply-adds per clock.
    Gpu("L40S", 89, 142, 100 << 10, 864, 0.9, 2.52, 0.25, 2, 4, 362),
    # NVIDIA RTX Blackwell whitepaper, RTX 5090: 209.5 TFLOPS dense with fp32 sums at 2.41 GHz = 256 per clock.
    Gpu("RTX 5090", 120, 170, 100 << 10, 1792, 0.9, 2.41, 0.125, 2, 4, 209.5),
    # NVIDIA HGX B200 datasheet, clock of the public GPU data bases. No public figure for mma.sync: A100's is assumed;
    # the peak, 2250 TFLOPS dense, is that of tcgen05.
    Gpu("B200", 100, 148, 228 << 10, 8000, 0.9, 1.965, 0.5, 2, 4, 2250),
)


@dataclass(frozen=True)
class Plan:
    """What `awq_trt_host_check plan` answers for few tokens: plugins/plan/decode_plan.h."""

    token_tiles: int
    blocks_per_multiprocessor: int  # planned for; fewer where there are fewer blocks
    warps: int  # of a block
    stages: int
    strip_tiles: int  # rows of 16 output features in a strip
    ranges: int
    slices: int
    most_strips: int  # of a range
    most_units: int  # of a strip in a slice
    row_bytes: int
    shared_bytes: int

    def waves(self, gpu: Gpu) -> int:
        """How many times as many blocks there are as fit at once."""
        return math.ceil(self.ranges * self.slices / (gpu.multiprocessors * self.blocks_per_multiprocessor))

    def resident(self, gpu: Gpu) -> int:
        """Blocks on the busiest multiprocessor at once."""
        blocks = math.ceil(self.ranges * self.slices / gpu.multiprocessors)
        return min(blocks, self.blocks_per_multiprocessor)

    def weight_bytes(self, gpu: Gpu, group_size: int) -> int:
        """Of the busiest multiprocessor, in a wave."""
        units = self.resident(gpu) * self.most_strips * self.most_units
        return units * self.strip_tiles * unit_bytes(group_size)

    def bytes_in_flight(self, gpu: Gpu, group_size: int) -> int:
        """Of the busiest multiprocessor: all stages but the one in use; fewer where there is less to read."""
        ring = self.resident(gpu) * self.warps * (self.stages - 1) * self.strip_tiles * unit_bytes(group_size)
        return min(ring, self.weight_bytes(gpu, group_size))


@dataclass(frozen=True)
class GemmPlan:
    """The same for many tokens: plugins/plan/gemm_plan.h."""

    kernel: str  # gemm, wgmma
    rows: int  # of a tile: output features
    tokens: int  # of a tile
    tiles: int
    units: int  # of a tile, 64 columns each
    split_tiles: int
    split_blocks: int
    blocks: int
    stages: int
    shared_bytes: int
    estimated_us: float  # by the planner


Cell = tuple[Shape, int, Gpu, int]
"""(shape, tokens, GPU, tactic)."""


def ask_planner(host_check: Path, cells: Iterable[Cell]) -> list[Plan | GemmPlan | None]:
    """The plans of cells, from the planner that the plugin uses; None where there is none."""
    questions = [
        f"{s.n} {s.k} {s.group_size} {m} {gpu.sm} {gpu.multiprocessors} {gpu.shared_bytes} {tactic}\n"
        for s, m, gpu, tactic in cells
    ]
    done = subprocess.run([host_check, "plan"], input="".join(questions), capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    if len(answers) != len(questions):
        raise ValueError(f"{host_check} does not plan: is it of this version? {done.stderr.splitlines()[:1]}")
    return [_plan(a) if a else None for a in answers]


def _plan(answer: dict[str, Any]) -> Plan | GemmPlan:
    if answer["kernel"] != "decode":
        return GemmPlan(**answer)
    return Plan(**{name: value for name, value in answer.items() if name != "kernel"})


def unit_bytes(group_size: int) -> int:
    """Of 16 output features x 128 columns: nibbles, scales and zero points."""
    groups = max(1, 128 // group_size)
    return 16 * 128 // 2 + groups * (32 + 8)


def parts(group_size: int) -> int:
    """Of a unit that are scaled separately: the key of paths.steady."""
    return {32: 4, 64: 2}.get(group_size, 1)


@dataclass(frozen=True)
class Prediction:
    """Microseconds: of each resource of the busiest multiprocessor, until X is there, of the reduction, of the call."""

    resources: dict[str, float]
    x: float
    split: float
    us: float

    @property
    def bound(self) -> str:
        """The resource that is needed longest."""
        return max(self.resources, key=self.resources.__getitem__)


def unit_clocks(unit: Steady, gpu: Gpu) -> dict[str, float]:
    """Clocks of a multiprocessor that each of its pipes needs for what one warp issues for a unit."""
    pipes, opcodes = unit.by_pipe(), unit.by_opcode()
    singles = sum(opcodes[name] for name in ("FFMA", "FADD", "FMUL"))
    fma = opcodes["IMAD"] / IMAD_PER_CLOCK + singles / gpu.single
    fma += (pipes["fma"] - opcodes["IMAD"] - singles) / gpu.half
    return {
        "issue": unit.slots / SCHEDULERS,
        "alu": pipes["alu"] / ALU_PER_CLOCK,
        "fma": fma,
        "tensor": unit.multiplications() / (WGMMA_PER_CLOCK if opcodes["HGMMA"] else gpu.hmma),
        "shared": unit.wavefronts(),
    }


def predict(shape: Shape, tokens: int, gpu: Gpu, plan: Plan, unit: Steady) -> Prediction:
    """A call's time with a plan; `unit` is what its kernel issues for a unit of weights."""
    resident = plan.resident(gpu)
    block_units = plan.most_strips * plan.most_units
    each, more = divmod(block_units, plan.warps)
    busiest = resident * (each * plan.warps // SCHEDULERS + math.ceil(more / SCHEDULERS))  # units of one scheduler
    weights, ring = plan.weight_bytes(gpu, shape.group_size), plan.bytes_in_flight(gpu, shape.group_size)
    l2 = L2_RATIO * gpu.share * 1e3  # bytes per microsecond
    x = resident * tokens * plan.most_units * 128 * 2 / l2
    sums = plan.most_strips * plan.strip_tiles * plan.token_tiles * 512 if plan.slices > 1 else 0  # bytes of a block
    filled = max(ring / (gpu.share * 1e3), ring / l2 + x)
    resources = {
        "memory": filled + (weights - ring) / (gpu.share * 1e3) + resident * sums / l2,
        "latency": (weights / ring - 1) * LOADED_NS / 1e3,  # the first ones: FIRST_BYTE_US
    }
    resources |= {name: x + c * SCHEDULERS * busiest / gpu.ghz / 1e3 for name, c in unit_clocks(unit, gpu).items()}
    waves = plan.waves(gpu)
    resources = {name: waves * us + (waves - 1) * WAVE_US for name, us in resources.items()}
    split = 0.0
    if plan.slices > 1:  # of the last wave: the others are added while it streams
        read = min(L2_BYTES_PER_CLOCK * gpu.ghz * 1e3, l2 * gpu.multiprocessors / math.ceil(plan.ranges / waves))
        split = SPLIT_US + plan.slices * sums / read
    return Prediction(resources, x, split, LAUNCH_US + FIRST_BYTE_US + max(resources.values()) + split)
