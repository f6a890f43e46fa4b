"""What one block is called with during calibration: this rank's windows, and how the ranks' sums come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.distributed import CollectiveError, Ranks
from awq_trt.awq.estimate import StageTimer
from awq_trt.awq.lanes import lane_ranges
from awq_trt.awq.states import States, StatesWriter
from awq_trt.awq.statistics import Group, observe_lanes
from awq_trt.errors import OtherRankError

OBSERVE, ADVANCE, FAIL = "observe", "advance", "fail"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """This process's part of the calibration windows.

    Attributes:
        total: windows of all ranks. ranks: who shares them. folder: where large sums wait.
    """

    total: int
    ranks: Ranks
    folder: Path | None = None

    @property
    def lanes(self) -> dict[int, range]:
        """Lane -> windows, numbered over all ranks."""
        return lane_ranges(self.total, self.ranks.rank, self.ranks.world)

    @property
    def windows(self) -> list[int]:
        """The windows of this process; BlockStream numbers them 0, 1, ... in this order."""
        return [window for lane in self.lanes.values() for window in lane]


@dataclass
class BlockCalibrator:
    """Block i, loaded, and what it is called with, as `statistics.Calls`; rank 0 searches with it, others follow.

    Attributes:
        states: what goes into the block.
    """

    stream: BlockStream
    i: int
    share: Share
    states: States
    clock: StageTimer = field(default_factory=StageTimer)
    observations: int = 0

    @property
    def name(self) -> str:
        """The block's name in the model."""
        return f"{self.stream.prefix}.{self.i}"

    def run(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The block's output for the first window."""
        with self.clock.stage("prove"):
            return self.stream.run(self.i, self.states[0], 0, dtype)

    def groups(self, block: nn.Module) -> list[Group]:
        """HessianAccumulator of the linear layers of the block as it is now, over all windows of all ranks."""
        ranks = self.share.ranks
        if self.observations:
            ranks.broadcast(OBSERVE)
            ranks.share_weights(block)
        return self._observe(block)

    def _observe(self, block: nn.Module) -> list[Group]:
        share = self.share
        self.observations += 1
        runs = [partial(self._run_window, number, window) for number, window in enumerate(share.windows)]
        lanes = {lane: len(windows) for lane, windows in share.lanes.items()}
        with share.ranks.fail_together(), self.clock.stage("observe"):
            mine = observe_lanes(block, runs, lanes, name=self.name, folder=share.folder)
        return share.ranks.sum_groups(block, mine, share.total)

    def searched(self, block: nn.Module, search: Callable[[], Result]) -> Result | None:
        """Rank 0 runs `search`, which calls `groups`; the others observe whenever it does, and get None."""
        ranks = self.share.ranks
        if ranks.rank == 0:
            try:
                result = search()
            except CollectiveError:
                raise
            except Exception:
                ranks.broadcast(FAIL)
                raise
            ranks.broadcast(ADVANCE)
            return result
        self._observe(block)
        while (order := ranks.broadcast()) == OBSERVE:
            ranks.share_weights(block)
            self._observe(block)
        if order == FAIL:
            raise OtherRankError
        return None

    def _run_window(self, number: int, window: int) -> torch.Tensor:
        return self.stream.run(self.i, self.states[window], number)

    def advance(self, block: nn.Module, into: StatesWriter) -> None:
        """Write what the block, rounded by now, makes of its inputs: the next block sees the error to come."""
        self.share.ranks.share_weights(block)
        with self.share.ranks.fail_together():
            for number, window in enumerate(self.share.windows):
                into.add(window, self._run_window(number, window))
