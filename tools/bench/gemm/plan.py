"""What a run has before it: the layers, their bytes, and how many seconds it takes on an H100."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gemm import timing
from bench.gemm.measure import SMALL_TOKENS, Settings
from bench.gemm.methods import Method, named
from bench.gemm.processes import PROCESSES
from bench.gemm.shapes import Shape, rotations

BANDWIDTH, PEAK, L2_BYTES = 3.0e12, 790e12, 50 << 20
"""Of an H100 SXM, as measured by others: a guess is all that is needed here."""
LAUNCH_US = 4
START_SECONDS = 10
"""Of a process: importing torch, the GPU's context, its clocks."""


def cell_seconds(method: Method, shape: Shape, tokens: int, settings: Settings) -> float:
    """Of all variants: comparing, capturing, replaying."""
    us = LAUNCH_US + method.times_floor * shape.floor_us(tokens, settings.symmetric, BANDWIDTH, PEAK)
    small = tokens <= SMALL_TOKENS
    touched = shape.weight_bytes(settings.symmetric) if small else shape.bytes(tokens, settings.symmetric)
    count = rotations(touched, L2_BYTES, settings.rotate, settings.limit_bytes)
    on_gpu = 2 * us + timing.cell_us(count, us, settings.replays)
    if small:
        on_gpu += timing.cell_us(1, us, settings.replays)
    return method.variants * (method.cell_seconds + on_gpu / 1e6)


def method_seconds(method: Method, planned: Sequence[Shape], settings: Settings) -> float:
    """Of all cells of a method."""
    cells = sum(cell_seconds(method, shape, m, settings) for shape in planned for m in settings.tokens)
    return len(planned) * method.setup_seconds + cells


def show_plan(planned: Sequence[Shape], settings: Settings, names: Sequence[str], allowed: float) -> None:
    """Print cells, bytes and seconds; and a warning where they are more than `allowed`."""
    for shape in planned:
        low, high = (shape.bytes(m, settings.symmetric) / 1e6 for m in (settings.tokens[0], settings.tokens[-1]))
        print(f"{shape.name:>12} group {shape.group_size:<4} {low:8.2f} to {high:8.2f} MB   {', '.join(shape.layers)}")
    methods = named(names)
    seconds = [method_seconds(m, planned, settings) for m in methods]
    total = sum(seconds) + START_SECONDS * sum(any(name in names for name in group) for group in PROCESSES)
    print(f"{len(planned)} shapes x {len(settings.tokens)} x {len(methods)} methods, about {total:.0f} s on an H100: "
          + ", ".join(f"{m.name} {s:.0f}" for m, s in zip(methods, seconds, strict=True)))  # fmt: skip
    if total > allowed:
        print(f"that is more than the {allowed:.0f} s allowed: what does not fit will be under not_run in the record")
