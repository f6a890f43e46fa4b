"""Times that were measured on a GPU, as tables: records of tools/bench_gemm.py, and what out.trtexec.sh leaves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.svg_chart import Chart, Series, chart

OWN, FLOAT = "awq_trt", "cublas"
"""Methods of a record: the plugin's kernels, and cuBLAS in 16 bits."""
SLOWEST = 20
"""Layers of a profile that are shown."""


@dataclass(frozen=True)
class Cell:
    """What a cell of a table shows, and the number it is sorted by (None: by its text)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """caption, names of the columns, rows of cells; the first cell of a row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Speed:
    """One file of measurements. notes: where and how, in words. charts: [] where there is nothing to draw."""

    title: str
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...] = ()


def read_speeds(paths: Sequence[Path]) -> list[Speed]:
    """Tables of each file.

    Raises:
        AwqTrtError: a file is missing, not JSON, or none of those that this reads.
    """
    return [_speed(path) for path in paths]


def _speed(path: Path) -> Speed:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise AwqTrtError(f"{path}: cannot be read ({error.strerror}). Give a file that holds measurements.") from error
    except ValueError as error:
        raise AwqTrtError(f"{path}: not JSON ({error}). Give a file that holds measurements.") from error
    try:
        if isinstance(content, dict):
            return _gemm(path, content)
        if "computeMs" in content[0]:
            return _times(path, content)
        return _layers(path, content[1:])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise AwqTrtError(
            f"{path}: neither a record of tools/bench_gemm.py nor a .times.json or .layers.json of a plan's "
            f"trtexec.sh ({type(error).__name__}: {error})."
        ) from error


def _gemm(path: Path, record: dict[str, Any]) -> Speed:
    """16 bits against INT4 for each shape and number of tokens."""
    settings = record["settings"]
    where = ", ".join(gpu.get("name", "") for gpu in record["hardware"]) or "no GPU"
    notes = [f"{where}, {settings['dtype']}, {record['date'][:10]}; median over replays of a CUDA graph, in µs."]
    if settings["device"] == "cpu":
        notes.append("Made up: a dry run on a CPU, by an invented clock.")
    if "device" in record:
        bandwidth, peak = (record["device"][what]["used"] for what in ("bandwidth", "peak"))
        notes.append(f"Measured in the same run: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.0f} TFLOP/s in 16 bits.")
    own, plain = _best(record["rows"], OWN), _best(record["rows"], FLOAT)
    tables, series = [], []
    for number, shape in enumerate(settings["shapes"]):
        size = (shape["n"], shape["k"])
        caption = f"{size[0]} × {size[1]}, group {shape['group_size']}: {', '.join(shape['layers'])}"
        rows = list(_gemm_rows(size, settings["tokens"], own, plain))
        if rows:
            tables.append(Table(caption, ("tokens", "16 bits", "INT4", "times faster"), tuple(rows)))
        cells = [(*size, m) for m in settings["tokens"]]
        both = [(c[-1], plain[c] / own[c]) for c in cells if c in own and c in plain]
        if len(both) > 1:
            series.append(Series(f"{size[0]} × {size[1]}", [m for m, _ in both], [r for _, r in both], number))
    drawn = chart("times faster than 16 bits", "tokens", series, log_x=True, mark=(1.0, "as fast as 16 bits"))
    return Speed(path.name, tuple(notes), tuple(tables), (drawn,) if drawn else ())


def _gemm_rows(
    size: tuple[int, int], tokens: Sequence[int], own: dict[tuple[int, ...], float], plain: dict[tuple[int, ...], float]
) -> Iterator[tuple[Cell, ...]]:
    for m in tokens:
        times = [plain.get((*size, m)), own.get((*size, m))]
        if times == [None, None]:
            continue
        ratio = times[0] / times[1] if times[0] is not None and times[1] is not None else None
        yield Cell(str(m), m), *(number_cell(t, ".1f") for t in times), number_cell(ratio, ".2f")


def _best(rows: Sequence[dict[str, Any]], method: str) -> dict[tuple[int, ...], float]:
    """(n, k, tokens) -> microseconds of a method's fastest variant."""
    found: dict[tuple[int, ...], float] = {}
    for row in rows:
        if row["method"] == method and "us" in row and "problem" not in row:
            cell = (row["n"], row["k"], row["m"])
            found[cell] = min(row["us"], found.get(cell, row["us"]))
    return found


def _times(path: Path, runs: Sequence[dict[str, float]]) -> Speed:
    """What `--exportTimes` of trtexec wrote."""
    rows = []
    for name, key in (("on the GPU", "computeMs"), ("with transfers", "latencyMs")):
        values = sorted(run[key] for run in runs)
        cuts = [values[math.ceil(q * len(values)) - 1] for q in (0.5, 0.9, 0.99)]
        rows.append((Cell(name), *(number_cell(v, ".3f") for v in (values[0], *cuts, statistics.fmean(values)))))
    columns = ("ms of a call", "smallest", "median", "90 %", "99 %", "mean")
    return Speed(path.name, (f"{len(runs)} calls by trtexec.",), (Table("Times of a call", columns, tuple(rows)),))


def _layers(path: Path, layers: Sequence[dict[str, Any]]) -> Speed:
    """What `--exportProfile` of trtexec wrote: the slowest layers."""
    total = sum(layer["averageMs"] for layer in layers)
    slowest = sorted(layers, key=lambda layer: -layer["averageMs"])[:SLOWEST]
    rows = tuple(
        (
            Cell(str(x["name"])),
            number_cell(x["averageMs"], ".4f"),
            number_cell(x["medianMs"], ".4f"),
            number_cell(100 * x["averageMs"] / total, ".1f"),
        )
        for x in slowest
    )
    notes = (f"{len(layers)} layers take {total:.3f} ms; the profiler itself takes time between them.",)
    columns = ("layer", "mean ms", "median ms", "%")
    return Speed(path.name, notes, (Table(f"The {len(rows)} slowest layers", columns, rows),))


def number_cell(value: float | None, form: str) -> Cell:
    """The cell of a number in a form like ".2f", or of one that is not known."""
    return Cell("-", -1.0) if value is None else Cell(format(value, form), float(value))
