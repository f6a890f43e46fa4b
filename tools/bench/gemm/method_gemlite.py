"""gemlite: Triton kernels, with settings for the H100 that come with the package.

A shape that is not in its table would be tuned at first use, 20 kernels or so for each number of tokens: half a minute
each, which a run does not have; such shapes are left out unless GEMLITE_TUNE=1 is set. Called is the kernel that the
table has settings for: split-K from 2 to 64 tokens, the plain one beyond (its settings for 4096 tokens serve 8192 too).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gemm.methods import Pack, Packed, Tensors
from bench.gemm.problem import Problem

GEMV, SPLIT_K, GEMM = "GEMV_REVSPLITK", "GEMM_SPLITK", "GEMM"
SPLIT_K_TOKENS = 64


class NotTunedError(Exception):
    """The package has no settings for a shape."""


def load(library: Path | None) -> Pack:
    """The package, if it can be imported; that needs a GPU."""
    import gemlite  # noqa: F401

    return pack


def kernel_for(tokens: int) -> str:
    """The kernel whose settings come with the package."""
    if tokens == 1:
        return GEMV
    return SPLIT_K if tokens <= SPLIT_K_TOKENS else GEMM


def pack(problem: Problem, tokens: Sequence[int]) -> list[Packed]:
    """[weight, scales, zeros, a scalar that it wants]: (q - zero) * scale as q * scale - (zero * scale)."""
    from gemlite import core

    shape, layer = problem.shape, problem.layer
    if os.environ.get("GEMLITE_TUNE") != "1" and (missing := untuned(core, problem, tokens)):
        raise NotTunedError(f"no settings in the package for {shape.name}, group {shape.group_size}: {missing} tokens")
    dtype = core.DType.FP16 if layer.scales.dtype == torch.float16 else core.DType.BF16
    packer = core.GemLiteLinearTriton(4, shape.group_size, shape.k, shape.n, dtype, dtype)
    zeros = 8 if layer.zeros is None else layer.zeros.to(layer.scales.dtype)
    packer.pack(layer.q, layer.scales, zeros)
    arguments = packer.get_meta_args()
    kinds = core.GEMLITE_MATMUL_TYPES_MAPPING

    def call(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return core.forward_functional(x, None, list(tensors), arguments, kinds[kernel_for(x.shape[0])])

    return [Packed([t.detach() for t in packer.get_tensor_args()], {"default": call})]


def untuned(core: object, problem: Problem, tokens: Sequence[int]) -> list[int]:
    """Numbers of tokens for which the package has no settings; its key ends in elements per word and type times 100."""
    from gemlite.triton_kernels.utils import get_closest_m

    table, shape = core.GEMLITE_TRITON_CONFIG_CACHE, problem.shape  # type: ignore[attr-defined]
    type_id = core.DType.FP16.value * 100 + 4  # type: ignore[attr-defined]  # bfloat16 takes the same
    key = (shape.n, shape.k, shape.group_size, 8, type_id)
    return [m for m in tokens if str((get_closest_m(m), *key)) not in table.get(kernel_for(m), {})]
