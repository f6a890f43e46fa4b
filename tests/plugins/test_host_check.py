"""The host program: the plugin interface, the kernels on an emulated GPU, and the same tables as Python's."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from awq_trt import layout
from awq_trt.linear import QuantizedLinear, quantize_weight


def test_every_check_passes(host_check: Path, library: Path) -> None:
    done = subprocess.run([host_check, "check", library], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [line for line in lines if line.get("ok") is False]
    assert not failed
    assert done.returncode == 0, done.stderr
    summary = lines[-1]
    assert summary["failed"] == 0
    assert summary["passed"] == sum("ok" in line for line in lines) >= 600
    if summary["gpu"] is None:
        skipped = [line for line in lines if "skipped" in line and "check" in line]
        assert summary["skipped"] == skipped[0]["skipped"] >= 800
        assert "no GPU: launch checks skipped" in skipped[0]["reason"]
    else:
        assert summary["skipped"] == 0


def test_a_library_that_is_not_there(host_check: Path, tmp_path: Path) -> None:
    done = subprocess.run([host_check, "check", tmp_path / "missing.so"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot open the plugin library" in done.stderr


def test_one_capability_table(host_check: Path, library: Path) -> None:
    """Python's table, the C++ table and the plugin's creator give the same answer on a grid across every limit."""
    features_n = [-8, 0, 4, 8, 12, 16, 24, 100, 4096, 1 << 20, (1 << 20) + 8]
    features_k = [0, 16, 32, 48, 64, 96, 128, 352, 4096, 1 << 20, (1 << 20) + 32]
    groups = [-1, 0, 16, 32, 48, 64, 96, 128, 256, 352, 4096, 1 << 20]
    grid = [
        *itertools.product(features_n, features_k, groups, ["float16"], [80]),
        *itertools.product([64], [128], [32, 48], ["float16", "bfloat16", "float32"], [70, 75, 80, 86, 90, 120]),
    ]
    questions = "".join(f"{n} {k} {g} {dtype} {sm}\n" for n, k, g, dtype, sm in grid)
    done = subprocess.run(
        [host_check, "supports", library], input=questions, capture_output=True, text=True, check=True
    )
    answers = done.stdout.splitlines()
    assert len(answers) == len(grid)
    for (n, k, g, dtype, sm), answer in zip(grid, answers, strict=True):
        table, creator = answer.split("\t")
        assert (table == "yes") == layout.supports(n, k, g, dtype, sm), (n, k, g, dtype, sm, answer)
        # the creator knows neither type nor device
        assert (creator == "yes") == layout.supports(n, k, g), (n, k, g, answer)
        assert creator == "yes" or creator.startswith("W4A16Gemm: test_layer: ")


def _pack(linear: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> bytes:
    """The plugin's inputs one after the other, packed by awq_trt.layout."""
    parts = [
        x.view(torch.int16).numpy(),
        layout.pack_qweight(linear.q).numpy(),
        layout.pack_scales(linear.scales).view(torch.int16).numpy(),
    ]
    if linear.zeros is not None:
        parts.append(layout.pack_zeros(linear.zeros).numpy())
    parts += [t.view(torch.int16).numpy() for t in (bias, linear.pre_scale) if t is not None]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("shape", "options"),  # tokens, N, K, group
    [
        ((1, 72, 96, 32), ["zeros"]),
        ((9, 24, 128, 64), ["zeros", "bias", "pre_scale"]),
        ((17, 136, 256, 128), ["pre_scale"]),
        ((70, 40, 160, 160), ["zeros", "bias"]),
        ((1025, 24, 96, 32), ["zeros", "bias", "pre_scale"]),
    ],
    ids=str,
)
def test_kernels_read_what_python_packs(
    host_check: Path, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int, int, int], options: list[str]
) -> None:
    """A layer quantized and packed in Python, multiplied by the emulated kernels: the product of its own definition."""
    tokens, n, k, group = shape
    generator = torch.Generator().manual_seed(tokens)
    linear = quantize_weight(torch.randn(n, k, generator=generator), group, "zeros" not in options, dtype)
    scale = torch.rand(k, generator=generator).add(0.5).to(dtype) if "pre_scale" in options else None
    linear = QuantizedLinear(linear.q, linear.scales, linear.zeros, group, scale)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    b = torch.randn(n, generator=generator).to(dtype) if "bias" in options else None

    (tmp_path / "in").write_bytes(_pack(linear, x, b))
    name = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    for tactic in range(6):
        arguments = [tokens, n, k, group, name, tactic, ",".join(options) or "none", tmp_path / "in", tmp_path / "out"]
        subprocess.run([host_check, "emulate", *map(str, arguments)], check=True)
        raw = np.fromfile(tmp_path / "out", np.int16)
        y = torch.from_numpy(raw).view(dtype).reshape(tokens, n).double()

        scaled = x if scale is None else x * scale
        zeros = 8 if linear.zeros is None else linear.zeros.double().repeat_interleave(group, 1)
        w = (linear.q.double() - zeros) * linear.scales.double().repeat_interleave(group, 1)
        expected = scaled.double() @ w.T + (0 if b is None else b.double())
        magnitude = scaled.double().abs() @ w.abs().T + 1
        # Y is rounded to dtype once; the fp32 sum has 2^-24 per step; weights may be rounded, at random
        half_unit = torch.finfo(dtype).eps / 2
        weights = 5 * half_unit * (scaled.double().square() @ w.square().T).sqrt()
        tolerance = half_unit * expected.abs() + magnitude * k * 2.0**-24 + weights
        assert bool(((y - expected).abs() <= tolerance).all())


def test_emulate_refuses_a_file_of_another_size(host_check: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\0" * 100)
    arguments = ["1", "8", "32", "32", "float16", "1", "none", str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run([host_check, "emulate", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "of another size" in done.stderr
