"""Estimate a model's tokens per second from measured times of its layers: decoding and prefill, INT4 and 16 bits.

    python tools/estimate_speed.py --model Qwen3-8B --record decode.json prefill.json
    python tools/estimate_speed.py --model DIR/config.json --record decode.json --bandwidth 2039 --peak 260

The records are what bench_gemm.py --output wrote on one GPU; none is recorded in this repository so far, so measure
first. A layer that is in them takes the time measured there; any other takes what a law of four numbers says that is
fitted to them (tools/bench/speed/law.py), and its error on shapes that it was not fitted to is printed. Another GPU's
times are those, scaled as the law says for its bandwidth and peak. Attention, the head and the small operators are
counted from bytes and flops at the full bandwidth and peak, not measured; starts of their kernels are left out.

For decoders whose MLP has gate, up and down; layers that read the same input count as one, as the exporter makes them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from bench.gemm.shapes import MODELS
from bench.speed.models import model_from
from bench.speed.prediction import COUNTED, LEFT_OUT, Step, decode_step, prefill_step, weight_bytes
from bench.speed.table import FLOAT, INT4, Gpu, gpu_names, made_up, tables
from gpu_check import UsageError, write_text

Result = dict[str, Any]
NAMES = {INT4: "INT4", FLOAT: "16 bits"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--model", required=True, help=f"a config.json, its directory, or one of {', '.join(MODELS)}")
    p.add_argument(
        "--record", type=Path, nargs="+", required=True, metavar="FILE", help="of bench_gemm.py, one or more"
    )
    p.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the GPU's memory, as a copy measures it "
                   "(default: the record's)")  # fmt: skip
    p.add_argument("--peak", type=float, metavar="TFLOP/S", help="of its tensor cores in 16 bits, as cuBLAS reaches it "
                   "(default: the record's)")  # fmt: skip
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences decoded (default: %(default)s)")
    p.add_argument("--context", type=int, nargs="+", default=[1024, 8192], metavar="TOKENS",
                   help="in the cache of each (default: %(default)s)")  # fmt: skip
    p.add_argument("--prompt", type=int, nargs="+", default=[128, 1024, 8192], metavar="TOKENS",
                   help="of a sequence in prefill (default: %(default)s)")  # fmt: skip
    p.add_argument("--output", type=Path, metavar="FILE", help="also write it as JSON")
    p.add_argument("--made-up", action="store_true", help="take the made-up times of a dry run, to try this out")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the estimate; 0, or 2 for an error the user can mend."""
    args = parser().parse_args(arguments)
    try:
        result = estimate(args)
    except UsageError as problem:
        print(f"estimate_speed: {problem}", file=sys.stderr)
        return 2
    print_result(result)
    if args.output:
        write_text(args.output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


def estimate(args: argparse.Namespace) -> Result:
    """All that is printed and written.

    Raises:
        UsageError: of the model, the records, or the command line.
    """
    for name in ("bandwidth", "peak", "batch", "context", "prompt"):
        given = getattr(args, name) or []
        for value in given if isinstance(given, list) else [given]:
            if not 0 < value < math.inf:
                raise UsageError(f"--{name} {value}: must be above 0")
    model = model_from(args.model)
    found, records = tables(args.record, args.made_up)
    measured_on = found[INT4].gpu
    gpu = Gpu(args.bandwidth * 1e9 if args.bandwidth else measured_on.bandwidth,
              args.peak * 1e12 if args.peak else measured_on.peak)  # fmt: skip
    low = max(table.tokens[0] for table in found.values())
    high = min(table.tokens[1] for table in found.values())
    decode = [
        {"batch": batch, "context": context,
         **compared({kind: decode_step(model, t, gpu, batch, context) for kind, t in found.items()}, batch)}
        for batch in args.batch if low <= batch <= high for context in args.context
    ]  # fmt: skip
    prefill = [
        {"prompt": tokens, **compared({kind: prefill_step(model, t, gpu, tokens) for kind, t in found.items()}, tokens)}
        for tokens in args.prompt if low <= tokens <= high
    ]  # fmt: skip
    if not decode and not prefill:
        raise UsageError(
            f"the records have {low} to {high} tokens, so none of these batches and prompts can be estimated: "
            "give other ones, or add a record of bench_gemm.py --range all"
        )
    outside = sorted({m for m in [*args.batch, *args.prompt] if not low <= m <= high})
    return {
        "model": {"name": args.model, **asdict(model)},
        "weights_gb": {kind: round(weight_bytes(model, table) / 1e9, 3) for kind, table in found.items()},
        "records": [str(path) for path in args.record],
        "measured_on": {"gpu": gpu_names(records[0]), "date": [r["date"] for r in records], **asdict(measured_on),
                        "dtype": records[0]["settings"]["dtype"], "made_up": any(map(made_up, records))},
        "gpu": asdict(gpu),
        "laws": {kind: asdict(table.law) for kind, table in found.items()},
        "held_out_errors": {kind: table.errors() for kind, table in found.items()},
        "counted_not_measured": COUNTED,
        "left_out": LEFT_OUT,
        "not_estimated_tokens": outside,
        "measured_tokens": [low, high],
        "decode": decode,
        "prefill": prefill,
    }  # fmt: skip


def compared(steps: dict[str, Step], tokens: int) -> Result:
    """Both kinds, and how many times faster INT4 is."""
    return {kind: step.as_json(tokens) for kind, step in steps.items()} | {
        "times_faster": round(steps[FLOAT].us / steps[INT4].us, 3)
    }


def print_result(result: Result) -> None:
    """For people."""
    on, gpu, low_high = result["measured_on"], result["gpu"], result["measured_tokens"]
    if on["made_up"]:
        print("MADE UP: from a dry run, in which every call counts as one microsecond. This says nothing of any GPU.\n")
    weights = result["weights_gb"]
    print(f"{result['model']['name']}: weights {weights[INT4]:.2f} GB in INT4, {weights[FLOAT]:.2f} GB in 16 bits")
    print(f"estimated for {speed(gpu)}; layers measured on {', '.join(on['gpu']) or 'no GPU'} at {speed(on)}")
    if gpu != {"bandwidth": on["bandwidth"], "peak": on["peak"]}:
        print("scaled to another bandwidth or peak: no measurement says how far off that is")
    print(
        f"\n{'':26} {'INT4 tokens/s':>14} {'ms':>9} {'16 bits tokens/s':>17} {'ms':>9} {'faster':>7}  measured layers"
    )
    for entry in result["decode"]:
        print_entry(f"decode {entry['batch']} x {entry['context']}", entry)
    for entry in result["prefill"]:
        print_entry(f"prefill {entry['prompt']}", entry)
    for tokens in result["not_estimated_tokens"]:
        print(f"{tokens} tokens: not estimated, the records have {low_high[0]} to {low_high[1]}")
    print("\nerror of the law for layers that are not in the table, on shapes that it was not fitted to:")
    for kind, errors in result["held_out_errors"].items():
        for e in errors:
            print(f"  {NAMES[kind]:8} {e['tokens'][0]:>4} to {e['tokens'][1]:>4} tokens: median {e['median']:.1%}, "
                  f"worst {e['worst']:.1%}; {e['cells']} cells")  # fmt: skip
    print(f"counted from bytes and flops, not measured: {result['counted_not_measured']}")
    print(f"left out: {result['left_out']}")


def print_entry(title: str, entry: Result) -> None:
    """One line of the table."""
    sides = " ".join(f"{entry[kind]['tokens_per_second']:>{width},.0f} {entry[kind]['us'] / 1e3:>9.2f}"
                     for kind, width in ((INT4, 14), (FLOAT, 17)))  # fmt: skip
    print(f"{title:26} {sides} {entry['times_faster']:>7.2f}  {entry[INT4]['measured_layers']}")


def speed(gpu: dict[str, float]) -> str:
    """A GPU's two numbers."""
    return f"{gpu['bandwidth'] / 1e9:,.0f} GB/s and {gpu['peak'] / 1e12:,.1f} TFLOP/s"


if __name__ == "__main__":
    sys.exit(main())
