"""One block and the calibration windows it is run on: each rank runs its own, and the Hessians are summed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from awq_trt.awq.blocks import BlockStream, State
from awq_trt.awq.distributed import Ranks
from awq_trt.awq.estimate import StageTimer
from awq_trt.awq.hessian import Group, Observer
from awq_trt.awq.ranges import Ranges
from awq_trt.awq.resume import States


@dataclass(frozen=True)
class BlockCalibrator:
    """Block i of a stream, once it is loaded; the model's head, after the blocks, counts as one more."""

    stream: BlockStream
    i: int
    states: States | Mapping[int, State]  # what goes into the block, for every window
    windows: range  # of this rank, numbered over all ranks; the stream's inputs are these
    ranks: Ranks
    timer: StageTimer
    ranges: Ranges = field(default_factory=Ranges)  # of what this rank's windows made of the block

    @property
    def is_head(self) -> bool:
        """Whether this is the head."""
        return self.i == len(self.stream.blocks)

    @property
    def name(self) -> str:
        """The block's name in the model; "" for the head, whose names are the model's own."""
        return "" if self.is_head else f"{self.stream.prefix}.{self.i}"

    def first_output(self) -> torch.Tensor:
        """The block's output for the first window, on rank 0."""
        with self.timer.stage("prove"):
            return self._run(0)[0]

    def _run(self, window: int) -> State:
        number = window - self.windows.start
        if self.is_head:
            return (self.stream.head(self.states[window], number),)
        return self.stream.run(self.i, self.states[window], number)

    def observe(self, module: nn.Module) -> list[Group]:
        """Run the block (of the head: the model) on every window; its groups of layers on rank 0, [] on the others.

        Raises:
            AwqTrtError: a layer's input holds NaN or Inf.
        """
        ranks, device = self.ranks, self.stream.device
        with ranks.fail_together(), self.timer.stage("observe"), Observer(module, self.name, device) as observer:
            for window in self.windows:
                with observer.window(), self._watching(module):
                    self._run(window)
        groups = ranks.all_reduce(module, observer.groups, device)
        return groups if ranks.rank == 0 else []

    def advance(self, block: nn.Module, following: States) -> None:
        """Put what the block, rounded by now, makes of its inputs: the next block sees the error to come."""
        self.ranks.share_weights(block)
        with self.ranks.fail_together(), self.timer.stage("advance"):
            for window in self.windows:
                with self._watching(block):
                    output = self._run(window)
                following.put(window, output)

    def _watching(self, module: nn.Module) -> AbstractContextManager[None]:
        return self.ranges.watching(module, f"{self.name}." if self.name else "")
