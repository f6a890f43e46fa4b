"""All cells of some methods in one process: pack, compare with double precision, and only then time."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from awq_trt.layout import DTYPES
from bench.gemm.methods import Call, Method, Packed, Tensors, named
from bench.gemm.problem import Problem, make_problem
from bench.gemm.shapes import TOKENS, Shape, rotations
from bench.gemm.timing import FakeTimer, GraphTimer, bandwidth, peak, warm_up

LARGEST_ERROR = {"float16": 5e-3, "bfloat16": 2e-2}
"""Relative to the double-precision product; rounding stays well below, a wrong layout is about 1."""
WORST_PART = 4
"""Times LARGEST_ERROR, for a few features of one token: they differ more than the whole."""

BANDWIDTH_BYTES, PEAK_SIZE = 1 << 30, 8192
SMALL_TOKENS = max(TOKENS)
"""Up to so many tokens all calls have the same x and y, small and still in the cache from the operator before, and a
time with everything in the cache is taken too. Beyond, x and y take turns like the weights."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all processes of a run share."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    dtype: str  # of the layers
    symmetric: bool
    seed: int  # of the numbers drawn
    device: str  # "cuda", or "cpu" where nothing can be timed
    library: str | None  # of the own kernels
    rotate: float  # copies of the weights take this many times the L2 cache
    limit_bytes: int  # but no more than this
    replays: int  # of a graph, at most


def measure(settings: Settings, names: Sequence[str], seconds: float, first: bool) -> Iterator[Row]:
    """The rows of some methods, shape after shape; ends when the seconds are up.

    Yields:
        {"device": ...} where `first`; {"method", "refusal"} where one cannot run at all; then one row for each cell
        and variant: "us" and so on, or "problem" and no times.
    """
    deadline = time.monotonic() + seconds
    on_gpu = settings.device == "cuda"
    timer = GraphTimer(settings.replays) if on_gpu else FakeTimer(settings.replays)
    if on_gpu:
        warm_up(0.5)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 1 << 14
    if first:
        size, width = (BANDWIDTH_BYTES, PEAK_SIZE) if on_gpu else (1 << 16, 64)
        found = bandwidth(timer, settings.device, size), peak(timer, settings.device, DTYPES[settings.dtype], width)
        yield {"device": {"l2_bytes": l2, "bandwidth": found[0], "peak": found[1]}}
    packers = {}
    for method in named(names):
        try:
            library = None if settings.library is None else Path(settings.library)
            packers[method] = importlib.import_module(f"bench.gemm.{method.module}").load(library)
        except Exception as error:
            yield {"method": method.name, "refusal": said(error)}
    for index, shape in enumerate(settings.shapes):
        if not packers or time.monotonic() > deadline:
            return
        problem = make_problem(
            shape, settings.dtype, settings.symmetric, settings.tokens, settings.device, settings.seed + index
        )
        for method, packer in packers.items():
            if time.monotonic() > deadline:
                return
            cast = problem.cast(settings.dtype if settings.dtype in method.dtypes else method.dtypes[0])
            yield from cells(settings, method, partial(packer, cast, settings.tokens), cast, timer, l2, deadline)
            gc.collect()


def cells(
    settings: Settings,
    method: Method,
    packer: Callable[[], list[Packed]],
    problem: Problem,
    timer: GraphTimer,
    l2: int,
    deadline: float,
) -> Iterator[Row]:
    """One method's rows for one layer; an error of the packer is a row for each number of tokens."""
    shape = problem.shape
    same = {"method": method.name, "dtype": problem.dtype, "n": shape.n, "k": shape.k, "group_size": shape.group_size}
    started = time.monotonic()
    try:
        forms = packer()
    except Exception as error:
        yield from ({**same, "m": m, "variant": "", "problem": said(error)} for m in settings.tokens)
        return
    same["pack_seconds"] = round(time.monotonic() - started, 2)
    for packed in forms:
        turns = partial(rotations, l2_bytes=l2, factor=settings.rotate, limit_bytes=settings.limit_bytes)
        copies = packed.copies(turns(packed.bytes))
        for m in settings.tokens:
            touched = packed.bytes + (2 * m * (shape.n + shape.k) if m > SMALL_TOKENS else 0)
            used = copies[: turns(touched)]
            size = {"bytes": packed.bytes, "copies": len(used)}
            for variant, call in packed.variants.items():
                if time.monotonic() > deadline:
                    return
                yield {**same, "m": m, "variant": variant, **size, **cell(call, used, problem, m, timer)}


def cell(call: Call, copies: Sequence[Tensors], problem: Problem, m: int, timer: GraphTimer) -> Row:
    """Errors and times of one call, or its problem; compared once more after the last replay."""
    x, limit = problem.x[:m], LARGEST_ERROR[problem.dtype]
    row: Row = {}
    try:
        y = torch.empty(m, problem.shape.n, dtype=x.dtype, device=x.device)
        others = [(x, y) if m <= SMALL_TOKENS else (x.clone(), torch.empty_like(y)) for _ in copies[1:]]
        for after in (False, True):
            poison(y)
            row["error"], row["worst_part"] = error, worst = problem.errors(call(copies[0], x, y))
            when = "after the replays" if after else "not timed"
            if not error <= limit:  # NaN too
                return {"problem": f"relative error {error:.3g}, {when}; at most {limit}"}
            if not worst <= WORST_PART * limit:
                return {"problem": f"relative error {worst:.3g} in one part, {when}; at most {WORST_PART * limit}"}
            if not after:
                cold = timer.measure([partial(call, t, *xy) for t, xy in zip(copies, [(x, y), *others], strict=True)])
                row |= asdict(cold)
                if m <= SMALL_TOKENS:
                    row["warm_us"] = timer.measure([partial(call, copies[0], x, y)]).us
    except Exception as problem_found:
        return {"problem": said(problem_found)}
    return row


def poison(y: torch.Tensor) -> None:
    """NaN in y, and in the block of memory that a method with an output of its own will be given."""
    y.fill_(torch.nan)
    torch.full_like(y, torch.nan)


def said(error: BaseException) -> str:
    """An error in its own words, short enough for a record."""
    return f"{type(error).__name__}: {error}"[:1000]
