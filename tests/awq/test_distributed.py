"""Calibration shared by processes: the files of two are those of one, bit for bit."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import awq_trt.awq.quantize  # noqa: F401  before the processes are forked

pytestmark = pytest.mark.usefixtures("one_thread")

EXPORT = Path(__file__).parents[2] / "tools" / "export.py"
SHORT = ("--calibration-samples", "5", "--calibration-length", "64")


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def test_files_are_those_of_one_process(model: Path, tmp_path: Path, logs: Path) -> None:
    for world in (1, 2, 3):
        results = start(logs, world, ["--model", str(model), "--awq", str(tmp_path / str(world)), *SHORT])
        assert [code for code, _ in results] == [0] * world, results
        assert ("shared by" in results[0][1]) == (world > 1)
        assert all("INT4" not in error for _, error in results[1:]), "only rank 0 prints"
        assert tiny_models.content(tmp_path / str(world)) == tiny_models.content(tmp_path / "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]


def test_an_error_of_one_rank_ends_all_with_one_message(model: Path, tmp_path: Path, logs: Path) -> None:
    arguments = ["--model", str(model), "--awq", str(tmp_path / "out"), *SHORT]
    results = start(logs, 2, arguments, {1: ["--calibration", str(tmp_path / "missing.txt")]})
    assert [code for code, _ in results] == [2, 2], results
    assert results[0][1].count("error:") == 1
    assert "missing.txt" in results[0][1]
    assert "on rank 1" in results[0][1]
    assert "error" not in results[1][1].lower()
    assert list(tmp_path.iterdir()) == []
