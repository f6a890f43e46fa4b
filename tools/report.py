"""What quantizing found for each layer: the same as `awq-trt report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from awq_trt.cli.main import main as command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `awq-trt report`; returns its exit code."""
    return command(["report", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
