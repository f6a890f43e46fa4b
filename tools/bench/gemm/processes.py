"""The processes of a run, one after the other, each with its share of the time that is left."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gemm.measure import Row, Settings, measure
from bench.gemm.methods import PROCESSES

MARK = "@row "
TOOLS = Path(__file__).parents[2]
GRACE_SECONDS = 15
"""A process that does not end by itself is killed so long after its time is up, or when the run's own time is."""


def run(settings: Settings, names: Sequence[str], seconds: float, isolate: bool = True) -> Iterator[Row]:
    """Rows of all methods, those of `measure`; a process that dies becomes a refusal of its methods.

    Args:
        isolate: False to measure in this process, one group of methods after the other.
    """
    end, first = time.monotonic() + seconds, True
    for group, share in PROCESSES:
        wanted = [name for name in group if name in names]
        left = end - time.monotonic()
        if not wanted or left <= 0:
            continue
        apart = child(settings, wanted, left * share, left, first)
        for row in apart if isolate else measure(settings, wanted, left * share, first):
            first = first and "device" not in row
            yield row


def child(settings: Settings, names: Sequence[str], share: float, left: float, first: bool) -> Iterator[Row]:
    """Rows of one process, as they come."""
    path = os.pathsep.join(filter(None, [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile("w+") as stderr:
        pickle.dump((settings, names, share, first), stdin)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gemm.processes"], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr,
            text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        limit = min(share + GRACE_SECONDS, max(left, 1))
        alarm = threading.Timer(limit, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            yield from (json.loads(line.removeprefix(MARK)) for line in process.stdout if line.startswith(MARK))
            code = process.wait()
        finally:
            alarm.cancel()
            process.kill()
            process.wait()
        if code:
            stderr.seek(0)
            words = f"the process ended with code {code} after at most {limit:.0f} seconds: {stderr.read()[-800:]}"
            yield from ({"method": name, "refusal": words} for name in names)


def main() -> None:
    """One process of a run: the arguments of `measure` come on stdin, rows go out as marked lines."""
    for row in measure(*pickle.load(sys.stdin.buffer)):
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
