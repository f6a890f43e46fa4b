"""H = X^T X of the inputs X of a block's linear layers: all that the search needs to know of the calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from awq_trt.errors import AwqTrtError


@dataclass
class HessianAccumulator:
    """Sums over the calibration tokens x [K] that one or several layers read."""

    hessian: torch.Tensor  # sum of x^T x, fp32 [K, K]; gone once taken
    total_abs: torch.Tensor  # sum of |x|, fp32 [K]
    tokens: int = 0
    largest: float = 0.0  # the largest |x| (fp16 ends at 65504); NaN or Inf where one was seen

    @classmethod
    def zero(cls, k: int, device: torch.device | str = "cpu") -> HessianAccumulator:
        """Of no token, for K = `k` channels."""
        return cls(torch.zeros(k, k, device=device), torch.zeros(k, device=device))

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., K]. Below its diagonal panels the Hessian is wrong until `mirror` is called."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.total_abs)
        if not len(x):
            return
        for columns in _panels(x.shape[1]):
            self.hessian[columns, columns.start :].addmm_(x[:, columns].t(), x[:, columns.start :])
        self.total_abs += torch.linalg.vector_norm(x, 1, dim=0)
        low, high = (float(bound) for bound in x.aminmax())
        self.tokens += len(x)
        self.largest = max(self.largest, -low, high) if low == low else low  # NaN stays NaN

    def mirror(self) -> None:
        """Copy the upper panels of the Hessian below the diagonal."""
        for columns in _panels(len(self.hessian)):
            self.hessian[columns.stop :, columns] = self.hessian[columns, columns.stop :].t()

    def all_reduce(self) -> None:
        """Add the sums of all processes of the group; each of them gets the result."""
        counts = torch.tensor([self.tokens, self.largest], dtype=torch.float64, device=self.hessian.device)
        for tensor in (self.hessian, self.total_abs, counts[:1]):
            dist.all_reduce(tensor)
        dist.all_reduce(counts[1:], dist.ReduceOp.MAX)
        self.tokens, self.largest = int(counts[0]), float(counts[1])

    def take(self) -> torch.Tensor:
        """The Hessian, [K, K], which is then the caller's to change: this object has none any more."""
        hessian = self.hessian
        del self.hessian
        return hessian


def _panels(k: int) -> list[slice]:
    """The columns 0..k in at most 8 slices of at least 128: x^T x is symmetric, so that 9/16 of it are enough."""
    step = max(128, -(-k // 8))
    return [slice(i, min(i + step, k)) for i in range(0, k, step)]


@dataclass
class Group:
    """Linear layers of one block that read the same tensor, so that one scale serves all of them."""

    linears: dict[str, nn.Linear]  # by their names in the block
    before: list[str]  # norms and linear layers that ran earlier in the block, the latest first: where s may be folded
    statistics: HessianAccumulator  # of the tensor they read

    @property
    def names(self) -> list[str]:
        """Of the layers, within the block."""
        return list(self.linears)


class _EnoughError(Exception):
    """Ends a forward after the last layer of interest."""


class Observer:
    """Accumulates the Hessians of a block's linear layers while the block runs:

        with Observer(block) as observer:
            for x in windows:
                with observer.window():
                    block(x)

    Afterwards `groups` are the layers in order of execution. Those that never ran (experts no token chose) are in none.

    Args:
        name: of the block, for messages. device: where sums are made; None for where each layer's weight is.
    """

    def __init__(self, block: nn.Module, name: str = "", device: torch.device | None = None) -> None:
        self.groups: list[Group] = []
        self._name, self._device = name, device
        self._modules = {n: m for n, m in block.named_modules() if scaled_weight(m) is not None}
        self._calls = 0
        self._last_call: int | None = None  # calls of linear layers in a window, known once all were called in one
        self._ran: list[str] = []  # in this window
        self._inputs: list[tuple[torch.Tensor, Group]] = []  # of this window, alive, so that `is` is enough

    def __enter__(self) -> Observer:
        self._hooks = [m.register_forward_pre_hook(partial(self._before, n)) for n, m in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for group in self.groups:
            group.statistics.mirror()

    @contextmanager
    def window(self) -> Iterator[None]:
        """Inside, the block runs once. The run ends early where no further layer is to come.

        Raises:
            AwqTrtError: a layer's input holds NaN or Inf.
        """
        self._calls, self._ran, self._inputs = 0, [], []
        with suppress(_EnoughError):
            yield
        self._inputs = []
        linears = {n for n, m in self._modules.items() if isinstance(m, nn.Linear)}
        if self._last_call is None and linears <= set(self._ran):
            self._last_call = self._calls

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook of every linear layer and norm."""
        if isinstance(module, nn.Linear):
            self._calls += 1
            self._add(name, module, args[0])
        self._ran.append(name)
        if isinstance(module, nn.Linear) and self._calls == self._last_call:
            raise _EnoughError

    def _add(self, name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        group = next((g for g in self.groups if name in g.linears), None)
        if group is None:
            group = next((g for tensor, g in self._inputs if tensor is x), None)
        if group is None:
            zero = HessianAccumulator.zero(linear.in_features, self._device or linear.weight.device)
            group = Group({}, list(dict.fromkeys(reversed(self._ran))), zero)
            self.groups.append(group)
        group.linears[name] = linear
        if any(tensor is x and g is group for tensor, g in self._inputs):
            return
        self._inputs.append((x, group))
        group.statistics.add(x)
        if not math.isfinite(group.statistics.largest):
            raise AwqTrtError(
                f"the input of layer {self._name + '.' if self._name else ''}{name} holds NaN or Inf on the "
                'calibration inputs: the model overflows there. Try compute_dtype="float32"; if it is that already, '
                "the checkpoint is damaged."
            )


def scaled_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, or of a norm (a module with one weight per channel); None for anything else."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.weight
    is_norm = isinstance(weight, torch.Tensor) and weight.dim() == 1 and not list(module.children())
    return weight if is_norm else None
