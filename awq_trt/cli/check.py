"""Will this plan run here? Compares its sidecar with this machine and says what will fail, before anything is loaded.

    python tools/check.py out.plan
    python tools/check.py out.plan --load     # also load it, in a process of its own: the last word
    python tools/check.py out.plan --json     # for programs

Exit code 0: nothing will fail (there may be warnings); 1: something will; 2: no plan, or no sidecar beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from awq_trt.engine.check import FAILS, OK, WARNING, Finding, check
from awq_trt.errors import AwqTrtError

FILE_WIDTH = 160
"""Columns where the output goes to a file or a pipe."""
COLORS = {OK: "green", WARNING: "yellow", FAILS: "red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("plan", type=Path, help="with its sidecar, PLAN.json, beside it")
    p.add_argument(
        "--device", type=int, default=0, metavar="N", help="GPU, as CUDA numbers them (default: %(default)s)"
    )
    p.add_argument("--load", action="store_true", help="also load the plan, in a process of its own")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = p.parse_args(arguments)
    try:
        findings = check(args.plan, device=args.device, load=args.load)
    except AwqTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fails = sum(finding.status == FAILS for finding in findings)
    if args.json:
        print(json.dumps({"plan": str(args.plan), "runs": not fails, "checks": list(map(asdict, findings))}, indent=1))
    else:
        show(args.plan, findings, fails)
    return 1 if fails else 0


def show(plan: Path, findings: Sequence[Finding], fails: int) -> None:
    """Print the table and the verdict."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    table = Table("check", "", "found", "what to do", title=escape(str(plan)), title_justify="left")
    for finding in findings:
        status = f"[{COLORS[finding.status]}]{finding.status}[/]"
        table.add_row(finding.check, status, escape(finding.found), escape(finding.advice))
    console.print(table, highlight=False)
    warnings = sum(finding.status == WARNING for finding in findings)
    verdict = f"[red]{fails} will fail[/]" if fails else "[green]nothing will fail[/]"
    console.print(f"{verdict}, {warnings} {'warning' if warnings == 1 else 'warnings'}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
