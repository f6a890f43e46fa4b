"""Will this plan run here? Compares its sidecar with the machine, before anything is loaded.

Rules, from NVIDIA's manuals ("Engine Compatibility" of TensorRT 11 and of TensorRT-RTX, "Porting Guide" of the latter):
a plan loads only in the version that built it, both of TensorRT and of TensorRT-RTX; only on a compute capability that
it was built for; only where the driver runs the CUDA version that the runtime was made with.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from awq_trt.engine import memory, plugin, sidecar
from awq_trt.engine.child import run_child
from awq_trt.engine.driver import Driver, Gpu, query
from awq_trt.engine.probe_process import PROBE_SECONDS
from awq_trt.engine.runtimes import RTX_ARCHITECTURES
from awq_trt.errors import AwqTrtError
from awq_trt.files import sha256

OK, WARNING, FAILS = "ok", "warning", "fails"

CONTEXT_BYTES = 512 << 20
"""Assumed for the CUDA context, kernels and the runtime's own buffers: they are not in any sum."""
DRIVERS = {12: "525.60.13", 13: "580.65.06"}
"""CUDA -> the first Linux driver that runs it (CUDA toolkit release notes, minor version compatibility)."""

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
    """One check."""

    check: str
    status: str  # OK, WARNING or FAILS
    found: str  # what was compared
    advice: str = ""  # what to do, "" if OK


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
        raise AwqTrtError(f"device is {device}; GPUs are numbered from 0.")
    content = sidecar.read_sidecar(sidecar.path_of(engine_path))
    runtime = content["versions"].get("runtime")
    if runtime not in NAMES:
        raise AwqTrtError(f"{sidecar.path_of(engine_path)}: the runtime is {runtime!r}. Build the engine again.")
    driver, (version, cuda) = query(), installed(runtime)
    gpu = driver.gpus[device] if device < len(driver.gpus) else None
    facts = content["plugin"]
    library = None  # the plan brings its plugin along, or needs none
    if facts is not None and not facts["embedded"]:
        library = Path(os.environ.get(plugin.ENVIRONMENT_VARIABLE) or facts["path"]).expanduser()
    findings = [
        *check_gpu(content, driver, device, gpu),
        *check_runtime(content, driver, version, cuda),
        *check_plugin(content, library),
    ]
    activations = None
    if gpu is not None and version is not None and (load or runtime == "tensorrt_rtx"):
        answer = ask(engine_path, runtime, library, device, load)
        findings += check_answer(answer, load)
        activations = answer.get("device_memory")
    elif load:
        findings.append(Finding("loading", FAILS, "cannot be tried", "see above"))
    host = host_memory()
    return [*findings, check_memory(content, gpu, host, activations), *check_host(engine_path, content, host)]


def installed(runtime: str) -> tuple[str | None, int | None]:
    """Version of a TensorRT module, and the CUDA major version its package is for, without importing it.

    Returns:
        the version, "" where it does not say, None where it is not installed; the CUDA version, None if unknown.
    """
    spec = importlib.util.find_spec(runtime)
    if spec is None or not spec.origin:
        return None, None
    packages = metadata.packages_distributions().get(runtime, [])
    cuda = next((int(m[1]) for name in packages if (m := re.search(r"cu(\d\d)", name))), None)
    text = Path(spec.origin).read_text(errors="replace")
    written = re.search(r"^__version__ *= *[\"']([\d.]+)", text, re.MULTILINE)
    return written[1] if written else metadata.version(packages[0]) if packages else "", cuda


def check_gpu(content: Mapping[str, Any], driver: Driver, device: int, gpu: Gpu | None) -> Iterator[Finding]:
    """A GPU, and the kernels for it in the plan."""
    if gpu is None:
        problem = driver.problem or f"there is no GPU {device}: {len(driver.gpus)} are visible"
        advice = "run on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both)"
        yield Finding("GPU", FAILS, problem, advice)
        return
    size = "memory of the host" if gpu.total_bytes is None else _size(gpu.total_bytes)
    words = f"{gpu.name}, {size}" + (f", one of {len(driver.gpus)}" if len(driver.gpus) > 1 else "")
    differ = len({g.name for g in driver.gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    advice = "CUDA may number them otherwise: CUDA_DEVICE_ORDER=PCI_BUS_ID makes it number them as nvidia-smi does"
    yield _finding("GPU", WARNING if differ else OK, words, advice)

    built = content["gpu_architectures"]
    status, advice = FAILS, f'build it for this GPU too: build_engine(..., architectures=["{gpu.capability}"])'
    if gpu.capability in built:
        status = OK
    elif content["versions"]["runtime"] == "tensorrt":
        status, advice = FAILS if built else WARNING, "build the engine on this GPU"
    elif gpu.capability not in RTX_ARCHITECTURES:
        advice = f'TensorRT-RTX plans are for {", ".join(RTX_ARCHITECTURES)}: build it here with runtime="tensorrt"'
    found = f"{gpu.capability}; the plan is for {', '.join(built) or 'unknown'}"
    yield _finding("compute capability", status, found, advice)
    other = content["build"].get("gpu")
    if other and other != gpu.name and status == OK:
        advice = "TensorRT tuned it for that one: build it here for the best speed"
        yield Finding("GPU model", WARNING, f"{gpu.name}; built on {other}", advice)


def check_runtime(
    content: Mapping[str, Any], driver: Driver, version: str | None, cuda: int | None
) -> Iterator[Finding]:
    """The module that built the plan, in the version that did, and a driver that runs it; see `installed`."""
    runtime, needed = content["versions"]["runtime"], content["versions"].get("runtime_version", "")
    name = NAMES[runtime]
    install = f"pip install {runtime.replace('_', '-')}-cu{cuda or min((driver.cuda or (13, 0))[0], 13)}=={needed}"
    advice = f"{install}, or build the engine again with what is installed"
    if version is None:
        yield Finding(name, FAILS, "is not installed", install)
    elif not version:
        yield Finding(name, WARNING, f"installed, of unknown version; the plan needs {needed}", advice)
    elif version == needed:
        yield Finding(name, OK, version)
    else:  # only the last number may differ: that of NVIDIA's build
        status = WARNING if version.split(".")[:3] == needed.split(".")[:3] else FAILS
        yield Finding(name, status, f"{version}; the plan was built by {needed}", advice)
    if driver.cuda is None:
        return
    words = f"{driver.version}, runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    if cuda is None or cuda <= driver.cuda[0]:
        yield Finding("driver", OK, words)
    else:
        advice = f"update the driver to {DRIVERS.get(cuda, 'a newer one')} or newer"
        advice += f", or install the package for CUDA {driver.cuda[0]}" if driver.cuda[0] in DRIVERS else ""
        yield Finding("driver", FAILS, f"{words}; the installed {name} needs CUDA {cuda}", advice)


def check_plugin(content: Mapping[str, Any], library: Path | None) -> Iterator[Finding]:
    """The plugin library: `library` where the plan does not bring it along."""
    facts = content["plugin"]
    if facts is None:
        yield Finding("plugin", OK, "the plan needs none")
        return
    if library is None:
        yield Finding("plugin", OK, f"{facts['version']}, inside the plan (allow host code to load it)")
    else:
        yield _library(facts, library)
    if content["versions"]["runtime"] == "tensorrt_rtx":
        words = "TensorRT-RTX runs plugins of this kind (IPluginV3), NVIDIA's own too; ours has not been run there"
        yield Finding("plugin layers", WARNING, words, "load the plan to try it (load=True)")
    shapes = [profile["inputs"].get("input_ids", {"max": [0]})["max"] for profile in content["profiles"]]
    if any(shape[0] * shape[-1] >= memory.LARGE_TOKENS for shape in shapes):
        place = os.environ.get("AWQ_TRT_CUBLASLT") or ctypes.util.find_library("cublasLt")
        words = "is not in the linker's path: long prompts may be slower"
        advice = "pip install nvidia-cublas, and its path in AWQ_TRT_CUBLASLT; without it our own kernel runs"
        yield _finding("cuBLASLt", OK if place else WARNING, place or words, advice)


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
        return Finding("plugin", FAILS, words, "use the very file, or build the engine again")
    return Finding("plugin", OK, f"{version}, {library}, the very file (SHA-256)")


def check_memory(content: Mapping[str, Any], gpu: Gpu | None, host: int | None, activations: int | None) -> Finding:
    """Free memory of the GPU against weights, cache and activations at the largest batch.

    Args:
        host: bytes that are free on the host. activations: what the loaded engine says, None takes the estimate in the
            sidecar.
    """
    sizes, (cache, io) = content["sizes"], memory.cache_and_io(content)
    parts = {
        "weights": sizes["quantized_weights"] + sizes["other_weights"],
        f"KV cache for {memory.max_batch(content)} sequences": cache,
        "inputs and outputs": io,
    }
    unknown = activations is None and sizes.get("activations") is None
    if not unknown:
        source = "estimated from the graph" if activations is None else "says the engine"
        parts[f"activations, {source}"] = sizes["activations"] if activations is None else activations
    needed = sum(parts.values())
    words = f"{_size(needed)} needed: {', '.join(f'{k} {_size(v)}' for k, v in parts.items() if v)}"
    words += ", activations unknown (loading the plan tells)" if unknown else ""
    free, kind = (gpu.free_bytes, "") if gpu and gpu.free_bytes is not None else (host, " on the host")
    if gpu is None or free is None:
        return Finding("GPU memory", WARNING, words, "there is nothing here to compare it with")
    words += f"; {_size(free)} free{kind}"
    if needed + CONTEXT_BYTES <= free:
        return _finding("GPU memory", WARNING if unknown else OK, words, "load the plan to ask the engine (load=True)")
    if needed <= free:
        words += f", of which CUDA itself takes about {_size(CONTEXT_BYTES)}"
    advice = "end what uses the GPU (nvidia-smi), or build with a smaller max_batch or max_seq"
    return Finding("GPU memory", WARNING if needed <= free else FAILS, words, advice)


def check_host(engine_path: Path, content: Mapping[str, Any], host: int | None) -> Iterator[Finding]:
    """Host memory to read the plan, and a folder for the plugin, which TensorRT unpacks."""
    if host is not None:
        needed = 2 * engine_path.stat().st_size  # the file's bytes, and what the runtime makes of them
        words = f"{_size(needed)} to load the plan; {_size(host)} free"
        yield _finding("host memory", WARNING if needed > host else OK, words, "end other programs, or add swap")
    if content["plugin"] is not None and content["plugin"]["embedded"]:
        folder = tempfile.gettempdir()
        needed, free = content["sizes"].get("plugin") or 0, shutil.disk_usage(folder).free
        words = f"{_size(needed)} for the plugin; {_size(free)} free in {folder}"
        yield _finding("disk", FAILS if needed > free else OK, words, "free some space, or set TMPDIR")


def ask(engine_path: Path, runtime: str, library: Path | None, device: int, load: bool) -> dict[str, Any]:
    """What the runtime itself says of a plan (probe_process.py); {"error": text} where it says nothing."""
    job = {"runtime": runtime, "plan": str(engine_path.resolve()), "device": device, "load": load}
    job["plugin"] = None if library is None else str(library.resolve())
    outcome, status, printed = run_child("probe_process", job)
    if status == -signal.SIGALRM:
        return {"error": f"no answer after {PROBE_SECONDS} seconds"}
    if not outcome:
        last = (printed.strip().splitlines() or ["nothing"])[-1]
        return {"error": f"the process that asked it ended with status {status}, and said: {last}"}
    return outcome["done"] if "done" in outcome else {"error": outcome["failed"]}


def check_answer(answer: Mapping[str, Any], load: bool) -> Iterator[Finding]:
    """What the runtime says of the plan, by its header or by loading it."""
    if "error" in answer:
        yield Finding("loading" if load else "header", FAILS, answer["error"], "see the lines above")
        return
    said = "; ".join(answer.get("log", [])[-3:])
    if answer.get("validity") == "INVALID":
        reasons = "; ".join(REASONS.get(r, r.lower()) for r in answer["reasons"])
        yield Finding("header", FAILS, f"TensorRT-RTX refuses the plan: {reasons or said}", "build the engine again")
    elif answer.get("validity") == "SUBOPTIMAL":
        advice = "build the engine with a newer TensorRT-RTX"
        yield Finding("header", WARNING, "TensorRT-RTX is older than this GPU: not its best speed", advice)
    elif "validity" in answer:
        yield Finding("header", OK, "TensorRT-RTX accepts the plan's header")
    if answer.get("loaded"):
        yield Finding("loading", OK, "the plan was loaded")
    elif load:
        words = "the plan could not be loaded" + (f": {said}" if said else "")
        yield Finding("loading", FAILS, words, "see the lines above, or build it again")


def host_memory() -> int | None:
    """Bytes of memory that programs may still take, None if unknown."""
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _finding(check: str, status: str, found: str, advice: str) -> Finding:
    """A finding whose advice counts only where it is not OK."""
    return Finding(check, status, found, "" if status == OK else advice)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
