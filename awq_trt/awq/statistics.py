"""What calibration leaves of the inputs of a block's linear layers: second moments, and which layers share an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from awq_trt.awq.hessian import HessianAccumulator
from awq_trt.awq.lanes import LaneSums, lane_count, lane_ranges
from awq_trt.errors import AwqTrtError

Run = Callable[[], object]


@dataclass
class Group:
    """Linear layers of one block that read the same tensor, so that one scale serves all of them."""

    names: list[str]
    linears: list[nn.Linear]
    statistics: HessianAccumulator
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
        """The block's output for the first window; its inputs are cast to `dtype`, the block's own if not given."""


@dataclass
class Observed:
    """A group while it is being observed, and its sums over the lanes of this process."""

    names: list[str]
    before: list[str]
    sums: LaneSums


class _EnoughError(Exception):
    """Ends a forward behind the last layer that is to be seen."""


@dataclass
class _Observer:
    """Hooks' state: which layer reads which tensor in the current run, and what is known from the runs before."""

    block: nn.Module
    name: str
    new_sums: Callable[[nn.Linear], LaneSums]
    groups: list[Observed] = field(default_factory=list)
    calls: int = 0
    last_call: int | None = None  # calls of linear layers in a run, known once all of them were called in one
    ran: list[str] = field(default_factory=list)
    inputs: list[tuple[torch.Tensor, Observed]] = field(default_factory=list)  # alive, so that `is` is enough

    def on_linear(self, name: str, x: torch.Tensor) -> None:
        """A linear layer is about to read x."""
        self.calls += 1
        group = next((g for g in self.groups if name in g.names), None)
        if group is None:
            group = next((g for tensor, g in self.inputs if tensor is x), None)
            if group is None:
                linear: nn.Linear = self.block.get_submodule(name)  # type: ignore[assignment]
                group = Observed([], list(dict.fromkeys(reversed(self.ran))), self.new_sums(linear))
                self.groups.append(group)
            group.names.append(name)
        if not any(tensor is x and g is group for tensor, g in self.inputs):
            group.sums.add(x)
            self.inputs.append((x, group))
            assert group.sums.current is not None or not x.numel()
            if group.sums.current is not None and not math.isfinite(group.sums.current.largest):
                where = f"{self.name}.{name}" if self.name else name
                raise AwqTrtError(
                    f"the input of layer {where} holds NaN or Inf on the calibration inputs: the model overflows "
                    "there. Try --compute-dtype float32; if it is that already, the checkpoint is damaged."
                )

    def run(self, run: Run) -> None:
        """One window."""
        self.calls = 0
        self.ran.clear()
        self.inputs.clear()
        with suppress(_EnoughError):
            run()
        if self.last_call is None:
            linears = {n for n, m in self.block.named_modules() if isinstance(m, nn.Linear)}
            if linears <= set(self.ran):
                self.last_call = self.calls
        self.inputs.clear()

    def before(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        """The forward pre-hook of every linear layer and norm."""
        if isinstance(module, nn.Linear):
            self.on_linear(name, x)
        self.ran.append(name)
        if isinstance(module, nn.Linear) and self.calls == self.last_call:
            raise _EnoughError


def observe(block: nn.Module, runs: Sequence[Run], name: str = "") -> list[Group]:
    """Run the block and gather statistics of the inputs of its linear layers, grouped by the tensor they read.

    Args:
        runs: one per calibration window. name: of the block, for messages.

    Returns:
        The groups in order of execution. Layers that never ran (experts no token chose) are in no group.

    Raises:
        AwqTrtError: an input holds NaN or Inf.
    """
    found = observe_lanes(block, runs, {lane: len(r) for lane, r in lane_ranges(len(runs)).items()}, name=name)
    return [finished(block, group, len(runs)) for group in found]


def observe_lanes(
    block: nn.Module,
    runs: Sequence[Run],
    lanes: Mapping[int, int],
    *,
    name: str = "",
    folder: Path | None = None,
    device: torch.device | None = None,
) -> list[Observed]:
    """`observe`, for the windows of one process of many.

    Args:
        lanes: lane -> number of its windows; `runs` are those windows, lane after lane.
        folder: where large sums wait. device: where sums are made; None for where each layer's weight is.
    """
    first = min(lanes, default=0)

    def new_sums(linear: nn.Linear) -> LaneSums:
        return LaneSums(linear.in_features, device or linear.weight.device, folder, first)

    observer = _Observer(block, name, new_sums)

    def hook(layer: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, args: observer.before(layer, module, args[0])

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in block.named_modules() if scaled_weight(m) is not None]
    try:
        window = 0
        for lane, count in lanes.items():
            for j in range(window, window + count):
                observer.run(runs[j])
            window += count
            for group in observer.groups:
                group.sums.end(lane)
    finally:
        for handle in handles:
            handle.remove()
    return observer.groups


def finished(block: nn.Module, observed: Observed, windows: int) -> Group:
    """The sums of one process that had all lanes, as a group."""
    top = lane_count(windows).bit_length() - 1
    return group_of(block, observed, observed.sums.take((top, 0)))


def group_of(block: nn.Module, observed: Observed, sums: HessianAccumulator | None) -> Group:
    """A group with its sums over all lanes; None where no token came."""
    statistics = observed.sums.zero() if sums is None else sums
    statistics.mirror()
    linears: list[nn.Linear] = [block.get_submodule(n) for n in observed.names]  # type: ignore[misc]
    return Group(observed.names, linears, statistics, observed.before)


def scaled_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, or of a norm (a module with one weight per channel); None for anything else."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.weight
    is_norm = isinstance(weight, torch.Tensor) and weight.dim() == 1 and not list(module.children())
    return weight if is_norm else None
