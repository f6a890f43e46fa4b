"""Many tokens: what binds the main loops of the gemm and wgmma kernels, and what the plugin's planner makes of a call.

The times here are the planner's own: it compares tiles with them (EstimateNanoseconds of gemm_plan.cpp, where
its assumptions are). **None is measured.**
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gemm import targets
from bench.gemm.shapes import PREFILL, Shape, shapes
from bench.sass.listing import PIPES, Kernel
from bench.sass.paths import Steady
from bench.sass.prediction import (
    DEFAULT_TACTIC,
    GPUS,
    L2_RATIO,
    LAUNCH_US,
    WAVEFRONT_BYTES,
    GemmPlan,
    Gpu,
    ask_planner,
    unit_clocks,
)

ESTIMATED = "estimated by the planner's own model, not measured"
UNIT_COLUMNS = 64
CONSUMER_WARPS = 8
CUBLAS_RATIO = 0.95
"""Least cuBLAS / own, from 512 tokens on."""

Unit = tuple[Kernel, Steady]
"""A gemm or wgmma kernel, and what one of its warps that multiply issues for a unit."""


def warps(kernel: Kernel) -> int:
    """That multiply: all of a gemm kernel's, two of three warpgroups of a wgmma kernel."""
    return kernel.threads // 32 if kernel.family == "GemmKernel" else CONSUMER_WARPS


def tile(kernel: Kernel) -> tuple[int, int]:
    """Rows (output features) and tokens of a block's tile: GemmTile of plugins/plan/gemm_plan.h."""
    strips = 2 if kernel.family == "GemmKernel" else kernel.numbers[0]
    return warps(kernel) * strips * 16, kernel.numbers[-1] * 8


def loop_rows(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Issue slots of a warp for a unit, by pipe; `lead`: those before its first multiplication."""
    rows = []
    for kernel, unit in units:
        pipes = unit.by_pipe()
        row = {"sm": kernel.sm, "kernel": kernel.title, "slots": unit.slots, "lead": unit.lead}
        row |= {name: pipes[name] for name in PIPES}
        rows.append(row | {"wavefronts": unit.wavefronts(), "unknown": " ".join(unit.unknown())})
    return rows


def clock_rows(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Clocks of a multiprocessor for a unit of a block's tile, on each GPU, fp16: what is largest binds the main loop.

    `l2`: weights and tokens at L2_RATIO times the bandwidth of memory, each multiprocessor its even share. `shared`
    counts the copy engine's writes, too. `lead`: until a warp's first multiplication, at one instruction per clock;
    nothing of the same block is multiplied meanwhile where all its warps wait for each other in every unit (gemm).
    """
    rows = []
    for kernel, unit in units:
        for gpu in GPUS:
            if kernel.dtype != "Half" or kernel.sm.rstrip("a") != str(gpu.sm):
                continue
            features, tokens = tile(kernel)
            loaded = features * UNIT_COLUMNS // 2 + tokens * UNIT_COLUMNS * 2
            clocks = {name: warps(kernel) * each for name, each in unit_clocks(unit, gpu).items()}
            clocks["shared"] += loaded / WAVEFRONT_BYTES if kernel.family == "WgmmaKernel" else 0
            clocks["l2"] = loaded / (L2_RATIO * gpu.share) * gpu.ghz
            row: dict[str, Any] = {"gpu": gpu.name, "kernel": kernel.title, "tile": f"{features}x{tokens}"}
            row |= {name: round(value) for name, value in clocks.items()}
            rows.append(row | {"lead": unit.lead, "bound": max(clocks, key=clocks.__getitem__)})
    return rows


def planned_rows(host_check: Path) -> list[dict[str, Any]]:
    """What the default tactic launches for every layer, number of tokens and GPU: fp16, with zeros.

    `us` is the planner's estimate and LAUNCH_US; `floor_us` the bytes, or the arithmetic at the GPU's peak.
    """
    cells = [(s, m, gpu, DEFAULT_TACTIC) for gpu in GPUS for s in shapes() for m in PREFILL]
    rows = []
    for (shape, tokens, gpu, _), plan in zip(cells, ask_planner(host_check, cells), strict=True):
        if not isinstance(plan, GemmPlan):
            raise ValueError(f"no plan for {tokens} tokens of {shape.name} on {gpu.name}: {plan}")
        rows.append({
            "gpu": gpu.name,
            "n": shape.n,
            "k": shape.k,
            "m": tokens,
            "kernel": plan.kernel,
            "tile": f"{plan.rows}x{plan.tokens}",
            "tiles": plan.tiles,
            "split_tiles": plan.split_tiles,
            "blocks": plan.blocks,
            "stages": plan.stages,
            "us": round(plan.estimated_us + LAUNCH_US, 2),
            "floor_us": round(floor_us(shape, tokens, gpu), 2),
        })  # fmt: skip
    return rows


def floor_us(shape: Shape, tokens: int, gpu: Gpu) -> float:
    """With 4-bit weights and zeros: what no kernel can beat."""
    return shape.floor_us(tokens, symmetric=False, bandwidth=memory(gpu), peak=gpu.peak * 1e12)


def memory(gpu: Gpu) -> float:
    """Bytes per second that a streaming kernel gets."""
    return gpu.bandwidth * gpu.achievable * 1e9


def cublas_us(shape: Shape, tokens: int, gpu: Gpu) -> float:
    """What cuBLAS with fp16 weights is assumed to take: always at the peak, or at the bandwidth. It is slower."""
    moved = 2 * (shape.n * shape.k + tokens * (shape.n + shape.k))
    return LAUNCH_US + max(moved / memory(gpu), shape.flops(tokens) / (gpu.peak * 1e12)) * 1e6


def evaluate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of many tokens on the H100, as far as they can be estimated; `meet`: in how many cells."""
    gpu = GPUS[0]
    layers = {(s.n, s.k): s for s in shapes()}
    us = {(r["n"], r["k"], r["m"]): r["us"] for r in rows if r["gpu"] == gpu.name}
    large = {c for c in us if layers[c[:2]].group_size == targets.PEAK_GROUP}
    first = PREFILL[0]
    slow = {c: v / targets.allowed_at_first_us(floor_us(layers[c[:2]], first, gpu))
            for c, v in us.items() if c[2] == first}  # fmt: skip
    found = [entry(f"time / (1.3 floor + 3 us), {first} tokens", slow, 1.0, small=True)]
    for m, limit in targets.FRACTIONS_OF_PEAK.items():
        fractions = {c: layers[c[:2]].flops(m) / (us[c] * 1e-6 * gpu.peak * 1e12) for c in large if c[2] == m}
        found.append(entry(f"fraction of {gpu.peak} TFLOP/s, {m} tokens, group 128", fractions, limit))
    over = {c: cublas_us(layers[c[:2]], c[2], gpu) / us[c] for c in large if c[2] > targets.MIDDLE}
    what = f"time of a cuBLAS that always reaches {gpu.peak} TFLOP/s / own, beyond {targets.MIDDLE} tokens, group 128"
    return [*found, entry(what, over, CUBLAS_RATIO)]


def entry(what: str, values: dict[targets.Cell, float], limit: float, small: bool = False) -> dict[str, Any]:
    """A target, and how many cells meet it; `small`: where small values are good."""
    found = targets.target(f"{ESTIMATED}: {GPUS[0].name}, {what}", values, limit, max if small else min)
    meet = sum(v <= limit if small else v >= limit for v in values.values())
    return found | {"meet": meet}


def print_planned(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each layer: the kernel, microseconds, and how many times the floor that is."""
    for gpu in GPUS:
        print(f"\n{gpu.name}, kernel, us of a call and its multiple of the floor, {ESTIMATED}:")
        print(f"{'M':>12}", *(f"{m:>14}" for m in PREFILL))
        for s in shapes():
            cells = [r for r in rows if (r["gpu"], r["n"], r["k"]) == (gpu.name, s.n, s.k)]
            print(
                f"{s.name:>12}", *(f"{r['kernel'][0]} {r['us']:>7.1f} {r['us'] / r['floor_us']:>4.1f}" for r in cells)
            )
