"""AWQ: find the scale of every input channel that makes INT4 rounding hurt least (Lin et al., MLSys 2024).

For a linear layer y = x W^T and a positive scale s per input channel, (x / s)(W s)^T is the same function, but rounding
W s to INT4 treats the columns with large s more gently. The search is over
    s = meanabs(x)^alpha                            (the paper's), and
    s = meanabs(x)^alpha / meanabs(w)^(1 - alpha)   (with weights: w relative to the largest in its group),
alpha in [0, 1].

The output error of a candidate needs no activations, only H = X^T X summed over all calibration tokens:
    sum over tokens |x dW^T|^2 = tr(dW H dW^T),   dW = Q(W s) / s - W.
So a candidate costs the same however many tokens there are, and a sample of the rows of W is enough to compare two.

Where 1/s goes is decided in fold.py; clipping and error compensation are in rounding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.fold import Fold, find_known_fold
from awq_trt.awq.hessian import Group, HessianAccumulator
from awq_trt.awq.rounding import clip, compensated, diagonal_blocks, factor, full_range, nearest, refit
from awq_trt.linear import QuantizedLinear, quantize_weight, row_chunks

COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)
FINE = (0.125, 0.0625)
"""Exponents tried first, and the steps to either side of the best one that are tried after."""

SAMPLE = 1 << 19
"""Weights of each layer that candidates are compared on: whole rows, FEWEST to MOST of them."""

FEWEST, MOST = 32, 128

Linears = Mapping[str, nn.Linear]
Constrain = Callable[[torch.Tensor], torch.Tensor]
"""Makes a scale [K] one that the place it goes to can hold: equal over heads that share, or exact in fp16."""


@dataclass(frozen=True)
class LayerReport:
    """What the search found for one layer: a row of "layers" in awq_trt.json, whose keys are these names."""

    name: str  # of the layer, in the model
    alpha: float  # exponent of its scale
    weights: bool  # whether the scale is also divided by meanabs(w)^(1 - alpha)
    folded_into: str | None  # the operator that took 1/s; None for a pre-scale or no scale
    error_rounding: float  # |x dW^T| / |x W^T| over the calibration tokens, on a sample of rows, of plain rounding
    error: float  # the same of the result
    clip: float  # part of its range that was kept, mean over the groups
    feedback: bool  # whether it was rounded with error compensation
    tokens: int  # that reached it
    largest_activation: float  # |x|


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


def relative_weights(linears: Linears, config: QuantizeConfig) -> torch.Tensor:
    """Mean over the rows of all layers of |w| / (largest |w| of its group): [K], in 0..1."""
    sums, rows = [], 0
    for linear in linears.values():
        n, k = linear.weight.shape
        for part in row_chunks(n, k):
            grouped = linear.weight[part].float().abs().reshape(-1, k // config.group(k), config.group(k))
            sums.append((grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-30)).sum(0).reshape(k))
        rows += n
    return torch.stack(sums).sum(0) / rows


def output_errors(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """delta H delta^T, its diagonal [N]: the squared error of each output, summed over the calibration tokens."""
    return ((delta @ hessian) * delta).sum(1)


@dataclass(frozen=True)
class Candidate:
    """A scale that was tried."""

    s: torch.Tensor  # [K]
    alpha: float
    with_weights: bool  # the form of the scale, see the head of this file
    errors: dict[str, float]  # layer -> squared output error of its sampled rows

    @property
    def error(self) -> float:
        """Summed over the layers of the group."""
        return sum(self.errors.values())

    @property
    def scaled(self) -> bool:
        """Whether s does anything."""
        return bool((self.s != 1).any())


@dataclass(frozen=True)
class Found:
    """The result of one group's search."""

    best: Candidate
    layers: dict[str, QuantizedLinear]  # layer -> rounded W s
    reports: dict[str, LayerReport]  # layer -> report, named as the layer is
    rounder: Rounder  # rounds further rows of the same layers, times s, in the same way
    pre_scale: torch.Tensor | None = None  # of the layers, where s is folded into nothing


def search(
    linears: Linears,
    statistics: HessianAccumulator,
    config: QuantizeConfig,
    dtype: torch.dtype,
    constrain: Constrain | None,
) -> Found:
    """Find the scale of layers that read the same input, multiply their weights by it in place, and round them.

    Args:
        linears: name -> layer. statistics: of their input; the Hessian is taken from it. dtype: of the scales.
        constrain: see `Constrain`; None where the group may have no scale at all, then s = 1.
    """
    hessian, group_size = statistics.take(), config.group(len(statistics.total_abs))
    rows = {name: sampled_rows(linear.weight) for name, linear in linears.items()}
    samples = {name: linear.weight[rows[name]].float() for name, linear in linears.items()}
    size = {name: float(output_errors(weight, hessian).sum()) for name, weight in samples.items()}

    def attempt(s: torch.Tensor, alpha: float = 0.0, with_weights: bool = False) -> Candidate:
        errors = {}
        for name, weight in samples.items():
            scaled = weight * s
            grid = full_range(scaled, group_size, config.symmetric, dtype)
            rounded = grid.nearest(scaled.reshape(len(scaled), -1, group_size)).reshape(scaled.shape)
            errors[name] = float(output_errors(rounded.sub_(scaled).div_(s), hessian).sum())
        return Candidate(s, alpha, with_weights, errors)

    plain = best = attempt(torch.ones_like(statistics.total_abs))
    if constrain is not None:
        mean_abs = statistics.total_abs / max(statistics.tokens, 1)
        scaled = find_scale(mean_abs, relative_weights(linears, config), constrain, attempt)
        best = min((plain, scaled), key=lambda c: c.error)
    rounder = Rounder(hessian.div_(best.s).div_(best.s.unsqueeze(1)), config, dtype)
    layers, reports = {}, {}
    for name, linear in linears.items():
        linear.weight.data = linear.weight.data.mul_(best.s)
        layers[name], kept = rounder.round(linear.weight.float())
        delta = layers[name].rows(rows[name]).dequantize().float() - linear.weight[rows[name]].float()
        both = plain.errors[name], float(rounder.error(delta).sum())
        before, after = ((max(error, 0.0) / max(size[name], 1e-30)) ** 0.5 for error in both)
        reports[name] = LayerReport(
            name=name,
            alpha=best.alpha,
            weights=best.with_weights,
            folded_into=None,
            error_rounding=before,
            error=after,
            clip=kept,
            feedback=bool(config.error_compensation),
            tokens=statistics.tokens,
            largest_activation=statistics.largest,
        )
    return Found(best, layers, reports, rounder)


def sampled_rows(weight: torch.Tensor) -> torch.Tensor:
    """Indices of the rows that stand for all, evenly spread; of all where there are fewer."""
    n, k = weight.shape
    count = min(n, max(FEWEST, min(MOST, SAMPLE // k)))
    return torch.arange(count, device=weight.device) * n // count


def find_scale(
    mean_abs: torch.Tensor,
    weights: torch.Tensor,
    constrain: Constrain,
    attempt: Callable[[torch.Tensor, float, bool], Candidate],
) -> Candidate:
    """The best scale, from coarse to fine: both forms on a coarse grid of alpha, then to either side of the best.

    Args:
        mean_abs: of the inputs, [K]. weights: as `relative_weights` returns them, [K]. attempt: rounds with a scale.
    """

    def at(alpha: float, with_weights: bool) -> Candidate:
        s = constrain(scale_for(mean_abs, alpha, weights if with_weights else None))
        return attempt(s, alpha, with_weights)

    best = min((at(alpha, form) for form in (False, True) for alpha in COARSE), key=lambda c: c.error)
    for step in FINE:
        near = [alpha for alpha in (best.alpha - step, best.alpha + step) if 0 <= alpha <= 1]
        best = min([best, *(at(alpha, best.with_weights) for alpha in near)], key=lambda c: c.error)
    return best


class Rounder:
    """Rounds layers that read the same input by the means the configuration allows.

    Args:
        hessian: of that input, fp32 [K, K], from here on the rounder's own to change.
    """

    def __init__(self, hessian: torch.Tensor, config: QuantizeConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype, self._group_size = config, dtype, config.group(len(hessian))
        self._blocks = diagonal_blocks(hessian, self._group_size)
        self._factored = factor(hessian) if config.error_compensation else None
        self._hessian = hessian

    def error(self, delta: torch.Tensor) -> torch.Tensor:
        """The squared output errors, [N], of weight errors [N, K]."""
        return self._factored.error(delta) if self._factored else output_errors(delta, self._hessian)

    def round(self, weight: torch.Tensor) -> tuple[QuantizedLinear, float]:
        """The layer of a weight, fp32 [N, K], and the mean part of its ranges that was kept. Rows are independent."""
        config, factored, kept = self._config, self._factored, 1.0
        if config.clip:
            grid, ratios = clip(weight, self._blocks, self._group_size, config.symmetric, self._dtype)
            kept = float(ratios.mean())
        else:
            grid = full_range(weight, self._group_size, config.symmetric, self._dtype)
        q = compensated(weight, grid, factored) if factored else nearest(weight, grid)
        if factored and config.refit:
            grid = refit(weight, q, grid, factored)
        return grid.layer(q), kept


def round_block(
    block: nn.Module, names: Collection[str], config: QuantizeConfig, dtype: torch.dtype
) -> dict[str, QuantizedLinear]:
    """Round the layers `names` of a block to nearest."""
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear) and name in names}
    return {
        name: quantize_weight(m.weight, config.group(m.in_features), config.symmetric, dtype)
        for name, m in linears.items()
    }


def quantize_block(
    block: nn.Module,
    groups: list[Group],
    first_output: Callable[[], torch.Tensor],
    folds: dict[str, Fold | None],
    *,
    names: AbstractSet[str],
    config: QuantizeConfig,
    dtype: torch.dtype,
) -> tuple[dict[str, QuantizedLinear], list[LayerReport]]:
    """AWQ on one block, filled. Folds change its norms and layers in place.

    Groups are taken from the last to the first, so that a layer is rounded after the layers behind it have folded
    their scales into it.

    Args:
        groups: of its layers, with their Hessians, which are taken. first_output: the block's output on a window.
        folds: remembers where the scales of a group go, for the blocks of the same structure that follow.
        names: the layers that become INT4. dtype: of activations and scales.

    Returns:
        Name within the block -> INT4 layer, and the reports of those that saw an input.
    """
    quantized: dict[str, QuantizedLinear] = {}
    reports: dict[str, LayerReport] = {}
    for group in reversed(groups):
        if not names & group.linears.keys():
            continue  # all of it stays in float: there may be no group size that divides its width
        fold = find_known_fold(block, group, groups, first_output, folds)
        found = quantize_group(block, group, fold, names=names, config=config, dtype=dtype)
        quantized |= {name: replace(layer, pre_scale=found.pre_scale) for name, layer in found.layers.items()}
        reports |= found.reports
    unseen = round_block(block, names - quantized.keys(), config, dtype)  # experts no token chose
    return quantized | unseen, [reports[n] for group in groups for n in group.names if n in reports]


def quantize_group(
    block: nn.Module,
    group: Group,
    fold: Fold | None,
    *,
    names: Collection[str],
    config: QuantizeConfig,
    dtype: torch.dtype,
) -> Found:
    """Search and round those of a group's layers that become INT4, and put their scale where it goes.

    Layers of the group that stay in float take the scale that was folded, too.
    """
    linears = {n: m for n, m in group.linears.items() if n in names}
    constrain = partial(_with_reciprocal_in, dtype=dtype) if config.pre_scale else None
    if fold is not None:
        constrain = partial(fold.shared, rows=len(block.get_submodule(fold.into).weight))  # type: ignore[arg-type]
    found = search(linears, group.statistics, config, dtype, constrain)
    s = found.best.s
    if not found.best.scaled:
        return found
    if fold is None:
        return replace(found, pre_scale=(1 / s).to(dtype))
    for name in group.linears.keys() - linears.keys():
        group.linears[name].weight.data = group.linears[name].weight * s
    fold.apply(block, s)
    return replace(found, reports={n: replace(r, folded_into=fold.into) for n, r in found.reports.items()})


def _with_reciprocal_in(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale near s whose pre-scale 1/s is exact in `dtype`."""
    return 1 / (1 / s).to(dtype).float()
