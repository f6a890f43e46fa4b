"""Will a plan run on this machine?: the same as `awq-trt check`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from awq_trt.cli.main import main as command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `awq-trt check`; returns its exit code."""
    return command(["check", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
