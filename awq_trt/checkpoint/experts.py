"""Mixtures of experts, taken apart: one linear layer for each expert and projection.

transformers 5 holds all experts of a block in 3-D parameters (`gate_up_proj` [experts, 2 * intermediate, hidden],
`down_proj` [experts, hidden, intermediate]) and says how they are stored in attributes that its decorator
`use_experts_implementation` sets. A module with that interface becomes one with the layers

    experts.3.gate_proj  experts.3.up_proj  experts.3.down_proj        (no gate_proj where experts have no gate)

whatever the family is called; so experts are found, calibrated, rounded and exported like any other linear layer. The
router is left alone: it says which experts see a token (`top_k_index`) and what their outputs count (`top_k_weights`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

ROUTER = "router: it chooses the experts, so that rounding it would change which ones compute; it is small"
UNSPLITTABLE = "experts in one 3-D tensor, of a form that is not taken apart into linear layers"


@dataclass(frozen=True)
class Part:
    """Where a parameter of one expert lies in the 3-D (bias: 2-D) parameter that transformers holds for all of them.

    Attributes:
        fused, shape: name and shape of that parameter. expert: index along its first axis.
        rows: the output features of this projection. transposed: features are the last axis, weights are [in, out].
    """

    fused: str
    shape: tuple[int, ...]
    expert: int
    rows: slice
    transposed: bool

    def of(self, expert: torch.Tensor) -> torch.Tensor:
        """The parameter, [out, in] or [out], from what the fused one holds of the expert."""
        return (expert.t() if self.transposed and expert.dim() == 2 else expert)[self.rows].contiguous()


class Expert(nn.Module):
    """The layers of one expert; `SplitExperts` calls them."""

    def __init__(self, widths: dict[str, tuple[int, int]], bias: bool) -> None:
        super().__init__()
        for name, (n, k) in widths.items():
            self.add_module(name, nn.Linear(k, n, bias=bias, device="meta"))


class SplitExperts(nn.Module):
    """Mixed into the class of a fused experts module; everything but its parameters stays what it was.

    Attributes:
        parts: parameter of this module -> where it lies in the fused ones (their names in this module).
    """

    parts: dict[str, Part]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            hidden_states: [tokens, hidden]. top_k_index: int64 [tokens, k]; an index past the last expert is none.
            top_k_weights: [tokens, k].
        """
        if type(hidden_states) is torch.Tensor and not hidden_states.is_meta:
            return self._of_chosen(hidden_states, top_k_index, top_k_weights)
        return self._of_all(hidden_states, top_k_index, top_k_weights)

    @property
    def experts(self) -> list[Expert]:
        """The experts in order."""
        return [m for m in self.children() if isinstance(m, Expert)]

    def _of_chosen(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert reads the tokens that chose it and no others: what calibration has to see."""
        total = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, place = torch.where(index == e)
            if len(tokens):
                y = self._output(expert, x[tokens]) * weights[tokens, place, None]
                total.index_add_(0, tokens, y.to(total.dtype))
        return total

    def _of_all(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same sum without a shape that depends on values, for a graph: every expert reads every token.

        What an expert makes of a token that did not choose it may overflow to Inf; multiplied by 0 that is NaN, so it
        is not multiplied but left out.
        """
        total = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = index == e
            weight = torch.where(chosen, weights, 0).sum(-1, keepdim=True)
            y = self._output(expert, x) * weight
            total = total + torch.where(chosen.any(-1, keepdim=True), y, 0).to(total.dtype)
        return total

    def _output(self, expert: Any, x: torch.Tensor) -> torch.Tensor:
        module: Any = self
        if not module.has_gate:
            y = module.act_fn(expert.up_proj(x))
        else:
            gate, up = expert.gate_proj(x), expert.up_proj(x)
            if module._apply_gate.__name__ == "_default_apply_gate":
                y = module.act_fn(gate) * up
            else:
                together = torch.cat if module.is_concatenated else _interleaved
                y = module._apply_gate(together([gate, up], -1))
        y = expert.down_proj(y)
        return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _interleaved(columns: list[torch.Tensor], dim: int) -> torch.Tensor:
    """[g0, u0, g1, u1, ...]"""
    return torch.stack(columns, dim).flatten(dim - 1)


@cache
def _split_class(cls: Any) -> type[nn.Module]:
    return type(f"Split{cls.__name__}", (SplitExperts, cls), {"__module__": __name__})


def split_experts(model: nn.Module) -> None:
    """Take every fused experts module of a model apart, in place. The new layers are empty (on the meta device).

    Modules that have to stay in float because of what they are get an attribute `why_float`, which says why.
    """
    for module in list(model.modules()):
        if _is_fused(module):
            _split(module)
    for parent in model.modules():
        counts = {len(m.experts) for m in parent.children() if isinstance(m, SplitExperts)}
        for module in _outside_experts(parent) if counts else ():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) in counts:
                module.why_float = ROUTER  # type: ignore[assignment]
        if not isinstance(parent, nn.Conv1d) and any(map(_is_stack, parent._parameters.values())):
            parent.why_float = UNSPLITTABLE  # type: ignore[assignment]


def _outside_experts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it, without the experts."""
    yield module
    for child in module.children():
        if not isinstance(child, SplitExperts):
            yield from _outside_experts(child)


def _is_stack(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter looks like several weight matrices, not like an embedding [1, tokens, width]."""
    return parameter is not None and parameter.dim() == 3 and len(parameter) > 1 and min(parameter.shape[1:]) >= 32


def _is_fused(module: Any) -> bool:
    """Whether a module has the interface of transformers' `use_experts_implementation`, and just its parameters."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    if isinstance(module, SplitExperts) or not all(isinstance(getattr(module, flag, None), bool) for flag in flags):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = [first, "down_proj", *([f"{first}_bias", "down_proj_bias"] if module.has_bias else [])]
    parameters = module._parameters
    if set(parameters) != set(names) or any(parameters[n].dim() != (2 if "bias" in n else 3) for n in names):
        return False
    (up, k), (n, inner) = (_features(parameters[name], module.is_transposed) for name in (first, "down_proj"))
    return bool(up == inner * (2 if module.has_gate else 1) and k == n)


def _features(weight: torch.Tensor, transposed: bool) -> tuple[int, int]:
    """(out, in) of a fused weight."""
    _, a, b = weight.shape
    return (b, a) if transposed else (a, b)


def _split(module: Any) -> None:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    fused = dict(module._parameters)
    count = len(fused["down_proj"])
    hidden, inner = _features(fused["down_proj"], module.is_transposed)
    rows = {"up_proj": slice(0, inner)}
    if module.has_gate and module.is_concatenated:
        rows = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}
    elif module.has_gate:
        rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    sources = {name: (first, where) for name, where in rows.items()} | {"down_proj": ("down_proj", slice(None))}
    widths = {name: (hidden, inner) if name == "down_proj" else (inner, hidden) for name in sources}
    module._parameters.clear()
    parts = {}
    for e in range(count):
        module.add_module(str(e), Expert(widths, module.has_bias))
        for name, (source, where) in sources.items():
            for kind, key in (("weight", source), ("bias", f"{source}_bias")):
                if key in fused:
                    parts[f"{e}.{name}.{kind}"] = Part(key, tuple(fused[key].shape), e, where, module.is_transposed)
    cls: Any = type(module)
    module.__class__ = _split_class(cls)
    module.parts = parts


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Parameter of an expert -> where it lies, with the fused parameter's name in the whole model."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for name, part in module.parts.items():
                fused = f"{prefix}.{part.fused}"
                found[f"{prefix}.{name}"] = Part(fused, part.shape, part.expert, part.rows, part.transposed)
    return found


def left_alone(model: nn.Module) -> dict[str, str]:
    """Modules that stay in float because of what they are -> why: routers, experts that could not be taken apart."""
    return {name: str(m.why_float) for name, m in model.named_modules() if "why_float" in m.__dict__}


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def expert_of(block: nn.Module, layer: str) -> str:
    """The name of the expert that a layer is part of, with a dot behind it ("mlp.experts.3."); "" for other layers."""
    return next((f"{p}." for p in _prefixes(layer) if isinstance(block.get_submodule(p), Expert)), "")
