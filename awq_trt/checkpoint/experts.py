"""Mixtures of experts, taken apart: one linear layer for each expert and projection.

transformers 5 holds all experts of a block in 3-D parameters (`gate_up_proj` [experts, 2 * intermediate, hidden],
`down_proj` [experts, hidden, intermediate]) and says how they are stored in attributes that its decorator
`use_experts_implementation` sets. A module with that interface is replaced by a `SplitExperts` with the layers

    experts.3.gate_proj  experts.3.up_proj  experts.3.down_proj        (no gate_proj where experts have no gate)

whatever the family is called; so experts are found, calibrated, rounded and exported like any other linear layer. The
router is left alone: it says which experts see a token (`top_k_index`) and what their outputs count (`top_k_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

ROUTER = "router: it chooses the experts, so that rounding it would change which ones compute; it is small"
UNSPLITTABLE = "experts in one 3-D tensor, of a form that is not taken apart into linear layers"


@dataclass(frozen=True)
class Part:
    """Where a parameter of one expert lies in the 3-D (bias: 2-D) parameter that transformers holds for all of them."""

    fused: str  # name of that parameter
    shape: tuple[int, ...]  # of that parameter
    expert: int  # index along its first axis
    rows: slice  # the output features of this projection
    transposed: bool  # weights are [in, out]: the features are the last axis

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
    """The experts of one block, in place of transformers' fused module.

    Args:
        fused: a module for which `_is_fused` holds; it loses its parameters. Its other modules (activation, norm) keep
            their names in this one. The new layers are empty (on the meta device).
    """

    act_fn: Any
    post_expert_norm: Any
    gate: Any  # transformers' own, of both halves together: [tokens, 2 * inner] -> [tokens, inner]; None for its usual

    def __init__(self, fused: Any) -> None:
        super().__init__()
        first, rows = "up_proj", {"up_proj": slice(None)}
        parameters = dict(fused._parameters)
        hidden, inner = _features(parameters["down_proj"], fused.is_transposed)
        self.gate, self.interleaved = None, fused.has_gate and not fused.is_concatenated
        if fused.has_gate:
            first, halves = "gate_up_proj", (slice(0, inner), slice(inner, None))
            halves = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else halves
            rows = dict(zip(("gate_proj", "up_proj"), halves, strict=True))
            if fused._apply_gate.__name__ != "_default_apply_gate":
                self.gate = fused._apply_gate
        self.act_fn = getattr(fused, "act_fn", None)
        self.normed = bool(getattr(fused, "has_post_expert_norm", False))
        for name, child in fused.named_children():
            setattr(self, name, child)
        sources = {name: (first, where) for name, where in rows.items()} | {"down_proj": ("down_proj", slice(None))}
        widths = {name: (hidden, inner) if name == "down_proj" else (inner, hidden) for name in sources}
        self.parts: dict[str, Part] = {}  # parameter of this module -> where it lies in the fused one's
        for e in range(len(parameters["down_proj"])):
            self.add_module(str(e), Expert(widths, fused.has_bias))
            for name, (source, where) in sources.items():
                for kind, key in (("weight", source), ("bias", f"{source}_bias")):
                    if key in parameters:
                        shape = tuple(parameters[key].shape)
                        self.parts[f"{e}.{name}.{kind}"] = Part(key, shape, e, where, fused.is_transposed)
        fused._parameters.clear()

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
        halves = [layer(x) for name, layer in expert.named_children() if name != "down_proj"]  # gate, up
        if len(halves) == 1:
            y = self.act_fn(halves[0])
        elif self.gate is None:
            y = self.act_fn(halves[0]) * halves[1]
        else:
            y = self.gate(torch.stack(halves, -1).flatten(-2) if self.interleaved else torch.cat(halves, -1))
        y = expert.down_proj(y)
        return self.post_expert_norm(y) if self.normed else y


def split_experts(model: nn.Module) -> None:
    """Replace every fused experts module in a model by its `SplitExperts`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_fused(child):
                setattr(parent, name, SplitExperts(child))


def left_alone(model: nn.Module) -> dict[str, str]:
    """Modules of a model, or of a block of it, that stay in float because of what they are -> why: the routers beside
    experts, and experts that could not be taken apart."""
    inside = {id(m) for experts in model.modules() if isinstance(experts, SplitExperts) for m in experts.modules()}
    reasons: dict[str, str] = {}
    for name, parent in model.named_modules():
        counts = {len(m.experts) for m in parent.children() if isinstance(m, SplitExperts)}
        for other, module in parent.named_modules(prefix=name) if counts else ():
            weight = module._parameters.get("weight")
            if id(module) not in inside and weight is not None and weight.dim() == 2 and len(weight) in counts:
                reasons[other] = ROUTER
        if not isinstance(parent, nn.Conv1d) and any(map(_is_stack, parent._parameters.values())):
            reasons[name] = UNSPLITTABLE
    return reasons


def _is_stack(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter looks like several weight matrices, not like an embedding [1, tokens, width]."""
    return parameter is not None and parameter.dim() == 3 and len(parameter) > 1 and min(parameter.shape[1:]) >= 32


def _is_fused(module: Any) -> bool:
    """Whether a module has the interface of transformers' `use_experts_implementation`, and just its parameters."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    if not all(isinstance(getattr(module, flag, None), bool) for flag in flags):
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


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Parameter of an expert -> where it lies, with the fused parameter's name in the whole model."""
    return {
        f"{prefix}.{name}": replace(part, fused=f"{prefix}.{part.fused}")
        for prefix, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for name, part in module.parts.items()
    }


def expert_of(block: nn.Module, layer: str) -> str:
    """The name of the expert that a layer is part of, with a dot behind it ("mlp.experts.3."); "" for other layers."""
    names = layer.split(".")
    prefixes = (".".join(names[: i + 1]) for i in range(len(names)))
    return next((f"{p}." for p in prefixes if isinstance(block.get_submodule(p), Expert)), "")
