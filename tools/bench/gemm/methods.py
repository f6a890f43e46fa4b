"""What is compared, as a table, and what a method's module gives: one function `load`.

    load(library) -> Pack      raises where the method cannot run here; its words go into the record
    Pack(problem, tokens)      the layer in the method's own form, with what to call

A peer is installed, never copied; all but torch's own kernels are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gemm.problem import Problem

Tensors = Sequence[torch.Tensor | None]
Call = Callable[[Tensors, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tensors, x [M, K], y [M, N]) -> the product, in y or in a tensor of its own."""


@dataclass(frozen=True)
class Packed:
    """A layer in one method's form.

    Attributes:
        tensors: what every call reads of the layer, so what is copied for the rotation. variants: name -> call.
    """

    tensors: Tensors
    variants: dict[str, Call]

    @property
    def bytes(self) -> int:
        """Of one copy."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    def copies(self, count: int) -> list[Tensors]:
        """The tensors, and again elsewhere in memory until there are `count`."""
        return [self.tensors, *([None if t is None else t.clone() for t in self.tensors] for _ in range(count - 1))]


Pack = Callable[[Problem, Sequence[int]], list[Packed]]
Load = Callable[[Path | None], Pack]


@dataclass(frozen=True)
class Method:
    """One competitor.

    Attributes:
        name: in the record. module: in this folder. dtypes: what it takes; where the run's dtype is not among them, the
        problem is cast to the first. package: what `pip download` calls it, "" for none. peer: counts as a rival of
        the own kernels. Guesses for the plan: setup_seconds per shape; cell_seconds per number of tokens and variant,
        the replays apart; how many variants; times_floor: how far from the floor a call is.
    """

    name: str
    module: str
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    package: str = ""
    peer: bool = True
    setup_seconds: float = 0.3
    cell_seconds: float = 0.1
    variants: int = 1
    times_floor: float = 1.5


OWN, CUBLAS = "awq_trt", "cublas"
METHODS = (
    Method(OWN, "method_awq_trt", peer=False, variants=6),  # the default and five tactics
    Method(CUBLAS, "method_cublas", peer=False),
    Method("humming", "method_humming", package="humming-kernels==0.1.19", setup_seconds=5),
    Method("int4pack", "method_int4pack", dtypes=("bfloat16",), times_floor=15),  # reads the weights for each 16 tokens
    # compiles each kernel, about 2 s, but has settings for 4 of the 14 shapes only
    Method("gemlite", "method_gemlite", package="gemlite==0.6.0.post2", cell_seconds=0.6, times_floor=2),
    Method("fbgemm", "method_fbgemm", dtypes=("bfloat16",), package="fbgemm-gpu-genai==1.6.0", variants=2),
)
PROCESSES = ((OWN, CUBLAS), ("humming",), ("int4pack",), ("gemlite",), ("fbgemm",))
"""Methods that share a process, in the order of their importance: a peer that dies takes none of the others along."""

SHARES = (0.6, 0.6, 0.4, 0.7, 1.0)
"""How much of the time that is left each process may take."""


def named(names: Sequence[str]) -> list[Method]:
    """The methods of some names, in the order of the table.

    Raises:
        KeyError: there is no such name.
    """
    if unknown := set(names) - {m.name for m in METHODS}:
        known = ", ".join(m.name for m in METHODS)
        raise KeyError(f"no method {', '.join(sorted(unknown))}; there are {known}")
    return [m for m in METHODS if m.name in names]
