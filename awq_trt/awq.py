"""AWQ: find the scale of every input channel that makes INT4 rounding hurt least (Lin et al., MLSys 2024).

For a linear layer y = x W^T and a positive scale s per input channel, (x / s)(W s)^T is the same function, but rounding
W s to INT4 treats the columns with large s more gently. The search is over s = meanabs(x)^alpha, alpha in [0, 1].

The output error of a candidate needs no activations, only H = X^T X summed over all calibration tokens:
    sum over tokens |x dW^T|^2 = tr(dW H dW^T),   dW = Q(W s) / s - W.

Where 1/s goes is the business of fold.py; how rounding works, of linear.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from awq_trt.fold import Fold, find_fold
from awq_trt.layout import why_not
from awq_trt.linear import QuantizedLinear, quantize_weight
from awq_trt.statistics import Calls, Group

ALPHAS = [i / 20 for i in range(21)]
Constrain = Callable[[torch.Tensor], torch.Tensor]
"""Makes a scale [K] one that the place it goes to can hold: equal over heads that share, or exact in fp16."""


@dataclass(frozen=True)
class Settings:
    """How to quantize. group_size: 32, 64, 128, or -1 for the whole row."""

    group_size: int
    symmetric: bool = False
    dtype: torch.dtype = torch.float16
    pre_scale: bool = True

    def group(self, in_features: int) -> int:
        """Columns per scale for a layer with `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def why_float(self, linear: nn.Linear) -> str | None:
        """None where the layer can be INT4, else the reason why it stays in float."""
        k = linear.in_features
        return why_not(linear.out_features, k, self.group(k), str(self.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class LayerReport:
    """What the search found for one layer. Errors are |x dW^T| / |x W^T| over the calibration tokens."""

    name: str
    alpha: float
    folded_into: str | None
    error_rounding: float
    error: float
    tokens: int
    largest_activation: float


def scale_for(mean_abs: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = meanabs^alpha, its largest and smallest value multiplying to 1; dead channels get the smallest."""
    floor = max(float(mean_abs.max()) * 1e-4, torch.finfo(torch.float32).tiny)
    s = mean_abs.clamp(min=floor).pow(alpha)
    return s / (s.max() * s.min()).sqrt()


def output_error(delta: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(delta H delta^T): the squared error of the layer's outputs, summed over the calibration tokens."""
    return float(((delta @ hessian) * delta).sum())


@dataclass(frozen=True)
class Found:
    """The result of one group's search.

    Attributes:
        s: the scale [K]. alpha: its exponent. layers: layer -> rounded W s, still without pre-scale.
        errors: layer -> relative output error of plain rounding and with s.
    """

    s: torch.Tensor
    alpha: float
    layers: dict[str, QuantizedLinear]
    errors: dict[str, tuple[float, float]]


def search(group: Group, settings: Settings, constrain: Constrain | None) -> Found:
    """Find the alpha with the least output error summed over the group's layers, and round them with its scale.

    Args:
        constrain: see `Constrain`; None where the group may have no scale at all, then s = 1.
    """
    linears = {n: m for n, m in zip(group.names, group.linears, strict=True) if settings.why_float(m) is None}
    hessian, k = group.statistics.hessian, group.linears[0].in_features
    mean_abs = group.statistics.total_abs / max(group.statistics.tokens, 1)

    def rounded(linear: nn.Linear, s: torch.Tensor) -> QuantizedLinear:
        return quantize_weight(linear.weight * s, settings.group(k), settings.symmetric, settings.dtype)

    def errors(s: torch.Tensor) -> dict[str, float]:
        return {
            name: output_error(rounded(linear, s).dequantize().float() / s - linear.weight, hessian)
            for name, linear in linears.items()
        }

    s, alpha = torch.ones(k), 0.0
    plain = best = errors(s)
    if constrain is not None and linears:
        for candidate in ALPHAS[1:]:
            scale = constrain(scale_for(mean_abs, candidate))
            found = errors(scale)
            if sum(found.values()) < sum(best.values()):
                best, s, alpha = found, scale, candidate
    size = {name: max(output_error(linear.weight, hessian), 1e-30) for name, linear in linears.items()}
    relative = {n: ((max(plain[n], 0) / size[n]) ** 0.5, (max(best[n], 0) / size[n]) ** 0.5) for n in linears}
    return Found(s, alpha, {n: rounded(linear, s) for n, linear in linears.items()}, relative)


def round_block(block: nn.Module, settings: Settings, but: Collection[str] = ()) -> dict[str, QuantizedLinear]:
    """Round every layer of a block to nearest, except those named in `but`."""
    return {
        name: quantize_weight(m.weight, settings.group(m.in_features), settings.symmetric, settings.dtype)
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear) and name not in but and settings.why_float(m) is None
    }


@dataclass(frozen=True)
class BlockResult:
    """One block, quantized. layers: name within the block -> INT4. reports: of the layers that saw an input."""

    layers: dict[str, QuantizedLinear]
    reports: list[LayerReport]


def quantize_block(block: nn.Module, calls: Calls, settings: Settings, folds: dict[Any, Fold | None]) -> BlockResult:
    """AWQ on one block, filled. Folds change its norms and layers in place.

    Groups are taken from the last to the first, so that a layer is rounded after the layers behind it have folded
    their scales into it. `folds` remembers, per structure of block, where the scales of a group can go.
    """
    groups = calls.groups(block)
    quantized: dict[str, QuantizedLinear] = {}
    reports: dict[str, LayerReport] = {}
    shape = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
    for group in reversed(groups):
        key = (type(block), shape, tuple(group.names))
        if key not in folds:
            block.double()
            folds[key] = find_fold(block, group, lambda: calls.run(torch.float64))
            block.float()
        fold = folds[key]
        result = search(group, settings, constrain(block, fold, settings))
        if fold is not None:
            for linear in group.linears:
                linear.weight.data = linear.weight * result.s
            fold.apply(block, result.s)
        for name, layer in result.layers.items():
            if fold is None and result.alpha > 0:
                layer = dataclasses.replace(layer, pre_scale=(1 / result.s).to(settings.dtype))
            quantized[name] = layer
            reports[name] = LayerReport(
                name=f"{calls.name}.{name}",
                alpha=result.alpha,
                folded_into=f"{calls.name}.{fold.into}" if fold and result.alpha > 0 else None,
                error_rounding=result.errors[name][0],
                error=result.errors[name][1],
                tokens=group.statistics.tokens,
                largest_activation=group.statistics.largest,
            )
    unseen = round_block(block, settings, but=quantized)  # experts no token chose
    return BlockResult(quantized | unseen, [reports[n] for group in groups for n in group.names if n in reports])


def constrain(block: nn.Module, fold: Fold | None, settings: Settings) -> Constrain | None:
    """What a scale must be to go where it has to go: into the fold, or into a pre-scale of 16 bits, or nowhere."""
    if fold is not None:
        rows = len(block.get_submodule(fold.into).weight)  # type: ignore[arg-type]
        return lambda s: fold.shared(s, rows)
    if settings.pre_scale:
        return lambda s: 1 / (1 / s).to(settings.dtype).float()
    return None
