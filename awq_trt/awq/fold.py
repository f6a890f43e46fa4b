"""Where the AWQ scale goes: into the operator before the layer, where that is exact.

Dividing x by s costs nothing where the operator that makes x can do it: the weight of a norm, the rows of a linear
layer. Which operator that is, is not looked up by model name: candidates are tried with random scales on the block
itself, and the one taken leaves the block's output what it was. So a norm whose output also feeds a residual
is refused, an up-projection behind a product or a ReLU is found, and a new architecture needs no table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from awq_trt.awq.hessian import Group
from awq_trt.checkpoint.experts import expert_of

UNCHANGED = 1e-4
"""A fold may change the block's output by this part of what the scale alone changes. Norms compute in fp32 inside."""


@dataclass(frozen=True)
class Fold:
    """Where 1/s can go: into the rows of linear `into`, or into the weight of norm `into`."""

    into: str  # name in the block
    offset: float = 0.0  # 1 for norms that compute x (1 + w)
    head_dim: int = 0  # of grouped-query attention, where s must repeat over the query heads of a value head; else 0

    def shared(self, s: torch.Tensor, rows: int) -> torch.Tensor:
        """Make s [K] equal over query heads that share a value head (geometric mean); `rows` values differ."""
        if not self.head_dim:
            return s
        repeats = len(s) // rows
        heads = s.reshape(-1, repeats, self.head_dim)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    def per_row(self, s: torch.Tensor, rows: int) -> torch.Tensor:
        """What each of the `rows` outputs of `into` is divided by, for s [K] as `shared` made it."""
        return s.reshape(-1, len(s) // rows, self.head_dim)[:, 0].reshape(-1) if self.head_dim else s

    def apply(self, block: nn.Module, s: torch.Tensor) -> None:
        """Divide the outputs of `into` by s, in place. s [K] is as `shared` made it."""
        module: Any = block.get_submodule(self.into)
        weight: torch.Tensor = module.weight
        bias = getattr(module, "bias", None)
        s = self.per_row(s, len(weight)).to(weight)
        if isinstance(module, nn.Linear):
            weight.data.div_(s.unsqueeze(1))
        else:
            weight.data = (weight + self.offset) / s - self.offset
        if isinstance(bias, torch.Tensor):
            bias.data = bias / s


def find_known_fold(
    block: nn.Module,
    group: Group,
    groups: list[Group],
    run: Callable[[], torch.Tensor],
    folds: dict[str, Fold | None],
) -> Fold | None:
    """`find_fold`, once per structure of block: what it finds is kept in `folds`, which can be written as JSON.

    Experts are alike: what is true of one holds for all. It is tried on one that a token of the first window reaches.

    Args:
        groups: of the block. run: its output on the first window.
    """

    def kind(other: Group) -> str:
        expert = expert_of(block, other.names[0])
        shapes = [(name, *parameter.shape) for name, parameter in block.named_parameters()]
        return repr((type(block).__name__, shapes, [n.removeprefix(expert) for n in other.names], bool(expert)))

    key = kind(group)
    if key not in folds:
        dtype = next(block.parameters()).dtype
        block.float()
        alike = (g for g in groups if kind(g) == key)
        tried = next((g for g in alike if not expert_of(block, g.names[0]) or _is_reached(g, run)), None)
        if tried is not None:
            found = find_fold(block, tried, run)
            folds[key] = found and replace(found, into=found.into.removeprefix(expert_of(block, tried.names[0])))
        block.to(dtype)
    fold = folds.get(key)
    return fold and replace(fold, into=expert_of(block, group.names[0]) + fold.into)


def find_fold(block: nn.Module, group: Group, run: Callable[[], torch.Tensor]) -> Fold | None:
    """The latest operator of the block whose output can be divided by s without changing what the block computes.

    Proven by trying: random s, operator divided, the group's columns multiplied, and the block's output compared. The
    change must vanish against the change that the columns alone make. s are powers of two, so that fp32 is enough; no
    weight matrix is touched, its inputs or outputs are scaled instead, so that nothing is copied.

    Args:
        block: in fp32 or fp64. run: its output on a calibration input.
    """
    linears = group.linears.values()
    k = next(iter(linears)).in_features
    generator = torch.Generator().manual_seed(0)
    expected = run()
    for fold in _candidates(block, group, k):
        module: Any = block.get_submodule(fold.into)
        s = fold.shared(2.0 ** torch.randint(-1, 2, (k,), generator=generator), len(module.weight)).to(expected)
        handles = [linear.register_forward_pre_hook(lambda _, x, s=s: (x[0] * s, *x[1:])) for linear in linears]
        try:
            one_sided = float((run() - expected).norm())
            with _divided(block, fold, s):
                both = float((run() - expected).norm())
        finally:
            for handle in handles:
                handle.remove()
        if both < UNCHANGED * one_sided:
            return fold
    return None


def _is_reached(group: Group, run: Callable[[], torch.Tensor]) -> bool:
    """Whether a token of the calibration input reaches the group: not every expert is chosen by one."""
    calls: list[int] = []
    linear = next(iter(group.linears.values()))
    handle = linear.register_forward_pre_hook(lambda _, x: calls.append(x[0].numel()))
    try:
        run()
    finally:
        handle.remove()
    return any(calls)


@contextmanager
def _divided(block: nn.Module, fold: Fold, s: torch.Tensor) -> Iterator[None]:
    """Inside, the outputs of `fold.into` are divided by s: a linear layer's themselves, a norm by its weight."""
    module = block.get_submodule(fold.into)
    if isinstance(module, nn.Linear):
        handle = module.register_forward_hook(lambda _, x, y: y / fold.per_row(s, y.shape[-1]))
        try:
            yield
        finally:
            handle.remove()
        return
    saved = {parameter: parameter.data for parameter in module.parameters(recurse=False)}
    fold.apply(block, s)
    try:
        yield
    finally:
        for parameter, value in saved.items():
            parameter.data = value


def _candidates(block: nn.Module, group: Group, k: int) -> list[Fold]:
    """Operators that ran before the group and are as wide as its input, or narrower by whole heads.

    For a layer of an expert, operators of that expert: what others feed, one expert's scale cannot be divided out of.
    """
    folds = []
    head_dims = {getattr(m, "head_dim", 0) for m in block.modules()} - {0, None}
    expert = expert_of(block, group.names[0])
    for name in group.before:
        if expert_of(block, name) != expert:
            continue
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
