"""Hugging Face checkpoint in, TensorRT plan out.

    python tools/export.py --model DIR --engine out.plan

writes  out.awq/              the quantized checkpoint, a Hugging Face directory
        out.onnx, .data       the network with W4A16Gemm nodes; runs in ONNX Runtime as it is
        out.plan, .plan.json  the TensorRT engine and its sidecar: profiles, layers, accuracy, launch lines
        out.trtexec.sh        times the plan with trtexec

`--model` may also name what an earlier run wrote: a quantized directory, or a .onnx file.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from awq_trt.errors import AwqTrtError, OtherRankError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--model", required=True, help="directory with safetensors, .gguf file, hub id, quantized directory, .onnx file"
    )
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings along")
    p.add_argument(
        "--part",
        choices=("text", "vision", "encoder"),
        help="of a checkpoint that holds several models, such as CLIP (default: the one that can be exported)",
    )
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")

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
    out.add_argument(
        "--format",
        choices=("plugin", "qdq"),
        default="plugin",
        help="ONNX flavour: W4A16Gemm nodes, or portable DequantizeLinear (default: %(default)s)",
    )
    out.add_argument("--no-fuse", action="store_true", help="a node for each layer, also where Q, K, V could share one")
    out.add_argument(
        "--kv-cache",
        choices=("fixed", "dynamic"),
        default="fixed",
        help="of a decoder: room for --max-seq tokens, written in place, or past in and longer past out, as other "
        "runtimes expect it (default: %(default)s)",
    )
    out.add_argument(
        "--max-seq",
        type=int,
        metavar="N",
        help="tokens of a sequence, cached ones too (default: 2048, or what the model was made for if that is less)",
    )
    out.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="new tokens of a sequence in one call, with a fixed cache (default: 1024, or the model's sliding window)",
    )
    out.add_argument(
        "--all-logits", action="store_true", help="logits of every new token, for scoring, not only of the last one"
    )

    q = p.add_argument_group("quantization")
    q.add_argument("--method", choices=("awq", "rtn"), default="awq", help="rtn only rounds (default: %(default)s)")
    q.add_argument(
        "--effort",
        choices=("fast", "default", "best"),
        default="default",
        help="fast: no error feedback; best: up to 64 calibration windows (default: %(default)s)",
    )
    yes_no = argparse.BooleanOptionalAction
    q.add_argument("--clip", action=yes_no, default=None, help="search the range of every group (default: yes)")
    q.add_argument("--feedback", action=yes_no, default=None, help="round with error feedback (default: unless fast)")
    q.add_argument("--refit", action="store_true", help="with feedback: least-squares scales after rounding")
    q.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        help="columns per scale, -1 for the whole row (default: the largest of 128, 64, 32 that divides every layer)",
    )
    q.add_argument("--symmetric", action="store_true", help="no zero points")
    q.add_argument(
        "--no-pre-scale",
        action="store_true",
        help="only scales that fold into the operator before, so that AutoAWQ loaders can read the checkpoint",
    )
    q.add_argument(
        "--save-format",
        choices=("awq", "compressed-tensors"),
        default="awq",
        help="of the quantized checkpoint: AutoAWQ's GEMM layout, or compressed-tensors' pack-quantized, which implies "
        "--no-pre-scale (default: %(default)s)",
    )
    q.add_argument(
        "--lm-head",
        choices=("float", "int4"),
        default="float",
        help="the layer that makes logits: in 16 bits, sharing the embedding's weight where the model does, or INT4 "
        "(default: %(default)s)",
    )
    q.add_argument("--dtype", choices=("float16", "bfloat16"), help="of activations (default: the checkpoint's)")
    q.add_argument(
        "--calibration", metavar="SOURCE", help="text file, directory, datasets id, or .npz of model inputs (default: "
        "a text in the package)",
    )  # fmt: skip
    q.add_argument(
        "--calibration-samples", type=int, metavar="N", help="windows (default: 8, 16 or 64, as the effort says)"
    )
    q.add_argument(
        "--calibration-length", type=int, default=512, metavar="N", help="tokens each (default: %(default)s)"
    )
    q.add_argument(
        "--memory",
        type=parse_bytes,
        metavar="SIZE",
        help="such as 8GiB: refuse to start where more is needed; keep states in memory where there is room",
    )
    q.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="to quantize on (default: the GPU, if any)"
    )
    q.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the calibration forward (default: %(default)s)",
    )
    q.add_argument("--no-resume", action="store_true", help="do not go on with the work of a run that was killed")

    e = p.add_argument_group("engine")
    e.add_argument(
        "--runtime",
        choices=("auto", "tensorrt", "tensorrt_rtx"),
        default="auto",
        help="auto is TensorRT where it is installed and there is a GPU, else TensorRT-RTX (default: %(default)s)",
    )
    e.add_argument("--max-batch", type=int, default=1, metavar="N", help="(default: %(default)s)")
    e.add_argument("--no-embed-plugin", action="store_true", help="leave the plugin library out of the plan")
    e.add_argument("--timing-cache", type=Path, metavar="FILE", help="read if there, written back (TensorRT only)")
    e.add_argument("--no-verify", action="store_true", help="skip accuracy and agreement of eager, ONNX and engine")
    return p


def first_rank() -> bool:
    """Of the processes that torchrun starts to share the calibration, the first one prints and goes on after it."""
    return os.environ.get("RANK", "0") == "0"


def parse_bytes(text: str) -> int:
    """A size as people write it: 8GiB, 8G, 500MB, 1073741824."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 8GiB or 500MB")
    number, prefix, binary = match.groups()
    decimal = text.lower().rstrip().endswith("b") and not binary
    return int(float(number) * (1000 if decimal else 1024) ** " kmgt".index(prefix.lower() or " "))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    args = parser().parse_args(arguments)
    console = Console(stderr=True, quiet=args.quiet or not first_rank())
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        export(args, console)
    except AwqTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OtherRankError:
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    return 0


def export(args: argparse.Namespace, console: Console) -> None:
    """All stages, from whatever `--model` is to whatever was asked for."""
    from awq_trt.checkpoint.directory import local_path

    is_onnx = args.model.endswith(".onnx")
    named = args.engine or args.onnx or args.awq or (args.triton_repo if is_onnx else None)
    if named is None:
        raise AwqTrtError("nothing to write: give --engine out.plan (or --onnx, or --awq, to stop earlier).")
    if args.triton_repo and not (args.engine or args.onnx or is_onnx):
        raise AwqTrtError("--triton-repo serves a plan or an ONNX file: give --engine or --onnx too.")
    if args.engine:
        check_engine(args)
    awq_dir: Path | None = None
    accuracy = None
    if is_onnx:
        onnx_path = Path(args.model)
    else:
        original = open_model(args)
        if original is None:
            awq_dir = local_path(args.model)
        else:
            awq_dir = quantize_stage(args, original, named.with_suffix(".awq"), console)
        if not (args.engine or args.onnx) or not first_rank():
            if first_rank():
                report_stage(args, awq_dir, None, None, console)
            return
        onnx_path = args.onnx or args.engine.with_suffix(".onnx")
        accuracy = onnx_stage(args, original, awq_dir, onnx_path, console)
    if args.engine:
        engine_stage(args, onnx_path, accuracy, console)
    if args.triton_repo:
        triton_stage(args.engine or onnx_path, args.triton_repo, console)
    report_stage(args, awq_dir, onnx_path, accuracy, console)


def report_stage(
    args: argparse.Namespace,
    awq_dir: Path | None,
    onnx_path: Path | None,
    accuracy: dict[str, Any] | None,
    console: Console,
) -> None:
    """The page, if asked for."""
    from awq_trt.evaluate.html_report import write_html_report

    if args.report:
        write_html_report(args.report, awq_dir=awq_dir, onnx=onnx_path, engine=args.engine, accuracy=accuracy)
        console.print(f"[bold]{args.report}[/]  for a browser", highlight=False)


def check_engine(args: argparse.Namespace) -> None:
    """Find out now, not after the calibration, that no engine can be built."""
    from awq_trt.engine.plugin import library_path
    from awq_trt.engine.runtimes import choose_runtime

    choose_runtime(args.runtime)
    if args.max_batch < 1 or (args.max_seq or 2) < 2:
        raise AwqTrtError(f"--max-batch {args.max_batch} --max-seq {args.max_seq}: at least 1 and 2, please.")
    if args.format == "plugin":
        library_path()
    elif not args.symmetric:
        raise AwqTrtError(
            "TensorRT's own INT4 is symmetric only: build the engine with --format plugin, which keeps the zero "
            "points, or add --symmetric, or leave --engine out to get the ONNX file alone."
        )


def quantize_stage(args: argparse.Namespace, original: Any, default: Path, console: Console) -> Path:
    """The quantized checkpoint, made from an open one."""
    from collections import Counter

    import torch

    from awq_trt.awq.config import QuantizeConfig
    from awq_trt.awq.quantize import quantize
    from awq_trt.awq.report import kind, warnings

    if original.note:
        console.print(f"{original.source}: {original.note}.", highlight=False)
    output: Path = args.awq or default
    report = quantize(
        original,
        output,
        QuantizeConfig(
            method=args.method,
            effort=args.effort,
            clip=args.clip,
            error_compensation=args.feedback,
            refit=args.refit,
            group_size=args.group_size,
            symmetric=args.symmetric,
            pre_scale=not args.no_pre_scale,
            calibration=args.calibration,
            calibration_samples=args.calibration_samples,
            calibration_length=args.calibration_length,
            save_format=args.save_format,
            lm_head=args.lm_head,
            device=args.device,
            compute_dtype=getattr(torch, args.compute_dtype),
        ),
        memory=args.memory,
        resume=not args.no_resume,
        console=console,
    )
    alike = Counter((kind(name), why) for name, why in report.left_in_float.items())
    left = "".join(f"\n  in float: {n} x {name} ({why})" for (name, why), n in alike.items())
    console.print(f"[bold]{output}[/]  {len(report.quantized)} layers in {report.seconds:.0f} s{left}", highlight=False)
    if report.pre_scales:
        console.print(
            f"{report.pre_scales} layers carry a pre-scale, which AutoAWQ's format cannot hold; other loaders will "
            "refuse the directory. --no-pre-scale avoids it."
        )
    if report.head and args.save_format == "awq":
        console.print(
            "The head is INT4, which loaders of AutoAWQ's format skip; they will refuse the directory. "
            "--save-format compressed-tensors avoids it."
        )
    dtype = str(original.dtype).removeprefix("torch.")
    for warning in warnings([dataclasses.asdict(layer) for layer in report.layers], report.quantized, dtype):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    return output


def open_model(args: argparse.Namespace) -> Any:
    """`--model` as a Checkpoint, with `--dtype` applied; None where it is quantized already."""
    import torch

    from awq_trt.awq.distributed import join_ranks
    from awq_trt.checkpoint.open import open_checkpoint
    from awq_trt.checkpoint.quantized import is_quantized

    with join_ranks(args.device).fail_together():
        if is_quantized(args.model):
            if args.part:
                raise AwqTrtError(f"{args.model}: quantized already; --part {args.part} is chosen before that.")
            return None
        checkpoint = open_checkpoint(args.model, trust_remote_code=args.trust_remote_code, part=args.part)
    return dataclasses.replace(checkpoint, dtype=getattr(torch, args.dtype)) if args.dtype else checkpoint


def onnx_stage(
    args: argparse.Namespace, original: Any, awq_dir: Path, onnx_path: Path, console: Console
) -> dict[str, Any] | None:
    """ONNX file from the quantized checkpoint, and what the verification says of both and the original, if open."""
    from awq_trt.evaluate.verify import verify
    from awq_trt.export.export import export_onnx
    from awq_trt.export.trace import DecoderOptions

    decoder = DecoderOptions(args.kv_cache, args.max_seq, args.prefill_chunk, args.all_logits)
    fuse = not args.no_fuse
    with console.status("Exporting to ONNX"):
        report = export_onnx(awq_dir, onnx_path, format=args.format, dtype=args.dtype, fuse=fuse, decoder=decoder)
    size = (report.onnx_bytes + report.data_bytes) / 2**20
    layers = f"{len(report.quantized)} quantized layers, {len(report.fused)} fused nodes"
    console.print(f"[bold]{onnx_path}[/]  {layers}, {size:.1f} MiB", highlight=False)
    if args.no_verify:
        return None
    with console.status("Verifying: eager model against ONNX Runtime, perplexity of float, rounding and AWQ"):
        found = verify(onnx_path, awq_dir, original, inputs=args.calibration)
    show_accuracy(found, console)
    return found


def show_accuracy(found: dict[str, Any], console: Console) -> None:
    """The accuracy table, and what the ONNX file wrote."""
    table = Table("model", "perplexity", "top-1 as float", title="Held-out text")
    for name, row in found["held_out"].items():
        perplexity = "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        table.add_row(name, perplexity, f"{row['top1']:.1%}")
    if found["held_out"]:
        console.print(table)
    onnx = found["onnx"]
    console.print(
        f"ONNX Runtime against the eager rounded model: {onnx['logits']} logits, relative difference "
        f"{onnx['relative']:.1e}, largest {onnx['max_abs']:.3f}, same arg max {onnx['top1']:.1%}"
    )
    if onnx["tokens"]:
        tie = f", the rest within {onnx['gap']:.3f} of the best logit" if onnx["gap"] else ""
        console.print(f"{onnx['tokens_equal']} of {onnx['tokens']} greedy tokens equal{tie}: ", end="")
        console.print(onnx["generated"], style="italic", markup=False, highlight=False)


def engine_stage(args: argparse.Namespace, onnx_path: Path, accuracy: dict[str, Any] | None, console: Console) -> None:
    """The plan, its sidecar, and the script that times it."""
    from awq_trt.engine.build import build_engine
    from awq_trt.engine.trtexec import path_of

    report = build_engine(
        onnx_path,
        args.engine,
        runtime=args.runtime,
        max_batch=args.max_batch,
        max_seq=args.max_seq,
        embed_plugin=not args.no_embed_plugin,
        timing_cache=args.timing_cache,
        accuracy=accuracy,
        quiet=args.quiet,
    )
    for warning in report.warnings:
        console.print(f"[yellow]{report.runtime}:[/] {warning}", highlight=False)
    console.print(
        f"[bold]{args.engine}[/]  {report.plugin_layers} W4A16Gemm nodes, {report.plan_bytes / 2**20:.1f} MiB, "
        f"{report.runtime} {report.runtime_version} for compute capability {', '.join(report.architectures)}",
        highlight=False,
    )
    words = "times it on a GPU; tools/check.py says whether it will run there"
    console.print(f"[bold]{path_of(args.engine)}[/]  {words}", highlight=False)
    console.print(f'Lines to time and to serve it are under "launch" in [bold]{report.sidecar}[/]', highlight=False)


def triton_stage(served: Path, repository: Path, console: Console) -> None:
    """A model repository, and the lines that start a server with it."""
    from awq_trt.serve.triton.repository import write_triton_repo

    triton = write_triton_repo(served, repository)
    console.print(f"[bold]{triton.model}[/]  for Triton", highlight=False)
    for warning in triton.warnings:
        console.print(f"[yellow]Triton:[/] {warning}", highlight=False)
    for line in filter(None, (triton.command, triton.docker)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
