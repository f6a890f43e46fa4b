"""Calibration shared by several processes (torchrun): each runs its windows, the sums are added, rank 0 searches.

Rank 0 has block, search and files; the others have the same block and their own windows. For every block, rank 0 tells
the others what to do next: observe again with the weights it has now, or go on with the rounded ones (see calls.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from awq_trt.awq.hessian import HessianAccumulator
from awq_trt.awq.lanes import LaneSums, Node, joined, lane_count, lane_owner
from awq_trt.awq.statistics import Group, Observed, group_of
from awq_trt.errors import AwqTrtError, OtherRankError


class CollectiveError(AwqTrtError):
    """An error that all ranks know of."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. rank: 0..world-1. world: how many there are."""

    rank: int = 0
    world: int = 1

    def broadcast(self, value: Any = None) -> Any:
        """A value of rank 0, on all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """All ranks do something; where one of them fails, rank 0 raises its error and the others end quietly."""
        error: Exception | None = None
        try:
            yield
        except OtherRankError:
            raise
        except (AwqTrtError, OSError) as caught:
            error = caught
        if self.world == 1:
            if error is not None:
                raise error
            return
        said = self.all_gather(None if error is None else str(error))
        first = next((i for i, text in enumerate(said) if text is not None), None)
        if first is None:
            return
        if self.rank:
            raise OtherRankError
        raise CollectiveError(f"{said[first]} (on rank {first})") from error

    def share_weights(self, block: nn.Module) -> None:
        """Every rank's block gets the weights that rank 0's has now, in memory of their own."""
        if self.world == 1:
            return
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = parameter.data.contiguous() if self.rank == 0 else torch.empty_like(parameter.data)
                    dist.broadcast(value, src=0)
                    if self.rank:
                        module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def sum_groups(self, block: nn.Module, mine: list[Observed], windows: int) -> list[Group]:
        """The groups that all ranks have seen, with the sums over all lanes; only rank 0 gets them, the others []."""
        parts = self.all_gather([(o.names, o.before, o.sums.k) for o in mine])
        merged: list[tuple[list[str], list[str], int]] = []
        for part in parts:
            for names, before, k in part:
                known = next((m for m in merged if set(m[0]) & set(names)), None)
                if known is None:
                    merged.append((list(names), before, k))
                else:
                    known[0].extend(n for n in names if n not in known[0])
        groups = []
        for names, before, k in merged:
            own = next((o for o in mine if set(o.names) & set(names)), None)
            if own is None:
                own = Observed(names, before, LaneSums(k, next(block.parameters()).device))
            own.names, own.before = names, before
            total = self._sum(own, (lane_count(windows).bit_length() - 1, 0), lane_count(windows))
            if self.rank == 0:
                groups.append(group_of(block, own, total))
        return groups

    def _sum(self, own: Observed, node: Node, lanes: int) -> HessianAccumulator | None:
        """The sum of a node of the tree on the rank that owns its first lane; None on the others and where it is 0."""
        level, index = node
        first = lane_owner(index << level, lanes, self.world)
        last = lane_owner(((index + 1) << level) - 1, lanes, self.world)
        if first == last:
            return own.sums.take(node) if self.rank == first else None
        left = self._sum(own, (level - 1, 2 * index), lanes)
        right = self._sum(own, (level - 1, 2 * index + 1), lanes)
        middle = lane_owner((2 * index + 1) << (level - 1), lanes, self.world)
        if middle != first and self.rank == middle:
            _send(right, first, own)
        elif middle != first and self.rank == first:
            right = _receive(middle, own)
        total = joined(left, right) if self.rank == first else None
        assert total is None or isinstance(total, HessianAccumulator)
        return total


def _send(sums: HessianAccumulator | None, to: int, own: Observed) -> None:
    """Send a sum; nothing but a mark where there is none."""
    device = own.sums.device
    mark = [0.0, 0.0] if sums is None else [float(sums.tokens), sums.largest]
    dist.send(torch.tensor(mark, dtype=torch.float64, device=device), to)
    if sums is not None:
        for tensor in (sums.hessian, sums.total_abs):
            dist.send(tensor, to)


def _receive(source: int, own: Observed) -> HessianAccumulator | None:
    mark = torch.zeros(2, dtype=torch.float64, device=own.sums.device)
    dist.recv(mark, source)
    if not mark[0]:
        return None
    sums = own.sums.zero()
    for tensor in (sums.hessian, sums.total_abs):
        dist.recv(tensor, source)
    sums.tokens, sums.largest = int(mark[0]), float(mark[1])
    return sums


def compute_device(device: str) -> torch.device:
    """ "cpu", "cuda", or "auto": the GPU where there is one; of several, the one of this rank."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def join_ranks(device: str) -> Ranks:
    """The ranks that torchrun started, or this process alone. Others wait while rank 0 searches, hence the timeout."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        backend = "gloo"
        if compute_device(device).type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Ranks(dist.get_rank(), dist.get_world_size())
