"""Clipped grids and error compensation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_trt import linear
from awq_trt.awq import rounding
from awq_trt.awq.rounding import clip, compensated, diagonal_blocks, factor, full_range, nearest, refit
from awq_trt.errors import AwqTrtError
from awq_trt.linear import Grid

FP16 = torch.float16


def problem(n: int, k: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and the H of inputs whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x = mixed * torch.rand(k, generator=generator).add(0.05)
    return torch.randn(n, k, generator=generator), x.t() @ x / tokens


def error(layer_weight: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    delta = layer_weight - weight
    return ((delta @ hessian) * delta).sum(1)


def value(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    grouped = q.float().reshape(len(q), grid.scales.shape[1], -1) - grid.zero_points().unsqueeze(-1)
    return (grouped * grid.scales.unsqueeze(-1)).reshape(q.shape)


shapes = st.tuples(
    st.integers(1, 5).map(lambda i: 8 * i), st.sampled_from([(64, 32), (128, 64), (128, 128), (96, 96), (192, 192)])
)


@settings(deadline=None, max_examples=30)
@given(shapes, st.booleans(), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 99), st.booleans())
def test_nearest_is_within_half_a_step_inside_the_clipped_range(
    shape: tuple[int, tuple[int, int]], symmetric: bool, dtype: torch.dtype, seed: int, clipped: bool
) -> None:
    n, (k, group_size) = shape
    weight, hessian = problem(n, k, 2 * k, seed)
    weight[0] = 0
    weight[-1, ::7] = 0
    grid = full_range(weight, group_size, symmetric, dtype)
    if clipped:
        grid, ratio = clip(weight, diagonal_blocks(hessian, group_size), group_size, symmetric, dtype)
        assert float(ratio.min()) >= min(rounding.RATIOS)
        assert float(ratio.max()) <= 1
    assert torch.equal(grid.scales.to(dtype).float(), grid.scales)
    assert torch.equal(grid.zero_points(), grid.zero_points().round())
    back = value(nearest(weight, grid), grid)
    step = grid.scales.repeat_interleave(group_size, 1)
    zero = grid.zero_points().repeat_interleave(group_size, 1)
    inside = (weight >= -zero * step) & (weight <= (15 - zero) * step)
    assert inside.float().mean() > 0.9
    assert ((back - weight).abs() <= 0.5 * step * (1 + 1e-5))[inside].all()
    assert ((back == -zero * step) | (back == (15 - zero) * step))[~inside].all()
    assert (back[0] == 0).all()


@settings(deadline=None, max_examples=20)
@given(shapes, st.booleans(), st.integers(0, 99))
def test_clipping_never_costs_anything_on_its_blocks(
    shape: tuple[int, tuple[int, int]], symmetric: bool, seed: int
) -> None:
    n, (k, group_size) = shape
    weight, hessian = problem(n, k, 2 * k, seed)
    blocks = diagonal_blocks(hessian, group_size)
    width = blocks.shape[1]
    grid, _ = clip(weight, blocks, group_size, symmetric, FP16)
    full = full_range(weight, group_size, symmetric, FP16)
    masked = hessian * torch.block_diag(*[torch.ones(width, width)] * (k // width))
    losses = [error(value(nearest(weight, g), g), weight, masked) for g in (grid, full)]
    assert (losses[0] <= losses[1] * (1 + 1e-4)).all()


def test_clipping_takes_the_best_ratio_of_each_group() -> None:
    weight, hessian = problem(8, 64, 200, 1)
    weight[:, 5] = 12.0  # one weight far outside, whose channel hardly matters
    hessian[5] = hessian[:, 5] = 0
    _, ratio = clip(weight, diagonal_blocks(hessian, 32), 32, False, FP16)
    assert ratio[:, 0].mean() < ratio[:, 1].mean()
    for group, columns in enumerate((slice(0, 32), slice(32, 64))):
        part, part_h, losses = weight[:, columns], hessian[columns, columns], []
        for r in rounding.RATIOS:
            trial = full_range(part * r, 32, False, FP16)
            losses.append(error(value(nearest(part, trial), trial), part, part_h))
        assert torch.equal(ratio[:, group], torch.tensor(rounding.RATIOS)[torch.stack(losses).argmin(0)])


def textbook_gptq(weight: torch.Tensor, grid: Grid, hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """GPTQ as in the paper: inverse of H, its upper Cholesky factor, one column after the other, in fp64."""
    k = weight.shape[1]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()[order][:, order]), upper=True)
    work, q = weight.double()[:, order].clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(k):
        group = int(order[j]) // (k // grid.scales.shape[1])
        scale, zero = grid.scales[:, group].double(), grid.zero_points()[:, group].double()
        q[:, j] = ((work[:, j] / scale).round() + zero).clamp(0, 15)
        lost = (work[:, j] - (q[:, j] - zero) * scale) / upper[j, j]
        work[:, j:] -= lost.unsqueeze(1) * upper[j, j:]
    back = torch.empty_like(q)
    back[:, order] = q
    return back


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("k", "group_size"), [(64, 32), (192, 64), (200, 200)])
def test_error_compensation_is_gptq(symmetric: bool, k: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", 7 * k)  # several pieces of rows, the last one short
    weight, hessian = problem(24, k, 3 * k, 3)
    grid = full_range(weight, group_size, symmetric, FP16)
    shrunk = 0.75 * hessian + torch.diag(0.25 * hessian.diagonal() + 0.05 * hessian.diagonal().mean())
    factored = factor(hessian.clone(), 0.25, 0.05)
    q = compensated(weight, grid, factored)
    expected = textbook_gptq(weight, grid, shrunk, factored.order.flip(0))
    assert (q == expected).float().mean() > 0.995  # a tie in fp32 may fall to the other side
    assert (
        error(value(q, grid), weight, hessian).sum() < error(value(nearest(weight, grid), grid), weight, hessian).sum()
    )


def test_a_factor_still_knows_the_errors_before_it_was_regularised() -> None:
    _, hessian = problem(16, 96, 300, 5)
    delta = 0.01 * torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    expected = ((delta @ hessian) * delta).sum(1)
    torch.testing.assert_close(factor(hessian.clone()).error(delta), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.ones(32, 32) * 1e8, torch.eye(32) * torch.eye(32)[3]])
def test_dead_constant_and_one_hot_channels(hessian: torch.Tensor) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    grid, _ = clip(weight, diagonal_blocks(hessian, 32), 32, False, FP16)
    back = value(compensated(weight, grid, factor(hessian.clone())), grid)
    assert torch.isfinite(back).all()
    assert (back - weight).abs().max() <= 16 * grid.scales.max()


def test_a_hessian_with_nan_are_refused() -> None:
    hessian = torch.eye(32)
    hessian[3, 3] = torch.nan
    with pytest.raises(AwqTrtError, match="NaN or Inf"):
        factor(hessian)


def test_a_row_whose_refitted_scales_run_away_keeps_its_own() -> None:
    """Steps of one group turned round: least squares would want a negative scale for it."""
    weight, hessian = problem(8, 64, 600, 3)
    grid = full_range(weight, 32, True, FP16)
    q = nearest(weight, grid)
    q[2, :32] = 16 - q[2, :32].clamp(min=1)
    again = refit(weight, q, grid, factor(hessian.clone(), 0.0, 1e-3))
    assert torch.equal(again.scales[2], grid.scales[2])
    assert (again.scales > 0).all()
    assert not torch.equal(again.scales, grid.scales)


def test_refitted_scales_solve_the_least_squares_problem() -> None:
    weight, hessian = problem(24, 192, 600, 7)
    weight[3] = 0
    grid, _ = clip(weight, diagonal_blocks(hessian, 64), 64, False, FP16)
    factored = factor(hessian.clone(), 0.0, 1e-3)
    q = compensated(weight, grid, factored)
    again = refit(weight, q, grid, factored)
    assert torch.equal(again.scales.half().float(), again.scales)
    assert torch.equal(again.scales[3], grid.scales[3])
    full = hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(192)
    root = torch.linalg.cholesky(full.double())
    for row in (0, 11, 23):
        steps = (q[row].double() - grid.zero_points()[row].double().repeat_interleave(64)).reshape(3, 64)
        parts = torch.block_diag(*steps) @ root  # [G, K]
        best = torch.linalg.lstsq(parts.t(), root.t() @ weight[row].double()).solution
        torch.testing.assert_close(again.scales[row].double(), best, rtol=2e-3, atol=0)
    before, after = (error(value(q, g), weight, full) for g in (grid, again))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()
