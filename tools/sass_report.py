"""Read the machine code of the built kernels, and predict from it how long their calls take: one JSON file, and tables.

    python tools/sass_report.py --output report.json

Needs no GPU. Per architecture: registers, memory, loads; what each kernel issues for a unit of weights in the steady
state of its main loop. Per GPU, layer and number of tokens: the time from those instructions, the bytes and the
plugin's own division of the work; from 64 tokens on, the time that the plugin's planner estimates. **Everything about
time is predicted, not measured.**

The library comes from the installed package, or from `--library DIR`; cuobjdump and nvdisasm from NVIDIA's wheels (the
extra 'test') or from PATH.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import gpu_check
from bench.gemm import targets
from bench.gemm.method_awq_trt import LIBRARY
from bench.gemm.shapes import HEADLINE, TOKENS, Shape, shapes
from bench.sass import prediction, prefill
from bench.sass.listing import ARCHITECTURES, PIPES, Kernel, count, read_library, versions
from bench.sass.paths import Steady, steady, steady_unit, strip_tiles
from bench.sass.prediction import DEFAULT_TACTIC, GPUS, TACTICS, Cell, Gpu, Plan, Prediction, ask_planner, predict

from awq_trt.engine.plugin import library_version

NOT_MEASURED = "predicted, not measured"
GROUP_SIZE = {4: 32, 2: 64, 1: 128}
"""Parts of a unit that are scaled separately -> group size; 128 stands for all larger ones."""

LIMITS = {"80": (64, 164), "86": (48, 100), "89": (48, 100), "90": (64, 228), "90a": (64, 228), "100": (64, 228),
          "120": (48, 100)}  # fmt: skip
"""Architecture -> warps and KiB of shared memory of a multiprocessor (CUDA programming guide, compute capabilities)."""

TABLES = ("kernels", "loops", "predicted", "prefill_loops", "prefill_clocks", "prefill")
"""Of the record."""

Loops = dict[tuple[str, str, int], dict[int, Steady]]
"""(architecture, dtype, token tiles) -> parts of a unit -> its path."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON to write")
    p.add_argument("--library", type=Path, metavar="DIR", help="folder with the libraries and the host program")
    return p


def resident_warps(kernel: Kernel) -> int:
    """Warps of a multiprocessor that registers and static shared memory allow, in blocks of the launch bound."""
    warps, kib = LIMITS[kernel.sm]
    block = kernel.threads // 32
    by_registers = 4 * (16384 // (-(-kernel.registers // 8) * 8 * 32))
    counted = int(kernel.sm.rstrip("a")) >= 90  # what the system takes for each block
    reserved = 0 if counted else 1024
    return block * min(by_registers // block, warps // block, kib * 1024 // (kernel.shared + reserved or 1))


def kernel_row(kernel: Kernel) -> dict[str, Any]:
    """Resources and counts of one kernel."""
    return {
        "sm": kernel.sm,
        "kernel": kernel.title,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "local_bytes": kernel.local,
        "shared": kernel.shared,
        "threads": kernel.threads,
        "warps": resident_warps(kernel),
        "instructions": len(kernel.code),
    } | count(kernel.code)


def loop_rows(loops: Loops) -> list[dict[str, Any]]:
    """Issue slots for a unit of weights, by pipe; "wavefronts" are 128 bytes of shared memory."""
    rows = []
    for (architecture, dtype, token_tiles), by_parts in loops.items():
        for parts, unit in by_parts.items():
            pipes = unit.by_pipe()
            row = {"sm": architecture, "dtype": dtype, "token_tiles": token_tiles, "group_size": GROUP_SIZE.get(parts)}
            weights = 2048 * strip_tiles(token_tiles)
            row |= {"weights": weights, "slots": unit.slots, "per_weight": round(32 * unit.slots / weights, 3)}
            row |= {name: pipes[name] for name in PIPES}
            rows.append(row | {"wavefronts": unit.wavefronts(), "unknown": " ".join(unit.unknown())})
    return rows


def decode_loops(kernels: Sequence[Kernel]) -> Loops:
    """The paths of the decode kernels."""
    decode = [k for k in kernels if k.family == "DecodeKernel"]
    return {(k.sm, k.dtype, k.numbers[-1]): steady(k.code, k.numbers[-1]) for k in decode}


def prefill_units(kernels: Sequence[Kernel]) -> list[prefill.Unit]:
    """The paths of the kernels for many tokens."""
    return [(k, steady_unit(k.code)) for k in kernels if k.family in ("GemmKernel", "WgmmaKernel")]


def predicted_row(shape: Shape, tokens: int, gpu: Gpu, times: dict[int, tuple[Plan, Prediction]]) -> dict[str, Any]:
    """One cell: with the default tactic, and with the one that is predicted to be fastest."""
    plan, found = times[DEFAULT_TACTIC]
    best = min(times, key=lambda tactic: times[tactic][1].us)
    floor = shape.floor_us(tokens, symmetric=False, bandwidth=gpu.bandwidth * gpu.achievable * 1e9)
    return {
        "gpu": gpu.name,
        "n": shape.n,
        "k": shape.k,
        "group_size": shape.group_size,
        "m": tokens,
        "us": round(found.us, 2),
        "floor_us": round(floor, 2),
        "bound": found.bound,
        "best_us": round(times[best][1].us, 2),
        "best_tactic": best,
        "warps": plan.resident(gpu) * plan.warps,
        "ranges": plan.ranges,
        "slices": plan.slices,
        "waves": plan.waves(gpu),
        "kb_in_flight": round(plan.bytes_in_flight(gpu, shape.group_size) / 1000, 1),
        "x_us": round(found.x, 2),
        "split_us": round(found.split, 2),
    } | {f"{name}_us": round(us, 2) for name, us in found.resources.items()}


def predicted_rows(loops: Loops, host_check: Path) -> list[dict[str, Any]]:
    """fp16, with zeros, the group size of each model: every layer, every number of tokens, every GPU."""
    groups = [(s, m, gpu) for gpu in GPUS for s in shapes() for m in TOKENS]
    cells: list[Cell] = [(*group, tactic) for group in groups for tactic in TACTICS]
    plans = dict(zip(cells, ask_planner(host_check, cells), strict=True))
    rows = []
    for shape, tokens, gpu in groups:
        times = {}
        for tactic in TACTICS:
            plan = plans[shape, tokens, gpu, tactic]
            if isinstance(plan, Plan):
                unit = loops[str(gpu.sm), "Half", plan.token_tiles][prediction.parts(shape.group_size)]
                times[tactic] = plan, predict(shape, tokens, gpu, plan, unit)
        rows.append(predicted_row(shape, tokens, gpu, times))
    return rows


def evaluate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets about time, as predicted for the H100: all layers, and those that the targets name."""
    cells = {(r["n"], r["k"], r["m"]): r["us"] / targets.allowed_us(r["floor_us"])
             for r in rows if r["gpu"] == GPUS[0].name and r["m"] <= targets.SMALL}  # fmt: skip
    what = f"{NOT_MEASURED}: {GPUS[0].name}, time / (1.15 floor + 2.5 us), up to {targets.SMALL} tokens"
    found = [targets.target(what, cells, 1.0, max)]
    for n, k in HEADLINE:
        only = {c: v for c, v in cells.items() if c[:2] == (n, k)}
        found.append(targets.target(f"{what}, {n}x{k}", only, 1.0, max))
    return found


def write(record: dict[str, Any], path: Path) -> None:
    """Replace the file at once; tables as columns and one line for each row."""
    tables = {name: rows for name, rows in record.items() if name in TABLES}
    parts = []
    for name, rows in tables.items():
        lines = ",\n  ".join(json.dumps(list(row.values())) for row in rows)
        parts.append(f' "{name}": {{\n  "columns": {json.dumps(list(rows[0]))},\n  "rows": [\n  {lines}\n  ]\n }}')
    head = json.dumps({name: v for name, v in record.items() if name not in tables}, indent=1)
    gpu_check.write_text(path, head.removesuffix("\n}") + ",\n" + ",\n".join(parts) + "\n}\n")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """All rows, right-aligned."""
    columns = list(rows[0])
    widths = [max(len(c), *(len(str(r[c])) for r in rows)) for c in columns]
    print(*(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    for row in rows:
        print(*(f"{row[c]!s:>{w}}" for c, w in zip(columns, widths, strict=True)))


def print_predicted(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each layer: microseconds of the default tactic, and what binds."""
    for gpu in GPUS:
        print(f"\n{gpu.name}, us of a call and what binds, {NOT_MEASURED}:")
        print(f"{'M':>12}", *(f"{m:>14}" for m in TOKENS))
        for s in shapes():
            cells = [r for r in rows if (r["gpu"], r["n"], r["k"]) == (gpu.name, s.n, s.k)]
            print(f"{s.name:>12}", *(f"{r['us']:>6.1f} {r['bound']:<7}" for r in cells))


def target_line(entry: dict[str, Any]) -> str:
    """A target for people, with how many cells meet it where that was counted."""
    return targets.line(entry) + (f", {entry['meet']} of them meet it" if "meet" in entry else "")


def main() -> int:
    """Read, predict, write, print."""
    args = parser().parse_args()
    try:
        found = argparse.Namespace(build=None, library=args.library)
        plugin, host_check, library = gpu_check.find_files(found, [], gpu_check.LIBRARY, gpu_check.HOST_CHECK, LIBRARY)
    except gpu_check.UsageError as problem:
        print(f"sass_report: {problem}", file=sys.stderr)
        return 2
    kernels = read_library(library)
    loops, units = decode_loops(kernels), prefill_units(kernels)
    predicted, planned = predicted_rows(loops, host_check), prefill.planned_rows(host_check)
    assumptions = {
        "launch_us": prediction.LAUNCH_US,
        "first_byte_us": prediction.FIRST_BYTE_US,
        "split_us": prediction.SPLIT_US,
        "wave_us": prediction.WAVE_US,
        "loaded_latency_ns": prediction.LOADED_NS,
        "l2_over_memory": prediction.L2_RATIO,
        "l2_bytes_per_clock": prediction.L2_BYTES_PER_CLOCK,
        "wgmma_per_clock": prediction.WGMMA_PER_CLOCK,
        "gpus": [vars(gpu) for gpu in GPUS],
    }
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"awq_trt": library_version(plugin)} | versions(library),
        "architectures": [f"sm_{a}" for a in ARCHITECTURES],
        "times": f"{NOT_MEASURED}; fp16, with zeros, group size of each model",
        "prefill_times": f"{prefill.ESTIMATED}; fp16, with zeros, group size of each model",
        "assumptions": assumptions,
        "targets": [*evaluate(predicted), *prefill.evaluate(planned)],
        "kernels": [kernel_row(kernel) for kernel in kernels],
        "loops": loop_rows(loops),
        "predicted": predicted,
        "prefill_loops": prefill.loop_rows(units),
        "prefill_clocks": prefill.clock_rows(units),
        "prefill": planned,
    }
    write(record, args.output)
    print_table(record["kernels"])
    print("\nIssue slots of a warp for 128 columns of a strip in the steady state of the main loop:")
    print_table(record["loops"])
    print("\nThe same of the kernels for many tokens, for 64 columns of a tile:")
    print_table(record["prefill_loops"])
    print("\nClocks of a multiprocessor for 64 columns of a tile:")
    print_table(record["prefill_clocks"])
    print_predicted(predicted)
    prefill.print_planned(planned)
    print("\ntargets:", *map(target_line, record["targets"]), sep="\n  ")
    unknown = sorted({name for t in ("loops", "prefill_loops") for row in record[t] for name in row["unknown"].split()})
    print(f"unknown opcodes: {' '.join(unknown) or 'none'}; written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
