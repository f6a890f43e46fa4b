"""What the NVIDIA driver says of this machine: its versions and the GPUs that CUDA would use here.

NVML (the package nvidia-ml-py, module pynvml) answers without making a CUDA context. It numbers GPUs as nvidia-smi
does and knows nothing of CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER; `query` applies both.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU, or the part of one that MIG made."""

    name: str
    capability: str  # like "8.9"
    total_bytes: int | None  # of its memory; None where it has none of its own (DGX Spark, Jetson)
    free_bytes: int | None


@dataclass(frozen=True)
class Driver:
    """The driver of this machine."""

    version: str | None = None  # like "580.65.06", None if unknown
    cuda: tuple[int, int] | None = None  # newest CUDA it can run, as (13, 0); None if unknown
    gpus: tuple[Gpu, ...] = ()  # in CUDA's order, as CUDA_VISIBLE_DEVICES leaves them
    problem: str | None = None  # why there are no GPUs, else None


def visible(device: int) -> str:
    """What CUDA_VISIBLE_DEVICES must be for one of the GPUs that are visible now to be the only one."""
    now = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return now[device] if device < len(now) else str(device)


def query() -> Driver:
    """Ask the driver; never raises."""
    import pynvml as nvml  # not at the top: `visible` is also used in Triton's Python, which has no packages

    version = cuda = None
    try:
        nvml.nvmlInit()
        version = nvml.nvmlSystemGetDriverVersion()
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        cuda = (number // 1000, number % 1000 // 10)
        gpus = tuple(_visible_gpus(nvml))
        nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            library = "libcuda.so.1" if version else "libnvidia-ml.so.1"
            return Driver(version, problem=f"there is no NVIDIA driver here ({library} is missing)")
        return Driver(version, cuda, problem=f"the NVIDIA driver offers no GPU: {error} (NVML error {error.value})")
    nothing = "the NVIDIA driver offers no GPU: no GPU is visible (CUDA_VISIBLE_DEVICES may hide them)"
    return Driver(version, cuda, gpus, None if gpus else nothing)


def _visible_gpus(nvml: Any) -> list[Gpu]:
    """The GPUs that this process may use, by CUDA's rules for CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.

    NVML cannot tell CUDA's default order, "fastest first", which is documented no further. Cores times clock stands
    for it; GPUs of one model stay in the order of the PCI bus, as they do in CUDA.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        handles.sort(key=lambda handle: -_speed(nvml, handle))
    numbered = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    by_uuid: dict[str, Gpu] = {}
    for handle in handles:
        parts = _mig_parts(nvml, handle)
        usable = [parts[0] if parts else handle, *parts]  # of a whole GPU that MIG divides, CUDA takes the first part
        for named, used in zip([handle, *parts], usable, strict=True):
            by_uuid[nvml.nvmlDeviceGetUUID(named)] = _gpu(nvml, used, whole=handle)
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    found: list[str] = []
    for name in numbered if names is None else map(str.strip, names.split(",")):
        if name.isdigit():
            chosen = numbered[int(name) : int(name) + 1]
        else:  # the beginning of a UUID is enough
            chosen = [uuid for uuid in by_uuid if name and uuid.startswith(name)]
        if len(chosen) != 1:  # CUDA ignores this name and all after it
            break
        found += chosen
    return [by_uuid[uuid] for uuid in found]


def _speed(nvml: Any, handle: Any) -> int:
    with suppress(nvml.NVMLError):
        return int(nvml.nvmlDeviceGetNumGpuCores(handle) * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    return 0


def _mig_parts(nvml: Any, handle: Any) -> list[Any]:
    parts = []
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):  # 0 where MIG is off
        with suppress(nvml.NVMLError_NotFound):  # numbers may have gaps
            parts.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))
    return parts


def _gpu(nvml: Any, handle: Any, whole: Any) -> Gpu:
    """Of a GPU, or of a MIG part, which has the capability of the whole."""
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(whole)
    total = free = None
    with suppress(nvml.NVMLError_NotSupported):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = memory.total, memory.free
    return Gpu(nvml.nvmlDeviceGetName(handle), f"{major}.{minor}", total, free)
