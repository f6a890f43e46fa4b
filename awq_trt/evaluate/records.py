"""Times measured on a GPU, as tables for the page: records of tools/bench_gemm.py, and what out.trtexec.sh leaves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awq_trt.errors import AwqTrtError, brief
from awq_trt.schema import read_json

Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Caption, names of the columns, rows; the first cell of a row names it."""

ADVICE = "Give a file that bench_gemm.py, or a plan's trtexec.sh wrote."
SLOWEST = 20  # layers of a profile that are shown


def read_record(path: Path) -> tuple[str, list[str], list[Table]]:
    """A file of measurements: its name, notes on where and how it was measured, and tables.

    Raises:
        AwqTrtError: the file is missing, not JSON, or of another kind.
    """
    try:
        content = read_json(path, list[Any] | dict[str, Any], ADVICE)
        if isinstance(content, dict):
            return path.name, *_gemm(content)
        return path.name, *(_calls(content) if "computeMs" in content[0] else _layers(content[1:]))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise AwqTrtError(
            f"{path}: cannot be read as a record of tools/bench_gemm.py, or a .times.json or .layers.json of a plan's "
            f"trtexec.sh ({brief(error)}). {ADVICE}"
        ) from error


def _gemm(record: dict[str, Any]) -> tuple[list[str], list[Table]]:
    """16 bits (cuBLAS) against INT4 (the plugin's kernels) for each shape and number of tokens."""
    settings = record["settings"]
    where = ", ".join(gpu.get("name", "") for gpu in record["hardware"]) or "no GPU"
    notes = [f"{where}, {settings['dtype']}, {record['date'][:10]}; median over replays of a CUDA graph, in µs."]
    if settings["device"] == "cpu":
        notes.append("Made up: a dry run on a CPU, by an invented clock.")
    if "device" in record:
        bandwidth, peak = (record["device"][what]["used"] for what in ("bandwidth", "peak"))
        notes.append(f"Measured in the same run: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.0f} TFLOP/s in 16 bits.")
    best: dict[tuple[Any, ...], float] = {}  # (method, n, k, tokens) -> µs of its fastest variant
    for row in record["rows"]:
        if "us" in row and "problem" not in row:
            key = (row["method"], row["n"], row["k"], row["m"])
            best[key] = min(row["us"], best.get(key, math.inf))
    tables: list[Table] = []
    for shape in settings["shapes"]:
        n, k, rows = shape["n"], shape["k"], []
        for m in settings["tokens"]:
            float16, int4 = (best.get((method, n, k, m)) for method in ("cublas", "awq_trt"))
            if float16 or int4:
                ratio = f"{float16 / int4:.2f}" if float16 and int4 else "-"
                rows.append((m, *(f"{us:.1f}" if us else "-" for us in (float16, int4)), ratio))
        caption = f"{n} × {k}, group {shape['group_size']}: {', '.join(shape['layers'])}"
        tables += [(caption, ("tokens", "16 bits", "INT4", "times faster"), rows)] if rows else []
    return notes, tables


def _calls(runs: Sequence[dict[str, float]]) -> tuple[list[str], list[Table]]:
    """What `--exportTimes` of trtexec wrote: milliseconds of every call."""
    rows = []
    for name, key in (("on the GPU", "computeMs"), ("with transfers", "latencyMs")):
        values = sorted(run[key] for run in runs)
        cuts = [values[math.ceil(q * len(values)) - 1] for q in (0.5, 0.9, 0.99)]
        rows.append([name, *(f"{v:.3f}" for v in (values[0], *cuts, statistics.fmean(values)))])
    columns = ("ms of a call", "smallest", "median", "90 %", "99 %", "mean")
    return [f"{len(runs)} calls by trtexec."], [("Times of a call", columns, rows)]


def _layers(layers: Sequence[dict[str, Any]]) -> tuple[list[str], list[Table]]:
    """What `--exportProfile` of trtexec wrote: the slowest layers."""
    total = sum(x["averageMs"] for x in layers)
    rows = [
        (x["name"], f"{x['averageMs']:.4f}", f"{x['medianMs']:.4f}", f"{100 * x['averageMs'] / total:.1f}")
        for x in sorted(layers, key=lambda x: -x["averageMs"])[:SLOWEST]
    ]
    note = f"{len(layers)} layers take {total:.3f} ms; the profiler itself takes time between them."
    return [note], [(f"The {len(rows)} slowest layers", ("layer", "mean ms", "median ms", "%"), rows)]
