"""Files of two exports or builds, each whole and of the right size, are refused wherever one of them is opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commands import command
from stand_ins import plan_in

from awq_trt import AwqTrtError, build_engine, generate, write_triton_repo
from awq_trt.engine.sidecar import path_of
from awq_trt.export.metadata import read_graph
from awq_trt.files import sha256


@pytest.fixture
def onnx(exported: Path, tmp_path: Path) -> Path:
    """A decoder with the data of another one: same size, same time."""
    for name in ("llama.onnx", "llama.onnx.data"):
        shutil.copy2(exported / name, tmp_path / name)
    data = bytearray((exported / "llama.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "llama.onnx.data").write_bytes(data)
    times = (exported / "llama.onnx.data").stat()
    os.utime(tmp_path / "llama.onnx.data", ns=(times.st_atime_ns, times.st_mtime_ns))
    return tmp_path / "llama.onnx"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan with the sidecar of another one."""
    (tmp_path / "plan").write_bytes(b"plan" * 1000)
    plan = plan_in(tmp_path, plan_sha256=sha256(tmp_path / "plan"))
    assert command("check", plan).returncode == 1  # there is no GPU
    plan.write_bytes(b"PLAN" * 1000)
    return plan


def test_data_of_another_export(onnx: Path, exported: Path, tmp_path: Path) -> None:
    assert read_graph(exported / "llama.onnx").metadata["data"]["sha256"] == sha256(exported / "llama.onnx.data")
    for words in (
        ("engine", onnx, "--output", tmp_path / "x.plan"),
        ("export", "--model", onnx, "--engine", tmp_path / "x.plan"),
        ("generate", onnx, "--prompt", "Hello", "--tokenizer", exported / "llama.awq"),
        ("triton", onnx, "--output", tmp_path / "repo", "--tokenizer", exported / "llama.awq"),
        ("eval", onnx, "--float", exported / "llama.awq"),
    ):
        result = command(*words)
        assert result.returncode == 2, words
        assert "llama.onnx.data: is not the file that" in result.stderr, words
    for call in (build_engine, write_triton_repo, generate):
        with pytest.raises(AwqTrtError, match="do not belong together"):
            call(onnx, [[1]] if call is generate else tmp_path / "y")  # type: ignore[operator]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.onnx", "llama.onnx.data"]


def test_a_plan_of_another_build(plan: Path, tmp_path: Path) -> None:
    for words in (
        ("check", plan),
        ("generate", plan, "--prompt", "Hello"),
        ("triton", plan, "--output", tmp_path / "repo"),
        ("report", plan, "--html", tmp_path / "page.html"),
    ):
        result = command(*words)
        assert result.returncode == 2, words
        assert f"{plan.name}: is not the file that {path_of(plan)} was written with" in result.stderr, words
    assert not (tmp_path / "repo").exists()
    assert not (tmp_path / "page.html").exists()
