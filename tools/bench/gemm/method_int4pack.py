"""tinygemm, the kernel in PyTorch itself: aten::_weight_int4pack_mm; bfloat16 only.

W = (q - 8) * scale + zero, with scale and zero side by side: [K / g, N, 2].
"""

from __future__ import annotations

from pathlib import Path

import torch

from bench.gemm.methods import Pack, Packed, Tensors
from bench.gemm.problem import Problem

TILE_COLUMNS = 16
"""Columns of one tile; the packed layout interleaves 8, 4 or 2 of them."""


def load(library: Path | None) -> Pack:
    """The kernel, where torch has a GPU for it."""
    if not torch.cuda.is_available():
        raise RuntimeError("aten::_convert_weight_to_int4pack and _weight_int4pack_mm need a GPU")
    return lambda problem, tokens: [pack(problem)]


def pack(problem: Problem) -> Packed:
    """[packed weight, scales and zeros]."""
    group_size = problem.shape.group_size
    inner = next(i for i in (8, 4, 2) if problem.shape.k % (i * TILE_COLUMNS) == 0)

    def call(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight, both = tensors
        assert weight is not None
        assert both is not None
        return torch.ops.aten._weight_int4pack_mm(x, weight, group_size, both)

    weight = torch.ops.aten._convert_weight_to_int4pack(nibbles(problem.layer.q), inner)
    return Packed([weight, scales_and_zeros(problem)], {"default": call})


def nibbles(q: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K / 2]: the even column of two in the high bits."""
    return q[:, ::2] << 4 | q[:, 1::2]


def scales_and_zeros(problem: Problem) -> torch.Tensor:
    """[K / g, N, 2]."""
    return torch.stack([problem.layer.scales, problem.offsets()], -1).transpose(0, 1).contiguous()
