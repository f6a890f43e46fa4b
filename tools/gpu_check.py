"""Every check that needs a GPU, in one call of under ten minutes; one JSON file comes out.

    python tools/gpu_check.py --output result.json                     # the plugin's kernels, through its interface
    python tools/gpu_check.py --output result.json --engine out.plan   # and a plan against its ONNX file
    python tools/gpu_check.py --output result.json --sanitizer         # and few of the layers under compute-sanitizer

Needs the standard library only; the plugin library comes from the installed package and its test program from
build/, where `pip install` left it, or both from `--library DIR` (a folder carried along), or from `--build` (nvcc and
the TensorRT headers of TENSORRT_ROOT, this machine's GPU only). Without a GPU it says so, counts what was skipped, and
exits with 0. `--engine` runs the plan by awq_trt's own code (run_plan.py): the package must be installed, with ONNX
Runtime, the TensorRT that built the plan, and a PyTorch with CUDA; what they refuse is recorded.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import machine

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, HOST_CHECK = "libawq_trt_plugins.so", "awq_trt_host_check"
PACKAGES = ("awq_trt", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "numpy")
HOST_CHECK_SECONDS, SANITIZER_SECONDS, ENGINE_SECONDS = 420, 100, 150
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


class UsageError(Exception):
    """Something for the person who started this: what and how to mend it."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    p.add_argument("--library", type=Path, help=f"folder with {LIBRARY} and {HOST_CHECK}, already built")
    p.add_argument("--build", type=Path, metavar="DIR", help="build both into DIR with nvcc, for this GPU only")
    p.add_argument("--engine", type=Path, help="a plan to load and run")
    p.add_argument("--onnx", type=Path, help="the ONNX file of the plan; default: the plan's name with .onnx")
    p.add_argument("--sanitizer", action="store_true", help="also run compute-sanitizer's four tools (CUDA toolkit)")
    p.add_argument("--seed", type=int, help="of the random data; default: the time")
    return p


def versions() -> dict[str, str]:
    """Versions of Python, the system, nvcc and the packages that are installed."""
    found = machine.versions(PACKAGES) | {"system": platform.platform()}
    if nvcc := shutil.which("nvcc"):
        lines = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
        found["nvcc"] = lines[-1] if lines else ""
    return found


def find_files(args: argparse.Namespace, gpus: list[dict[str, str]], *names: str) -> list[Path]:
    """Files that the build makes, from --build, --library or the installed package.

    Raises:
        UsageError: one is not there.
    """
    built: Path | None = None  # the test program is not installed: it is where `pip install .` built it
    if args.build:
        folder = build(args.build, gpus)
    elif args.library:
        folder = args.library
    else:
        try:
            folder = Path(str(metadata.distribution("awq_trt").locate_file("awq_trt/lib")))
        except metadata.PackageNotFoundError as error:
            raise UsageError("awq_trt is not installed here: give --library DIR or --build DIR") from error
        built = max(
            ROOT.glob(f"build/*/{HOST_CHECK}"), key=lambda path: path.stat().st_mtime, default=folder / HOST_CHECK
        )
    paths = [built if name == HOST_CHECK and built else folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path} is missing: build it with `pip install .` or --build DIR")
    return [path.resolve() for path in paths]


def build(folder: Path, gpus: list[dict[str, str]]) -> Path:
    """Build library and test program with CMake and nvcc; for the first GPU only, else for every architecture."""
    options = []
    if gpus:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={gpus[0]['compute_cap'].replace('.', '')}-real")
    try:
        subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True, stdout=sys.stderr)
        subprocess.run(["cmake", "--build", folder, "--parallel"], check=True, stdout=sys.stderr)
    except FileNotFoundError as error:
        raise UsageError("--build needs cmake, which is not installed (pip install cmake ninja)") from error
    except subprocess.CalledProcessError as error:
        raise UsageError(f"the build failed with exit code {error.returncode}; its words are above") from error
    return folder


def run(command: list[Any], limit: int) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and seconds of a command; code -1 where it was stopped after `limit` seconds."""
    started = time.monotonic()
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=limit)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        code, err = -1, f"stopped after {limit} seconds"
    return code, out, err, round(time.monotonic() - started, 1)


def check_plugin(library: Path, host_check: Path, seed: int) -> dict[str, Any]:
    """Run the test program on the library; its JSON lines, the summary apart."""
    code, out, err, seconds = run([host_check, "gpu", library, "--seed", seed], HOST_CHECK_SECONDS)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return {
        "exit_code": code,
        "seconds": seconds,
        "summary": next((line for line in lines if line.get("summary")), None),
        "max_error_over_tolerance": max((line.get("error_over_tolerance", 0.0) for line in lines), default=0.0),
        "stderr": err[-4000:],
        "checks": [line for line in lines if not line.get("summary")],
    }


def check_sanitizers(library: Path, host_check: Path, seed: int) -> dict[str, Any]:
    """Run few layers of the test program under each tool: "clean" where no error was found and every check passed.

    Where there is no GPU or no compute-sanitizer, a tool's "clean" is None and "words" say why.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return {tool: {"clean": None, "words": "compute-sanitizer is not installed"} for tool in SANITIZERS}
    found: dict[str, Any] = {}
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", 9, host_check, "few", library, "--seed", seed]
        code, out, err, seconds = run(command, SANITIZER_SECONDS)
        lines = out.splitlines() + err.splitlines()
        clean = None if code == 0 and not any('"gpu": "' in line for line in lines) else code == 0
        words = [line for line in lines if not line.startswith("{")][-20:] if clean is not None else ["no GPU"]
        found[tool] = {"clean": clean, "exit_code": code, "seconds": seconds, "words": "\n".join(words)}
    return found


def check_engine(engine: Path, onnx: Path | None) -> dict[str, Any]:
    """Load and run a plan in a child process, which may die with it; what it printed, or its last words."""
    onnx = onnx or engine.with_suffix(".onnx")
    for path in (engine, onnx):
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
    child = Path(__file__).with_name("run_plan.py")
    code, out, err, seconds = run([sys.executable, child, engine, onnx], ENGINE_SECONDS)
    answer = next((line for line in reversed(out.splitlines()) if line.startswith("{")), None)
    result = {"ran": False, "refusal": err[-4000:]} if answer is None else json.loads(answer)
    return {"engine": str(engine), "onnx": str(onnx), "exit_code": code} | result | {"seconds": seconds}


def main() -> int:
    """Run everything, write the file, say the outcome in a line."""
    args = parser().parse_args()
    seed = args.seed if args.seed is not None else int(time.time())
    gpus = machine.gpus()
    try:
        library, host_check = find_files(args, gpus, LIBRARY, HOST_CHECK)
        result: dict[str, Any] = {
            "date": machine.now(),
            "hardware": gpus,
            "versions": versions(),
            "library": str(library),
            "seed": seed,
            "plugin": check_plugin(library, host_check, seed),
            "sanitizer": check_sanitizers(library, host_check, seed) if args.sanitizer else None,
            "engine": check_engine(args.engine, args.onnx) if args.engine else None,
        }
    except UsageError as problem:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    machine.write_json(args.output, result)

    plugin, engine = result["plugin"], result["engine"]
    summary = plugin["summary"] or {}
    where = summary.get("gpu") or "no GPU: launch checks skipped"
    print(
        f"{where}: {summary.get('passed', 0)} passed, {summary.get('failed', '?')} failed, "
        f"{summary.get('skipped', '?')} skipped in {plugin['seconds']} s; written to {args.output}"
    )
    for check in plugin["checks"]:
        if check.get("ok") is False:
            print(f"failed: {json.dumps(check)}")
    sanitizer = result["sanitizer"] or {}
    verdicts = {True: "clean", False: "NOT CLEAN", None: "not run"}
    for tool, outcome in sanitizer.items():
        print(f"{tool}: {verdicts[outcome['clean']]}" + ("" if outcome["clean"] else f": {outcome['words']}"))
    if engine is not None:
        print(
            "engine: " + (f"agrees: {engine['agrees']}" if engine.get("ran") else f"did not run: {engine['refusal']}")
        )
    engine_failed = engine is not None and engine.get("ran") and not engine["agrees"]
    dirty = any(outcome["clean"] is False for outcome in sanitizer.values())
    return 0 if plugin["exit_code"] == 0 and not engine_failed and not dirty else 1


if __name__ == "__main__":
    sys.exit(main())
