"""Where the AWQ scale goes: into the operator before the layer, where that is exact.

Dividing x by s costs nothing where the operator that makes x can do it: the weight of a norm, the rows of a linear
layer. Which operator that is, is not looked up by model name: candidates are tried with random scales on the block
itself, and the one taken leaves the block's output what it was. So a norm whose output also feeds a residual
is refused, an up-projection behind a product or a ReLU is found, and a new architecture needs no table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from awq_trt.statistics import Group

UNCHANGED = 1e-4
"""A fold may change the block's output by this part of what the scale alone changes. Norms compute in fp32 inside."""


@dataclass(frozen=True)
class Fold:
    """Where 1/s can go: into the rows of linear `into`, or into the weight of norm `into`.

    offset: 1 for norms that compute x (1 + w). head_dim: 0, or the head width where several query heads read one value
    head (grouped-query attention), so that s must repeat over the heads that share.
    """

    into: str
    offset: float = 0.0
    head_dim: int = 0

    def shared(self, s: torch.Tensor, rows: int) -> torch.Tensor:
        """Make s [K] equal over query heads that share a value head (geometric mean); `rows` values differ."""
        if not self.head_dim:
            return s
        repeats = len(s) // rows
        heads = s.reshape(-1, repeats, self.head_dim)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    def apply(self, block: nn.Module, s: torch.Tensor) -> None:
        """Divide the outputs of `into` by s, in place. s [K] is as `shared` made it."""
        module: Any = block.get_submodule(self.into)
        weight: torch.Tensor = module.weight
        bias = getattr(module, "bias", None)
        if self.head_dim:
            s = s.reshape(-1, len(s) // len(weight), self.head_dim)[:, 0].reshape(-1)
        s = s.to(weight.dtype)
        if isinstance(module, nn.Linear):
            weight.data = weight / s.unsqueeze(1)
        else:
            weight.data = (weight + self.offset) / s - self.offset
        if isinstance(bias, torch.Tensor):
            bias.data = bias / s


def find_fold(block: nn.Module, group: Group, run: Callable[[], torch.Tensor]) -> Fold | None:
    """The latest operator of the block whose output can be divided by s without changing what the block computes.

    Proven by trying: random s, operator divided, the group's columns multiplied, and the block's output compared. The
    change must vanish against the change that the columns alone make.

    Args:
        block: in fp64, so that rounding does not hide or feign a change. run: its output on a calibration input.
    """
    k = group.linears[0].in_features
    generator = torch.Generator().manual_seed(0)
    expected = run()
    for fold in _candidates(block, group, k):
        module: Any = block.get_submodule(fold.into)
        s = fold.shared(torch.rand(k, generator=generator) * 1.5 + 0.5, len(module.weight)).double()
        touched = [module, *group.linears]
        saved = [{n: p.data for n, p in m._parameters.items() if p is not None} for m in touched]
        for linear in group.linears:
            linear.weight.data = linear.weight * s
        one_sided = float((run() - expected).norm())
        fold.apply(block, s)
        both = float((run() - expected).norm())
        for m, data in zip(touched, saved, strict=True):
            for name, value in data.items():
                m._parameters[name].data = value
        if both < UNCHANGED * one_sided:
            return fold
    return None


def _candidates(block: nn.Module, group: Group, k: int) -> list[Fold]:
    """Operators that ran before the group and are as wide as its input, or narrower by whole heads."""
    folds = []
    head_dims = {getattr(m, "head_dim", 0) for m in block.modules()} - {0, None}
    for name in group.before:
        module: Any = block.get_submodule(name)
        rows = len(module.weight)
        if isinstance(module, nn.Linear):
            if rows == k:
                folds.append(Fold(name))
            elif rows < k and k % rows == 0:
                folds += [Fold(name, head_dim=int(d)) for d in sorted(head_dims) if rows % int(d) == 0]
        elif rows == k:
            folds += [Fold(name), Fold(name, offset=1.0)]
    return folds
