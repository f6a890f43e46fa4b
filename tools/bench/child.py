"""One method of the benchmark in a process of its own, in whichever environment has what it needs.

    python tools/bench/child.py JOB.json

The job names a module beside this file with three functions, each timed apart:
    load(directory)                      the float model, or whatever the method wants to have before it starts
    quantize(model, ids, job)            the work that is compared
    deliver(model, output) -> [names]    Hugging Face directories below `output`, quantized or with rounded fp32 weights

and the answer, seconds and peak memory, goes to result.json in the job's output directory.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

started = time.monotonic()


def peak_mb() -> int:
    """Largest resident set of this process so far, in MB (2^20 bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    """Do the job whose file is named on the command line."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import numpy as np
    import torch

    torch.set_num_threads(job["threads"])
    method = importlib.import_module(f"bench.{job['module']}")
    ids = torch.from_numpy(np.load(job["ids"]))
    output = Path(job["output"])
    imported, imports_mb = time.monotonic(), peak_mb()
    model = method.load(job["model"])
    loaded = time.monotonic()
    method.quantize(model, ids, job)
    result = {
        "seconds": round(time.monotonic() - loaded, 2),
        "load_seconds": round(loaded - imported, 2),
        "import_seconds": round(imported - started, 2),
        "peak_mb": peak_mb(),
        "imports_mb": imports_mb,
        "calibration_windows": len(ids),
        "remarks": getattr(method, "REMARKS", []),
    }
    result["delivered"] = method.deliver(model, output)
    (output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
