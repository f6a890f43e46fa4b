"""What a record says of the machine it was made on, writing it, running commands; the standard library only."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

GPU_FIELDS = "name,compute_cap,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"


def now() -> str:
    """Date and time, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def gpus() -> list[dict[str, str]]:
    """One entry per GPU with what nvidia-smi says of it; empty where there is no GPU or no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(zip(GPU_FIELDS.split(","), (v.strip() for v in row.split(",")), strict=False)) for row in rows]


def processor() -> str:
    """Its name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class CommandError(Exception):
    """A command failed; the message is the end of what it printed."""


def run(command: list[Any], **options: Any) -> None:
    """Run a command, quietly.

    Raises:
        CommandError: it failed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, **options)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise CommandError(f"{' '.join(words)}: exit code {done.returncode}: {said}")


def write_json(path: Path, record: dict[str, Any], indent: int = 1) -> None:
    """A record as JSON."""
    write_text(path, json.dumps(record, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace the file at once, so that there is a whole one at any time; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
