"""Rounding to INT4."""

from __future__ import annotations

import pytest
import torch

from awq_trt import linear
from awq_trt.linear import quantize_weight


@pytest.mark.parametrize("symmetric", [False, True])
def test_pieces_are_the_whole(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantize_weight(torch.randn(23, 64), 32, symmetric, torch.float16)
    whole = layer.dequantize()
    monkeypatch.setattr(linear, "CHUNK", 5 * 64)
    assert torch.equal(layer.dequantize(), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_at_most_half_a_step(dtype: torch.dtype, group_size: int, symmetric: bool) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    layer = quantize_weight(weight, group_size, symmetric, dtype)
    assert layer.q.shape == (24, 256)
    assert layer.q.max() <= 15
    assert layer.scales.shape == (24, 256 // group_size)
    assert layer.scales.dtype == dtype
    assert (layer.zeros is None) == symmetric
    step = layer.scales.float().repeat_interleave(group_size, 1)
    # half a step, and what the 16-bit scale and the last rounding of the product add to it
    slack = 1 + 16 * torch.finfo(dtype).eps
    error = (layer.dequantize().float() - weight).abs()
    inside = error <= 0.5 * step * slack + weight.abs() * torch.finfo(dtype).eps
    # the zero point is rounded, so the end of the range may lie up to half a step outside
    assert inside.float().mean() > 0.97
    assert (error <= 1.01 * step * slack).all()


def test_asymmetric_range_holds_zero_and_both_ends() -> None:
    weight = torch.cat([torch.linspace(1, 2, 32), torch.linspace(-2, -1, 32), torch.zeros(32)]).reshape(1, 96)
    layer = quantize_weight(weight, 32, False, torch.float16)
    assert layer.zeros is not None
    assert layer.zeros.tolist() == [[0, 15, 0]]
    back = layer.dequantize()[0]
    assert abs(float(back[31]) - 2) < 1e-2
    assert abs(float(back[32]) + 2) < 1e-2
    assert (back[64:] == 0).all()


def test_symmetric_zero_is_exact_and_the_ends_are_used() -> None:
    weight = torch.linspace(-3, 3, 64).reshape(1, 64)
    weight[0, 10] = 0
    layer = quantize_weight(weight, 64, True, torch.float16)
    assert layer.dequantize()[0, 10] == 0
    assert set(layer.q.unique().tolist()) >= {0, 15}


def test_tiny_and_constant_groups_do_not_divide_by_zero() -> None:
    for value in (0.0, 1e-9, -1e-9, 1.0):
        back = quantize_weight(torch.full((8, 32), value), 32, False, torch.float16).dequantize()
        assert torch.isfinite(back).all()
        assert (back.float() - value).abs().max() < 1e-3
