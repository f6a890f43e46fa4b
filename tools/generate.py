"""Chat with a plan or an ONNX file, or answer prompts: the same as `awq-trt generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from awq_trt.cli.main import main as command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `awq-trt generate`; returns its exit code."""
    return command(["generate", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
