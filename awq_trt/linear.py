"""One quantized linear layer as plain data, and rounding to INT4 (nothing searched here; see search.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

SYMMETRIC_ZERO = 8
"""Zero point of a layer stored without zeros: q = 8 is the weight 0."""

CHUNK = 1 << 22
"""Weights that are rounded, packed or unpacked at a time, which bounds the memory it takes to a few times 16 MiB."""

SMALLEST_SCALE = 2.0**-20
"""Scales stay above it: a group of zeros must not divide by zero, and fp16 subnormals keep 4 bits of precision here."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut [rows, columns] into pieces of about CHUNK weights."""
    step = max(1, CHUNK // columns)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


@dataclass(frozen=True)
class QuantizedLinear:
    """y = (x * pre_scale) @ W.T with W[n, k] = (q[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size]."""

    q: torch.Tensor  # uint8 [N, K], values 0..15
    scales: torch.Tensor  # [N, K / group_size], fp16 or bf16, the dtype of the activations
    zeros: torch.Tensor | None  # uint8 [N, K / group_size], values 0..15; None for symmetric weights (8 everywhere)
    group_size: int  # columns that share a scale; K for one scale per row
    pre_scale: torch.Tensor | None = None  # [K], dtype of `scales`, multiplies the input (1/s of the AWQ paper)

    def dequantize(self) -> torch.Tensor:
        """W as [N, K] in the dtype of `scales`: the exact product in fp32, rounded once. `pre_scale` is not applied."""
        n, k = self.q.shape
        weight = torch.empty(n, k, dtype=self.scales.dtype, device=self.q.device)
        for rows in row_chunks(n, k):
            zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros[rows].unsqueeze(-1).float()
            grouped = self.q[rows].reshape(-1, k // self.group_size, self.group_size).float() - zeros
            weight[rows] = (grouped * self.scales[rows].unsqueeze(-1).float()).reshape(-1, k)
        return weight

    def rows(self, index: torch.Tensor) -> QuantizedLinear:
        """The layer with some of its outputs only, int64 [R]."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, q=self.q[index], scales=self.scales[index], zeros=zeros)

    def cpu(self) -> QuantizedLinear:
        """The same layer, its tensors on the CPU."""
        zeros = None if self.zeros is None else self.zeros.cpu()
        pre_scale = None if self.pre_scale is None else self.pre_scale.cpu()
        return replace(self, q=self.q.cpu(), scales=self.scales.cpu(), zeros=zeros, pre_scale=pre_scale)


@dataclass(frozen=True)
class Grid:
    """The 16 values that each group of weights is rounded to: (q - zero) * scale, q = 0..15."""

    scales: torch.Tensor  # fp32 [N, G], with values that `dtype` holds exactly
    zeros: torch.Tensor | None  # fp32 [N, G], whole numbers 0..15; None for symmetric grids (8 everywhere)
    dtype: torch.dtype  # that scales are stored in

    def zero_points(self) -> torch.Tensor:
        """fp32 [N, G], also where they are 8 everywhere."""
        return torch.full_like(self.scales, SYMMETRIC_ZERO) if self.zeros is None else self.zeros

    def group_size(self, in_features: int) -> int:
        """Columns per scale."""
        return in_features // self.scales.shape[1]

    def steps(self, grouped: torch.Tensor) -> torch.Tensor:
        """The nearest q, fp32 [N, G, g], of weights [N, G, g]."""
        zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros.unsqueeze(-1)
        return (grouped / self.scales.unsqueeze(-1)).round_().add_(zeros).clamp_(0, 15)

    def nearest(self, grouped: torch.Tensor) -> torch.Tensor:
        """The nearest value of the grid, fp32 [N, G, g], of weights [N, G, g]."""
        zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros.unsqueeze(-1)
        return self.steps(grouped).sub_(zeros).mul_(self.scales.unsqueeze(-1))

    def where(self, mask: torch.Tensor, other: Grid) -> Grid:
        """This grid for the groups where mask [N, G] is true, `other` elsewhere."""
        zeros = None if self.zeros is None else torch.where(mask, self.zeros, other.zero_points())
        return Grid(torch.where(mask, self.scales, other.scales), zeros, self.dtype)

    @staticmethod
    def cat(grids: Sequence[Grid]) -> Grid:
        """Grids of rows, one under the other."""
        zeros = None if grids[0].zeros is None else torch.cat([g.zero_points() for g in grids])
        return Grid(torch.cat([g.scales for g in grids]), zeros, grids[0].dtype)

    def layer(self, q: torch.Tensor) -> QuantizedLinear:
        """The layer whose weights are the steps q, uint8 [N, K]."""
        zeros = None if self.zeros is None else self.zeros.to(torch.uint8)
        return QuantizedLinear(q, self.scales.to(self.dtype), zeros, self.group_size(q.shape[1]))


def range_of(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest value of each group, widened to hold 0: [N, G, g] -> two of [N, G]."""
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def grid_between(low: torch.Tensor, high: torch.Tensor, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid over a range that holds 0.

    Asymmetric: scale = (high - low) / 15, zero = round(-low / scale). Symmetric: scale = max(-low, high) / 7.5,
    zero = 8, so the largest magnitude loses at most half a step on the positive side. The scale is rounded to `dtype`
    before anything is divided by it, so its rounding is not an extra error.

    Args:
        low, high: [N, G], low <= 0 <= high. dtype: torch.float16 or torch.bfloat16.
    """
    scales = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    scales = scales.to(dtype).clamp(min=SMALLEST_SCALE).float()
    return Grid(scales, None if symmetric else (-low / scales).round().clamp(0, 15), dtype)


def quantize_weight(weight: torch.Tensor, group_size: int, symmetric: bool, dtype: torch.dtype) -> QuantizedLinear:
    """Round a weight to nearest, group-wise along K, on grids over the whole range of each group.

    Args:
        weight: [N, K], any float dtype. group_size: divides K. dtype: torch.float16 or torch.bfloat16.
    """
    n, k = weight.shape
    grouped = weight.float().reshape(n, k // group_size, group_size)
    grid = grid_between(*range_of(grouped), symmetric, dtype)
    return grid.layer(grid.steps(grouped).to(torch.uint8).reshape(n, k))
