"""Quantize the linear layers of a checkpoint to INT4 with AWQ.

    awq-trt quantize DIR --output out.awq
    awq-trt quantize DIR --output out.awq --effort best --calibration my.txt --memory 8GiB
    torchrun --nproc-per-node 2 -m awq_trt quantize DIR --output out.awq      # two processes share the calibration

Reads a Hugging Face directory with safetensors, a .gguf file or a hub id; writes a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from awq_trt.cli.console import first_rank, progress_console
from awq_trt.cli.messages import with_flags
from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output
from awq_trt.publishing import claimed

if TYPE_CHECKING:
    from awq_trt.checkpoint.reader import Checkpoint


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt quantize`."""
    p.add_argument("model", help="directory with safetensors, .gguf file, or hub id")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="quantized checkpoint to write")
    add_checkpoint_options(p)
    add_quantize_options(p.add_argument_group("quantization"))


def add_checkpoint_options(p: argparse.ArgumentParser) -> None:
    """How the checkpoint is read."""
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings along")
    p.add_argument(
        "--part",
        choices=("text", "vision", "encoder"),
        help="of a checkpoint that holds several models, such as CLIP (default: the one that can be exported)",
    )
    p.add_argument("--dtype", choices=("float16", "bfloat16"), help="of activations (default: the checkpoint's)")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_quantize_options(q: argparse._ArgumentGroup) -> None:
    """The fields of QuantizeConfig, and what a run may use."""
    yes_no = argparse.BooleanOptionalAction
    q.add_argument("--method", choices=("awq", "rtn"), default="awq", help="rtn only rounds (default: %(default)s)")
    q.add_argument(
        "--effort",
        choices=("fast", "default", "best"),
        default="default",
        help="fast: no error compensation; best: up to 64 calibration windows (default: %(default)s)",
    )
    q.add_argument("--clip", action=yes_no, default=None, help="search the range of every group (default: yes)")
    q.add_argument(
        "--error-compensation",
        "--feedback",
        action=yes_no,
        default=None,
        help="GPTQ: columns not yet rounded make up for those that are (default: unless fast)",
    )
    q.add_argument("--refit", action="store_true", help="with error compensation: least-squares scales after rounding")
    q.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        help="columns per scale, -1 for the whole row (default: the largest of 128, 64, 32 that divides every layer)",
    )
    q.add_argument("--symmetric", action="store_true", help="no zero points")
    q.add_argument(
        "--no-pre-scale",
        dest="pre_scale",
        action="store_false",
        help="only scales that fold into the operator before, so that AutoAWQ loaders can read the checkpoint",
    )
    q.add_argument(
        "--save-format",
        choices=("awq", "compressed-tensors"),
        default="awq",
        help="AutoAWQ's GEMM layout, or compressed-tensors' pack-quantized, which implies --no-pre-scale "
        "(default: %(default)s)",
    )
    q.add_argument(
        "--lm-head",
        choices=("float", "int4"),
        default="float",
        help="the layer that makes logits: in 16 bits, sharing the embedding's weight where the model does, or INT4 "
        "(default: %(default)s)",
    )
    q.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="text file, directory or datasets id (the first 2 million characters), or .npz of model inputs "
        "(default: a text in the package)",
    )
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
        help="such as 8GiB: refuse to start where more is needed; keep hidden states in memory where there is room",
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
    q.add_argument(
        "--no-resume", dest="resume", action="store_false", help="do not go on with the work of a run that was killed"
    )


def parse_bytes(text: str) -> int:
    """A size as people write it: 8GiB, 8G, 500MB, 1073741824."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 8GiB or 500MB")
    number, prefix, binary = match.groups()
    decimal = text.lower().rstrip().endswith("b") and not binary
    return int(float(number) * (1000 if decimal else 1024) ** " kmgt".index(prefix.lower() or " "))


def run(args: argparse.Namespace) -> None:
    """`awq-trt quantize`."""
    with claimed_by_first_rank(args.device, [Output(args.output, directory=True)], args.model):
        checkpoint = open_model(args)
        if checkpoint is None:
            raise AwqTrtError(
                f"{args.model}: quantized already, so there is nothing to quantize; `awq-trt onnx` takes it."
            )
        quantize_checkpoint(args, checkpoint, args.output, progress_console(args.quiet))


@contextmanager
def claimed_by_first_rank(device: str, outputs: Sequence[Output], model: str) -> Iterator[None]:
    """`claimed`, of several processes by the first one; where it is refused, all of them end."""
    from awq_trt.awq.distributed import join_ranks

    with ExitStack() as stack:
        with join_ranks(device).fail_together():
            if first_rank():
                stack.enter_context(claimed(outputs, [Path(model)]))
        yield


def open_model(args: argparse.Namespace) -> Checkpoint | None:
    """The model as a Checkpoint, with --dtype applied; None where it is quantized already."""
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


def quantize_checkpoint(args: argparse.Namespace, checkpoint: Checkpoint, output: Path, console: Console) -> None:
    """Quantize, and say what was done and what to look at."""
    import torch

    from awq_trt.awq.config import QuantizeConfig
    from awq_trt.awq.quantize import quantize
    from awq_trt.awq.report import kind, warnings

    if checkpoint.note:
        console.print(f"{checkpoint.source}: {checkpoint.note}.", highlight=False)
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(QuantizeConfig)}
    config = QuantizeConfig(**fields | {"compute_dtype": getattr(torch, args.compute_dtype)})
    report = quantize(checkpoint, output, config, memory=args.memory, resume=args.resume, console=console)
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
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    for warning in warnings(layers, report.quantized, dtype, report.largest_value):
        console.print(f"[yellow]warning:[/] {with_flags(warning, args.options)}", highlight=False)
