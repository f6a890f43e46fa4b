"""Hugging Face checkpoint in, TensorRT plan out: the same as `awq-trt export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from awq_trt.cli.main import main as command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `awq-trt export`; returns its exit code."""
    return command(["export", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
