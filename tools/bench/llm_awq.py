"""The procedure published as llm-awq (Lin et al., "AWQ", MLSys 2024), written for comparison from the paper.

Block by block, on the float model's activations: the scales of every group of linear layers that share an input are
s = mean|x|^alpha, alpha out of 20 steps in [0, 1), chosen by the squared error of the output of the module that the
group feeds, computed anew for every candidate; then every weight group is clipped at the best of 10 ratios in (0.5, 1],
by the squared error of its part of the layer's output on 512 sampled tokens; queries and keys are not clipped. As in
the published code, the output projection is scaled only where value and output projections have the same shape
(no grouped-query attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import float_model

STEPS = 20
CLIP_STEPS = 10
"""Of 1/20 each: the narrowest range tried is 0.55 of the widest."""
CLIP_TOKENS = 512
CLIP_ROWS = 64
"""Rows of a weight clipped at a time, to bound memory."""


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded."""

    group_size: int  # columns per scale
    symmetric: bool  # no zero points

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Round [..., K] to 4 bits in groups along K and return the values that are left, in the same dtype."""
        grouped = weight.reshape(-1, self.group_size)
        if self.symmetric:
            scale = grouped.abs().amax(1, keepdim=True).clamp(min=1e-5) / 7
            return ((grouped / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)
        high, low = grouped.amax(1, keepdim=True), grouped.amin(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 15
        zero = (-(low / scale).round()).clamp(0, 15)
        return (((grouped / scale).round() + zero).clamp(0, 15) - zero).mul(scale).reshape(weight.shape)


@dataclass(frozen=True)
class Part:
    """Linear layers that share an input, the module whose output judges their scale, and what absorbs it."""

    linears: list[str]
    inspect: str
    before: str


def parts(block: Any) -> list[Part]:
    """The groups of a Llama-like block that get a scale.

    Raises:
        SystemExit: the block is of another kind.
    """
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    attention = [f"self_attn.{n}_proj" for n in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    if names != {*attention, "self_attn.o_proj", *gate_up, "mlp.down_proj"}:
        raise SystemExit(f"llm-awq is written for Llama-like blocks, not for one of {sorted(names)}")
    found = [Part(attention, "self_attn", "input_layernorm")]
    if block.self_attn.v_proj.weight.shape == block.self_attn.o_proj.weight.shape:
        found.append(Part(["self_attn.o_proj"], "self_attn.o_proj", "self_attn.v_proj"))
    return [
        *found,
        Part(gate_up, "mlp", "post_attention_layernorm"),
        Part(["mlp.down_proj"], "mlp.down_proj", "mlp.up_proj"),
    ]


load = float_model.load


def quantize(model: Any, ids: torch.Tensor, job: dict[str, Any]) -> None:
    """In place; ids int64 [windows, length]."""
    quantize_blocks(model, ids, Rounding(job["group_size"], job["symmetric"]))


def deliver(model: Any, output: Path) -> list[str]:
    """The rounded weights, and the norms with scales folded in."""
    float_model.write(model.name_or_path, float_model.parameters(model), output / "model")
    return ["model"]


@torch.inference_mode()
def quantize_blocks(model: Any, ids: torch.Tensor, rounding: Rounding) -> None:
    """Scale, clip and round the linear layers of a transformers decoder in place.

    Args:
        model: LlamaForCausalLM or alike, fp32. ids: int64 [windows, length].
    """
    hidden, arguments = first_block_inputs(model, ids)
    for block in model.model.layers:
        inputs, attention_arguments, following = record(block, hidden, arguments)
        for part in parts(block):
            extra = attention_arguments if part.inspect == "self_attn" else {}
            scale = search_scale(block, part, inputs[part.linears[0]], extra, rounding)
            apply_scale(block, part, scale, inputs)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                if "q_proj" not in name and "k_proj" not in name:
                    module.weight.copy_(clip(module.weight, inputs[name], rounding))
                module.weight.copy_(rounding(module.weight))
        hidden = following


class StopForwardError(Exception):
    """Ends a forward early."""


def first_block_inputs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hidden states [windows, length, K] that go into block 0, and its other arguments."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise StopForwardError

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(ids, use_cache=False)
    except StopForwardError:
        pass
    finally:
        handle.remove()
    return seen[0]


def record(
    block: Any, hidden: torch.Tensor, arguments: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]:
    """Run a block: the input of every linear layer [windows, length, K], other arguments of the attention, output."""
    inputs: dict[str, torch.Tensor] = {}
    attention: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0].clone())

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    handles.append(
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: attention.update({k: v for k, v in kwargs.items() if k != "hidden_states"}),
            with_kwargs=True,
        )
    )
    output = block(hidden, **arguments)
    for handle in handles:
        handle.remove()
    return inputs, attention, output[0] if isinstance(output, tuple) else output


def search_scale(
    block: Any, part: Part, x: torch.Tensor, arguments: dict[str, Any], rounding: Rounding
) -> torch.Tensor:
    """The scale [K] of a group with the least error at the output of `part.inspect`. x: its input [..., K]."""

    def output() -> torch.Tensor:
        result = block.get_submodule(part.inspect)(x, **arguments)
        return result[0] if isinstance(result, tuple) else result

    linears = [block.get_submodule(name) for name in part.linears]
    weights = [linear.weight.clone() for linear in linears]
    expected, mean = output(), x.reshape(-1, x.shape[-1]).abs().mean(0)
    best, best_error = torch.ones_like(mean), float("inf")
    for step in range(STEPS):
        scale = mean.pow(step / STEPS).clamp(min=1e-4)
        scale /= (scale.max() * scale.min()).sqrt()
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(rounding(weight * scale) / scale)
        error = float((output() - expected).square().mean())
        if error < best_error:
            best, best_error = scale, error
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.copy_(weight)
    return best


def apply_scale(block: Any, part: Part, scale: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """Multiply the group's columns by `scale` and divide what goes into them by it: the same function."""
    before = block.get_submodule(part.before)
    before.weight.div_(scale if before.weight.dim() == 1 else scale.unsqueeze(1))
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scale)
    for name in part.linears:
        block.get_submodule(name).weight.mul_(scale)
        inputs[name].div_(scale)


def clip(weight: torch.Tensor, x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """The weight [N, K] with every group clamped at the range that hurts its part of the output least."""
    size = rounding.group_size
    x = x.reshape(-1, x.shape[-1])
    x = x[:: max(len(x) // CLIP_TOKENS, 1)]
    x = x.reshape(len(x), -1, size).transpose(0, 1)  # [groups, tokens, size]
    clipped = []
    for rows in weight.split(CLIP_ROWS):
        groups = rows.reshape(len(rows), -1, size)  # [rows, groups, size]
        widest = groups.abs().amax(-1, keepdim=True)
        best, best_error = widest.clone(), torch.full_like(widest, float("inf"))
        for step in range(CLIP_STEPS):
            bound = widest * (1 - step / STEPS)
            delta = rounding(groups.clamp(-bound, bound)) - groups
            error = torch.einsum("gts,rgs->rgt", x, delta).square().mean(-1, keepdim=True)
            better = error < best_error
            best, best_error = torch.where(better, bound, best), torch.where(better, error, best_error)
        clipped.append(groups.clamp(-best, best).reshape(rows.shape))
    return torch.cat(clipped)
