"""What the NVIDIA driver says of this machine: its GPUs and versions, asked through ctypes, without any CUDA context.

libcuda.so.1 (CUDA driver API, cuda.h) knows the GPUs that this process may use, in the order that CUDA numbers them;
libnvidia-ml.so.1 (NVML, nvml.h) knows how much of their memory is free, and the driver's version.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR"""


@dataclass(frozen=True)
class Gpu:
    """One GPU. capability: like "8.9". total_bytes, free_bytes: of its memory; free_bytes None without NVML."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class Driver:
    """The driver of this machine.

    Attributes:
        version: like "580.65.06", None if unknown. cuda: newest CUDA it can run, as (13, 0); None if unknown.
        gpus: in CUDA's order, as CUDA_VISIBLE_DEVICES leaves them. problem: why there are none, else None.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


def query() -> Driver:
    """Ask the driver; never raises."""
    nvml = _open("libnvidia-ml.so.1")
    if nvml is not None and nvml.nvmlInit_v2():
        nvml = None
    try:
        return _query(_open("libcuda.so.1"), nvml)
    finally:
        if nvml is not None:
            nvml.nvmlShutdown()


def visible(device: int) -> str:
    """What CUDA_VISIBLE_DEVICES must be for one of the GPUs that are visible now to be the only one."""
    now = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return now[device] if device < len(now) else str(device)


def _query(cuda: Any, nvml: Any) -> Driver:
    version = None
    if nvml is not None:
        text = ctypes.create_string_buffer(80)
        version = text.value.decode() if nvml.nvmlSystemGetDriverVersion(text, 80) == 0 else None
    if cuda is None:
        return Driver(version, problem="there is no NVIDIA driver here (libcuda.so.1 is missing)")
    number = ctypes.c_int()
    newest = None
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        newest = (number.value // 1000, number.value % 1000 // 10)
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number))
    if status or number.value == 0:
        words = _words(cuda, status) if status else "no GPU is visible (CUDA_VISIBLE_DEVICES may hide them)"
        return Driver(version, newest, problem=f"the NVIDIA driver offers no GPU: {words}")
    return Driver(version, newest, tuple(_gpu(cuda, nvml, i) for i in range(number.value)))


def _gpu(cuda: Any, nvml: Any, index: int) -> Gpu:
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    for attribute, number in zip(CAPABILITY, numbers, strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    capability = f"{numbers[0].value}.{numbers[1].value}"
    return Gpu(name.value.decode(errors="replace"), capability, total.value, _free_bytes(cuda, nvml, device))


def _free_bytes(cuda: Any, nvml: Any, device: ctypes.c_int) -> int | None:
    """NVML numbers GPUs in another order than CUDA: the UUID says which one is meant."""
    raw = (ctypes.c_ubyte * 16)()
    if nvml is None or cuda.cuDeviceGetUuid_v2(raw, device):
        return None
    digits = bytes(raw).hex()
    uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    for kind in ("GPU", "MIG"):
        if nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}".encode(), ctypes.byref(handle)) == 0:
            return int(memory[1]) if nvml.nvmlDeviceGetMemoryInfo(handle, memory) == 0 else None
    return None


def _words(cuda: Any, status: int) -> str:
    text = ctypes.c_char_p()
    known = cuda.cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value
    return f"{text.value.decode()} (CUDA error {status})" if known and text.value else f"CUDA error {status}"


def _open(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
