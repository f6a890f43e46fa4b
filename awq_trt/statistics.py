"""What calibration leaves of the inputs of a block's linear layers: second moments, and which layers share an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

Run = Callable[[], object]


@dataclass
class Statistics:
    """What calibration leaves of the inputs of one group of linear layers (K input channels).

    Attributes:
        hessian: sum of x^T x over the tokens, fp32 [K, K]. total_abs: sum of |x|, fp32 [K]. tokens: how many.
        largest: the largest |x| seen (fp16 ends at 65504).
    """

    hessian: torch.Tensor
    total_abs: torch.Tensor
    tokens: int = 0
    largest: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.hessian.addmm_(rows.t(), rows)
        magnitude = rows.abs()
        self.total_abs += magnitude.sum(0)
        self.tokens += len(rows)
        self.largest = max(self.largest, float(magnitude.amax()))


@dataclass
class Group:
    """Linear layers of one block that read the same tensor, so that one scale serves all of them."""

    names: list[str]
    linears: list[nn.Linear]
    statistics: Statistics
    before: list[str]
    """Names of the norms and linear layers that ran earlier in the block, the latest first: where s may be folded."""


class Calls(Protocol):
    """What one block is called with, over all calibration windows (of all ranks)."""

    @property
    def name(self) -> str:
        """The block's name in the model ("model.layers.0")."""

    def groups(self, block: nn.Module) -> list[Group]:
        """Run the block, as it is now, on every window and gather the statistics of its linear layers' inputs."""

    def run(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The block's output for the first window; its inputs are cast to `dtype`, the block's own if given."""


def observe(block: nn.Module, runs: Iterable[Run]) -> list[Group]:
    """Run the block and gather statistics of the inputs of its linear layers, grouped by the tensor they read.

    Returns the groups in order of execution. Layers that never ran (experts no token chose) are in no group.
    """
    groups: list[Group] = []
    by_linear: dict[str, Group] = {}
    order: list[str] = []
    inputs: list[tuple[torch.Tensor, Group]] = []  # of the current run; keeps them alive, so `is` is enough

    def on_linear(name: str, module: nn.Linear, x: torch.Tensor) -> None:
        group = by_linear.get(name)
        if group is None:
            group = next((g for tensor, g in inputs if tensor is x), None)
            if group is None:
                k = module.in_features
                group = Group([], [], Statistics(torch.zeros(k, k), torch.zeros(k)), order[::-1])
                groups.append(group)
            group.names.append(name)
            group.linears.append(module)
            by_linear[name] = group
        if not any(g is group for _, g in inputs):
            group.statistics.add(x)
            inputs.append((x, group))

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if isinstance(module, nn.Linear):
                on_linear(name, module, args[0])
            if name not in order:
                order.append(name)

        return before

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in block.named_modules() if scaled_weight(m) is not None]
    try:
        for run in runs:
            inputs.clear()
            run()
    finally:
        for handle in handles:
            handle.remove()
    return groups


def scaled_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, or of a norm (a module with one weight per channel); None for anything else."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.weight
    is_norm = isinstance(weight, torch.Tensor) and weight.dim() == 1 and not list(module.children())
    return weight if is_norm else None
