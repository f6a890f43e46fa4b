"""Calibration shared by processes: the files of two are those of one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from forked_ranks import start

import awq_trt.awq.quantize  # noqa: F401  before the processes are forked

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--calibration-samples", "5", "--calibration-length", "64")


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
