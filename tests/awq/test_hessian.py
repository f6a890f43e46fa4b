"""Hessians of what layers read: sums over all tokens, layers that share an input, inputs that overflow."""

from __future__ import annotations

import pytest
import torch
from observing import observe
from torch import nn

from awq_trt.awq.hessian import HessianAccumulator
from awq_trt.errors import AwqTrtError


@pytest.mark.parametrize("k", [8, 200, 1100])
def test_sums_are_those_of_all_tokens(k: int) -> None:
    x = torch.randn(5, 7, k)
    statistics = HessianAccumulator.zero(k)
    statistics.add(x[:2])
    statistics.add(x[2:])
    statistics.mirror()
    rows = x.reshape(-1, k)
    torch.testing.assert_close(statistics.hessian, rows.t() @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.total_abs, rows.abs().sum(0))
    assert statistics.tokens == 35
    assert statistics.largest == float(x.abs().max())
    statistics.take()
    assert not hasattr(statistics, "hessian")


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
