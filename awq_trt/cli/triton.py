"""Write a Triton model repository for a plan, or for an ONNX decoder that is to run on the CPU.

awq-trt triton out.plan --output models
awq-trt triton out.onnx --output models --parameter max_queue=16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from awq_trt.cli.console import progress_console
from awq_trt.errors import AwqTrtError


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt triton`."""
    p.add_argument("model", type=Path, help="TensorRT plan or .onnx file")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="model repository; made if it is missing")
    p.add_argument("--name", metavar="NAME", help="of the model (default: the file's)")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="(default: the one that the model names)")
    p.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="for config.pbtxt; may be repeated"
    )
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> None:
    """`awq-trt triton`."""
    parameters = dict(text.partition("=")[::2] for text in args.parameter)
    if wrong := [text for text in args.parameter if "=" not in text]:
        raise AwqTrtError(f"--parameter {wrong[0]}: write NAME=VALUE.")
    write(args.model, args.output, progress_console(args.quiet), args.name, args.tokenizer, parameters)


def write(
    model: Path,
    repository: Path,
    console: Console,
    name: str | None = None,
    tokenizer: Path | None = None,
    parameters: dict[str, str] | None = None,
) -> None:
    """The repository, and the lines that start a server with it."""
    from awq_trt.serve.triton.repository import write_triton_repo

    triton = write_triton_repo(model, repository, model_name=name, tokenizer=tokenizer, parameters=parameters)
    console.print(f"[bold]{triton.model}[/]  for Triton", highlight=False)
    for warning in triton.warnings:
        console.print(f"[yellow]Triton:[/] {warning}", highlight=False)
    for line in filter(None, (triton.command, triton.docker)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
