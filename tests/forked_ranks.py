"""The export command in several processes, as torchrun starts them."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path

import torch

EXPORT = Path(__file__).parents[1] / "tools" / "export.py"


def run_rank(log: Path, environment: dict[str, str], arguments: list[str]) -> None:
    """In a forked process: tools/export.py with standard error in a file. Never returns."""
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.update(environment)
            torch.set_num_threads(1)
            code = runpy.run_path(str(EXPORT))["main"](arguments)
            sys.stderr.flush()
    finally:
        os._exit(code)


def start(
    folder: Path, world: int, arguments: list[str], changed: dict[int, list[str]] | None = None
) -> list[tuple[int, str]]:
    """tools/export.py in `world` processes, as torchrun starts them; exit code and standard error of each.

    They are forked, because importing torch and transformers takes longer than the run.

    Args:
        folder: for their output. changed: rank -> arguments that it alone gets besides.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in ranks.items()} if world > 1 else {}
        child = os.fork()
        if child == 0:
            run_rank(folder / f"log{rank}", environment, [*arguments, *(changed or {}).get(rank, [])])
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, (folder / f"log{rank}").read_text()) for rank, code in enumerate(codes)]
