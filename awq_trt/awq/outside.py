"""The parts of a model outside its blocks, and how any part gets its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from awq_trt.errors import AwqTrtError


class Weights(Protocol):
    """Whatever parameters can be read from: a `Checkpoint`, or a quantized one (then dequantized).

    It may also have `rows(name, index)`, see `Checkpoint.rows`.
    """

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> transformers.PretrainedConfig: ...
    def tensor(self, name: str) -> torch.Tensor: ...


def read_parameter(
    weights: Weights,
    name: str,
    like: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Parameter:
    """A parameter in memory of its own, never the file's (whose alignment could change the bits of a product).

    Raises:
        AwqTrtError: its shape is not that of `like`.
    """
    value = weights.tensor(name)
    if value.shape != like.shape:
        raise AwqTrtError(
            f"{weights.source}: tensor {name} has shape {list(value.shape)}, its configuration says {list(like.shape)}."
        )
    return nn.Parameter(value.to(device, dtype, copy=True), requires_grad=False)


def fill(
    module: nn.Module,
    prefix: str,
    weights: Weights,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Give the meta parameters of `module` their values. Tied ones stay tied."""
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():  # a tied parameter appears once, under its first name
        if parameter.is_meta:
            filled[id(parameter)] = read_parameter(weights, prefix + name, parameter, dtype, device)
    for child in module.modules():
        for name, old in child._parameters.items():
            if old is not None and id(old) in filled:
                child._parameters[name] = filled[id(old)]


class Outside(TorchFunctionMode):
    """The model around its blocks, on the CPU in fp32: active as a context manager around a forward of the model.

    A module's weights are read when it is called, embeddings row by row, nothing else: a large vocabulary makes
    embedding and head larger than any block, and recording what blocks are called with needs neither.
    """

    def __init__(self, model: nn.Module, blocks: nn.Module, weights: Weights) -> None:
        super().__init__()
        self._weights = weights
        inside = {id(p) for p in blocks.parameters()}
        self._places = [
            (module, place, parameter)
            for module in model.modules()
            for place, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta and id(parameter) not in inside
        ]
        self._names = {id(p): n for n, p in model.named_parameters()}  # a tied one under its first name
        self._modules = {module for module, _, _ in self._places}
        for module in self._modules:
            if not isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._fill)

    def _fill(self, module: nn.Module, _: Any = None) -> None:
        for place, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[place] = read_parameter(self._weights, self._names[id(parameter)], parameter)

    def fill_all(self) -> None:
        """Fill every module: for models that use a module's weight without calling the module."""
        for module in self._modules:
            self._fill(module)

    def empty(self) -> None:
        """Back to the meta device: the memory is free again."""
        for module, place, parameter in self._places:
            module._parameters[place] = parameter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look embeddings up in the file: [...] -> [..., H], fp32."""
        named = kwargs or {}
        if func is nn.functional.embedding:
            ids = args[0] if args else named["input"]
            weight = args[1] if len(args) > 1 else named["weight"]
            if weight.is_meta and id(weight) in self._names:
                name, weights = self._names[id(weight)], self._weights
                unique, inverse = ids.unique(return_inverse=True)
                rows = weights.rows(name, unique) if hasattr(weights, "rows") else weights.tensor(name)[unique]
                return rows.float()[inverse]
        return func(*args, **named)
