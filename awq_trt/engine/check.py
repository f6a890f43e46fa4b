"""Will this plan run here? Compares its sidecar with the machine, before anything is loaded.

Rules, from NVIDIA's manuals ("Engine Compatibility" of TensorRT 11 and of TensorRT-RTX, "Porting Guide" of the latter):
a plan loads only in the version that built it, both of TensorRT and of TensorRT-RTX; only on a compute capability that
it was built for; only where the driver runs the CUDA version that the runtime was made with.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from awq_trt.engine import memory, plugin, sidecar
from awq_trt.engine.build import RTX_ARCHITECTURES
from awq_trt.engine.driver import Driver, Gpu, query
from awq_trt.errors import AwqTrtError
from awq_trt.files import PACKAGE, sha256

OK, WARNING, FAILS = "ok", "warning", "fails"

CONTEXT_BYTES = 512 << 20
"""Assumed for the CUDA context, kernels and the runtime's own buffers: they are not in any sum."""
DRIVERS = {12: "525.60.13", 13: "580.65.06"}
"""CUDA -> the first Linux driver that runs it (CUDA toolkit release notes, minor version compatibility)."""
PROBE_SECONDS = 900

NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
REASONS = {
    "VERSION_MISMATCH": "another version built it",
    "UNSUPPORTED_CC": "it was not built for this compute capability",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "its weights do not fit into the GPU's memory",
    "MALFORMED_ENGINE": "the file is damaged or no plan",
    "CUDA_ERROR": "CUDA does not work",
}


@dataclass(frozen=True)
class Finding:
    """One check. status: "ok", "warning" or "fails". found: what was compared. advice: what to do, "" if ok."""

    check: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What is here: the driver's answers, which GPU is meant, and the runtime of the plan, if it is installed.

    Attributes:
        device: index of the GPU. runtime_version: of the installed module, "" where it does not say, None where it is
        not installed. cuda: major version of CUDA that it was made with, None if unknown.
        host_bytes: memory that is free on the host.
    """

    driver: Driver
    device: int
    runtime_version: str | None
    cuda: int | None
    host_bytes: int | None

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that is meant, if it is there."""
        return self.driver.gpus[self.device] if self.device < len(self.driver.gpus) else None


def check(engine_path: Path, *, device: int = 0, load: bool = False) -> list[Finding]:
    """Everything that can be said of a plan on this machine.

    Args:
        engine_path: the plan, beside its sidecar. device: GPU, as CUDA numbers them.
        load: also load it, in a process of its own; what that says counts more than any comparison.

    Raises:
        AwqTrtError: no plan or sidecar, a damaged one, or no such number of a device.
    """
    if not engine_path.is_file():
        raise AwqTrtError(f"{engine_path}: no such file. Give the path of a plan.")
    if device < 0:
        raise AwqTrtError(f"device {device}: GPUs are numbered from 0.")
    content = sidecar.read_sidecar(sidecar.path_of(engine_path))
    runtime = content["versions"].get("runtime")
    if runtime not in NAMES:
        raise AwqTrtError(f"{sidecar.path_of(engine_path)}: the runtime is {runtime!r}. Build the engine again.")
    machine = look(runtime, device)
    plugin_finding, library = check_plugin(content)
    findings = [*check_gpu(content, machine), *check_runtime(content, machine), *plugin_finding]
    runs = machine.gpu is not None and machine.runtime_version is not None
    answer: dict[str, Any] = {}
    if runs and (load or runtime == "tensorrt_rtx"):
        answer = ask(engine_path, runtime, library, device, load)
        findings += check_answer(answer, load)
    elif load:
        findings.append(Finding("loading", FAILS, "cannot be tried", "see above"))
    findings += check_memory(content, machine, answer.get("device_memory"))
    findings += check_host(engine_path, content, machine)
    return [*findings]


def look(runtime: str, device: int) -> Machine:
    """Ask the machine."""
    version, cuda = installed(runtime)
    return Machine(query(), device, version, cuda, host_memory())


def installed(runtime: str) -> tuple[str | None, int | None]:
    """Version of a TensorRT module, and the CUDA major version its package is for, without importing it."""
    spec = importlib.util.find_spec(runtime)
    if spec is None or not spec.origin:
        return None, None
    packages = metadata.packages_distributions().get(runtime, [])
    cuda = next((int(m[1]) for name in packages if (m := re.search(r"cu(\d\d)", name))), None)
    text = Path(spec.origin).read_text(errors="replace")
    written = re.search(r"^__version__ *= *[\"']([\d.]+)", text, re.MULTILINE)
    return written[1] if written else metadata.version(packages[0]) if packages else "", cuda


def check_gpu(content: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    """A GPU, and the kernels for it in the plan."""
    gpu, count = machine.gpu, len(machine.driver.gpus)
    if gpu is None:
        problem = machine.driver.problem or f"there is no GPU {machine.device}: {count} are visible"
        yield Finding(
            "GPU", FAILS, problem, "run on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both)"
        )
        return
    words = ", ".join(
        [gpu.name, *([_size(gpu.total_bytes)] if gpu.total_bytes else []), *([f"one of {count}"] if count > 1 else [])]
    )
    if len({g.name for g in machine.driver.gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        advice = "CUDA may number them otherwise: CUDA_DEVICE_ORDER=PCI_BUS_ID makes it number them as nvidia-smi does"
        yield Finding("GPU", WARNING, words, advice)
    else:
        yield Finding("GPU", OK, words)
    built = content["gpu_architectures"]
    found = f"{gpu.capability}; the plan is for {', '.join(built) or 'unknown'}"
    rtx = content["versions"]["runtime"] == "tensorrt_rtx"
    if gpu.capability in built:
        yield Finding("compute capability", OK, found)
    elif rtx and gpu.capability in RTX_ARCHITECTURES:
        advice = f'build it for this GPU too: build_engine(..., architectures=["{gpu.capability}"])'
        yield Finding("compute capability", FAILS, found, advice)
    elif rtx:
        advice = f"TensorRT-RTX plans are for {', '.join(RTX_ARCHITECTURES)}: build it here with --runtime tensorrt"
        yield Finding("compute capability", FAILS, found, advice)
    else:
        yield Finding("compute capability", FAILS if built else WARNING, found, "build the engine on this GPU")
    other = content["build"].get("gpu")
    if other and other != gpu.name and gpu.capability in built:
        advice = "TensorRT tuned it for that one: build it here for the best speed"
        yield Finding("GPU model", WARNING, f"{gpu.name}; built on {other}", advice)


def check_runtime(content: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    """The module that built the plan, in the version that did, and a driver that runs it."""
    runtime, needed = content["versions"]["runtime"], content["versions"].get("runtime_version", "")
    found, name = machine.runtime_version, NAMES[runtime]
    package = f"{runtime.replace('_', '-')}-cu{machine.cuda or min((machine.driver.cuda or (13, 0))[0], 13)}"
    advice = f"pip install {package}=={needed}, or build the engine again with what is installed"
    if found is None:
        yield Finding(name, FAILS, "is not installed", f"pip install {package}=={needed}")
    elif not found:
        yield Finding(name, WARNING, f"installed, of unknown version; the plan needs {needed}", advice)
    elif found == needed:
        yield Finding(name, OK, found)
    else:
        build_only = found.split(".")[:3] == needed.split(".")[:3]
        yield Finding(name, WARNING if build_only else FAILS, f"{found}; the plan was built by {needed}", advice)
    newest = machine.driver.cuda
    if newest is None:
        return
    words = f"{machine.driver.version or 'of unknown version'}, runs CUDA up to {newest[0]}.{newest[1]}"
    if machine.cuda is not None and newest[0] < machine.cuda:
        advice = f"update the driver to {DRIVERS.get(machine.cuda, 'a newer one')} or newer"
        advice += f", or install the package for CUDA {newest[0]}" if newest[0] in DRIVERS else ""
        yield Finding("driver", FAILS, f"{words}; the installed {name} needs CUDA {machine.cuda}", advice)
    else:
        yield Finding("driver", OK, words)


def check_plugin(content: Mapping[str, Any]) -> tuple[list[Finding], Path | None]:
    """The plugin library, and its path where the plan does not bring it along."""
    facts = content["plugin"]
    if facts is None:
        return [Finding("plugin", OK, "the plan needs none")], None
    findings, library = [], None
    if facts["embedded"]:
        findings.append(Finding("plugin", OK, f"{facts['version']}, inside the plan (allow host code to load it)"))
    else:
        library = Path(os.environ.get(plugin.ENVIRONMENT_VARIABLE) or facts["path"]).expanduser()
        findings.append(_library(facts, library))
    if content["versions"]["runtime"] == "tensorrt_rtx":
        words = "NVIDIA's manual says that TensorRT-RTX supports no plugin layers; it builds them all the same"
        findings.append(Finding("plugin layers", WARNING, words, "try it with --load; TensorRT itself supports them"))
    if any(_rows(p) >= memory.LARGE_TOKENS for p in content["profiles"]):
        place = os.environ.get("AWQ_TRT_CUBLASLT") or ctypes.util.find_library("cublasLt")
        if place is None:
            advice = "pip install nvidia-cublas, and its path in AWQ_TRT_CUBLASLT; without it our own kernel runs"
            words = "is not in the linker's path: long prompts may be slower"
            findings.append(Finding("cuBLASLt", WARNING, words, advice))
        else:
            findings.append(Finding("cuBLASLt", OK, place))
    return findings, library


def _library(facts: Mapping[str, Any], library: Path) -> Finding:
    advice = f"copy it here and give its path in {plugin.ENVIRONMENT_VARIABLE}, or build with the plugin embedded"
    try:
        version = plugin.library_version(library)
        same = sha256(library) == facts["sha256"]
    except AwqTrtError as error:
        return Finding("plugin", FAILS, str(error).partition(". ")[0], advice)
    if version != facts["version"]:
        return Finding("plugin", FAILS, f"{library} is version {version}; the plan needs {facts['version']}", advice)
    if not same:
        words = f"{library} is version {version}, but not the file the plan was built with (SHA-256 differs)"
        return Finding("plugin", WARNING, words, "use the very file, or build the engine again")
    return Finding("plugin", OK, f"{version}, {library}, the very file (SHA-256)")


def check_memory(content: Mapping[str, Any], machine: Machine, activations: int | None) -> Iterator[Finding]:
    """Free memory of the GPU against weights, cache and activations at the largest batch.

    Args:
        activations: what the loaded engine says, None takes the estimate in the sidecar.
    """
    sizes, batch = content["sizes"], memory.max_batch(content)
    cache, io = memory.cache_and_io(content)
    parts = {"weights": sizes["quantized_weights"] + sizes["other_weights"], f"KV cache for {batch} sequences": cache}
    parts["inputs and outputs"] = io
    if activations is not None:
        parts["activations, says the engine"] = activations
    elif sizes.get("activations") is not None:
        parts["activations, estimated from the graph"] = sizes["activations"]
    unknown = ", activations unknown (--load asks the engine)" if len(parts) == 3 else ""
    needed = sum(parts.values())
    words = f"{_size(needed)} needed: {', '.join(f'{k} {_size(v)}' for k, v in parts.items() if v)}{unknown}"
    gpu = machine.gpu
    if gpu is None:
        yield Finding("GPU memory", WARNING, words, "there is nothing here to compare it with")
        return
    free = gpu.free_bytes if gpu.free_bytes is not None else machine.host_bytes or 0
    words += f"; {_size(free)} free" + (" on the host, whose memory the GPU shares" if gpu.free_bytes is None else "")
    advice = "end what uses the GPU (nvidia-smi), or build with a smaller --max-batch or --max-seq"
    if needed > free:
        yield Finding("GPU memory", FAILS, words, advice)
    elif needed + CONTEXT_BYTES > free:
        words += f", of which CUDA itself takes about {_size(CONTEXT_BYTES)}"
        yield Finding("GPU memory", WARNING, words, advice)
    else:
        yield Finding("GPU memory", WARNING if unknown else OK, words, "ask the engine with --load" if unknown else "")


def check_host(engine_path: Path, content: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    """Host memory to read the plan, and a folder for the plugin, which TensorRT unpacks."""
    needed = 2 * engine_path.stat().st_size  # the file's bytes, and what the runtime makes of them
    if machine.host_bytes is not None:
        short = needed > machine.host_bytes
        words = f"{_size(needed)} to load the plan; {_size(machine.host_bytes)} free"
        yield Finding(
            "host memory", WARNING if short else OK, words, "end other programs, or add swap" if short else ""
        )
    if content["plugin"] is not None and content["plugin"]["embedded"]:
        folder = Path(tempfile.gettempdir())
        size, free = content["sizes"].get("plugin") or 0, shutil.disk_usage(folder).free
        words = f"{_size(size)} for the plugin; {_size(free)} free in {folder}"
        short = size > free
        yield Finding("disk", FAILS if short else OK, words, "free some space, or set TMPDIR" if short else "")


def ask(engine_path: Path, runtime: str, library: Path | None, device: int, load: bool) -> dict[str, Any]:
    """What the runtime itself says of a plan (probe_process.py); {"error": text} where it says nothing."""
    job = {"runtime": runtime, "plan": str(engine_path.resolve()), "device": device, "load": load}
    job["plugin"] = None if library is None else str(library.resolve())
    root = str(PACKAGE.parent)
    path = ":".join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as pipe:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "awq_trt.engine.probe_process", str(write_end)],
                input=json.dumps(job),
                pass_fds=[write_end],
                env=os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer after {PROBE_SECONDS} seconds"}
        finally:
            os.close(write_end)
        text = pipe.read()
    if not text:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"error": f"the process that asked it ended with status {done.returncode}, and said: {last}"}
    return json.loads(text)


def check_answer(answer: Mapping[str, Any], load: bool) -> Iterator[Finding]:
    """What the runtime says of the plan, by its header or by loading it."""
    words = list(answer.get("log", []))[-3:]
    said = ": " + "; ".join(words) if words else ""
    if "error" in answer:
        yield Finding("loading" if load else "header", FAILS, answer["error"], "see the lines above")
        return
    if "validity" in answer:
        reasons = "; ".join(REASONS.get(r, r.lower()) for r in answer["reasons"])
        if answer["validity"] == "INVALID":
            yield Finding(
                "header", FAILS, f"TensorRT-RTX refuses the plan: {reasons or said[2:]}", "build the engine again"
            )
        elif answer["validity"] == "SUBOPTIMAL":
            advice = "build the engine with a newer TensorRT-RTX"
            yield Finding("header", WARNING, "TensorRT-RTX is older than this GPU: not its best speed", advice)
        else:
            yield Finding("header", OK, "TensorRT-RTX accepts the plan's header")
    if answer.get("loaded") is True:
        yield Finding("loading", OK, "the plan was loaded")
    elif load:
        yield Finding("loading", FAILS, f"the plan could not be loaded{said}", "see the lines above, or build it again")


def host_memory() -> int | None:
    """Bytes of memory that programs may still take, None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _rows(profile: Mapping[str, Any]) -> int:
    """The most tokens of a call in a profile, 0 where it has none."""
    largest = profile["inputs"].get("input_ids", {}).get("max", [0, 0])
    return int(largest[0] * largest[-1])


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
