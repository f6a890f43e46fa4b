"""Run an export as a user would and record what it took: seconds, peak memory, sizes against their bounds, accuracy.

    python tools/measure_export.py --model DIR --output tools/results/NAME.json [-- further options of export.py]

Memory is the resident set of each process, sampled every 50 ms. "above_imports" is without what the interpreter and its
libraries take before a model is opened (measured in the same run): that part is the same for a model of any size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from bench import machine

EXPORT = Path(__file__).with_name("export.py")
IMPORTS = "import torch, transformers, onnxruntime, onnx_graphsurgeon, awq_trt.evaluate.verify, awq_trt.export.export"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnx-graphsurgeon", "tensorrt-rtx-cu13", "awq_trt")


def watch(command: list[str]) -> tuple[float, int, int, str]:
    """Run a command. Returns seconds, peak resident bytes of it and of its largest child, and what it printed."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        own, child = 0, 0
        while process.poll() is None:
            try:
                parent = psutil.Process(process.pid)
                own = max(own, parent.memory_info().rss)
                child = max([child, *(c.memory_info().rss for c in parent.children(recursive=True))])
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.05)
        log.seek(0)
        text = log.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    return time.monotonic() - started, own, child, text


def bounds(sidecar: dict[str, Any], fp16_bytes: int, memory: dict[str, int]) -> dict[str, Any]:
    """Sizes and peak memory as multiples of what they are bounded by."""
    sizes = sidecar["sizes"]
    needed = sizes["quantized_weights"] + sizes["other_weights"]
    plugin = sizes["plugin"] if sidecar["plugin"]["embedded"] else 0
    return {
        "plan_over_weights": round((sizes["plan"] - plugin) / needed, 4),
        "onnx_over_weights": round((sizes["onnx"] + sizes["onnx_data"]) / needed, 4),
        "export_process_over_fp16": round(memory["export"] / fp16_bytes, 2),
        "export_process_above_imports_over_fp16": round((memory["export"] - memory["imports"]) / fp16_bytes, 2),
        "build_process_over_fp16": round(memory["build"] / fp16_bytes, 2),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("options", nargs="*", help="further options of export.py, after --")
    args = parser.parse_args()
    _, imports, _, _ = watch([sys.executable, "-c", IMPORTS])
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "out.plan"
        command = [sys.executable, str(EXPORT), "--model", args.model, "--engine", str(plan), *args.options]
        seconds, export, build, text = watch(command)
        sidecar = json.loads(Path(f"{plan}.json").read_text())
    from awq_trt.checkpoint.model import empty_model
    from awq_trt.checkpoint.open import open_checkpoint

    config = open_checkpoint(args.model).config
    fp16_bytes = 2 * sum(p.numel() for p in empty_model(config).parameters())
    memory = {"imports": imports, "export": export, "build": build}
    record = {
        "date": machine.now(),
        "command": " ".join(["tools/export.py --model", Path(args.model).name, "--engine out.plan", *args.options]),
        "hardware": {
            "cpu": machine.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": machine.memory_bytes(),
            "gpu": None,
        },
        "versions": machine.versions(PACKAGES),
        "parameters": fp16_bytes // 2,
        "fp16_bytes": fp16_bytes,
        "seconds": round(seconds, 1),
        "peak_bytes": memory,
        "bounds": bounds(sidecar, fp16_bytes, memory),
        "layers_quantized": len(sidecar["quantized"]),
        "profiles": [
            {"name": p["name"], "input_ids": p["inputs"]["input_ids"]}
            for p in sidecar["profiles"]
            if "input_ids" in p["inputs"]
        ],
    }
    record |= {name: sidecar[name] for name in ("left_in_float", "gpu_architectures", "sizes", "accuracy")}
    machine.write_json(args.output, record, indent=2)
    print(text)
    print(json.dumps(record["bounds"], indent=2))


if __name__ == "__main__":
    main()
