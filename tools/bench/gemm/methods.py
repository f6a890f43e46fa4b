"""What is compared, as a table, and what a method's module gives: one function `load`.

    load(library) -> Pack      raises where the method cannot run here; its words go into the record
    Pack(problem, tokens)      the layer in the method's own form, with what to call

A peer is installed, never copied; all but torch's own kernels are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.gemm.problem import Problem

Tensors = Sequence[torch.Tensor | None]
Call = Callable[[Tensors, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tensors, x [M, K], y [M, N]) -> the product, in y or in a tensor of its own."""


@dataclass(frozen=True)
class Packed:
    """A layer in one method's form."""

    tensors: Tensors  # what every call reads of the layer, so what is copied for the rotation
    variants: dict[str, Call]  # by name

    @property
    def bytes(self) -> int:
        """Of one copy."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    def copies(self, count: int) -> list[Tensors]:
        """The tensors, and again elsewhere in memory until there are `count`."""
        return [self.tensors, *([None if t is None else t.clone() for t in self.tensors] for _ in range(count - 1))]


Pack = Callable[[Problem, Sequence[int]], list[Packed]]


@dataclass(frozen=True)
class Method:
    """One competitor."""

    name: str  # in the record
    module: str  # in this folder
    dtypes: tuple[str, ...] = ("float16", "bfloat16")  # a run in another one casts the problem to the first of these
    package: str = ""  # what `pip download` calls it
    peer: bool = True  # counts as a rival of the own kernels


OWN, CUBLAS = "awq_trt", "cublas"
METHODS = (
    Method(OWN, "method_awq_trt", peer=False),
    Method(CUBLAS, "method_cublas", peer=False),
    Method("humming", "method_humming", package="humming-kernels==0.1.19"),
    Method("int4pack", "method_int4pack", dtypes=("bfloat16",)),
    Method("gemlite", "method_gemlite", package="gemlite==0.6.0.post2"),
    Method("fbgemm", "method_fbgemm", dtypes=("bfloat16",), package="fbgemm-gpu-genai==1.6.0"),
)
PROCESSES = (((OWN, CUBLAS), 0.6), (("humming",), 0.6), (("int4pack",), 0.4), (("gemlite",), 0.7), (("fbgemm",), 1.0))
"""Methods that share a process, and how much of the time that is left it may take; in the order of their importance: a
peer that dies takes none of the others along."""


def named(names: Sequence[str]) -> list[Method]:
    """The methods of some names, in the order of the table.

    Raises:
        KeyError: there is no such name.
    """
    if unknown := set(names) - {m.name for m in METHODS}:
        known = ", ".join(m.name for m in METHODS)
        raise KeyError(f"no method {', '.join(sorted(unknown))}; there are {known}")
    return [m for m in METHODS if m.name in names]
