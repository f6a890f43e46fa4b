"""AWQ: find the scale of every input channel that makes INT4 rounding hurt least (Lin et al., MLSys 2024).

For a linear layer y = x W^T and a positive scale s per input channel, (x / s)(W s)^T is the same function, but rounding
W s to INT4 treats the columns with large s more gently. The search is over s = meanabs(x)^alpha, alpha in [0, 1].

The output error of a candidate needs no activations, only H = X^T X summed over all calibration tokens:
    sum over tokens |x dW^T|^2 = tr(dW H dW^T),   dW = Q(W s) / s - W.

Where 1/s goes is the business of fold.py; how rounding works, of linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from awq_trt.layout import why_not
from awq_trt.linear import QuantizedLinear, quantize_weight

ALPHAS = [i / 20 for i in range(21)]
Run = Callable[[], object]
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


@dataclass
class Statistics:
    """What calibration leaves of the inputs of one group of linear layers (K input channels).

    Attributes:
        hessian: sum of x^T x over the tokens, fp32 [K, K]. total_abs: sum of |x|, fp32 [K]. tokens: how many.
        largest: the largest |x| seen (fp16 ends at 65504).
    """

    hessian: torch.Tensor
    total_abs: torch.Tensor
    tokens: int = 0
    largest: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.hessian.addmm_(rows.t(), rows)
        magnitude = rows.abs()
        self.total_abs += magnitude.sum(0)
        self.tokens += len(rows)
        self.largest = max(self.largest, float(magnitude.amax()))


@dataclass
class Group:
    """Linear layers of one block that read the same tensor, so that one scale serves all of them."""

    names: list[str]
    linears: list[nn.Linear]
    statistics: Statistics
    before: list[str]
    """Names of the norms and linear layers that ran earlier in the block, the latest first: where s may be folded."""


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


def observe(block: nn.Module, runs: Iterable[Run]) -> list[Group]:
    """Run the block and gather statistics of the inputs of its linear layers, grouped by the tensor they read.

    Returns the groups in order of execution. Layers that never ran (experts no token chose) are in no group.
    """
    groups: list[Group] = []
    by_linear: dict[str, Group] = {}
    order: list[str] = []
    inputs: list[tuple[torch.Tensor, Group]] = []  # of the current run; keeps them alive, so `is` is enough

    def on_linear(name: str, module: nn.Linear, x: torch.Tensor) -> None:
        group = by_linear.get(name)
        if group is None:
            group = next((g for tensor, g in inputs if tensor is x), None)
            if group is None:
                k = module.in_features
                group = Group([], [], Statistics(torch.zeros(k, k), torch.zeros(k)), order[::-1])
                groups.append(group)
            group.names.append(name)
            group.linears.append(module)
            by_linear[name] = group
        if not any(g is group for _, g in inputs):
            group.statistics.add(x)
            inputs.append((x, group))

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if isinstance(module, nn.Linear):
                on_linear(name, module, args[0])
            if name not in order:
                order.append(name)

        return before

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in block.named_modules() if scaled_weight(m) is not None]
    try:
        for run in runs:
            inputs.clear()
            run()
    finally:
        for handle in handles:
            handle.remove()
    return groups


def scaled_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, or of a norm (a module with one weight per channel); None for anything else."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.weight
    is_norm = isinstance(weight, torch.Tensor) and weight.dim() == 1 and not list(module.children())
    return weight if is_norm else None


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
