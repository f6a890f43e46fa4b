"""Rounding to INT4 for given inputs: grids that clip, and error compensation (GPTQ). Everything from H = X^T X.

A grid is one scale and one zero point per row and group (linear.py). Both functions here minimise

    sum over tokens |x (W' - W)^T|^2 = tr((W' - W) H (W' - W)^T)

`clip` chooses the grids, each on its own diagonal block of H, with every weight going to its nearest step.
`compensated` then chooses the steps: columns are rounded one after the other, and the columns still to come make up
for the error of each. With the Cholesky factor H = L L^T the error is |(W' - W) L|^2, column j of
(W' - W) L holds the errors of columns i >= j only, so going from the last column to the first each is rounded to
    w_j + sum over i > j of (w_i - w'_i) L_ij / L_jj.
This is GPTQ (Frantar et al., ICLR 2023) without its inverse: Babai's nearest plane (Chen et al., "The Geometry of LLM
Quantization", 2025). The order of columns is free, as the grids are fixed before: the largest H_jj first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awq_trt.errors import AwqTrtError
from awq_trt.linear import Grid, grid_between, range_of, row_chunks

RATIOS = tuple(1 - i / 20 for i in range(9))
"""Parts of a group's range that `clip` tries: 1, 0.95 ... 0.6."""

SHRINKAGE = 0.2
"""Part of H off its diagonal that `factor` takes away."""

DAMPING = 0.01
"""Part of the mean of diag H that `factor` adds to diag H: dead channels need it."""

WIDEST = 128
"""Columns of the largest diagonal blocks of H that `clip` looks at."""

COLUMNS = 64
"""Columns that are compensated one by one; between blocks of so many it is one matrix product."""


def diagonal_blocks(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """The blocks on the diagonal of [K, K] that `clip` looks at: [K / width, width, width], `width` the group's.

    Groups wider than WIDEST are taken as if H had no more than blocks of a width that divides them.
    """
    width = next(w for w in (group_size, WIDEST, 96, 64, 32) if group_size % w == 0 and w <= WIDEST)
    return torch.stack([hessian[i : i + width, i : i + width] for i in range(0, len(hessian), width)])


def full_range(weight: torch.Tensor, group_size: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid of each group over its whole range: weight fp32 [N, K]."""
    grouped = weight.reshape(len(weight), -1, group_size)
    return grid_between(*range_of(grouped), symmetric, dtype)


def nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round `weight`, fp32 [N, K], to the nearest step of `grid`: q, uint8 [N, K], values 0..15."""
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(n, k):
        part = Grid(grid.scales[rows], None if grid.zeros is None else grid.zeros[rows], grid.dtype)
        q[rows] = part.steps(weight[rows].reshape(-1, grid.scales.shape[1], grid.group_size(k))).reshape(-1, k).to(q)
    return q


def clip(
    weight: torch.Tensor, blocks: torch.Tensor, group_size: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Grid, torch.Tensor]:
    """The grid of each group for the part of its range (`RATIOS`) that makes its own output error least.

    Args:
        weight: fp32 [N, K]. blocks: of the H of its inputs, see `diagonal_blocks`. dtype: of the scales.

    Returns:
        The grid, and the ratio taken for each group, [N, K / group_size].
    """
    n, k = weight.shape
    width = blocks.shape[1]
    grids, ratios = [], []
    for rows in row_chunks(n, k):
        grouped = weight[rows].reshape(-1, k // group_size, group_size)
        low, high = range_of(grouped)
        best = torch.full(low.shape, torch.inf, device=low.device)
        grid, ratio = grid_between(low, high, symmetric, dtype), torch.ones_like(low)
        for candidate in RATIOS:
            trial = grid_between(low * candidate, high * candidate, symmetric, dtype)
            delta = (trial.nearest(grouped) - grouped).reshape(len(grouped), -1, width).transpose(0, 1)
            loss = ((delta @ blocks) * delta).sum(-1).reshape(grouped.shape[1], -1, len(grouped)).sum(1).t()
            better = loss < best
            best, grid = torch.where(better, loss, best), trial.where(better, grid)
            ratio.masked_fill_(better, candidate)
        grids.append(grid)
        ratios.append(ratio)
    return Grid.cat(grids), torch.cat(ratios)


@dataclass(frozen=True)
class Factor:
    """Regularised H = L L^T with its columns in `order`, ascending H_jj: the last is rounded first."""

    order: torch.Tensor  # [K]
    lower: torch.Tensor  # L, fp32 [K, K]
    shrinkage: float  # of H, see `factor`
    added: torch.Tensor  # to the diagonal, fp32 [K]; rows, columns and this in `order`

    def error(self, delta: torch.Tensor) -> torch.Tensor:
        """The sums of squared output errors, [N], of weight errors [N, K]: of H as it was before `factor`."""
        delta = delta[:, self.order]
        regularised = (delta @ self.lower).square().sum(1)
        return ((regularised - delta.square() @ self.added) / (1 - self.shrinkage)).clamp(min=0)


def factor(hessian: torch.Tensor, shrinkage: float = SHRINKAGE, damping: float = DAMPING) -> Factor:
    """Cholesky factor of (1 - shrinkage) H + shrinkage diag(H) + damping mean(diag H), made in the memory of `hessian`.

    What a few thousand tokens say about pairs of channels is partly chance; compensation that believes all of it
    repairs errors on the calibration text and makes others elsewhere. Shrinking towards the diagonal (Ledoit and Wolf,
    2004) is worth more here than any refinement of the rounding.

    Args:
        hessian: fp32 [K, K], symmetric.
    """
    diagonal = hessian.diagonal().clone()
    order = torch.argsort(diagonal, stable=True)
    mean = float(diagonal.mean())
    added = shrinkage * diagonal[order] + (damping * mean if mean > 0 else 1.0)
    for rows in row_chunks(*hessian.shape):
        hessian[rows] = hessian[rows, order]
    for columns in row_chunks(*hessian.shape):
        hessian[:, columns] = hessian[order, columns]
    hessian.mul_(1 - shrinkage).diagonal().add_(added)
    info = torch.zeros((), dtype=torch.int32, device=hessian.device)
    lower = hessian.mT  # symmetric, so the same; LAPACK wants columns in a row, and would get them in a copy
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info):
        raise AwqTrtError(
            f"the Hessian of {len(diagonal)} channels is not positive definite at channel {int(info)}; "
            "is there NaN or Inf in the calibration inputs?"
        )
    return Factor(order, lower, shrinkage, added)


def compensated(weight: torch.Tensor, grid: Grid, factored: Factor) -> torch.Tensor:
    """Round `weight` onto `grid` column by column with error compensation (GPTQ).

    Args:
        weight: fp32 [N, K]. factored: of the H of its inputs.

    Returns:
        q, uint8 [N, K], values 0..15.
    """
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    group_of = (factored.order // grid.group_size(k)).tolist()
    for rows in row_chunks(n, k):
        scales, zeros = grid.scales[rows].t().contiguous(), grid.zero_points()[rows].t().contiguous()  # [G, n]
        columns = weight[rows].t()[factored.order].contiguous()  # [K, n], becomes w - w' from the end on
        steps = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
        for end in range(k, 0, -COLUMNS):
            start = max(end - COLUMNS, 0)
            carried = factored.lower[end:, start:end].t() @ columns[end:]  # [columns, n]: sum of (w_i - w'_i) L_ij
            for j in range(end - 1, start - 1, -1):
                scale, zero = scales[group_of[j]], zeros[group_of[j]]
                target = carried[j - start].div_(factored.lower[j, j]).add_(columns[j])
                step = target.div_(scale).round_().add_(zero).clamp_(0, 15)
                steps[j] = step
                columns[j] -= step.sub_(zero).mul_(scale)
                if j > start:
                    carried[: j - start].addr_(factored.lower[j, start:j], columns[j])
        restored = torch.empty_like(steps)
        restored[factored.order] = steps
        q[rows] = restored.t()
    return q


def refit(weight: torch.Tensor, q: torch.Tensor, grid: Grid, factored: Factor) -> Grid:
    """The scales that are best for steps already chosen: least squares over all groups of a row together.

    With D_g the columns of q - zero of group g and zero elsewhere, the error |(w - sum over g of s_g D_g) L|^2 of a
    row is quadratic in s, so the best s solves  sum over h of (D_g L)(D_h L)^T s_h = (D_g L)(w L)^T.  A row keeps its
    scales where the new ones, rounded to 16 bits, are not better, or are not within a factor of 2 of the old.

    Args:
        weight: fp32 [N, K]. q: uint8 [N, K]. factored: of the H of its inputs.
    """
    groups = grid.scales.shape[1]
    lower, order = factored.lower, factored.order
    group_of = order // grid.group_size(weight.shape[1])
    members = [(group_of == g).nonzero().squeeze(1) for g in range(groups)]
    scales = grid.scales.clone()
    for rows in row_chunks(len(weight), weight.shape[1] * groups):
        zeros, old = grid.zero_points()[rows], grid.scales[rows]
        steps = q[rows].float()[:, order] - zeros[:, group_of]  # [n, K], in the order of L
        parts = torch.stack([steps[:, m] @ lower[m] for m in members], dim=1)  # [n, G, K]
        target = (weight[rows][:, order] @ lower).unsqueeze(-1)  # [n, K, 1]
        normal = parts @ parts.transpose(1, 2)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += diagonal.mean(1, keepdim=True) * 1e-6 + 1e-30
        change = torch.linalg.solve(normal, parts @ target - normal @ old.unsqueeze(-1)).squeeze(-1)
        new = (old + change).to(grid.dtype).float()
        errors = [(target - parts.transpose(1, 2) @ s.unsqueeze(-1)).square().sum((1, 2)) for s in (old, new)]
        better = (errors[1] < errors[0]) & ((new > old / 2) & (new < old * 2)).all(1)
        scales[rows] = torch.where(better.unsqueeze(1), new, old)
    return Grid(scales, grid.zeros, grid.dtype)
