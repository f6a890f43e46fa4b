"""The README's lines do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code(language: str) -> str:
    """The README's first block of a language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_python_lines(models: Path, tmp_path: Path) -> None:
    script = code("python").replace("path/to/checkpoint", str(models / "llama"))
    assert str(models) in script
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "models" / "out" / "config.pbtxt").exists()


def test_options_exist() -> None:
    """Every option the README names is one of the command line's."""
    text = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    ours = set(re.findall(r"`(--[a-z-]+)", README)) | set(re.findall(r"tools/export\.py.* (--[a-z-]+)", README))
    foreign = {"--versionCompatible", "--dynamicPlugins", "--version", "--dynamic"}
    assert len(ours) > 10
    assert {option for option in ours - foreign if option not in text} == set()


def test_recorded_numbers_are_the_ones_printed() -> None:
    record = json.loads((ROOT / "tools" / "results" / "smollm2-135m-export.json").read_text())
    held_out = record["accuracy"]["held_out"]
    for name in ("float", "rounding", "awq"):
        assert f"{held_out[name]['perplexity']:.2f}" in README
    assert str(record["sizes"]["plan"] // 10**6) in README


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_first_line_on_a_real_model(tmp_path: Path) -> None:
    """The first line without its installation (the one these tests run in is it): SmolLM2 to a plan."""
    line = code("bash").splitlines()[0]
    steps = line.split(" && ")
    assert steps[2].startswith("pip install -c tools/constraints.txt")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    command = " && ".join(steps[3:])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    sidecar = json.loads((tmp_path / "out.plan.json").read_text())
    assert len(sidecar["quantized"]) == 210
    assert sidecar["plugin"]["layers"] == 120  # Q, K, V are one node; gate and up are one
    assert set(sidecar["left_in_float"]) == {"lm_head"}
    assert "32 of 32 greedy tokens equal" in " ".join(result.stderr.split())
    held_out = sidecar["accuracy"]["held_out"]
    assert held_out["float"]["perplexity"] < held_out["awq"]["perplexity"] < held_out["rounding"]["perplexity"]
    assert held_out["awq"]["top1"] > held_out["rounding"]["top1"]
    assert sidecar["accuracy"]["onnx"]["relative"] < 2e-3
    sizes = sidecar["sizes"]
    weights = sizes["quantized_weights"] + sizes["other_weights"]
    assert sizes["onnx"] + sizes["onnx_data"] <= 1.05 * weights
    # packed INT4, fp16 scales and 4-bit zeros of 106 million weights, and everything else in fp16, stored once
    assert weights <= 1.01 * (106_168_320 * (4 + 20 / 64) / 8 + 2 * (134_515_008 - 106_168_320))
    check = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--output", "gpu.json", "--engine", "out.plan"],
        cwd=tmp_path,
        check=False,
    )
    assert check.returncode == 0
    assert json.loads((tmp_path / "gpu.json").read_text())
