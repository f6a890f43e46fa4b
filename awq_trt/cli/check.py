"""Will this plan run here? Compares its sidecar with this machine and says what will fail, before anything is loaded.

    awq-trt check out.plan
    awq-trt check out.plan --load     # also load it, in a process of its own: the last word
    awq-trt check out.plan --json     # for programs

Exit code 0: nothing will fail (there may be warnings); 1: something will; 2: no plan, or no sidecar beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from awq_trt.cli import export
from awq_trt.cli.console import table_console
from awq_trt.cli.messages import with_flags
from awq_trt.engine import sidecar
from awq_trt.engine.check import FAILS, OK, WARNING, Finding, check
from awq_trt.serve.triton.repository import launch_plan

COLORS = {OK: "green", WARNING: "yellow", FAILS: "red"}


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `awq-trt check`."""
    p.add_argument("plan", type=Path, help="with its sidecar, PLAN.json, beside it")
    p.add_argument(
        "--device", type=int, default=0, metavar="N", help="GPU, as CUDA numbers them (default: %(default)s)"
    )
    p.add_argument("--load", action="store_true", help="also load the plan, in a process of its own")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Compare, print; 1 where something will fail."""
    findings = [*check(args.plan, device=args.device, load=args.load), *check_triton(args.plan)]
    fails = sum(finding.status == FAILS for finding in findings)
    if args.json:
        print(json.dumps({"plan": str(args.plan), "runs": not fails, "checks": list(map(asdict, findings))}, indent=1))
    else:
        show(args.plan, findings, fails)
    return 1 if fails else 0


def check_triton(plan: Path) -> Iterator[Finding]:
    """Whether Triton can serve the plan, and by which line."""
    launch = launch_plan(sidecar.read_sidecar(sidecar.path_of(plan)))
    for warning in launch.warnings:
        happened, _, advice = warning.partition(". ")
        yield Finding("Triton", WARNING, happened, advice)
    if launch.command:
        yield Finding("Triton", OK, launch.command)


def show(plan: Path, findings: Sequence[Finding], fails: int) -> None:
    """Print the table and the verdict."""
    console = table_console()
    table = Table("check", "", "found", "what to do", title=escape(str(plan)), title_justify="left")
    options = export.options()
    for finding in findings:
        status = f"[{COLORS[finding.status]}]{finding.status}[/]"
        table.add_row(finding.check, status, escape(finding.found), escape(with_flags(finding.advice, options)))
    console.print(table, highlight=False)
    warnings = sum(finding.status == WARNING for finding in findings)
    verdict = f"[red]{fails} will fail[/]" if fails else "[green]nothing will fail[/]"
    console.print(f"{verdict}, {warnings} {'warning' if warnings == 1 else 'warnings'}", highlight=False)
