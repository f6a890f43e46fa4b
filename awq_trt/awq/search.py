"""AWQ: find the scale of every input channel that makes INT4 rounding hurt least (Lin et al., MLSys 2024).

For a linear layer y = x W^T and a positive scale s per input channel, (x / s)(W s)^T is the same function, but rounding
W s to INT4 treats the columns with large s more gently. The search is over
    s = meanabs(x)^alpha                            (the paper's), and
    s = meanabs(x)^alpha / meanabs(w)^(1 - alpha)   (w as a part of the largest in its group),
alpha in [0, 1].

The output error of a candidate needs no activations, only H = X^T X summed over all calibration tokens:
    sum over tokens |x dW^T|^2 = tr(dW H dW^T),   dW = Q(W s) / s - W.
So a candidate costs the same however many tokens there are, and a sample of the rows of W is enough to compare two.

Where 1/s goes is the business of fold.py; clipping and error feedback, of rounding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from awq_trt.awq.fold import Fold, find_fold, is_reached
from awq_trt.awq.rounding import clip, diagonal_blocks, factor, feedback, full_range, nearest, refit
from awq_trt.awq.statistics import Calls, Group
from awq_trt.checkpoint.experts import expert_of, left_alone
from awq_trt.layout import padded_features, unsupported_reason
from awq_trt.linear import QuantizedLinear, quantize_weight, row_chunks

COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)
FINE = (0.125, 0.0625)
"""Exponents tried first, and the steps to either side of the best one that are tried after."""

SAMPLE = 1 << 19
"""Weights of each layer that candidates are compared on: whole rows, FEWEST to MOST of them."""

FEWEST, MOST = 32, 128


@dataclass(frozen=True)
class Effort:
    """How much is done to find good weights. windows: of calibration text, if there are as many."""

    windows: int
    clip: bool
    feedback: bool


EFFORTS = {
    "fast": Effort(windows=8, clip=True, feedback=False),
    "default": Effort(windows=16, clip=True, feedback=True),
    "best": Effort(windows=64, clip=True, feedback=True),
}

Constrain = Callable[[torch.Tensor], torch.Tensor]
"""Makes a scale [K] one that the place it goes to can hold: equal over heads that share, or exact in fp16."""


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Attributes:
        group_size: 32, 64, 128, or -1 for the whole row. symmetric: no zero points. dtype: of activations and scales.
        pre_scale: allow scales that no operator before the layer can absorb.
        clip: search the range of every group. feedback: round with error feedback (rounding.py). refit: scales by least
            squares once the weights are rounded, which needs feedback's factor of H.
    """

    group_size: int
    symmetric: bool = False
    dtype: torch.dtype = torch.float16
    pre_scale: bool = True
    clip: bool = True
    feedback: bool = True
    refit: bool = False

    def group(self, in_features: int) -> int:
        """Columns per scale for a layer with `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def why_float(self, linear: nn.Linear, *, padded: bool = False) -> str | None:
        """None where the layer can be INT4, else the reason why it stays in float; `padded`, if rows may be added."""
        n, k = linear.out_features, linear.in_features
        n = padded_features(n) if padded else n
        return unsupported_reason(n, k, self.group(k), str(self.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class LayerReport:
    """What the search found for one layer.

    Attributes:
        name: of the layer. alpha: exponent of its scale. weights: whether the scale is the form with weights.
        folded_into: the operator that took 1/s, None for a pre-scale or no scale.
        error_rounding, error: |x dW^T| / |x W^T| over the calibration tokens, of plain rounding and of the result,
            on a sample of the rows of W. clip: mean over its groups of the part of the range that was kept.
        feedback: whether it was rounded with error feedback. tokens: that reached it. largest_activation: |x|.
    """

    name: str
    alpha: float
    weights: bool
    folded_into: str | None
    error_rounding: float
    error: float
    clip: float
    feedback: bool
    tokens: int
    largest_activation: float


def scale_for(mean_abs: torch.Tensor, alpha: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """s = meanabs^alpha (/ weights^(1 - alpha)), its largest and smallest value multiplying to 1.

    Dead channels get what the smallest live ones would; no scale is further than 10^4 from the largest.
    """
    tiny = torch.finfo(torch.float32).tiny
    s = mean_abs.clamp(min=max(float(mean_abs.max()) * 1e-4, tiny)).pow(alpha)
    if weights is not None:
        s = s / weights.clamp(min=max(float(weights.max()) * 1e-4, tiny)).pow(1 - alpha)
        s = s.clamp(min=float(s.max()) * 1e-4)
    return s / (s.max() * s.min()).sqrt()


def weight_parts(linears: Collection[nn.Linear], group_of: Callable[[int], int]) -> torch.Tensor:
    """Mean over the rows of all layers of |w| / (largest |w| of its group): [K], in 0..1."""
    sums, rows = [], 0
    for linear in linears:
        n, k = linear.weight.shape
        for part in row_chunks(n, k):
            grouped = linear.weight[part].float().abs().reshape(-1, k // group_of(k), group_of(k))
            sums.append((grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-30)).sum(0).reshape(k))
        rows += n
    return torch.stack(sums).sum(0) / rows


def output_errors(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """delta H delta^T, its diagonal [N]: the squared error of each output, summed over the calibration tokens."""
    return ((delta @ hessian) * delta).sum(1)


@dataclass(frozen=True)
class Found:
    """The result of one group's search.

    Attributes:
        s: the scale [K]. alpha, weights: its exponent and form. layers: layer -> rounded W s, still without pre-scale.
        errors: layer -> relative output error of plain rounding and of the result. clips: layer -> mean ratio kept.
    """

    s: torch.Tensor
    alpha: float
    weights: bool
    layers: dict[str, QuantizedLinear]
    errors: dict[str, tuple[float, float]]
    clips: dict[str, float]

    @property
    def scaled(self) -> bool:
        """Whether s does anything."""
        return bool((self.s != 1).any())


@dataclass(frozen=True)
class Candidate:
    """A scale [K] that was tried, and what it costs: layer -> squared output error of its sampled rows."""

    s: torch.Tensor
    alpha: float
    weights: bool
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """Summed over the layers of the group."""
        return sum(self.errors.values())


def search(group: Group, settings: Settings, constrain: Constrain | None, but: Collection[str] = ()) -> Found:
    """Find the scale of one group's layers and round them with it.

    In place, to save memory: the weights of the layers that are rounded are multiplied by s, and the group's Hessian
    is used up.

    Args:
        constrain: see `Constrain`; None where the group may have no scale at all, then s = 1.
        but: layers of the group that stay in float.
    """
    return search_and_keep(group, settings, constrain, but)[0]


def search_and_keep(
    group: Group, settings: Settings, constrain: Constrain | None, but: Collection[str] = ()
) -> tuple[Found, Rounder]:
    """`search`, and what rounds further rows of the same layers (times s) in the same way."""
    members = zip(group.names, group.linears, strict=True)
    linears = {n: m for n, m in members if n not in but and settings.why_float(m) is None}
    hessian = group.statistics.hessian
    rows = {name: sampled_rows(linear.weight) for name, linear in linears.items()}
    samples = {name: linear.weight[rows[name]].float() for name, linear in linears.items()}
    size = {name: float(output_errors(weight, hessian).sum()) for name, weight in samples.items()}
    plain = attempt(samples, group, settings, torch.ones_like(group.statistics.total_abs))
    best = plain
    if constrain is not None and linears:
        best = min((plain, find_scale(samples, group, settings, constrain)), key=lambda c: c.error)
    for linear in linears.values():
        linear.weight.data = linear.weight.data.mul_(best.s)
    rounder = Rounder(hessian.div_(best.s).div_(best.s.unsqueeze(1)), settings)
    rounded = {name: rounder.round(linear.weight.float()) for name, linear in linears.items()}
    errors = {}
    for name, (layer, _) in rounded.items():
        delta = layer.rows(rows[name]).dequantize().float() - linears[name].weight[rows[name]].float()
        both = plain.errors[name], float(rounder.error(delta).sum())
        relative = [max(error, 0.0) / max(size[name], 1e-30) for error in both]
        errors[name] = (relative[0] ** 0.5, relative[1] ** 0.5)
    layers = {name: layer for name, (layer, _) in rounded.items()}
    clips = {name: kept for name, (_, kept) in rounded.items()}
    return Found(best.s, best.alpha, best.weights, layers, errors, clips), rounder


def sampled_rows(weight: torch.Tensor) -> torch.Tensor:
    """Indices of the rows that stand for all, evenly spread; of all where there are fewer."""
    n, k = weight.shape
    count = min(n, max(FEWEST, min(MOST, SAMPLE // k)))
    return torch.arange(count, device=weight.device) * n // count


def attempt(
    samples: dict[str, torch.Tensor],
    group: Group,
    settings: Settings,
    s: torch.Tensor,
    alpha: float = 0.0,
    weights: bool = False,
) -> Candidate:
    """Round sampled rows, layer -> fp32 [n, K], with the scale s [K]."""
    group_size = settings.group(len(s))
    errors = {}
    for name, weight in samples.items():
        scaled = weight * s
        grid = full_range(scaled, group_size, settings.symmetric, settings.dtype)
        nearest = grid.nearest(scaled.reshape(len(scaled), -1, group_size)).reshape(scaled.shape)
        errors[name] = float(output_errors(nearest.sub_(scaled).div_(s), group.statistics.hessian).sum())
    return Candidate(s, alpha, weights, errors)


def find_scale(samples: dict[str, torch.Tensor], group: Group, settings: Settings, constrain: Constrain) -> Candidate:
    """The best scale, from coarse to fine: both forms on a coarse grid of alpha, then to either side of the best."""
    statistics = group.statistics
    mean_abs = statistics.total_abs / max(statistics.tokens, 1)
    parts = weight_parts([m for n, m in zip(group.names, group.linears, strict=True) if n in samples], settings.group)

    def at(alpha: float, weights: bool) -> Candidate:
        s = constrain(scale_for(mean_abs, alpha, parts if weights else None))
        return attempt(samples, group, settings, s, alpha, weights)

    best = min((at(alpha, form) for form in (False, True) for alpha in COARSE), key=lambda c: c.error)
    for step in FINE:
        near = [alpha for alpha in (best.alpha - step, best.alpha + step) if 0 <= alpha <= 1]
        best = min([best, *(at(alpha, best.weights) for alpha in near)], key=lambda c: c.error)
    return best


class Rounder:
    """Rounds layers that read the same input, as they are, by the means the settings allow.

    Args:
        hessian: of that input, fp32 [K, K]; its memory is used up.
    """

    def __init__(self, hessian: torch.Tensor, settings: Settings) -> None:
        self._settings, self._group_size = settings, settings.group(len(hessian))
        self._blocks = diagonal_blocks(hessian, self._group_size)
        self._factored = factor(hessian) if settings.feedback else None
        self._hessian = hessian

    def error(self, delta: torch.Tensor) -> torch.Tensor:
        """The squared output errors, [N], of weight errors [N, K]."""
        return self._factored.error(delta) if self._factored else output_errors(delta, self._hessian)

    def round(self, weight: torch.Tensor) -> tuple[QuantizedLinear, float]:
        """The layer of a weight, fp32 [N, K], and the mean part of its ranges that was kept. Rows are independent."""
        settings, factored, kept = self._settings, self._factored, 1.0
        if settings.clip:
            grid, ratios = clip(weight, self._blocks, self._group_size, settings.symmetric, settings.dtype)
            kept = float(ratios.mean())
        else:
            grid = full_range(weight, self._group_size, settings.symmetric, settings.dtype)
        q = feedback(weight, grid, factored) if factored else nearest(weight, grid)
        if factored and settings.refit:
            grid = refit(weight, q, grid, factored)
        return grid.layer(q), kept


def round_block(block: nn.Module, settings: Settings, but: Collection[str] = ()) -> dict[str, QuantizedLinear]:
    """Round every layer of a block to nearest, except routers and those named in `but`."""
    left = {*but, *left_alone(block)}
    return {
        name: quantize_weight(m.weight, settings.group(m.in_features), settings.symmetric, settings.dtype)
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear) and name not in left and settings.why_float(m) is None
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
    groups, left = calls.groups(block), left_alone(block)
    quantized: dict[str, QuantizedLinear] = {}
    reports: dict[str, LayerReport] = {}
    shape = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
    for group in reversed(groups):
        fold = known_fold(block, group, groups, calls, folds, shape)
        result = search(group, settings, constrain(block, fold, settings), but=left)
        group.statistics.hessian = result.s.new_empty(0)  # used up
        if fold is not None and result.scaled:
            for name, linear in zip(group.names, group.linears, strict=True):
                if name not in result.layers:
                    linear.weight.data = linear.weight * result.s
            fold.apply(block, result.s)
        for name, layer in result.layers.items():
            if fold is None and result.scaled:
                layer = replace(layer, pre_scale=(1 / result.s).to(settings.dtype))
            quantized[name] = layer
            reports[name] = layer_report(f"{calls.name}.", name, group, result, fold, settings)
    unseen = round_block(block, settings, but=quantized)  # experts no token chose
    return BlockResult(quantized | unseen, [reports[n] for group in groups for n in group.names if n in reports])


def layer_report(
    prefix: str, name: str, group: Group, found: Found, fold: Fold | None, settings: Settings
) -> LayerReport:
    """The report of a layer of a group; `prefix` makes names of the model of names in the block."""
    return LayerReport(
        name=prefix + name,
        alpha=found.alpha,
        weights=found.weights,
        folded_into=prefix + fold.into if fold and found.scaled else None,
        error_rounding=found.errors[name][0],
        error=found.errors[name][1],
        clip=found.clips[name],
        feedback=settings.feedback,
        tokens=group.statistics.tokens,
        largest_activation=group.statistics.largest,
    )


def known_fold(
    block: nn.Module, group: Group, groups: list[Group], calls: Calls, folds: dict[Any, Fold | None], shape: Any
) -> Fold | None:
    """Where the scale of a group can go: looked up in `folds`, or else tried, and noted there.

    Experts are alike: what is true of one holds for all. It is tried on one that a token of the first window reaches.
    """

    def kind(other: Group) -> Any:
        expert = expert_of(block, other.names[0])
        return type(block), shape, tuple(name.removeprefix(expert) for name in other.names), bool(expert)

    key = kind(group)
    if key not in folds:
        dtype = next(block.parameters()).dtype
        block.float()
        alike = (g for g in groups if kind(g) == key)
        tried = next((g for g in alike if not expert_of(block, g.names[0]) or is_reached(g, calls.run)), None)
        if tried is not None:
            found = find_fold(block, tried, calls.run)
            folds[key] = found and replace(found, into=found.into.removeprefix(expert_of(block, tried.names[0])))
        block.to(dtype)
    if key not in folds:
        return None
    fold = folds[key]
    return fold and replace(fold, into=expert_of(block, group.names[0]) + fold.into)


def constrain(block: nn.Module, fold: Fold | None, settings: Settings) -> Constrain | None:
    """What a scale must be to go where it has to go: into the fold, or into a pre-scale of 16 bits, or nowhere."""
    if fold is not None:
        rows = len(block.get_submodule(fold.into).weight)  # type: ignore[arg-type]
        return lambda s: fold.shared(s, rows)
    if settings.pre_scale:
        return lambda s: 1 / (1 / s).to(settings.dtype).float()
    return None
