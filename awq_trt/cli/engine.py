"""Build a TensorRT plan from an ONNX file, with its sidecar and the script that times it.

awq-trt engine out.onnx --output out.plan
awq-trt engine out.onnx --output out.plan --max-batch 8 --runtime tensorrt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from awq_trt.cli.console import progress_console
from awq_trt.errors import AwqTrtError


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt engine`."""
    p.add_argument("model", type=Path, help=".onnx file")
    p.add_argument("--output", type=Path, required=True, metavar="PLAN", help="TensorRT plan to write")
    p.add_argument(
        "--max-seq",
        type=int,
        metavar="N",
        help="tokens of a sequence, where the cache is not fixed (default: 2048)",
    )
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_engine_options(p)


def add_engine_options(e: argparse._ActionsContainer) -> None:
    """How the engine is built."""
    e.add_argument(
        "--runtime",
        choices=("auto", "tensorrt", "tensorrt_rtx"),
        default="auto",
        help="auto is TensorRT where it is installed and there is a GPU, else TensorRT-RTX (default: %(default)s)",
    )
    e.add_argument("--max-batch", type=int, default=1, metavar="N", help="(default: %(default)s)")
    e.add_argument(
        "--no-embed-plugin", dest="embed_plugin", action="store_false", help="leave the plugin library out of the plan"
    )
    e.add_argument("--timing-cache", type=Path, metavar="FILE", help="read if there, written back (TensorRT only)")


def run(args: argparse.Namespace) -> None:
    """`awq-trt engine`."""
    check_engine_options(args)
    build(args, args.model, args.output, None, progress_console(args.quiet))


def check_engine_options(args: argparse.Namespace) -> None:
    """Find out now, not after the calibration, that no engine can be built."""
    from awq_trt.engine.runtimes import choose_runtime

    choose_runtime(args.runtime)
    if args.max_batch < 1 or (args.max_seq or 2) < 2:
        raise AwqTrtError(f"--max-batch {args.max_batch} --max-seq {args.max_seq}: at least 1 and 2, please.")


def build(
    args: argparse.Namespace, onnx_path: Path, engine: Path, accuracy: dict[str, Any] | None, console: Console
) -> None:
    """The plan, its sidecar, and the script that times it."""
    from awq_trt.engine.build import build_engine
    from awq_trt.engine.trtexec import path_of

    report = build_engine(
        onnx_path,
        engine,
        runtime=args.runtime,
        max_batch=args.max_batch,
        max_seq=args.max_seq,
        embed_plugin=args.embed_plugin,
        timing_cache=args.timing_cache,
        accuracy=accuracy,
        quiet=args.quiet,
    )
    for warning in report.warnings:
        console.print(f"[yellow]{report.runtime}:[/] {warning}", highlight=False)
    console.print(
        f"[bold]{engine}[/]  {report.plugin_layers} W4A16Gemm nodes, {report.plan_bytes / 2**20:.1f} MiB, "
        f"{report.runtime} {report.runtime_version} for compute capability {', '.join(report.architectures)}",
        highlight=False,
    )
    console.print(f"[bold]{path_of(engine)}[/]  times it on a GPU", highlight=False)
    for line in (f"awq-trt check {engine}", f"awq-trt triton {engine} --output models"):
        console.print(f"next: {line}", markup=False, highlight=False, soft_wrap=True)
