"""A virtual environment for each peer, so that their pins of other packages do not meet ours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from bench.methods import PEERS

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


class NotInstalledError(Exception):
    """A peer could not be installed; the message is pip's."""


def interpreter(name: str | None, cache: Path) -> str:
    """Path of the Python that has a peer (None: this one), installing it on first use.

    Raises:
        NotInstalledError: pip could not.
    """
    if name is None:
        return sys.executable
    requirements = [
        *PEERS[name],
        *(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")),
    ]
    key = hashlib.sha256(" ".join([*requirements, sys.version]).encode()).hexdigest()[:8]
    folder = cache / "environments" / f"{name}-{key}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "-q", *requirements])
        complete.touch()
    return str(python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotInstalledError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-800:]}")
