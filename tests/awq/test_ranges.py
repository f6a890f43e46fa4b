"""The largest value of a model's activations, wherever it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import nn

from awq_trt.awq.ranges import Ranges
from awq_trt.errors import AwqTrtError


class Residual(nn.Module):
    """x + a(x), and then + b(norm(x + a(x))): the first sum is seen by the norm only."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(2, 2, bias=False), nn.LayerNorm(2), nn.Linear(2, 2, bias=False)
        self.a.weight.data, self.b.weight.data = a * torch.eye(2), b * torch.eye(2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.a(x)
        return x + self.b(self.norm(x)), x * 1e9  # of a tuple, what comes first are the hidden states


@pytest.mark.parametrize(
    ("a", "b", "largest", "module"),
    [
        (-300.0, 0.0, 598.0, "block.norm"),  # x + a(x) = 2 - 600
        (-0.5, 500.0, 501.0, "block"),  # 1 + 500 * (+1, -1): the sum at the end
        (0.0, -500.0, 500.0, "block.b"),  # 2 - 500: what the layer gives is larger than the sum
    ],
)
def test_sums_are_seen(a: float, b: float, largest: float, module: str) -> None:
    ranges, block = Ranges(), Residual(a, b)
    with torch.no_grad(), ranges.watching(block, "block."):
        block(torch.tensor([[2.0, 0.0]]))
    if module == "block.norm":
        assert (ranges.module, ranges.largest) == ("block.a", 600.0)  # the layer gives a little more
    else:
        assert ranges.module == module
        assert ranges.largest == pytest.approx(largest, rel=1e-4)
    with torch.no_grad():
        block(torch.tensor([[1e6, 0.0]]))
    assert ranges.largest < 1000, "the hooks are gone"


def test_two_small_parts_of_a_large_sum() -> None:
    """Neither layer gives more than 40000; the norm reads 80000."""
    ranges, block = Ranges(), Residual(1.0, 0.0)
    with torch.no_grad(), ranges.watching(block, "block."):
        block(torch.tensor([[40000.0, 0.0]]))
    assert (ranges.module, ranges.largest) == ("block.norm", 80000.0)
    with pytest.raises(AwqTrtError, match=r'm: activations reach 8e\+04 in block.norm, .*dtype="bfloat16"'):
        ranges.refuse_float16("m", torch.float16)
    ranges.refuse_float16("m", torch.bfloat16)
    Ranges(65504.0, "x").refuse_float16("m", "float16")


@pytest.mark.parametrize(
    ("values", "largest"), [([math.nan] * 2, 0.0), ([math.nan, -7.0], 7.0), ([3, -math.inf], math.inf)]
)
def test_nan_is_no_number(values: list[float], largest: float) -> None:
    """Blocks that are not run give NaN; what overflows gives Inf first."""
    ranges = Ranges()
    with ranges.watching(layer := nn.Linear(2, 2)):
        layer(torch.tensor(values))
    assert ranges.largest == largest


def test_a_real_block(models: Path) -> None:
    """Against the hidden states that transformers itself gives: no larger value is seen, and none of them is missed."""
    model = t.AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.float32)
    ranges = Ranges()
    with torch.no_grad(), ranges.watching(model):
        output = model(torch.randint(0, 384, (1, 30)), output_hidden_states=True)
    assert ranges.largest >= max(float(x.abs().max()) for x in (*output.hidden_states, output.logits))
