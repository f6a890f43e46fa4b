"""The floor of every row, and what the targets say: met, missed, or not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.gemm.measure import Row
from bench.gemm.methods import CUBLAS, METHODS, OWN
from bench.gemm.shapes import Shape

SMALL = 16
"""Tokens up to which reading the weights is all that counts."""

SPEEDUPS = {(4096, 4096): 2.6, (4096, 14336): 3.0, (8192, 28672): 3.4}
"""(N, K) -> least speed-up over cuBLAS in 16 bits, up to SMALL tokens."""

LARGE, LARGE_SPEEDUP = 32, 2.0
PEERS = tuple(m.name for m in METHODS if m.peer)
Cell = tuple[int, int, int]
"""(N, K, tokens)."""


def allowed_us(floor_us: float) -> float:
    """The time that counts as being at the floor: 15% above it, and 2.5 us for starting a kernel."""
    return 1.15 * floor_us + 2.5


def add_floors(rows: Iterable[Row], shapes: Sequence[Shape], symmetric: bool, bandwidth: float) -> None:
    """Put floor_us and fraction_of_floor (floor over time: 1 is the best there can be) into the timed rows."""
    by_size = {(s.n, s.k): s for s in shapes}
    for row in rows:
        if "us" in row:
            row["floor_us"] = round(by_size[row["n"], row["k"]].floor_us(row["m"], symmetric, bandwidth), 3)
            row["fraction_of_floor"] = round(row["floor_us"] / row["us"], 4)


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


def evaluate(rows: Sequence[Row], variant: str | None = None) -> list[dict[str, Any]]:
    """One entry per target: "what", "limit", the value in the worst cell, cells counted, "met" (None: not measured).

    Args:
        variant: of the own kernels, "default" for what runs unasked; None for the fastest in each cell.
    """
    own, cublas, peer = best(rows, (OWN,), variant), best(rows, (CUBLAS,)), best(rows, PEERS)
    slow = {c: r["us"] / allowed_us(r["floor_us"]) for c, r in own.items() if c[2] <= SMALL and "floor_us" in r}
    over_cublas = {c: cublas[c]["us"] / r["us"] for c, r in own.items() if c in cublas}
    over_peer = {c: peer[c]["us"] / r["us"] for c, r in own.items() if c in peer}
    errors = {c: r["error"] / cublas[c]["error"] for c, r in own.items()
              if c in cublas and r["dtype"] == cublas[c]["dtype"]}  # fmt: skip
    found = [target(f"time / (1.15 floor + 2.5 us), up to {SMALL} tokens", slow, 1.0, max)]
    for (n, k), limit in SPEEDUPS.items():
        cells = {c: v for c, v in over_cublas.items() if c[:2] == (n, k) and c[2] <= SMALL}
        found.append(target(f"cuBLAS / own, {n}x{k}, up to {SMALL} tokens", cells, limit, min))
    large = {c: v for c, v in over_cublas.items() if c[:2] in SPEEDUPS and c[2] == LARGE}
    found.append(target(f"cuBLAS / own, {LARGE} tokens", large, LARGE_SPEEDUP, min))
    found.append(target("best peer / own, every cell", over_peer, 1.0, min))
    found.append(mean_target("best peer / own, geometric mean", over_peer, 1.2))
    found.append(target("error / error of cuBLAS", errors, 1.1, max))
    return found


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


def mean_target(what: str, values: dict[Cell, float], limit: float) -> dict[str, Any]:
    """The same for the geometric mean over all cells."""
    if not values:
        return {"what": what, "limit": limit, "cells": 0, "met": None}
    mean = geometric_mean(list(values.values()))
    return {"what": what, "limit": limit, "cells": len(values), "value": round(mean, 3), "met": mean >= limit}


def line(entry: dict[str, Any]) -> str:
    """A target for people."""
    verdict = {True: "met", False: "MISSED", None: "not measured"}[entry["met"]]
    if entry["met"] is None:
        return f"{verdict}: {entry['what']} (limit {entry['limit']})"
    at = "" if "at" not in entry else " at {}x{}, {} tokens".format(*entry["at"])
    return f"{verdict}: {entry['what']}: {entry['value']} (limit {entry['limit']}){at}; {entry['cells']} cells"
