"""Show what quantizing found for each layer: alpha, clipping, error before and after, tokens seen, largest activation.

    python tools/report.py out.awq --plot out.svg

The same numbers as data are under "layers" in DIR/awq_trt.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from awq_trt import report
from awq_trt.errors import AwqTrtError
from awq_trt.quantized_checkpoint import open_quantized

FILE_WIDTH = 160
"""Columns where the output goes to a file or a pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for an error the user can mend."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", type=Path, help="quantized directory, as export.py writes it")
    p.add_argument("--full", action="store_true", help="one line per layer instead of one per kind of layer")
    p.add_argument("--plot", type=Path, metavar="FILE", help="also draw it: .svg, .png or .pdf (needs matplotlib)")
    args = p.parse_args(arguments)
    try:
        show(args.directory, args.full, args.plot)
    except AwqTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(directory: Path, full: bool, plot: Path | None) -> None:
    """Print the table and the warnings, and write the plot."""
    checkpoint = open_quantized(directory)
    if "layers" not in checkpoint.report:
        raise AwqTrtError(f"{directory}: no awq_trt.json here: another tool quantized it, and left no report to show.")
    layers = checkpoint.report["layers"]
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    if layers:
        console.print(report.table(layers, full=full))
    else:
        console.print(f"{len(checkpoint.linears)} layers were rounded to nearest: there was no search to report on.")
    for warning in report.warnings(layers, list(checkpoint.linears), dtype):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if plot:
        report.plot(layers, plot, directory.resolve().name, dtype)
        console.print(f"[bold]{plot}[/]", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
