"""Hugging Face checkpoint in, TensorRT plan out.

    awq-trt export --model DIR --engine out.plan

writes  out.awq/              the quantized checkpoint, a Hugging Face directory
        out.onnx, .data       the network with W4A16Gemm nodes; runs in ONNX Runtime as it is
        out.plan, .plan.json  the TensorRT engine and its sidecar: profiles, layers, accuracy
        out.trtexec.sh, .bin  times the plan with trtexec

`--model` may also name what an earlier run wrote: a quantized directory, or a .onnx file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from awq_trt.cli import engine, onnx, quantize, triton
from awq_trt.cli.console import first_rank, progress_console
from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output, file_name
from awq_trt.publishing import claimed


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of all stages."""
    p.add_argument(
        "--model", required=True, help="directory with safetensors, .gguf file, hub id, quantized directory, .onnx file"
    )
    quantize.add_checkpoint_options(p)
    out = p.add_argument_group("output")
    out.add_argument("--engine", type=Path, metavar="PLAN", help="TensorRT plan to write")
    out.add_argument("--onnx", type=Path, metavar="FILE", help="ONNX file to write (default: the plan's name, .onnx)")
    out.add_argument("--awq", type=Path, metavar="DIR", help="quantized checkpoint (default: the plan's name, .awq)")
    out.add_argument(
        "--triton-repo",
        type=Path,
        metavar="DIR",
        help="also write a Triton model repository, for the plan, or without --engine for the ONNX file",
    )
    out.add_argument("--report", type=Path, metavar="HTML", help="also write a page about all of it, for a browser")
    quantize.add_quantize_options(p.add_argument_group("quantization"))
    onnx.add_onnx_options(p.add_argument_group("network"))
    engine.add_engine_options(p.add_argument_group("engine"))


def options() -> argparse.ArgumentParser:
    """The options of `awq-trt export`, for messages of commands that have others."""
    p = argparse.ArgumentParser()
    add_options(p)
    return p


def run(args: argparse.Namespace) -> None:
    """All stages, from whatever --model is to whatever was asked for."""
    console = progress_console(args.quiet)
    is_onnx = args.model.endswith(".onnx")
    named = args.engine or args.onnx or args.awq or (args.triton_repo if is_onnx else None)
    if named is None:
        raise AwqTrtError("nothing to write: give --engine out.plan (or --onnx, or --awq, to stop earlier).")
    if args.triton_repo and not (args.engine or args.onnx or is_onnx):
        raise AwqTrtError("--triton-repo serves a plan or an ONNX file: give --engine or --onnx too.")
    if args.engine:
        check_engine(args)
    onnx_path: Path | None = Path(args.model) if is_onnx else args.onnx
    if args.engine and onnx_path is None:
        onnx_path = file_name(args.engine).with_suffix(".onnx")
    awq_dir = None if is_onnx else args.awq or file_name(named).with_suffix(".awq")
    outputs = [*places(args, None if is_onnx else onnx_path, awq_dir)]
    claim = claimed(outputs, [Path(args.model)])
    with claim if is_onnx else quantize.claimed_by_first_rank(args.device, outputs, args.model):
        run_stages(args, awq_dir, onnx_path, console)


def places(args: argparse.Namespace, onnx_path: Path | None, awq_dir: Path | None) -> Iterator[Output]:
    """All outputs; None where there is no such stage."""
    from awq_trt.checkpoint.quantized import is_quantized
    from awq_trt.engine import sidecar
    from awq_trt.export import metadata

    if awq_dir and not (Path(args.model).exists() and is_quantized(args.model)):
        yield Output(awq_dir, directory=True)
    if onnx_path:
        yield metadata.output(onnx_path)
    if args.engine:
        yield sidecar.output(args.engine)
    if args.triton_repo:
        served = args.engine or onnx_path or Path(args.model)
        yield Output(args.triton_repo / served.stem, directory=True)
    if args.report:
        from awq_trt.evaluate import html_report

        yield html_report.output(args.report)


def run_stages(args: argparse.Namespace, awq_dir: Path | None, onnx_path: Path | None, console: Console) -> None:
    """From whatever --model is to whatever was asked for."""
    accuracy, early = None, None
    if awq_dir:
        from awq_trt.checkpoint.directory import local_path

        original = quantize.open_model(args)
        if onnx_path and original is not None:
            early = onnx.check_exportable(args, original, console)
        judged = onnx.judge(args, original, console)
        if original is None:
            awq_dir = local_path(args.model)
        else:
            quantize.quantize_checkpoint(args, original, awq_dir, console)
        if not first_rank():
            return
        if onnx_path:
            accuracy = onnx.export_checkpoint(args, original, awq_dir, onnx_path, console, judged, early)
    if args.engine and onnx_path:
        engine.build(args, onnx_path, args.engine, accuracy, console)
    if args.triton_repo and onnx_path:
        triton.write(args.engine or onnx_path, args.triton_repo, console)
    if args.report:
        from awq_trt.evaluate.html_report import write_html_report

        write_html_report(args.report, awq_dir=awq_dir, onnx=onnx_path, engine=args.engine, accuracy=accuracy)
        console.print(f"[bold]{args.report}[/]  for a browser", highlight=False)


def check_engine(args: argparse.Namespace) -> None:
    """Find out now, not after the calibration, that no engine can be built."""
    from awq_trt.engine.plugin import library_path

    engine.check_engine_options(args)
    if args.format == "plugin":
        library_path()
    elif not args.symmetric:
        raise AwqTrtError(
            "TensorRT's own INT4 is symmetric only: build the engine with --format plugin, which keeps the zero "
            "points, or add --symmetric, or leave --engine out to get the ONNX file alone."
        )
