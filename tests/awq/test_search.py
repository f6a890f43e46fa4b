"""The search and the folds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from observing import observe
from torch import nn

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.fold import find_fold
from awq_trt.awq.hessian import HessianAccumulator
from awq_trt.awq.search import (
    Candidate,
    Found,
    find_scale,
    output_errors,
    quantize_block,
    relative_weights,
    scale_for,
    search,
)
from awq_trt.linear import quantize_weight

CONFIG = QuantizeConfig(group_size=32).resolved()
FP16 = torch.float16


class Gated(nn.Module):
    """Norm, gate and up projection, product, down projection, residual; `activation` on the gate."""

    def __init__(self, norm: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor], residual: str) -> None:
        super().__init__()
        self.norm, self.activation, self.residual = norm, activation, residual
        self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.down(self.activation(self.gate(y)) * self.up(y))
        return z + (y if self.residual == "after norm" else x)


class OnePlusNorm(nn.Module):
    """RMS norm whose weight is stored minus one, as Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class TwoLayers(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(32, 64), activation, nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.activation(self.first(x)))


class Mixed(nn.Module):
    """A norm that feeds one layer that can be INT4 and one whose 20 rows cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.odd, self.even = nn.RMSNorm(32), nn.Linear(32, 20), nn.Linear(32, 64)
        self.norm.weight.data = torch.logspace(-1, 1, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return torch.cat([self.odd(y), self.even(y)], dim=-1)


def folds_of(block: nn.Module) -> dict[str, str | None]:
    """Layer -> where the scale of its input goes."""
    torch.manual_seed(0)
    block.requires_grad_(False)
    x = torch.randn(2, 8, 32)
    groups = observe(block, [lambda: block(x)])
    block.double()
    found = {}
    for group in groups:
        before = {n: p.clone() for n, p in block.named_parameters()}
        fold = find_fold(block, group, lambda: block(x.double()))
        found |= dict.fromkeys(group.names, fold.into if fold else None)
        for name, parameter in block.named_parameters():  # trying leaves no trace
            assert torch.equal(parameter, before[name])
    return found


def test_folds_of_a_gated_mlp() -> None:
    found = folds_of(Gated(nn.LayerNorm(32), nn.functional.silu, "before norm"))
    assert found == {"gate": "norm", "up": "norm", "down": "up"}


def test_a_norm_that_feeds_the_residual_is_not_folded() -> None:
    found = folds_of(Gated(nn.LayerNorm(32), nn.functional.silu, "after norm"))
    assert found == {"gate": None, "up": None, "down": "up"}


def test_norm_with_weight_minus_one() -> None:
    block = Gated(OnePlusNorm(), nn.functional.silu, "before norm").requires_grad_(False)
    assert folds_of(block)["gate"] == "norm"


@pytest.mark.parametrize(("activation", "folds"), [(nn.ReLU(), True), (nn.GELU(), False), (nn.Identity(), True)])
def test_through_an_activation_only_if_it_is_homogeneous(activation: nn.Module, folds: bool) -> None:
    found = folds_of(TwoLayers(activation))
    assert found == {"first": None, "second": "first" if folds else None}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_grouped_query_attention_folds_into_v(heads: int, kv_heads: int) -> None:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0).requires_grad_(False)
    x = torch.randn(1, 6, 64)
    angles = torch.randn(1, 6, 16)
    rotary = (angles.cos(), angles.sin())

    def run(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return layer(x.to(dtype), position_embeddings=tuple(r.to(dtype) for r in rotary))

    groups = observe(layer, [run])
    assert [g.names for g in groups] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    layer.double()
    fold = find_fold(layer, groups[1], lambda: run(torch.float64))
    assert fold is not None
    assert fold.into == "self_attn.v_proj"
    assert fold.head_dim == (0 if heads == kv_heads else 16)


def test_fold_with_an_arbitrary_scale_keeps_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Gated(nn.LayerNorm(32), nn.functional.silu, "before norm").requires_grad_(False).double()
    x = torch.randn(4, 32).double()
    expected = block(x)
    group = observe(block.float(), [lambda: block(x.float())])[0]
    block.double()
    fold = find_fold(block, group, lambda: block(x))
    assert fold is not None
    s = torch.rand(32).double() + 0.1
    for linear in group.linears.values():
        linear.weight.data = linear.weight * s
    fold.apply(block, s)
    torch.testing.assert_close(block(x), expected)


def problem(weight: torch.Tensor, x: torch.Tensor) -> tuple[dict[str, nn.Linear], HessianAccumulator]:
    """A layer of this weight [N, K] and the sums of its inputs x [..., K]."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False).requires_grad_(False)
    linear.weight.data = weight.clone()
    statistics = HessianAccumulator.zero(k)
    statistics.add(x)
    statistics.mirror()
    return {"layer": linear}, statistics


def relative_errors(found: Found) -> tuple[float, float]:
    """Of plain rounding, and of the result."""
    return found.reports["layer"].error_rounding, found.reports["layer"].error


def test_output_error_is_the_error_of_the_outputs() -> None:
    x, delta = torch.randn(100, 16), torch.randn(8, 16)
    torch.testing.assert_close(output_errors(delta, x.t() @ x), (x @ delta.t()).pow(2).sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_search_beats_rounding_where_channels_are_uneven(clip: bool, compensation: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    x[:, ::16] *= 30
    weight = torch.randn(48, 64)
    linears, statistics = problem(weight, x)
    found = search(linears, statistics, replace(CONFIG, clip=clip, error_compensation=compensation), FP16, lambda s: s)
    before, after = relative_errors(found)
    assert found.best.alpha > 0
    assert after < 0.6 * before
    assert (found.reports["layer"].clip < 1) == clip
    # the errors are those of the layer's outputs
    exact, s = x @ weight.t(), found.best.s
    got = (x / s) @ found.layers["layer"].dequantize().float().t()
    assert float((got - exact).norm() / exact.norm()) == pytest.approx(after, rel=1e-2)
    plain = x @ quantize_weight(weight, 32, False, FP16).dequantize().float().t()
    assert float((plain - exact).norm() / exact.norm()) == pytest.approx(before, rel=1e-2)
    torch.testing.assert_close(linears["layer"].weight.data, weight * s)


def test_clipping_and_error_compensation_each_make_the_error_smaller() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 64) @ torch.randn(64, 64)
    weight = torch.randn(96, 64)
    weight[:, 3] *= 6
    error = {}
    for clip in (False, True):
        for compensation in (False, True):
            config = replace(CONFIG, clip=clip, error_compensation=compensation)
            error[clip, compensation] = relative_errors(search(*problem(weight, x), config, FP16, lambda s: s))[1]
    assert error[True, True] < error[True, False] < error[False, False]
    assert error[False, True] < error[False, False]


def test_search_without_permission_to_scale_only_rounds() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    given = problem(weight, torch.randn(64, 64) * torch.logspace(-1, 1, 64))
    found = search(*given, replace(CONFIG, clip=False, error_compensation=False), FP16, None)
    assert found.best.alpha == 0
    assert (found.best.s == 1).all()
    assert torch.equal(found.layers["layer"].q, quantize_weight(weight, 32, False, FP16).q)


def test_the_form_with_weights_is_found_where_only_weights_are_uneven() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[:, ::4] *= 0.05
    linears, statistics = problem(weight, torch.randn(512, 64))
    grouped = weight.abs().reshape(64, 2, 32)
    expected = (grouped / grouped.amax(-1, keepdim=True)).mean(0).reshape(64)
    torch.testing.assert_close(relative_weights(linears, CONFIG), expected)
    best = search(linears, statistics, CONFIG, FP16, lambda s: s).best
    assert best.with_weights
    assert best.s[::4].mean() > 2 * best.s[1::4].mean()


def test_alpha_is_refined_around_the_best_coarse_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64) * torch.logspace(-1.5, 0.5, 64)[torch.randperm(64)]
    weight = torch.randn(64, 64)
    tried: list[torch.Tensor] = []

    def note(s: torch.Tensor) -> torch.Tensor:
        tried.append(s)
        return s

    best = search(*problem(weight, x), CONFIG, FP16, note).best
    assert len(tried) <= 14
    assert best.alpha * 16 == round(best.alpha * 16)
    errors = []
    for i in range(41):
        s = scale_for(x.abs().mean(0), i / 40)
        delta = quantize_weight(weight * s, 32, False, FP16).dequantize().float() / s - weight
        errors.append(float(output_errors(delta, x.t() @ x).sum()))
    assert best.error <= 1.05 * min(errors)


@pytest.mark.parametrize(
    ("optimum", "found"), [(0.45, 0.4375), (0.3, 0.3125), (0.68, 0.6875), (0.94, 0.9375), (-0.2, 0.0), (1.2, 1.0)]
)
def test_alpha_comes_as_near_as_a_sixteenth(optimum: float, found: float) -> None:
    tried: list[float] = []

    def attempt(s: torch.Tensor, alpha: float, with_weights: bool) -> Candidate:
        tried.append(alpha)
        return Candidate(s, alpha, with_weights, {"layer": abs(alpha - optimum) + 0.01 * with_weights})

    best = find_scale(torch.ones(32), torch.ones(32), lambda s: s, attempt)
    assert best.alpha == found
    assert not best.with_weights
    assert all(0 <= alpha <= 1 for alpha in tried)


@pytest.mark.parametrize("x", [torch.zeros(8, 32), torch.ones(8, 32), torch.eye(32)[:4] * 1e4])
def test_dead_and_constant_channels(x: torch.Tensor) -> None:
    found = search(*problem(torch.randn(8, 32), x), CONFIG, FP16, lambda s: s)
    assert torch.isfinite(found.best.s).all()
    assert (found.best.s > 0).all()
    assert torch.isfinite(found.layers["layer"].dequantize()).all()


def test_scale_is_balanced() -> None:
    s = scale_for(torch.tensor([0.0, 1.0, 4.0]), 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1)
    assert float(s[2] / s[1]) == pytest.approx(2)


def test_scale_with_weights() -> None:
    """The second form: activations^alpha / weights^(1 - alpha)."""
    mean_abs, parts = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.5, 0.25, 1.0])
    for alpha in (0.0, 0.5, 0.75, 1.0):
        expected = mean_abs**alpha / parts ** (1 - alpha)
        s = scale_for(mean_abs, alpha, parts)
        torch.testing.assert_close(s / s[0], expected / expected[0])


def test_a_layer_that_stays_in_float_takes_the_scale_that_was_folded() -> None:
    """Its input is divided by s in the norm as for the others, so its weight is multiplied."""
    torch.manual_seed(0)
    block = Mixed().requires_grad_(False)
    x = torch.randn(16, 32)
    before, weight = block.odd(block.norm(x)), block.odd.weight.clone()

    groups = observe(block, [lambda: block(x)])
    layers, (report,) = quantize_block(block, groups, lambda: block(x), {}, names={"even"}, config=CONFIG, dtype=FP16)
    assert list(layers) == ["even"]
    assert report.folded_into == "norm"
    assert not torch.allclose(block.odd.weight, weight)
    torch.testing.assert_close(block.odd(block.norm(x)), before, rtol=1e-4, atol=1e-4)


def test_layers_that_never_ran_are_in_no_group() -> None:
    block = nn.ModuleDict({"used": nn.Linear(32, 32), "expert": nn.Linear(32, 32)})
    groups = observe(block, [lambda: block["used"](torch.randn(2, 32))])
    assert [g.names for g in groups] == [["used"]]
