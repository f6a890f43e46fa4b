"""The model around its blocks: a module's weights are read when it is called, embeddings row by row, nothing else.

A large vocabulary makes embedding and head larger than any block; recording what blocks are called with needs neither.
"""

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


class Outside(TorchFunctionMode):
    """Active as a context manager around a forward of the model. Its parameters are on the meta device otherwise."""

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
        self._tables: dict[str, torch.Tensor] = {}
        for module in {m for m, _, _ in self._places}:
            if not isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._fill)

    def _fill(self, module: nn.Module, _: Any) -> None:
        for place, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) in self._names:
                module._parameters[place] = read_parameter(self._weights, self._names[id(parameter)], parameter)

    def fill_all(self) -> None:
        """Fill every module: for models that use a module's weight without calling the module."""
        filled: dict[int, nn.Parameter] = {}
        for module, place, parameter in self._places:
            if id(parameter) not in filled:
                filled[id(parameter)] = read_parameter(self._weights, self._names[id(parameter)], parameter)
            module._parameters[place] = filled[id(parameter)]

    def empty(self) -> None:
        """Back to the meta device: the memory is free again."""
        self._tables.clear()
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
                unique, inverse = ids.unique(return_inverse=True)
                return self._rows(self._names[id(weight)], unique).float()[inverse]
        return func(*args, **named)

    def _rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        if hasattr(self._weights, "rows"):
            rows: torch.Tensor = self._weights.rows(name, index)
            return rows
        if name not in self._tables:
            self._tables[name] = self._weights.tensor(name)
        return self._tables[name][index]
