"""humming-kernels: CUDA templates compiled at run time for each shape, by NVRTC or by nvcc (about 3 s a kernel).

The layer goes in as AutoAWQ stores it. N is padded to a multiple of 128, which its kernels for compute capability 9.0
ask for. Its own choice of kernel is taken for each number of tokens, as when no tuning is given; no other is compiled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from awq_trt.checkpoint.formats import AWQ_ORDER
from bench.gemm.methods import Pack, Packed, Tensors
from bench.gemm.problem import Problem, pack_words

PAD_N = 128


def load(library: Path | None) -> Pack:
    """The package, if it can be imported."""
    from humming.layer import HummingLayer  # noqa: F401

    return lambda problem, tokens: [pack(problem, tokens)]


def awq_tensors(problem: Problem) -> dict[str, torch.Tensor]:
    """qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]: AutoAWQ's names and order."""
    layer = problem.layer
    return {
        "qweight": pack_words(layer.q.t(), AWQ_ORDER),
        "qzeros": pack_words(problem.zero_points().t(), AWQ_ORDER),
        "scales": layer.scales.t().contiguous(),
    }


def pack(problem: Problem, tokens: Sequence[int]) -> Packed:
    """[weight, scales, zero points or None] as humming transforms them, and the kernels compiled."""
    from humming.forward import humming_forward

    try:
        layer, tuning = compiled(problem, tokens)
    except RuntimeError:
        if os.environ.get("HUMMING_COMPILER") == "nvcc":
            raise
        os.environ["HUMMING_COMPILER"] = "nvcc"  # no NVRTC, or not all of it, beside this CUDA
        layer, tuning = compiled(problem, tokens)

    def call(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight, scales, zeros = tensors
        return humming_forward(
            layer.humming_config, inputs=x, outputs=y, weight=weight, weight_scale=scales, zero_point=zeros,
            locks=layer.locks, tuning_config=tuning,
        )  # fmt: skip

    parts = [layer.weight, layer.weight_scale, getattr(layer, "zero_point", None)]
    return Packed([None if p is None else p.data for p in parts], {"default": call})


def compiled(problem: Problem, tokens: Sequence[int]) -> tuple[Any, str]:
    """Its layer, and its choice of kernels as JSON: [more tokens than, up to, settings], compiled side by side."""
    from humming.kernel.humming import HummingKernel
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    shape, dtype = problem.shape, problem.layer.scales.dtype
    config = {"quant_method": "awq", "bits": 4, "group_size": shape.group_size,
              "zero_point": problem.layer.zeros is not None}  # fmt: skip
    layer = HummingLayer(shape.n, shape.k, config, pad_n_to_multiple=PAD_N, torch_dtype=dtype).to(problem.x.device)
    layer.load_from_tensors(awq_tensors(problem))
    layer.transform()
    choice: list[list[Any]] = []
    for low, high in pairwise([0, *sorted(tokens)]):
        settings = get_heuristics_config(layer.humming_config, shape_m=high)
        if choice and choice[-1][2] == settings:
            choice[-1][1] = high
        else:
            choice.append([low, high, settings])
    tuning = json.dumps(choice, default=int)
    HummingKernel.prepare_kernels(layer.humming_config.to_str(), None, tuning)
    return layer, tuning
