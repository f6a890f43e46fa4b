"""The clock: replays of a CUDA graph between events; and the bandwidth that the floor is counted with."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol

import torch

MIN_CALLS = 16
"""Calls in one graph at least, so that the start of a replay and the events' resolution are spread over many."""

WARM_REPLAYS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over replays and the 10th percentile; what was replayed how often."""

    us: float
    p10_us: float
    calls: int
    replays: int


class Timer(Protocol):
    """Something that times calls."""

    def measure(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Time calls that are made one after the other, over and over."""


def timing_of(milliseconds: Sequence[float], calls: int) -> Timing:
    """A Timing out of what each replay of so many calls took."""
    each = sorted(1e3 * ms / calls for ms in milliseconds)
    tenth = each[max(0, math.ceil(len(each) / 10) - 1)]
    return Timing(round(statistics.median(each), 3), round(tenth, 3), calls, len(each))


def repeated(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """All calls, as many times over as it takes to have MIN_CALLS."""
    return list(calls) * math.ceil(MIN_CALLS / len(calls))


@dataclass(frozen=True)
class GraphTimer:
    """Captures the calls in one CUDA graph and replays it."""

    replays: int = 30

    def measure(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Time calls; what they allocate and compile on first use happens before the capture."""
        calls, stream, graph = repeated(calls), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:MIN_CALLS]:
                call()
        torch.cuda.synchronize()
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
        return timing_of(self._replay(graph), len(calls))

    def _replay(self, graph: torch.cuda.CUDAGraph) -> list[float]:
        """Milliseconds of each replay; all are queued before the first is waited for."""
        for _ in range(WARM_REPLAYS):
            graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]


@dataclass(frozen=True)
class FakeTimer:
    """For machines without a GPU: makes every call once and says what it would have counted, a microsecond a call."""

    replays: int = 30

    def measure(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Make each call once."""
        calls = repeated(calls)
        for call in calls:
            call()
        return timing_of([1e-3 * len(calls)] * self.replays, len(calls))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of the GPU's memory: a copy (bytes read and written), a pass that only reads, the larger."""

    copy: float
    read: float
    used: float
    by: str


def bandwidth(timer: Timer, device: str, size: int) -> dict[str, object]:
    """Measure both on a buffer of `size` bytes, a few times the L2 cache at least; a Bandwidth as a dict."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / timer.measure([lambda: target.copy_(source)]).us * 1e6
    passes = [timer.measure([lambda: source.sum()]), timer.measure([lambda: source.amax()])]
    read = size / min(p.us for p in passes) * 1e6
    return asdict(Bandwidth(copy, read, max(copy, read), "copy" if copy > read else "read"))


def warm_up(seconds: float) -> None:
    """Keep the GPU busy until its clocks have risen."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    spent = 0.0
    while spent < seconds:
        start.record()
        for _ in range(50):
            a @ a
        end.record()
        torch.cuda.synchronize()
        spent += start.elapsed_time(end) / 1e3
