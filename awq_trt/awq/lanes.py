"""Sums over the calibration windows that have the same bits however many processes share the windows.

Floating-point sums depend on their order, so the order is fixed by the number of windows alone. The windows are cut
into lanes (contiguous, at most 8, a power of two); a lane is added up window by window, the lanes by a binary tree:

    lane   0   1   2   3          a process with lanes 0, 1 sums node (1, 0), one with lanes 2, 3 sums node (1, 1),
            \\ /     \\ /          and one of them adds the two: the same additions as in one process.
           (1,0)   (1,1)
               \\   /
               (2,0)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from awq_trt.awq.hessian import HessianAccumulator, Parked

LANES = 8
"""More would only help more than 8 processes, and each level of the tree is one more sum to keep."""
PARK_BYTES = 1 << 24
"""A sum this large waits for its turn in a file, not in memory: 822 MB for 14336 channels."""

Node = tuple[int, int]
"""(level, index): covers the lanes from index * 2^level, 2^level of them."""


def lane_count(windows: int) -> int:
    """The largest power of two that is at most 8 and at most the number of windows."""
    return 1 << (min(LANES, windows).bit_length() - 1)


def lane_ranges(windows: int, rank: int = 0, world: int = 1) -> dict[int, range]:
    """Lane -> its windows, for the lanes of one rank. Rank 0 always has lane 0; ranks beyond the lanes have none."""
    count = lane_count(windows)
    first, end = (-(-r * count // world) for r in (rank, rank + 1))
    return {lane: range(lane * windows // count, (lane + 1) * windows // count) for lane in range(first, end)}


def lane_owner(lane: int, count: int, world: int) -> int:
    """The rank that has a lane; see `lane_ranges`."""
    return lane * world // count


@dataclass
class LaneSums:
    """The lanes of one process as they come; what is finished is added up as far as the tree allows.

    Attributes:
        k: channels. folder: where large sums wait; None keeps them in memory. first: the first lane of this process.
        nodes: the sums that are finished. current: of the lane in progress, None before its first token.
    """

    k: int
    device: torch.device | str = "cpu"
    folder: Path | None = None
    first: int = 0
    nodes: dict[Node, HessianAccumulator | Parked] = field(default_factory=dict)
    current: HessianAccumulator | None = None

    def add(self, x: torch.Tensor) -> None:
        """Add activations to the lane in progress."""
        if self.current is None:
            self._park()
            self.current = self.zero()
        self.current.add_upper(x.to(self.device))

    def end(self, lane: int) -> None:
        """The lane in progress, number `lane`, is complete."""
        value: HessianAccumulator | Parked | None = self.current
        self.current = None
        level, index = 0, lane
        while index % 2 and (index - 1) << level >= self.first:
            value = joined(self.nodes.pop((level, index - 1), None), value)
            level, index = level + 1, index // 2
        if value is not None:
            self.nodes[level, index] = value

    def _park(self) -> None:
        for node, value in self.nodes.items():
            if self.folder is not None and isinstance(value, HessianAccumulator) and value.hessian.nbytes >= PARK_BYTES:
                self.nodes[node] = Parked.of(value, self.folder / f"sum-{id(self):x}-{node[0]}-{node[1]}.tmp")

    def zero(self) -> HessianAccumulator:
        """The sum of nothing."""
        return HessianAccumulator.zero(self.k, self.device)

    def take(self, node: Node) -> HessianAccumulator | None:
        """A finished sum, in memory; None where no token came."""
        value = self.nodes.pop(node, None)
        return value.load() if isinstance(value, Parked) else value


def joined(
    left: HessianAccumulator | Parked | None, right: HessianAccumulator | Parked | None
) -> HessianAccumulator | Parked | None:
    """left + right, in the place of the one that is in memory."""
    if left is None or right is None:
        return right if left is None else left
    if isinstance(left, Parked):
        left, right = right, left
    if isinstance(left, Parked):
        left = left.load()
    if isinstance(right, Parked):
        right.add_to(left)
    else:
        left.plus(right)
    return left
