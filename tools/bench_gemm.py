"""Time the own kernels, cuBLAS in 16 bits and the peers on the same layers, in one run; one JSON file comes out.

    python tools/bench_gemm.py --output decode.json --plot decode.svg                        # 1 to 32 tokens
    python tools/bench_gemm.py --range prefill --output prefill.json --report prefill.md     # 64 to 8192 tokens
    python tools/bench_gemm.py --from prefill.json --report prefill.md --plot prefill.svg    # from the file, no GPU

Needs a GPU, torch and NumPy; awq_trt need not be installed. The library of the own kernels comes from the installed
package, from `--library DIR` (a folder carried along), or from `--build DIR` (CMake and nvcc, this GPU only).

Weights are rotated past the L2 cache, calls are timed in replays of a CUDA graph (as many as their time allows; the
record says how many), and the floor is counted with the memory bandwidth and the tensor cores' peak measured in the
same run. Every method is compared with the product in double precision before it is timed: all tokens up to 64, beyond
one in each 16, always all features. Peers are optional: what is missing or fails is recorded in its own words. Each has
a process of its own; tools/README.md says how to carry their wheels to a machine without network. `--dry-run` says what
a run would do and goes through everything with tiny layers on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import gpu_check
import torch
from bench import machine
from bench.gemm import processes, report, targets
from bench.gemm.measure import Settings
from bench.gemm.method_awq_trt import LIBRARY
from bench.gemm.methods import METHODS, OWN, named
from bench.gemm.plot import draw
from bench.gemm.record import Record, finish, new_record, read, write
from bench.gemm.shapes import MODELS, RANGES, Shape, shapes

from awq_trt.layout import DTYPES

DRY_SHAPES = (Shape(64, 128, 64, ("dry run",)), Shape(40, 192, 64, ("dry run",)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--output", type=Path, metavar="FILE", help="the JSON to write, as it grows")
    source.add_argument("--from", type=Path, metavar="FILE", dest="recorded", help="measure nothing: take this record")
    p.add_argument("--plot", type=Path, metavar="FILE", help="also draw it: .svg, .png or .pdf (needs matplotlib)")
    p.add_argument("--report", type=Path, metavar="FILE", help="also fp16 against INT4 for each model, as Markdown")
    p.add_argument("--library", type=Path, metavar="DIR", help=f"folder with {LIBRARY}, already built")
    p.add_argument("--build", type=Path, metavar="DIR", help="build it into DIR with nvcc, for this GPU only")
    p.add_argument("--dtype", choices=DTYPES, default="float16", help="of the activations (default: %(default)s); "
                   "methods that know only bfloat16 run in that")  # fmt: skip
    p.add_argument("--symmetric", action="store_true", help="no zero points")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose layers (default: all)")
    cells = p.add_mutually_exclusive_group()
    cells.add_argument("--range", choices=RANGES, default="decode", help="how many tokens (default: %(default)s): "
                       + "; ".join(f"{name} {' '.join(map(str, m))}" for name, m in RANGES.items()))  # fmt: skip
    cells.add_argument("--tokens", type=int, nargs="+", metavar="M", help="the same, one by one")
    p.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], metavar="NAME", help="(default: all)")
    p.add_argument("--seconds", type=float, default=540, help="stop after so long (default: %(default)s)")
    p.add_argument("--rotate", type=float, default=4, metavar="TIMES",
                   help="copies of the weights take so many times the L2 cache (default: %(default)s)")  # fmt: skip
    p.add_argument("--memory", type=float, default=16, metavar="GB", help="at most for copies (default: %(default)s)")
    p.add_argument("--replays", type=int, default=30, help="of each graph, at most (default: %(default)s)")
    p.add_argument("--seed", type=int, help="of the random data; default: the time")
    p.add_argument("--dry-run", action="store_true", help="tiny layers on the CPU and a made-up clock; no GPU needed")
    return p


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line asks for."""
    if args.tokens and min(args.tokens) < 1:
        raise gpu_check.UsageError(f"--tokens {min(args.tokens)}: give numbers of tokens from 1 on")
    methods = [m.name for m in named(args.methods)]
    own = not args.dry_run and OWN in methods
    library = str(gpu_check.find_files(args, machine.gpus(), LIBRARY)[0]) if own else None
    return Settings(
        shapes=DRY_SHAPES if args.dry_run else tuple(shapes(args.models)),
        tokens=tuple(sorted(set(args.tokens or RANGES[args.range]))),
        dtype=args.dtype,
        symmetric=args.symmetric,
        seed=args.seed if args.seed is not None else int(time.time()),
        device="cpu" if args.dry_run else "cuda",
        library=library,
        rotate=args.rotate,
        limit_bytes=int(args.memory * 1e9),
        replays=args.replays,
    )


def main() -> int:
    """Run, or take a record; print it, and draw it; 0 unless nothing was measured or an own result is wrong."""
    args = parser().parse_args()
    try:
        record = read(args.recorded) if args.recorded else measured(args)
    except (gpu_check.UsageError, KeyError) as problem:
        print(f"bench_gemm: {problem.args[0]}", file=sys.stderr)
        return 2
    if args.plot:
        draw(record, args.plot)
    if args.report:
        machine.write_text(args.report, report.markdown(record))
    return summary(record, args.recorded or args.output)


def measured(args: argparse.Namespace) -> Record:
    """Measure; the file is written after every few layers.

    Raises:
        UsageError, KeyError: something is missing, or there is no such method.
    """
    settings = settings_of(args)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise gpu_check.UsageError("there is no GPU here (or torch has no CUDA): use --dry-run to see the plan")
    names = [m.name for m in named(args.methods)]
    show_plan(shapes(args.models), settings, names)
    started, written = time.monotonic(), 0.0
    record = new_record(settings, args.seconds)

    def keep() -> None:
        finish(record, settings, names)
        record["seconds"] = round(time.monotonic() - started, 1)
        write(record, args.output)

    for row in processes.run(settings, names, args.seconds, isolate=not args.dry_run):
        if "device" in row:
            record |= row
        elif "refusal" in row:
            record["refusals"][row["method"]] = row["refusal"]
        else:
            record["rows"].append(row)
        if time.monotonic() - written > 5:
            keep()
            written = time.monotonic()
    keep()
    return record


def show_plan(planned: Sequence[Shape], settings: Settings, names: Sequence[str]) -> None:
    """Print the layers, the bytes that a call moves, and how many cells there are."""
    for shape in planned:
        low, high = (shape.bytes(m, settings.symmetric) / 1e6 for m in (settings.tokens[0], settings.tokens[-1]))
        print(f"{shape.name:>12} group {shape.group_size:<4} {low:8.2f} to {high:8.2f} MB   {', '.join(shape.layers)}")
    print(f"{len(planned)} shapes x {len(settings.tokens)} x {len(names)} methods: {', '.join(names)}")


def summary(record: Record, path: Path) -> int:
    """Print it; the exit code."""
    rows = record["rows"]
    for method, words in record["refusals"].items():
        print(f"{method}: did not run: {words.strip().splitlines()[-1]}")
    problems = Counter((r["method"], r["variant"], r["problem"][:160]) for r in rows if "problem" in r)
    for (method, variant, words), count in problems.items():
        print(f"{method} {variant}: {count} cells: {words}")
    if "device" in record:
        bandwidth, peak = (record["device"][what]["used"] for what in ("bandwidth", "peak"))
        print(f"measured in this run: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.1f} TFLOP/s in 16 bits by cuBLAS")
    print_table(record)
    for title, entries in record["targets"].items():
        clock = ", by a made-up clock" if record["settings"]["device"] == "cpu" else ""
        print(f"targets, {title} tactic{clock}:", *map(targets.line, entries), sep="\n  ")
    timed, missing = sum("us" in r for r in rows), len(record["not_run"])
    print(f"{timed} rows timed, {missing} cells not run, {record['seconds']} s; record: {path}")
    own_wrong = any(r["method"] == OWN and r.get("problem", "").startswith("relative error") for r in rows)
    return 1 if own_wrong or not timed else 0


def print_table(record: Record) -> None:
    """Microseconds of each method's fastest variant, one line a cell; the own fraction of the floor."""
    by_method = {m.name: targets.best(record["rows"], (m.name,)) for m in METHODS}
    print(f"{'us':>12} {'M':>4} " + " ".join(f"{name:>9}" for name in by_method) + "  of floor")
    for shape in record["settings"]["shapes"]:
        for m in record["settings"]["tokens"]:
            found = [cells.get((shape["n"], shape["k"], m)) for cells in by_method.values()]
            if any(found):
                times = " ".join(f"{'-' if r is None else format(r['us'], '.2f'):>9}" for r in found)
                own = by_method[OWN].get((shape["n"], shape["k"], m), {})
                fraction = format(own["fraction_of_floor"], ".0%") if "fraction_of_floor" in own else "-"
                print(f"{shape['n']:>6}x{shape['k']:<5} {m:>4} {times}  {fraction}")


if __name__ == "__main__":
    sys.exit(main())
