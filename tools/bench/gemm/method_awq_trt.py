"""The own kernels, through the C library libawq_trt_kernels.so; without it, on a CPU, the packed tensors undone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
    kernels = Kernels(library)
    return lambda problem, tokens: [Packed(pack(problem), kernels.variants(problem, tokens))]


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


class Kernels:
    """The C interface. All pointers are to device memory; the content of the workspace does not matter."""

    def __init__(self, library: Path) -> None:
        c = ctypes.CDLL(str(library))
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        c.awq_trt_tactics.argtypes, c.awq_trt_tactics.restype = [pointer, integer], integer
        c.awq_trt_workspace_bytes.argtypes, c.awq_trt_workspace_bytes.restype = [integer] * 3, ctypes.c_size_t
        c.awq_trt_counter_bytes.argtypes, c.awq_trt_counter_bytes.restype = [integer], ctypes.c_size_t
        c.awq_trt_gemm.argtypes, c.awq_trt_gemm.restype = [pointer] * 7 + [integer] * 6 + [pointer] * 3, integer
        c.awq_trt_error_text.argtypes, c.awq_trt_error_text.restype = [integer], ctypes.c_char_p
        self._c = c

    def tactics(self) -> list[int]:
        """Tactic 0, the default, and all that the library names."""
        ids = (ctypes.c_int * MAX_TACTICS)()
        count = self._c.awq_trt_tactics(ctypes.cast(ids, ctypes.c_void_p), MAX_TACTICS)
        return [0, *(i for i in ids[: min(count, MAX_TACTICS)] if i != 0)]

    def variants(self, problem: Problem, tokens: Sequence[int]) -> dict[str, Call]:
        """ "default" and one for each tactic; they share the workspace and the counters, as layers of a model do."""
        shape, tactics, device = problem.shape, self.tactics(), problem.x.device
        needed = [self._c.awq_trt_workspace_bytes(m, shape.n, shape.k) for m in tokens]
        workspace = torch.empty(max(1, *needed), dtype=torch.uint8, device=device)
        counters = torch.zeros(max(1, self._c.awq_trt_counter_bytes(shape.n)), dtype=torch.uint8, device=device)
        return {
            f"tactic {t}" if t else "default": self._call(problem, t, workspace, counters) for t in tactics
        }  # fmt: skip

    def _call(self, problem: Problem, tactic: int, workspace: torch.Tensor, counters: torch.Tensor) -> Call:
        shape, bfloat16 = problem.shape, int(DTYPES[problem.dtype] == torch.bfloat16)

        def call(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            qweight, scales, zeros = (None if t is None else t.data_ptr() for t in tensors)
            stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
            error = self._c.awq_trt_gemm(
                x.data_ptr(), qweight, scales, zeros, None, None, y.data_ptr(), x.shape[0], shape.n, shape.k,
                shape.group_size, bfloat16, tactic, workspace.data_ptr(), counters.data_ptr(), stream,
            )  # fmt: skip
            if error:
                raise KernelError(f"awq_trt_gemm: {self._c.awq_trt_error_text(error).decode()} (code {error})")
            return y

        return call
