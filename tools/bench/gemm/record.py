"""The record of a run: begun, finished, written as it grows, read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_check
import torch

from bench import machine
from bench.gemm import targets
from bench.gemm.measure import Settings
from bench.gemm.method_awq_trt import LIBRARY
from bench.gemm.methods import METHODS

Record = dict[str, Any]


def new_record(settings: Settings, seconds: float) -> Record:
    """The record before anything is measured."""
    peers = machine.versions(("triton", *(m.package.split("==")[0] for m in METHODS if m.package)))
    return {
        "date": machine.now(),
        "hardware": machine.gpus(),
        "versions": gpu_check.versions() | peers | {"cuda of torch": str(torch.version.cuda)},
        "settings": asdict(settings) | {"library": settings.library and LIBRARY, "seconds": seconds},
        "refusals": {},
        "rows": [],
    }


def finish(record: Record, settings: Settings, names: Sequence[str]) -> None:
    """Add what follows from the rows: floors, targets, and the cells that were not run."""
    rows = record["rows"]
    if "device" in record:
        bandwidth, peak = (record["device"][what]["used"] for what in ("bandwidth", "peak"))
        targets.add_floors(rows, settings.shapes, settings.symmetric, bandwidth, peak)
    variants = {"best": None, "default": "default"}
    record["targets"] = {title: targets.evaluate(rows, settings.tokens, v) for title, v in variants.items()}
    seen = {(r["method"], r["n"], r["k"], r["m"]) for r in rows}
    planned = [(name, s.n, s.k, m) for name in names for s in settings.shapes for m in settings.tokens]
    never = set(record["refusals"]) - {r["method"] for r in rows}
    record["not_run"] = [list(p) for p in planned if p not in seen and p[0] not in never]


def write(record: Record, path: Path) -> None:
    """Replace the file at once, so that there is a whole one at any time; rows and cells take a line each."""
    lists = {name: record[name] for name in ("rows", "not_run")}
    text = json.dumps(record | {name: [] for name in lists}, indent=1, allow_nan=False)
    for name, entries in lists.items():
        lines = ",\n".join("  " + json.dumps(entry, allow_nan=False) for entry in entries)
        text = text.replace(f'\n "{name}": []', f'\n "{name}": [\n{lines}\n ]')
    machine.write_text(path, text + "\n")


def read(path: Path) -> Record:
    """A record that `write` wrote.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise gpu_check.UsageError(f"{path}: cannot be read as JSON: {error}") from error
    wanted = ("date", "hardware", "settings", "device", "rows", "targets", "refusals", "not_run", "seconds")
    missing = [name for name in wanted if not isinstance(record, dict) or name not in record]
    missing += [] if missing else [f"device.{name}" for name in ("bandwidth", "peak") if name not in record["device"]]
    if missing:
        raise gpu_check.UsageError(
            f"{path}: no {', '.join(missing)} in it: give a file that this bench_gemm.py --output has written"
        )
    return record
