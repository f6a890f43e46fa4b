"""The own kernels, through the C library libawq_trt_kernels.so; without it, on a CPU, the packed tensors undone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from awq_trt import layout
from awq_trt.layout import DTYPES
from awq_trt.linear import QuantizedLinear
from bench.gemm.methods import Call, Pack, Packed, Tensors
from bench.gemm.problem import Problem

LIBRARY = "libawq_trt_kernels.so"
MAX_TACTICS = 64


class KernelError(Exception):
    """A kernel refused; the library's words."""


def load(library: Path | None) -> Pack:
    """The kernels of a library; None for the arithmetic on a CPU."""
    if library is None:
        return lambda problem, tokens: [Packed(pack(problem), {"default": unpacked(problem)})]
    c = ctypes.CDLL(str(library))
    c.awq_trt_workspace_bytes.restype = c.awq_trt_counter_bytes.restype = ctypes.c_size_t
    c.awq_trt_gemm.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int] * 6 + [ctypes.c_void_p] * 3
    c.awq_trt_error_text.restype = ctypes.c_char_p
    return lambda problem, tokens: [Packed(pack(problem), variants(c, problem, tokens))]


def pack(problem: Problem) -> list[torch.Tensor | None]:
    """[qweight, scales, zeros or None] in the layout of awq_trt/layout.py, on the device of the problem."""
    layer = problem.layer
    zeros = None if layer.zeros is None else layout.pack_zeros(layer.zeros)
    return [layout.pack_qweight(layer.q), layout.pack_scales(layer.scales), zeros]


def unpacked(problem: Problem) -> Call:
    """What the kernels compute, from the packed tensors: shows on a CPU that packing lost nothing."""
    n, k = problem.shape.n, problem.shape.k

    def call(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        qweight, scales, zeros = tensors
        assert qweight is not None
        assert scales is not None
        q, z = layout.unpack_qweight(qweight, n, k), None if zeros is None else layout.unpack_zeros(zeros, n)
        layer = QuantizedLinear(q, layout.unpack_scales(scales, n), z, problem.shape.group_size)
        return y.copy_(x.float() @ layer.dequantize().float().t())

    return call


def variants(c: ctypes.CDLL, problem: Problem, tokens: Sequence[int]) -> dict[str, Call]:
    """ "default" and one for each tactic; they share the workspace, whose content does not matter, and the counters, as
    layers of a model do."""
    shape, device = problem.shape, problem.x.device
    ids = (ctypes.c_int * MAX_TACTICS)()
    count = c.awq_trt_tactics(ids, MAX_TACTICS)
    needed = [c.awq_trt_workspace_bytes(m, shape.n, shape.k) for m in tokens]
    workspace = torch.empty(max(1, *needed), dtype=torch.uint8, device=device)
    counters = torch.zeros(max(1, c.awq_trt_counter_bytes(shape.n)), dtype=torch.uint8, device=device)
    bfloat16 = int(DTYPES[problem.dtype] == torch.bfloat16)

    def call(tactic: int, tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        qweight, scales, zeros = (None if t is None else t.data_ptr() for t in tensors)
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        error = c.awq_trt_gemm(
            x.data_ptr(), qweight, scales, zeros, None, None, y.data_ptr(), x.shape[0], shape.n, shape.k,
            shape.group_size, bfloat16, tactic, workspace.data_ptr(), counters.data_ptr(), stream,
        )  # fmt: skip
        if error:
            raise KernelError(f"awq_trt_gemm: {c.awq_trt_error_text(error).decode()} (code {error})")
        return y

    named = {f"tactic {t}": t for t in ids[: min(count, MAX_TACTICS)] if t != 0}
    return {name: partial(call, tactic) for name, tactic in ({"default": 0} | named).items()}
