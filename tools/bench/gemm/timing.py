"""The clock: replays of a CUDA graph between events; and the bandwidth and peak that the floor is counted with."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

MIN_CALLS = 16
"""Calls in one graph, so that the start of a replay and the events' resolution are spread over many; fewer where they
take longer than GRAPH_US."""

GRAPH_US = 10_000
CELL_US = 60_000
"""All replays together take about so long, but there are FEWEST_REPLAYS."""
FEWEST_REPLAYS = 7


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    us: float  # median over the replays
    p10_us: float  # 10th percentile
    calls: int  # in a graph
    replays: int


def timing_of(milliseconds: Sequence[float], calls: int) -> Timing:
    """A Timing out of what each replay of so many calls took."""
    each = sorted(1e3 * ms / calls for ms in milliseconds)
    tenth = each[max(0, math.ceil(len(each) / 10) - 1)]
    return Timing(round(statistics.median(each), 3), round(tenth, 3), calls, len(each))


def repeats(count: int, us: float) -> int:
    """How often a graph goes through `count` calls of `us` microseconds each: to MIN_CALLS, or to GRAPH_US."""
    return max(1, min(math.ceil(MIN_CALLS / count), int(GRAPH_US / max(count * us, 1))))


def replays_for(graph_us: float, most: int) -> int:
    """How often to replay a graph of so many microseconds: `most`, or what CELL_US and FEWEST_REPLAYS say."""
    return min(most, max(FEWEST_REPLAYS, int(CELL_US / max(graph_us, 1))))


@dataclass(frozen=True)
class GraphTimer:
    """Captures the calls in one CUDA graph and replays it."""

    replays: int = 30  # at most

    def measure(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Time calls; what they allocate and compile on first use happens before the capture."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:MIN_CALLS]:
                call()
            (one,) = timed([calls[0]])
        calls = list(calls) * repeats(len(calls), 1e3 * one)
        with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage each time: longer than the timing
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the call's own error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        (once,) = timed([graph.replay])
        replays = replays_for(1e3 * once, self.replays)
        for _ in range(math.ceil(replays / 10)):  # to warm up
            graph.replay()
        return timing_of(timed([graph.replay] * replays), len(calls))


class FakeTimer(GraphTimer):
    """For machines without a GPU: makes every call once and says what it would have counted, a microsecond a call."""

    def measure(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Make each call once."""
        calls = list(calls) * repeats(len(calls), 1.0)
        for call in calls:
            call()
        return timing_of([1e-3 * len(calls)] * replays_for(len(calls), self.replays), len(calls))


def timed(steps: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each step on the current stream; all are queued before the first is waited for."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    marks[0].record()
    for step, mark in zip(steps, marks[1:], strict=True):
        step()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def bandwidth(timer: GraphTimer, device: str, size: int) -> dict[str, object]:
    """Bytes per second of the GPU's memory on a buffer of `size` bytes, a few times the L2 cache at least: a copy
    (bytes read and written), a pass that only reads, and the larger of the two: {"copy", "read", "used", "by"}."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / timer.measure([lambda: target.copy_(source)]).us * 1e6
    passes = [timer.measure([lambda: source.sum()]), timer.measure([lambda: source.amax()])]
    read = size / min(p.us for p in passes) * 1e6
    return {"copy": copy, "read": read, "used": max(copy, read), "by": "copy" if copy > read else "read"}


def peak(timer: GraphTimer, device: str, dtype: torch.dtype, size: int) -> dict[str, object]:
    """Flops per second of a product of two random matrices [size, size] by cuBLAS, the median: {"used", "by"}.

    Random, because a GPU that multiplies zeros draws less power and clocks higher.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    us = timer.measure([lambda: torch.mm(a, b.t(), out=out)]).us
    return {"used": 2 * size**3 / us * 1e6, "by": f"{size}x{size}x{size}, {str(dtype).removeprefix('torch.')}"}


def warm_up(seconds: float) -> None:
    """Keep the GPU busy until its clocks have risen."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    out, spent = torch.empty_like(a), 0.0
    while spent < seconds:
        spent += sum(timed([lambda: torch.mm(a, a, out=out)] * 50)) / 1e3
