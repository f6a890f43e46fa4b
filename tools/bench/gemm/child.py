"""`python -m bench.gemm.child`: one process of a run. Settings come on stdin as JSON, rows go out as marked lines."""

from __future__ import annotations

import json
import sys

from bench.gemm.measure import Settings, measure

MARK = "@row "


def main() -> None:
    """Measure what stdin asks for."""
    job = json.load(sys.stdin)
    for row in measure(Settings.from_json(job["settings"]), job["methods"], job["seconds"], job["first"]):
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
