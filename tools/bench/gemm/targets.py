"""The floor of every row, and what the targets say: met, missed, or not measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from bench.gemm.measure import Row
from bench.gemm.methods import CUBLAS, METHODS, OWN
from bench.gemm.shapes import PREFILL, TOKENS, Shape

SMALL = 16
"""Tokens up to which reading the weights is all that counts."""

SPEEDUPS = {(4096, 4096): 2.6, (4096, 14336): 3.0, (8192, 28672): 3.4}
"""(N, K) -> least speed-up over cuBLAS in 16 bits, up to SMALL tokens."""

LARGE, LARGE_SPEEDUP = 32, 2.0

FRACTIONS_OF_PEAK = {128: 0.70, 256: 0.75}
"""Tokens -> least fraction of the tensor cores' measured peak; for layers of the group size that this was said of."""
PEAK_GROUP = 128
MIDDLE = 256
"""Tokens from 64 up to which the weights still are a good part of the time, so that 4 bits must win."""
PEERS = tuple(m.name for m in METHODS if m.peer)
Cell = tuple[int, int, int]
"""(N, K, tokens)."""
Value = TypeVar("Value")


def allowed_us(floor_us: float) -> float:
    """The time that counts as being at the floor: 15% above it, and 2.5 us for starting a kernel."""
    return 1.15 * floor_us + 2.5


def allowed_at_first_us(floor_us: float) -> float:
    """The same for the fewest tokens of prefill: 30% above the floor, and 3 us."""
    return 1.3 * floor_us + 3


def add_floors(rows: Iterable[Row], shapes: Sequence[Shape], symmetric: bool, bandwidth: float, peak: float) -> None:
    """Put into the timed rows: floor_us, fraction_of_floor (floor over time: 1 is the best there can be), and
    fraction_of_peak (flops per second over the peak)."""
    by_size = {(s.n, s.k): s for s in shapes}
    for row in rows:
        if "us" in row:
            shape = by_size[row["n"], row["k"]]
            row["floor_us"] = round(shape.floor_us(row["m"], symmetric, bandwidth, peak), 3)
            row["fraction_of_floor"] = round(row["floor_us"] / row["us"], 4)
            row["fraction_of_peak"] = round(shape.flops(row["m"]) / (row["us"] * 1e-6 * peak), 4)


def best(rows: Iterable[Row], methods: Sequence[str], variant: str | None = None) -> dict[Cell, Row]:
    """The fastest timed row of some methods in each cell; of one variant only, if it is named."""
    found: dict[Cell, Row] = {}
    for row in rows:
        if row.get("method") in methods and "us" in row and variant in (None, row["variant"]):
            cell = (row["n"], row["k"], row["m"])
            found[cell] = min(found.get(cell, row), row, key=lambda r: r["us"])
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers, one at least."""
    return math.exp(sum(map(math.log, values)) / len(values))


def evaluate(rows: Sequence[Row], tokens: Iterable[int], variant: str | None = None) -> list[dict[str, Any]]:
    """One entry per target: "what", "limit", the value in the worst cell, cells counted, "met" (None: not measured).

    Args:
        tokens: of the run, which decide whether the targets of decoding, of prefill, or both are meant.
        variant: of the own kernels, "default" for what runs unasked; None for the fastest in each cell.
    """
    own, cublas, peer = best(rows, (OWN,), variant), best(rows, (CUBLAS,)), best(rows, PEERS)
    over_cublas = {c: cublas[c]["us"] / r["us"] for c, r in own.items() if c in cublas}
    over_peer = {c: peer[c]["us"] / r["us"] for c, r in own.items() if c in peer}
    errors = {c: r["error"] / cublas[c]["error"] for c, r in own.items()
              if c in cublas and r["dtype"] == cublas[c]["dtype"]}  # fmt: skip
    found = []
    if any(m < PREFILL[0] for m in tokens):
        found += decode_targets(own, up_to(over_cublas, TOKENS[-1]), up_to(over_peer, TOKENS[-1]))
    if any(m >= PREFILL[0] for m in tokens):
        found += prefill_targets(own, since(over_cublas, PREFILL[0]), since(over_peer, PREFILL[0]))
    return [*found, target("error / error of cuBLAS", errors, 1.1, max)]


def decode_targets(
    own: dict[Cell, Row], over_cublas: dict[Cell, float], over_peer: dict[Cell, float]
) -> list[dict[str, Any]]:
    """Up to 32 tokens."""
    slow = {c: r["us"] / allowed_us(r["floor_us"]) for c, r in up_to(own, SMALL).items() if "floor_us" in r}
    found = [target(f"time / (1.15 floor + 2.5 us), up to {SMALL} tokens", slow, 1.0, max)]
    for (n, k), limit in SPEEDUPS.items():
        cells = {c: v for c, v in up_to(over_cublas, SMALL).items() if c[:2] == (n, k)}
        found.append(target(f"cuBLAS / own, {n}x{k}, up to {SMALL} tokens", cells, limit, min))
    large = {c: v for c, v in over_cublas.items() if c[:2] in SPEEDUPS and c[2] == LARGE}
    found.append(target(f"cuBLAS / own, {LARGE} tokens", large, LARGE_SPEEDUP, min))
    found.append(target("best peer / own, every cell", over_peer, 1.0, min))
    return [*found, middle_target("best peer / own, geometric mean", over_peer, geometric_mean, 1.2)]


def prefill_targets(
    own: dict[Cell, Row], over_cublas: dict[Cell, float], over_peer: dict[Cell, float]
) -> list[dict[str, Any]]:
    """From 64 tokens on."""
    first = PREFILL[0]
    slow = {c: r["us"] / allowed_at_first_us(r["floor_us"]) for c, r in own.items()
            if c[2] == first and "floor_us" in r}  # fmt: skip
    found = [target(f"time / (1.3 floor + 3 us), {first} tokens", slow, 1.0, max)]
    for m, limit in FRACTIONS_OF_PEAK.items():
        fractions = {c: r["fraction_of_peak"] for c, r in own.items()
                     if c[2] == m and "fraction_of_peak" in r and r["group_size"] == PEAK_GROUP}  # fmt: skip
        found.append(target(f"fraction of the peak, {m} tokens, group {PEAK_GROUP}", fractions, limit, min))
    large = since(over_cublas, MIDDLE + 1)
    found += [
        target(f"cuBLAS / own, {first} to {MIDDLE} tokens", up_to(over_cublas, MIDDLE), 1.3, min),
        target(f"cuBLAS / own, beyond {MIDDLE} tokens, every cell", large, 0.95, min),
        middle_target(f"cuBLAS / own, beyond {MIDDLE} tokens, median", large, statistics.median, 1.0),
        target(f"best peer / own, from {first} tokens, every cell", over_peer, 0.95, min),
        middle_target(f"best peer / own, from {first} tokens, geometric mean", over_peer, geometric_mean, 1.1),
    ]
    return found


def up_to(cells: dict[Cell, Value], tokens: int) -> dict[Cell, Value]:
    """The cells of so many tokens at most."""
    return {c: v for c, v in cells.items() if c[2] <= tokens}


def since(cells: dict[Cell, Value], tokens: int) -> dict[Cell, Value]:
    """The cells of so many tokens at least."""
    return {c: v for c, v in cells.items() if c[2] >= tokens}


def target(what: str, values: dict[Cell, float], limit: float, worst: Callable[..., Cell]) -> dict[str, Any]:
    """One line: the worst value (`worst` is max where small is good, min where large is) against its limit."""
    if not values:
        return {"what": what, "limit": limit, "cells": 0, "met": None}
    cell = worst(values, key=values.__getitem__)
    met = values[cell] <= limit if worst is max else values[cell] >= limit
    return {
        "what": what,
        "limit": limit,
        "cells": len(values),
        "value": round(values[cell], 3),
        "at": list(cell),
        "met": met,
    }


def middle_target(
    what: str, values: dict[Cell, float], middle: Callable[[list[float]], float], limit: float
) -> dict[str, Any]:
    """The same for the median or the geometric mean over all cells."""
    if not values:
        return {"what": what, "limit": limit, "cells": 0, "met": None}
    found = middle(list(values.values()))
    return {"what": what, "limit": limit, "cells": len(values), "value": round(found, 3), "met": found >= limit}


def line(entry: dict[str, Any]) -> str:
    """A target for people."""
    verdict = {True: "met", False: "MISSED", None: "not measured"}[entry["met"]]
    if entry["met"] is None:
        return f"{verdict}: {entry['what']} (limit {entry['limit']})"
    at = "" if "at" not in entry else " at {}x{}, {} tokens".format(*entry["at"])
    return f"{verdict}: {entry['what']}: {entry['value']} (limit {entry['limit']}){at}; {entry['cells']} cells"
