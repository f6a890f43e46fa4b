"""Time and memory: seconds per stage, peak of the process, and the limit that the user set."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from awq_trt.awq.resume import KeepError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Usage:
    """What a run takes."""

    seconds: float  # wall clock
    bytes: int  # peak resident memory of the process


@dataclass
class StageTimer:
    """Seconds per stage. A stage inside another counts for both."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def total(self, **factors: float) -> float:
        """Seconds of all stages together, some of them multiplied."""
        return sum(seconds * factors.get(stage, 1.0) for stage, seconds in self.seconds.items())


@dataclass
class Budget:
    """The run as a whole."""

    limit: int | None  # bytes it may take
    started: float  # monotonic seconds

    @classmethod
    def begin(cls, limit: int | None) -> Budget:
        """A run starts now; the peak of what this process did before is forgotten where Linux allows it."""
        with suppress(OSError):
            CLEAR.write_text("5")
        return cls(limit, time.monotonic())

    def used(self) -> Usage:
        """Seconds and peak so far."""
        return Usage(time.monotonic() - self.started, resident_bytes("VmHWM"))

    def check(self, need: int) -> None:
        """Refuse a run that needs more than the limit.

        Raises:
            AwqTrtError: it does.
        """
        if self.limit is not None and need > self.limit:
            raise KeepError(
                f"this run needs {need / 2**20:.0f} MiB of memory, but memory={self.limit / 2**20:.0f} MiB. Allow that "
                "much, or use shorter calibration windows (calibration_length); fewer of them do not help."
            )

    def spare(self, peak: int, wanted: int) -> bool:
        """Whether a limit is set and has room for `wanted` bytes above the peak."""
        return self.limit is not None and peak + wanted <= self.limit


def resident_bytes(key: str) -> int:
    """Resident memory of this process: "VmRSS" now, "VmHWM" at its peak."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trim_heap() -> None:
    """Give freed memory back to the system, which glibc does not do by itself once tensors have come and gone.

    Over 32 blocks of an 8-billion-parameter model it would keep 0.6 GB more than the first block needed.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
