"""One quantized linear layer as plain data, and rounding to INT4 (nothing searched here; see awq.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SYMMETRIC_ZERO = 8
"""Zero point of a layer stored without zeros: q = 8 is the weight 0."""

SMALLEST_SCALE = 2.0**-20
"""Scales stay above it: a group of zeros must not divide by zero, and fp16 subnormals keep 4 bits of precision here."""


@dataclass(frozen=True)
class QuantizedLinear:
    """y = (x * pre_scale) @ W.T with W[n, k] = (q[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size].

    Attributes:
        q: uint8 [N, K], values 0..15.
        scales: [N, K / group_size], fp16 or bf16, the dtype of the activations.
        zeros: uint8 [N, K / group_size], values 0..15, or None for symmetric weights (8 everywhere).
        group_size: columns that share a scale; K for one scale per row.
        pre_scale: [K], dtype of `scales`, multiplies the input (1/s of the AWQ paper), or None.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int
    pre_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """W as [N, K] in the dtype of `scales`: the exact product in fp32, rounded once. `pre_scale` is not applied."""
        n, k = self.q.shape
        zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros.unsqueeze(-1).float()
        grouped = self.q.reshape(n, -1, self.group_size).float() - zeros
        return (grouped * self.scales.unsqueeze(-1).float()).reshape(n, k).to(self.scales.dtype)


def quantize_weight(weight: torch.Tensor, group_size: int, symmetric: bool, dtype: torch.dtype) -> QuantizedLinear:
    """Round a weight to INT4, group-wise along K.

    Asymmetric: scale = (max - min) / 15 with the range widened to hold 0, zero = round(-min / scale). Symmetric:
    scale = max|w| / 7.5, zero = 8, so the largest magnitude loses at most half a step on the positive side.
    The scale is rounded to `dtype` before the weights are divided by it, so its rounding is not an extra error.

    Args:
        weight: [N, K], any float dtype. group_size: divides K. dtype: torch.float16 or torch.bfloat16.
    """
    n, k = weight.shape
    grouped = weight.float().reshape(n, k // group_size, group_size)
    if symmetric:
        scales = grouped.abs().amax(-1) / 7.5
        zeros = None
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / 15
    scales = scales.to(dtype).clamp(min=SMALLEST_SCALE)
    if symmetric:
        offset: torch.Tensor | int = SYMMETRIC_ZERO
    else:
        zeros = (-low / scales.float()).round().clamp(0, 15)
        offset = zeros.unsqueeze(-1)
    q = (grouped / scales.float().unsqueeze(-1)).round().add(offset).clamp(0, 15)
    return QuantizedLinear(
        q.to(torch.uint8).reshape(n, k), scales, None if zeros is None else zeros.to(torch.uint8), group_size
    )
