"""Tiny checkpoints, made once per test run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side; said before torch is imported, and to every child
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import tiny_models
import torch

LONGEST = ("test_readme.py", "test_families.py", "test_export.py", "test_triton_server.py", "test_host_check.py")

# A shell's `&` has SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """More of tests/fuzz than the few hundred cases of every run."""
    parser.addoption("--fuzz-cases", type=int, help="mutated files for tests/fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, or one process of `-n 2` would end on one of them alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads do not survive a fork, and the bits of a result may depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float_model_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own model of a checkpoint runs in the process of the test: in a new one it takes ten seconds more,
    to import torch."""
    from awq_trt.evaluate import float_model

    def here(module: str, job: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
        from awq_trt.evaluate.float_process import work

        try:
            return json.loads(json.dumps({"done": work(job, print)})), 0, ""
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}, 0, ""

    monkeypatch.setattr(float_model, "run_child", here)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny checkpoints: llama, gpt2, bert, vit. Read only."""
    folder = tmp_path_factory.mktemp("models")
    for make in (tiny_models.llama, tiny_models.gpt2, tiny_models.bert, tiny_models.vit):
        make(folder / make.__name__)
    return folder


@pytest.fixture(scope="session")
def exported(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama.awq, the tiny llama quantized, and llama.onnx, made from it. Read only."""
    from awq_trt.awq.config import QuantizeConfig
    from awq_trt.awq.quantize import quantize
    from awq_trt.export.export import export_onnx

    folder = tmp_path_factory.mktemp("exported")
    quantize(models / "llama", folder / "llama.awq", QuantizeConfig(calibration_samples=2, calibration_length=128))
    export_onnx(folder / "llama.awq", folder / "llama.onnx")
    return folder
