"""Measured times of one method, the law fitted to them, and how far that law is off where it was not fitted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gpu_check import UsageError

from bench.gemm import targets
from bench.gemm.methods import CUBLAS, OWN
from bench.gemm.record import Record, read
from bench.gemm.shapes import Shape
from bench.speed.law import Array, Law, fit

RANGES = ((1, 32), (33, 256), (257, 1 << 30))
"""Numbers of tokens that errors are given for apart: decode, the weights still count, arithmetic alone."""
FEWEST_CELLS = 8
INT4, FLOAT = "int4", "float"
METHODS = {INT4: OWN, FLOAT: CUBLAS}


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes per second. peak: flops per second of the tensor cores in 16 bits."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Table:
    """What a method needs for each product.

    Attributes:
        kind: INT4, or FLOAT for 16 bits. symmetric: no zero points. gpu: it was measured on.
        cells: (shape, tokens) -> microseconds; the shapes as `unnamed` makes them.
    """

    kind: str
    symmetric: bool
    gpu: Gpu
    cells: dict[tuple[Shape, int], float]

    @property
    def tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens measured: no prediction beyond."""
        tokens = [m for _, m in self.cells]
        return min(tokens), max(tokens)

    @cached_property
    def law(self) -> Law:
        """Fitted to all cells."""
        return self.fitted(list(self.cells))

    def us(self, shape: Shape, tokens: int, gpu: Gpu) -> tuple[float, bool]:
        """Microseconds on a GPU, and whether they were measured; another GPU's are scaled as the law says."""
        times = [float(self.law.us(*self.floors(shape, tokens, g))) for g in (gpu, self.gpu)]
        measured = self.cells.get((unnamed(shape, self.kind), tokens))
        return (times[0], False) if measured is None else (measured * times[0] / times[1], True)

    def floors(self, shape: Shape, tokens: int, gpu: Gpu) -> tuple[float, float]:
        """Microseconds of the bytes at the full bandwidth, of the arithmetic at the peak."""
        weights = shape.weight_bytes(self.symmetric) if self.kind == INT4 else 2 * shape.n * shape.k
        touched = weights + 2 * tokens * (shape.n + shape.k)
        return touched / gpu.bandwidth * 1e6, shape.flops(tokens) / gpu.peak * 1e6

    def fitted(self, keys: Sequence[tuple[Shape, int]]) -> Law:
        """The law of some cells; the same in whichever order they were measured."""
        keys = sorted(keys, key=lambda key: (astuple(key[0]), key[1]))  # sums of another order round otherwise
        floors: Array = np.array([self.floors(shape, m, self.gpu) for shape, m in keys])
        return fit(floors[:, 0], floors[:, 1], np.array([self.cells[key] for key in keys]))

    def held_out(self) -> dict[tuple[Shape, int], float]:
        """Relative error of each cell's prediction by a law fitted to all other shapes."""
        errors = {}
        for left_out in {shape for shape, _ in self.cells}:
            law = self.fitted([key for key in self.cells if key[0] != left_out])
            for key in (key for key in self.cells if key[0] == left_out):
                errors[key] = float(law.us(*self.floors(*key, self.gpu))) / self.cells[key] - 1
        return errors

    def errors(self) -> list[dict[str, Any]]:
        """For each range of tokens: {"tokens": [from, to], "cells", "median", "worst"}, of |relative error|."""
        found, held_out = [], self.held_out()
        for low, high in RANGES:
            inside = [(m, abs(error)) for (_, m), error in held_out.items() if low <= m <= high]
            if inside:
                tokens, values = zip(*inside, strict=True)
                median, worst = statistics.median(values), max(values)
                found.append({"tokens": [min(tokens), max(tokens)], "cells": len(values),
                              "median": round(median, 4), "worst": round(worst, 4)})  # fmt: skip
        return found


def tables(paths: Sequence[Path], allow_made_up: bool) -> tuple[dict[str, Table], list[Record]]:
    """INT4 and 16 bits out of the records of one GPU; bandwidth and peak are the means of theirs.

    Args:
        allow_made_up: take a dry run's too.

    Raises:
        UsageError: a record is of a dry run, they do not belong together, or there is too little in them.
    """
    records = [read(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if made_up(record) and not allow_made_up:
            raise UsageError(
                f"{path}: its times are made up by --dry-run: give a GPU's, or --made-up to go on with these"
            )
        for what, of in (("GPU", gpu_names), ("dtype", dtype_of), ("zero points", symmetric_of)):
            if of(record) != of(records[0]):
                raise UsageError(f"{path}: another {what} than in {paths[0]}: give the records of one at a time")
    gpu = Gpu(*(statistics.mean(float(r["device"][what]["used"]) for r in records) for what in ("bandwidth", "peak")))
    symmetric = symmetric_of(records[0])
    found = {kind: Table(kind, symmetric, gpu, {}) for kind in METHODS}
    for kind, method in METHODS.items():
        for path, record in zip(paths, records, strict=True):
            found[kind].cells.update(cells_of(path, record, method))
        cells, shapes = len(found[kind].cells), len({shape for shape, _ in found[kind].cells})
        if cells < FEWEST_CELLS or shapes < 2:
            raise UsageError(
                f"{', '.join(map(str, paths))}: {cells} timed cells of {method}, of {shapes} shapes: {FEWEST_CELLS} of "
                "two shapes are needed; run bench_gemm.py with more of --models, --tokens and --methods"
            )
    return found, records


def cells_of(path: Path, record: Record, method: str) -> dict[tuple[Shape, int], float]:
    """A method's fastest time in each cell.

    Raises:
        UsageError: a row lacks something.
    """
    for row in record["rows"]:
        if row.get("method") == method and "us" in row:
            wrong = [f for f in ("n", "k", "m", "group_size", "us") if not isinstance(row.get(f), int | float)]
            if wrong or "variant" not in row or not (math.isfinite(row["us"]) and row["us"] > 0):
                raise UsageError(f"{path}: a row of {method} without sound n, k, m, group_size, variant or us: {row}")
    fastest = targets.best(record["rows"], (method,))
    kind = INT4 if method == OWN else FLOAT
    return {(unnamed(Shape(r["n"], r["k"], r["group_size"]), kind), r["m"]): r["us"] for r in fastest.values()}


def unnamed(shape: Shape, kind: str) -> Shape:
    """The shape without the names of layers; in 16 bits there are no groups either."""
    return Shape(shape.n, shape.k, shape.group_size if kind == INT4 else shape.k)


def made_up(record: Record) -> bool:
    """Whether it is a dry run's."""
    return record["settings"]["device"] == "cpu"


def gpu_names(record: Record) -> list[str]:
    """Of the GPUs of a record."""
    return [gpu.get("name", "") for gpu in record["hardware"]]


def dtype_of(record: Record) -> str:
    """Of the activations."""
    return record["settings"]["dtype"]


def symmetric_of(record: Record) -> bool:
    """Whether the weights have no zero points."""
    return record["settings"]["symmetric"]
