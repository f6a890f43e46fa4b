"""One layer and its input, the same for every method, and what the product is in double precision."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from awq_trt.layout import DTYPES
from awq_trt.linear import SYMMETRIC_ZERO, QuantizedLinear, quantize_weight
from bench.gemm.shapes import Shape

ROWS = 4096
"""Rows of the weight that are looked at together, so that the largest layers fit in double precision."""

ALL_CHECKED = 64
"""Tokens up to which all are compared with the double-precision product, which takes longer than the kernels."""
CHECKED_EVERY = 16
"""Beyond, one token out of so many: no token tile of a kernel is smaller."""
PART = 8
"""Features that `worst_part` looks at together; N is a multiple of it."""


@dataclass(frozen=True)
class Problem:
    """A layer rounded to nearest and inputs for it."""

    shape: Shape
    dtype: str  # of scales and activations, "float16" or "bfloat16"
    layer: QuantizedLinear  # q uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None
    x: torch.Tensor  # [tokens, K]
    checked: torch.Tensor  # int64 [S], ascending: the tokens that are compared

    @cached_property
    def expected(self) -> torch.Tensor:
        """float64 [S, N]: the checked tokens of x times the exact (q - zero) * scale, nothing rounded."""
        x, rows = self.x[self.checked].double(), []
        for start in range(0, self.shape.n, ROWS):
            part = self.layer.rows(torch.arange(start, min(start + ROWS, self.shape.n), device=x.device))
            grouped = part.q.reshape(part.q.shape[0], -1, part.group_size).double()
            zeros = SYMMETRIC_ZERO if part.zeros is None else part.zeros.unsqueeze(-1).double()
            weight = (grouped - zeros) * part.scales.unsqueeze(-1).double()
            rows.append(x @ weight.reshape(part.q.shape).t())
        return torch.cat(rows, 1)

    def errors(self, y: torch.Tensor) -> tuple[float, float]:
        """`relative_error` and `worst_part` of y [M, N], the product for the first M tokens."""
        count = int(torch.searchsorted(self.checked, len(y)))
        found, expected = y[self.checked[:count]], self.expected[:count]
        return relative_error(found, expected), worst_part(found, expected)

    def zero_points(self) -> torch.Tensor:
        """uint8 [N, G], also where they are 8 everywhere."""
        zeros = self.layer.zeros
        return torch.full_like(self.layer.scales, SYMMETRIC_ZERO, dtype=torch.uint8) if zeros is None else zeros

    def offsets(self) -> torch.Tensor:
        """[N, G], dtype of scales: (8 - zero) * scale, what W is where q = 8; some peers take this for the zero."""
        scales = self.layer.scales
        return ((SYMMETRIC_ZERO - self.zero_points().float()) * scales.float()).to(scales.dtype)

    def cast(self, dtype: str) -> Problem:
        """The same steps and zero points, scales and x in another dtype, for methods that know only that one."""
        scales, x = self.layer.scales.to(DTYPES[dtype]), self.x.to(DTYPES[dtype])
        layer = replace(self.layer, scales=scales)
        return self if dtype == self.dtype else replace(self, dtype=dtype, layer=layer, x=x)


def checked_tokens(tokens: Sequence[int], seed: int) -> list[int]:
    """The tokens to compare, for calls of some numbers of tokens: all of the first ALL_CHECKED, then one in each
    CHECKED_EVERY, anywhere in it, and the last of each call."""
    draw, most = random.Random(seed), max(tokens)
    spread = {start + draw.randrange(CHECKED_EVERY) for start in range(ALL_CHECKED, most, CHECKED_EVERY)}
    return sorted(m for m in {*range(ALL_CHECKED), *spread, *(m - 1 for m in tokens)} if m < most)


def make_problem(shape: Shape, dtype: str, symmetric: bool, tokens: Sequence[int], device: str, seed: int) -> Problem:
    """Weights, and inputs for calls of some numbers of tokens, drawn from a normal distribution; the same for the same
    seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    layers = []
    for start in range(0, shape.n, ROWS):
        rows = min(ROWS, shape.n - start)
        weight = torch.randn(rows, shape.k, generator=generator, device=device) * shape.k**-0.5
        layers.append(quantize_weight(weight, shape.group_size, symmetric, DTYPES[dtype]))
    zeros = None if symmetric else torch.cat([layer.zeros for layer in layers if layer.zeros is not None])
    q, scales = torch.cat([layer.q for layer in layers]), torch.cat([layer.scales for layer in layers])
    x = torch.randn(max(tokens), shape.k, generator=generator, device=device).to(DTYPES[dtype])
    checked = torch.tensor(checked_tokens(tokens, seed), device=device)
    return Problem(shape, dtype, QuantizedLinear(q, scales, zeros, shape.group_size), x, checked)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; NaN where an output was not written."""
    return float((found.double() - expected).norm() / expected.norm())


def worst_part(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest root mean square of found - expected over PART features of a token, over that of all of expected.

    A wrong tile is lost in `relative_error` among the tiles of a large product; here it is about 1. NaN as there.
    """
    parts = (found.double() - expected).square_().unflatten(1, (-1, PART)).mean(-1)
    return float((parts.max() / expected.square().mean()).sqrt())


def pack_words(values: torch.Tensor, order: Sequence[int] = range(8)) -> torch.Tensor:
    """uint8 [..., 8 W] to int32 [..., W]: bits 4i .. 4i+3 of a word hold the value at order[i]."""
    values = values.unflatten(-1, (-1, 8))
    words = torch.zeros(values.shape[:-1], dtype=torch.int32, device=values.device)
    for i, place in enumerate(order):
        words |= values[..., place].to(torch.int32) << 4 * i
    return words
