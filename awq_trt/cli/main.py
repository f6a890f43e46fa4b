"""`awq-trt`, also `python -m awq_trt`: one command with a subcommand for each stage."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from awq_trt.cli.messages import with_flags
from awq_trt.errors import AwqTrtError, OtherRankError, TerminatedError
from awq_trt.files import package_version

COMMANDS = {
    "export": "all stages: checkpoint in, TensorRT plan out",
    "quantize": "checkpoint in, quantized checkpoint out",
    "onnx": "quantized checkpoint in, ONNX file out",
    "engine": "ONNX file in, TensorRT plan out",
    "triton": "plan or ONNX file in, Triton model repository out",
    "generate": "chat with a plan or an ONNX file, or answer prompts",
    "eval": "perplexity and agreement of a model at every stage",
    "check": "will a plan run on this machine?",
    "report": "what quantizing found for each layer",
}
"""Subcommand -> one line about it. Each is a module of this folder with `add_options(parser)` and `run(args)`."""


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line, with the options of one subcommand: the other modules, and torch with some, stay unloaded."""
    top = argparse.ArgumentParser(
        prog="awq-trt", description="Hugging Face checkpoint in, TensorRT plan out, with 4-bit AWQ weights."
    )
    top.add_argument("--version", action="version", version=f"awq_trt {package_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        module = importlib.import_module(f"awq_trt.cli.{name}") if name == command else None
        sub = commands.add_parser(
            name,
            help=about,
            description=module.__doc__ if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if module:
            module.add_options(sub)
            sub.set_defaults(run=module.run, options=sub)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done; `check`: nothing will fail. 1: `check` found something that will. 2: an error that the user can mend, said
    in one message on standard error. 130: Ctrl-C; 143: SIGTERM; 129: SIGHUP.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser(words[0] if words else None).parse_args(words)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with clean_end():
            code: int | None = args.run(args)
    except AwqTrtError as error:
        print(f"error: {with_flags(str(error), args.options)}", file=sys.stderr)
        return 2
    except OtherRankError:
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except TerminatedError as end:
        print(end.text or "terminated; nothing half-written is left", file=sys.stderr)
        return end.status
    return code or 0


@contextmanager
def clean_end() -> Iterator[None]:
    """SIGTERM and SIGHUP raise, as Ctrl-C does, so that files are put in order and child processes are ended."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise TerminatedError(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if main_thread and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
