"""Calibration shared by several processes (torchrun): each runs its windows, Hessians are summed, rank 0 searches.

All ranks load the same block and go through the same steps. Sums of floats depend on their order, so runs with the same
number of processes write the same bits, and runs with different numbers are equal within rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from awq_trt.awq.hessian import Group, HessianAccumulator
from awq_trt.errors import AwqTrtError, OtherRankError


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0  # 0 .. world - 1
    world: int = 1  # how many there are

    def windows(self, total: int) -> range:
        """The calibration windows of this process, contiguous. Rank 0 has the first, others may have none."""
        first, end = (-(-rank * total // self.world) for rank in (self.rank, self.rank + 1))
        return range(first, end)

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
        except Exception as caught:
            if self.world == 1:
                raise
            error = caught
        said = self.all_gather(None if error is None else str(error))
        first = next((i for i, text in enumerate(said) if text is not None), None)
        if error is not None and (self.rank == 0 or not isinstance(error, (AwqTrtError, OSError))):
            raise error
        if first is not None and self.rank == 0:
            raise AwqTrtError(f"{said[first]} (on rank {first})")
        if first is not None:
            raise OtherRankError

    def share_weights(self, block: nn.Module) -> None:
        """Every rank's block gets the weights that rank 0's has now."""
        for parameter in block.parameters() if self.world > 1 else ():
            value = parameter.data.contiguous()
            dist.broadcast(value, src=0)
            parameter.data = value

    def all_reduce(self, block: nn.Module, groups: list[Group], device: torch.device) -> list[Group]:
        """The groups of layers that any rank has seen in the block, with the sums over all ranks, on `device`."""
        if self.world == 1:
            return groups
        merged: list[Group] = []
        seen = self.all_gather([(g.names, g.before, len(g.statistics.total_abs)) for g in groups])
        for names, before, k in chain.from_iterable(seen):
            own = next((g.statistics for g in groups if set(g.names) & set(names)), None)
            known = next((g for g in merged if set(g.names) & set(names)), None)
            if known is None:
                known = Group({}, before, own or HessianAccumulator.zero(k, device))
                merged.append(known)
            known.linears |= {n: block.get_submodule(n) for n in names}
        for group in merged:
            group.statistics.all_reduce()
        return merged


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
