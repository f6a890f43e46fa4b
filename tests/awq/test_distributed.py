"""Calibration shared by processes: the same number of them writes the same files, another number nearly the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from forked_ranks import start

import awq_trt.awq.quantize  # noqa: F401  before the processes are forked
from awq_trt.awq.distributed import Ranks
from awq_trt.checkpoint.quantized import open_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--calibration-samples", "5", "--calibration-length", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.mark.parametrize(("total", "world"), [(5, 1), (5, 2), (8, 3), (2, 3), (1, 4)])
def test_every_window_has_one_rank_and_the_first_is_that_of_rank_0(total: int, world: int) -> None:
    parts = [Ranks(rank, world).windows(total) for rank in range(world)]
    assert [window for part in parts for window in part] == list(range(total))
    assert 0 in parts[0]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_two_runs_of_as_many_processes_write_the_same_bits_and_of_others_nearly(
    model: Path, tmp_path: Path, logs: Path
) -> None:
    """With an INT4 head; of eight processes some have no window."""
    for name, world in (("1", 1), ("2", 2), ("again", 2), ("8", 8)):
        arguments = ["--model", str(model), "--awq", str(tmp_path / name), "--lm-head", "int4", *SHORT]
        results = start(logs, world, arguments)
        assert [code for code, _ in results] == [0] * world, results
        assert ("shared by" in results[0][1]) == (world > 1)
        assert all("INT4" not in error for _, error in results[1:]), "only rank 0 prints"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "8", "again"]
    assert tiny_models.content(tmp_path / "2") == tiny_models.content(tmp_path / "again")
    alone = open_quantized(tmp_path / "1")
    assert "lm_head" in alone.linears
    for name in ("2", "8"):
        shared = open_quantized(tmp_path / name)
        assert shared.linears.keys() == alone.linears.keys()
        for layer, linear in alone.linears.items():
            other = shared.linears[layer]
            assert float((other.q == linear.q).float().mean()) > 0.98, layer
            weight, expected = other.dequantize().float(), linear.dequantize().float()
            assert float((weight - expected).norm() / expected.norm()) < 0.05, layer


def test_an_error_of_one_rank_ends_all_with_one_message(model: Path, tmp_path: Path, logs: Path) -> None:
    arguments = ["--model", str(model), "--awq", str(tmp_path / "out"), *SHORT]
    results = start(logs, 2, arguments, {1: ["--calibration", str(tmp_path / "missing.txt")]})
    assert [code for code, _ in results] == [2, 2], results
    assert results[0][1].count("error:") == 1
    assert "missing.txt" in results[0][1]
    assert "on rank 1" in results[0][1]
    assert "error" not in results[1][1].lower()
    assert list(tmp_path.iterdir()) == []
