"""Perplexity and top-1 agreement of a model at every stage, on the same windows of text.

    awq-trt eval --float DIR out.awq out.onnx --output eval.json

A model is a Hugging Face directory (float, or quantized by this or another tool), a .gguf or an .onnx file. With
--float and a quantized directory, plain rounding with the same settings is measured too.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from awq_trt.cli.console import progress_console, table_console
from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output
from awq_trt.publishing import claimed, publishing

WRITTEN_BY = "awq_trt eval"
"""In every record."""


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt eval`."""
    p.add_argument("models", nargs="+", metavar="MODEL", help="directories, .gguf or .onnx files of one model")
    p.add_argument("--float", dest="float_model", metavar="DIR", help="the model before quantization")
    p.add_argument("--text", metavar="SOURCE", help="text file, directory or datasets id (the first 2 "
                   "million characters), or .npz of model inputs (default: a text of the package)")  # fmt: skip
    p.add_argument("--windows", type=int, default=8, metavar="N", help="of text (default: %(default)s)")
    p.add_argument("--length", type=int, default=512, metavar="N", help="tokens each (default: %(default)s)")
    p.add_argument("--output", type=Path, metavar="FILE", help="JSON to write")
    p.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm_eval, separated by commas (pip install lm_eval)")
    p.add_argument("--lm-eval-limit", type=int, metavar="N", help="documents per task (default: all)")
    p.add_argument("--lm-eval-include", type=Path, metavar="DIR", help="directory with task files of your own")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON."""
    from awq_trt.evaluate.evaluate import evaluate

    if args.windows < 1 or args.length < 2:
        raise AwqTrtError(f"--windows {args.windows} --length {args.length}: at least 1 and 2, please.")
    tasks = [t.strip() for t in (args.lm_eval or "").split(",") if t.strip()]
    outputs = [Output(args.output, mark=f'"written_by": "{WRITTEN_BY}"'.encode())] if args.output else []
    with claimed(outputs, map(Path, args.models)):
        with progress_console().status("Evaluating"):
            rows = evaluate(
                args.models,
                float_model=args.float_model,
                text=args.text,
                samples=args.windows,
                length=args.length,
                tasks=tasks,
                task_options={"limit": args.lm_eval_limit, "include": args.lm_eval_include},
            )
        show(rows)
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "written_by": WRITTEN_BY,
            "text": args.text or "package default",
            "windows": args.windows,
            "length": args.length,
            "rows": rows,
        }
        for output in outputs:
            with publishing(output) as (file,):
                file.write_text(json.dumps(record, indent=1) + "\n")


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table, and under it what lm_eval found."""
    console = table_console()
    table = Table("model", "perplexity", f"top-1 as {next(iter(rows))}", "seconds")
    for name, row in rows.items():
        perplexity = "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
        table.add_row(name, perplexity, f"{row['top1']:.2%}", f"{row['seconds']:.0f}")
    console.print(table)
    for name, row in rows.items():
        for task, metrics in row.get("tasks", {}).items():
            values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            console.print(f"{name}  {task}: {values}", highlight=False, markup=False)
