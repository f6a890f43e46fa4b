"""Second moments: their sums are those they say, in an order that does not depend on who adds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from awq_trt.awq import lanes as lanes_module
from awq_trt.awq.hessian import HessianAccumulator
from awq_trt.awq.lanes import LaneSums, joined, lane_count, lane_owner, lane_ranges
from awq_trt.awq.statistics import observe
from awq_trt.errors import AwqTrtError


@pytest.mark.parametrize("k", [8, 200, 1100])
def test_sums_are_those_of_all_tokens(k: int) -> None:
    x = torch.randn(5, 7, k)
    statistics = HessianAccumulator.zero(k)
    statistics.add(x[:2])
    statistics.add(x[2:])
    rows = x.reshape(-1, k)
    torch.testing.assert_close(statistics.hessian, rows.t() @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.total_abs, rows.abs().sum(0))
    assert statistics.tokens == 35
    assert statistics.largest == float(x.abs().max())


@pytest.mark.parametrize(("windows", "count"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (9, 8), (128, 8)])
def test_lanes_cover_the_windows(windows: int, count: int) -> None:
    assert lane_count(windows) == count
    for world in range(1, 12):
        parts = [lane_ranges(windows, rank, world) for rank in range(world)]
        assert [w for part in parts for r in part.values() for w in r] == list(range(windows))
        assert 0 in parts[0]
        assert all(lane_owner(lane, count, world) == rank for rank, part in enumerate(parts) for lane in part)


def lane_sums(x: torch.Tensor, rank: int = 0, world: int = 1, folder: Path | None = None) -> LaneSums:
    """The lanes of one rank over windows x [W, tokens, K]; windows of NaN are left out (no token came)."""
    ranges = lane_ranges(len(x), rank, world)
    sums = LaneSums(x.shape[-1], folder=folder, first=min(ranges, default=0))
    for lane, windows in ranges.items():
        for window in windows:
            if not x[window].isnan().any():
                sums.add(x[window])
        sums.end(lane)
    return sums


@pytest.mark.parametrize("windows", [3, 8, 13])
@pytest.mark.parametrize("missing", [(), (0,), (2,), (1, 2)])
def test_same_bits_in_memory_on_disk_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: int, missing: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(windows, 20, 160) * torch.logspace(-2, 2, 160)
    x[list(missing)] = float("nan")
    top = lane_count(windows).bit_length() - 1
    whole = lane_sums(x).take((top, 0))
    assert whole is not None
    assert whole.tokens == 20 * (windows - len(missing))

    left, right = (lane_sums(x, rank, 2) for rank in range(2))
    shared = joined(left.take((top - 1, 0)), right.take((top - 1, 1)))
    assert isinstance(shared, HessianAccumulator)
    assert torch.equal(shared.hessian, whole.hessian)
    assert torch.equal(shared.total_abs, whole.total_abs)

    monkeypatch.setattr(lanes_module, "PARK_BYTES", 0)
    parked = lane_sums(x, folder=tmp_path)
    on_disk = parked.take((top, 0))
    assert on_disk is not None
    assert torch.equal(on_disk.hessian, whole.hessian)
    assert on_disk.largest == whole.largest
    assert list(tmp_path.iterdir()) == []


def test_large_sums_wait_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "PARK_BYTES", 0)
    sums = LaneSums(16, folder=tmp_path)
    for lane in range(3):
        sums.add(torch.ones(4, 16))
        assert len(list(tmp_path.iterdir())) == (lane + 1) // 2
        sums.end(lane)


class Shared(nn.Module):
    """One linear layer called twice, and an expert that only some inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.expert = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, experts: int) -> torch.Tensor:
        y = self.twice(self.twice(x))
        return y if not experts else torch.cat([self.expert(y[:, :experts]), y[:, experts:]], 1)


def test_a_layer_called_twice_counts_both_inputs_and_experts_their_tokens() -> None:
    block = Shared()
    x = torch.randn(6, 1, 10, 32)
    groups = observe(block, [lambda i=i: block(x[i], (0, 3, 0, 2, 0, 0)[i]) for i in range(6)])
    assert {tuple(g.names): g.statistics.tokens for g in groups} == {("twice",): 120, ("expert",): 5}
    inputs = torch.cat([x, block.twice(x)]).reshape(-1, 32)
    torch.testing.assert_close(groups[0].statistics.hessian, inputs.t() @ inputs, rtol=1e-4, atol=1e-3)


def test_what_runs_behind_the_last_layer_is_left_out_once_all_layers_are_known() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    ran: list[int] = []
    block[2].register_forward_hook(lambda *_: ran.append(1))
    groups = observe(block, [lambda: block(torch.ones(3, 8))] * 4)
    assert len(ran) == 1
    assert [g.statistics.tokens for g in groups] == [12, 12]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_name_the_layer(bad: float) -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.ones(3, 8)
    x[1, 2] = bad
    with pytest.raises(AwqTrtError, match=r"input of layer model\.layers\.3\.0 holds NaN or Inf"):
        observe(block, [lambda: block(x)], "model.layers.3")


@pytest.mark.parametrize("x", [torch.zeros(3, 8), torch.ones(3, 8), torch.zeros(0, 8)])
def test_zero_constant_and_no_activations(x: torch.Tensor) -> None:
    block = nn.Linear(8, 8)
    wrapped = nn.Sequential(block)
    (group,) = observe(wrapped, [lambda: wrapped(x)])
    assert torch.equal(group.statistics.hessian, x.t() @ x)
    assert group.statistics.tokens == len(x)
