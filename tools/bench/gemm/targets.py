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

FRACTIONS_OF_PEAK = {128: 0.70, 256: 0.75}
"""Tokens -> least fraction of the tensor cores' measured peak; for layers of the group size that this was said of."""
PEAK_GROUP = 128
MIDDLE = 256
"""Tokens from 64 up to which the weights still are a good part of the time, so that 4 bits must win."""
PEERS = tuple(m.name for m in METHODS if m.peer)
Cell = tuple[int, int, int]
"""(N, K, tokens)."""
Value = TypeVar("Value")


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
    timed, small, few, first = {c: r for c, r in own.items() if "floor_us" in r}, SMALL, TOKENS[-1], PREFILL[0]
    found = []
    if any(m < first for m in tokens):
        slow = {c: r["us"] / (1.15 * r["floor_us"] + 2.5) for c, r in between(timed, 1, small).items()}
        headline = {c: v for c, v in over_cublas.items() if c[:2] in SPEEDUPS}
        found += [
            target(f"time / (1.15 floor + 2.5 us), up to {small} tokens", slow, 1.0, max),
            *(target(f"cuBLAS / own, {n}x{k}, up to {small} tokens",
                     {c: v for c, v in between(headline, 1, small).items() if c[:2] == (n, k)}, limit)
              for (n, k), limit in SPEEDUPS.items()),
            target(f"cuBLAS / own, {few} tokens", between(headline, few, few), 2.0),
            target("best peer / own, every cell", between(over_peer, 1, few), 1.0),
            target("best peer / own, geometric mean", between(over_peer, 1, few), 1.2, geometric_mean),
        ]  # fmt: skip
    if any(m >= first for m in tokens):
        slow = {c: r["us"] / (1.3 * r["floor_us"] + 3) for c, r in between(timed, first, first).items()}
        of_peak = {c: r["fraction_of_peak"] for c, r in timed.items() if r["group_size"] == PEAK_GROUP}
        many, peers = between(over_cublas, MIDDLE + 1), between(over_peer, first)
        found += [
            target(f"time / (1.3 floor + 3 us), {first} tokens", slow, 1.0, max),
            *(target(f"fraction of the peak, {m} tokens, group {PEAK_GROUP}", between(of_peak, m, m), limit)
              for m, limit in FRACTIONS_OF_PEAK.items()),
            target(f"cuBLAS / own, {first} to {MIDDLE} tokens", between(over_cublas, first, MIDDLE), 1.3),
            target(f"cuBLAS / own, beyond {MIDDLE} tokens, every cell", many, 0.95),
            target(f"cuBLAS / own, beyond {MIDDLE} tokens, median", many, 1.0, statistics.median),
            target(f"best peer / own, from {first} tokens, every cell", peers, 0.95),
            target(f"best peer / own, from {first} tokens, geometric mean", peers, 1.1, geometric_mean),
        ]  # fmt: skip
    return [*found, target("error / error of cuBLAS", errors, 1.1, max)]


def between(cells: dict[Cell, Value], low: int, high: float = math.inf) -> dict[Cell, Value]:
    """The cells of `low` to `high` tokens."""
    return {c: v for c, v in cells.items() if low <= c[2] <= high}


def target(what: str, values: dict[Cell, float], limit: float, judge: Callable[..., Any] = min) -> dict[str, Any]:
    """One target: the worst value against its limit, or a median or mean of all.

    Args:
        judge: min: every value must be at least `limit`; max: at most; else what makes one number of all the values,
            which must be at least `limit`.
    """
    entry = {"what": what, "limit": limit, "cells": len(values), "met": None}
    if not values:
        return entry
    if judge in (min, max):
        cell = judge(values, key=values.__getitem__)
        value, entry["at"] = values[cell], list(cell)
    else:
        value = judge(list(values.values()))
    return entry | {"value": round(value, 3), "met": value <= limit if judge is max else value >= limit}


def line(entry: dict[str, Any]) -> str:
    """A target for people."""
    if entry["met"] is None:
        return f"not measured: {entry['what']} (limit {entry['limit']})"
    at = "" if "at" not in entry else " at {}x{}, {} tokens".format(*entry["at"])
    verdict = "met" if entry["met"] else "MISSED"
    return f"{verdict}: {entry['what']}: {entry['value']} (limit {entry['limit']}){at}; {entry['cells']} cells"
