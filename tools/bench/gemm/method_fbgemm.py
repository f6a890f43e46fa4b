"""FBGEMM GenAI: CUTLASS's mixed-input kernels for Hopper; bfloat16 only.

W = q * scale + zero with q signed, scales and zeros [K / g, N]. Its Python package is not imported, only its library
loaded: importing wants parts of FBGEMM that this wheel does not have. `shuffled` takes groups of 128 and more.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from bench.gemm.methods import Pack, Packed, Tensors
from bench.gemm.problem import Problem

LIBRARY = "experimental/gen_ai/fbgemm_gpu_experimental_gen_ai.so"


def load(library: Path | None) -> Pack:
    """The library of the installed wheel; it must be built for this version of torch."""
    spec = importlib.util.find_spec("fbgemm_gpu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'fbgemm_gpu'")
    torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / LIBRARY))
    return lambda problem, tokens: pack(problem)


def pack(problem: Problem) -> list[Packed]:
    """[weight, scales, zeros] in two forms."""
    scales, zeros = problem.layer.scales.t().contiguous(), problem.offsets().t().contiguous()
    weight = signed_nibbles(problem.layer.q)
    packed = [Packed([weight, scales, zeros], {"rowwise": rowwise})]
    if problem.shape.group_size >= 128:
        shuffled_weight, shuffled_scales = torch.ops.fbgemm.preshuffle_i4(weight, scales)
        packed.append(Packed([shuffled_weight, shuffled_scales, zeros], {"shuffled": shuffled}))
    return packed


def signed_nibbles(q: torch.Tensor) -> torch.Tensor:
    """int8 [N, K / 2]: q - 8 in two's complement, the even column of two in the low bits."""
    signed = q ^ 8
    return (signed[:, 1::2] << 4 | signed[:, ::2]).view(torch.int8)


def rowwise(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Weights in row order."""
    return torch.ops.fbgemm.bf16i4bf16_rowwise(x, *tensors)


def shuffled(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Weights in the order in which the threads read them."""
    return torch.ops.fbgemm.bf16i4bf16_shuffled(x, *tensors)
