"""Show what quantizing found for each layer: alpha, clipping, error before and after, tokens seen, largest activation.

    awq-trt report out.awq --plot out.svg
    awq-trt report out.plan --html out.html      # a page about everything: layers, accuracy, memory, speed
    awq-trt report out.awq out.plan --html out.html --record decode.json prefill.json out.trtexec/*.json

The same numbers as data are under "layers" in DIR/awq_trt.json and in the plan's sidecar. --record takes what was
measured on a GPU, by bench_gemm.py or by the plan's trtexec.sh.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from awq_trt.awq import report
from awq_trt.checkpoint.quantized import open_quantized
from awq_trt.cli import export
from awq_trt.cli.console import table_console
from awq_trt.cli.messages import with_flags
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate import html_report
from awq_trt.publishing import claimed


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt report`."""
    p.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="quantized directory as `awq-trt quantize` writes it, plan, or both",
    )
    p.add_argument("--full", action="store_true", help="one line per layer instead of one per kind of layer")
    p.add_argument("--plot", type=Path, metavar="FILE", help="also draw it: .svg, .png or .pdf (needs matplotlib)")
    p.add_argument("--html", type=Path, metavar="FILE", help="also write a page for a browser")
    p.add_argument("--record", type=Path, nargs="+", default=[], metavar="FILE", help="measurements, for the page")


def run(args: argparse.Namespace) -> None:
    """The table, and what else was asked for."""
    directory, engine = sort_out(args.inputs)
    if args.record and not args.html:
        raise AwqTrtError("--record is for the page: give --html FILE too.")
    if directory is None and (not args.html or args.full or args.plot):
        raise AwqTrtError(f"{engine}: a plan alone has no layers to show: give --html FILE, or the directory too.")
    outputs = [report.output(args.plot)] if args.plot else []
    outputs += [html_report.output(args.html)] if args.html else []
    with claimed(outputs, [*args.inputs, *args.record]):
        if directory is not None:
            show(directory, args.full, args.plot)
        if args.html:
            html_report.write_html_report(args.html, awq_dir=directory, engine=engine, records=args.record)
            print(args.html)


def sort_out(inputs: Sequence[Path]) -> tuple[Path | None, Path | None]:
    """The directory and the plan among the inputs, at most one of each."""
    directories = [path for path in inputs if path.is_dir()]
    files = [path for path in inputs if not path.is_dir()]
    if len(directories) > 1 or len(files) > 1:
        raise AwqTrtError("give one quantized directory, one plan, or one of each.")
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise AwqTrtError(f"{missing[0]}: no such file or directory.")
    return next(iter(directories), None), next(iter(files), None)


def show(directory: Path, full: bool, plot: Path | None) -> None:
    """Print the table and the warnings, and write the plot."""
    checkpoint = open_quantized(directory)
    if "layers" not in checkpoint.report:
        raise AwqTrtError(f"{directory}: no awq_trt.json here: another tool quantized it, and left no report to show.")
    layers = checkpoint.report["layers"]
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    console = table_console()
    if layers:
        console.print(report.table(layers, full=full))
    else:
        console.print(f"{len(checkpoint.linears)} layers were rounded to nearest: there was no search to report on.")
    largest = checkpoint.report.get("largest_value", (0.0, ""))
    for warning in report.warnings(layers, list(checkpoint.linears), dtype, largest):
        console.print(f"[yellow]warning:[/] {with_flags(warning, export.options())}", highlight=False)
    if plot:
        report.plot(layers, plot, directory.resolve().name, dtype)
        console.print(f"[bold]{plot}[/]", highlight=False)
