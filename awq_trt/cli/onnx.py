"""Export a quantized checkpoint to ONNX, and compare the file with the eager model.

    awq-trt onnx out.awq --output out.onnx
    awq-trt onnx out.awq --output out.onnx --format qdq      # portable DequantizeLinear, no plugin

Reads a directory of `awq-trt quantize` or of another tool (AutoAWQ, GPTQ, compressed-tensors, ModelOpt).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from awq_trt.cli.console import progress_console
from awq_trt.cli.messages import with_flags
from awq_trt.publishing import claimed

if TYPE_CHECKING:
    from onnx import GraphProto

    from awq_trt.checkpoint.reader import Checkpoint
    from awq_trt.evaluate.float_model import FloatModel
    from awq_trt.export.exportable import EarlyTrace
    from awq_trt.export.interface import DecoderOptions


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt onnx`."""
    p.add_argument("model", help="quantized directory, or hub id")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="to write; its weights go to FILE.data")
    p.add_argument("--dtype", choices=("float16", "bfloat16"), help="of activations (default: the checkpoint's)")
    p.add_argument("--calibration", metavar="SOURCE", help="inputs to compare with, .npz for vision (default: a text)")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_onnx_options(p)


def add_onnx_options(out: argparse._ActionsContainer) -> None:
    """What the graph is like."""
    out.add_argument(
        "--format",
        choices=("plugin", "qdq"),
        default="plugin",
        help="W4A16Gemm nodes, or portable DequantizeLinear (default: %(default)s)",
    )
    out.add_argument(
        "--no-fuse",
        dest="fuse",
        action="store_false",
        help="a node for each layer, also where Q, K, V could share one",
    )
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
    out.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip accuracy and agreement of eager model and ONNX"
    )


def run(args: argparse.Namespace) -> None:
    """`awq-trt onnx`."""
    from awq_trt.checkpoint.directory import local_path
    from awq_trt.export.metadata import output

    with claimed([output(args.output)], [Path(args.model)]):
        export_checkpoint(args, None, local_path(args.model), args.output, progress_console(args.quiet))


def judge(args: argparse.Namespace, original: Checkpoint | None, console: Console) -> FloatModel | None:
    """Compare the checkpoint with transformers' own model of it, before hours of work on what was read wrong."""
    from awq_trt.awq.distributed import join_ranks
    from awq_trt.evaluate.verify import judge_float

    if original is None or not args.verify:
        return None
    ranks = join_ranks(args.device)
    with ranks.fail_together(), console.status("Comparing the checkpoint with transformers' own model of it"):
        return judge_float(original, inputs=args.calibration, memory=args.memory) if ranks.rank == 0 else None


def decoder_options(args: argparse.Namespace) -> DecoderOptions:
    """What the options say of a decoder's graph."""
    from awq_trt.export.interface import DecoderOptions

    return DecoderOptions(args.kv_cache, args.max_seq, args.prefill_chunk, args.all_logits)


def check_exportable(args: argparse.Namespace, original: Checkpoint, console: Console) -> EarlyTrace | None:
    """Find out before the calibration that a model cannot be exported, or its attention not be built into an engine;
    what is returned spares the export some work."""
    from awq_trt.awq.distributed import join_ranks
    from awq_trt.engine.attention import without_kernel
    from awq_trt.engine.runtimes import choose_runtime
    from awq_trt.export.exportable import check_exportable

    def ask_builder(graph: GraphProto) -> None:
        if args.engine:
            without_kernel(graph, choose_runtime(args.runtime))

    ranks = join_ranks(args.device)
    with ranks.fail_together(), console.status("Tracing the model without weights"):
        if ranks.rank == 0:
            return check_exportable(original.config, original.dtype, decoder_options(args), ask_builder)
    return None


def export_checkpoint(
    args: argparse.Namespace,
    original: Checkpoint | None,
    awq_dir: Path,
    onnx_path: Path,
    console: Console,
    judged: FloatModel | None = None,
    early: EarlyTrace | None = None,
) -> dict[str, Any] | None:
    """Write the ONNX file, if the verification lets it pass; returns what that says of it, of the quantized model and
    of the original, if open. judged: what it says of the original; early: the model's trace; if these are known."""
    from awq_trt.awq.report import warnings
    from awq_trt.evaluate.verify import verify
    from awq_trt.export.export import export_onnx

    decoder = decoder_options(args)
    found: dict[str, Any] = {}
    with console.status("Exporting to ONNX") as status:

        def check(path: Path) -> None:
            status.update("Verifying: eager model against ONNX Runtime, perplexity of float, rounding and AWQ")
            found.update(verify(path, awq_dir, original, inputs=args.calibration, judged=judged))

        report = export_onnx(
            awq_dir,
            onnx_path,
            format=args.format,
            dtype=args.dtype,
            fuse=args.fuse,
            decoder=decoder,
            check=check if args.verify else None,
            early=early,
        )
    size = (report.onnx_bytes + report.data_bytes) / 2**20
    layers = f"{len(report.quantized)} quantized layers, {len(report.fused)} fused nodes"
    console.print(f"[bold]{onnx_path}[/]  {layers}, {size:.1f} MiB", highlight=False)
    if not args.verify:
        return None
    show_accuracy(found, console)
    for warning in warnings([], [], report.dtype, (found["onnx"]["largest"], found["onnx"]["largest_in"])):
        console.print(f"[yellow]warning:[/] {with_flags(warning, args.options)}", highlight=False)
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
