"""Running a model one block at a time, with the weights of one block in memory.

Transformers are a list of like blocks between an embedding and a head. `BlockStream` finds that list, records once
what every block is called with (masks, rotary tables), and then runs block i on the hidden states that block i-1
left. What a model is called does not matter; that it has such a list does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from awq_trt.checkpoint import empty_model
from awq_trt.errors import AwqTrtError
from awq_trt.statistics import Group, observe

Inputs = dict[str, torch.Tensor]


class Weights(Protocol):
    """Whatever parameters can be read from: a `Checkpoint`, or a `QuantizedCheckpoint` (then dequantized)."""

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> transformers.PretrainedConfig: ...
    def tensor(self, name: str) -> torch.Tensor: ...


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the repeated blocks: the outermost ModuleList that holds the most parameters.

    Raises:
        AwqTrtError: the model has no list of blocks.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise AwqTrtError(
            f"{type(model).__name__}: no list of repeated blocks (torch.nn.ModuleList) in this model, so there is "
            "nothing to quantize. Transformer encoders and decoders have one."
        )
    return max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))


def quantizable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> nn.Linear for every linear layer inside the repeated blocks."""
    prefix, blocks = find_blocks(model)
    return {f"{prefix}.{name}": m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}


def fill(module: nn.Module, prefix: str, weights: Weights, leave: nn.Module | None = None) -> None:
    """Give the meta parameters of `module` their values, in fp32; those of `leave` stay. Tied ones stay tied."""
    left = {id(p) for p in leave.parameters()} if leave is not None else set()
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():  # a tied parameter appears once, under its first name
        if parameter.is_meta and id(parameter) not in left:
            value = weights.tensor(prefix + name).to(torch.float32)
            if value.shape != parameter.shape:
                raise AwqTrtError(
                    f"{weights.source}: tensor {prefix + name} has shape {list(value.shape)}, "
                    f"its configuration says {list(parameter.shape)}."
                )
            filled[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for child in module.modules():
        for name, old in child._parameters.items():
            if old is not None and id(old) in filled:
                child._parameters[name] = filled[id(old)]


def empty(module: nn.Module) -> None:
    """Back to the meta device: the memory is free again."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class _EnoughError(Exception):
    """Ends a forward early."""


class BlockStream:
    """The model around the blocks, filled; the blocks, empty; and what each block is called with for each input.

    Attributes:
        prefix: module name of the list of blocks ("model.layers"). blocks: the list.
        hidden: per input, the hidden states that go into the next block, as block 0 gets them at first.
    """

    def __init__(self, weights: Weights, inputs: list[Inputs]) -> None:
        self.model = empty_model(weights.config)
        self.prefix, self.blocks = find_blocks(self.model)
        fill(self.model, "", weights, leave=self.blocks)
        self.inputs = inputs
        self.hidden: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.blocks]
        self._tuples: bool = self._returns_tuple(weights)
        for sample in inputs:
            self.hidden.append(self._record(sample))

    def _forward(self, sample: Inputs, stub: Callable[[int], Callable[..., Any]]) -> Any:
        """The model's forward with every block i replaced by stub(i)."""
        for i, block in enumerate(self.blocks):
            block.forward = stub(i)
        try:
            arguments: dict[str, Any] = dict(sample)
            if getattr(self.model.config, "use_cache", None) is not None:
                arguments["use_cache"] = False
            with torch.no_grad():
                return self.model(**arguments)
        finally:
            for block in self.blocks:
                del block.forward

    def _returns_tuple(self, weights: Weights) -> bool:
        """Whether blocks return the hidden states alone or first in a tuple: run block 0 once to see."""

        def stub(i: int) -> Callable[..., Any]:
            def stop(*args: Any, **kwargs: Any) -> Any:
                call.append((args, kwargs))
                raise _EnoughError

            return stop

        call: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        try:
            self._forward(self.inputs[0], stub)
        except _EnoughError:
            pass
        except Exception as error:
            raise AwqTrtError(
                f"{type(self.model).__name__}: the model could not be run on the calibration inputs "
                f"{ {n: list(t.shape) for n, t in self.inputs[0].items()} }: {type(error).__name__}: {error}"
            ) from error
        if not call:
            raise AwqTrtError(f"{type(self.model).__name__}: its forward never calls {self.prefix}.0.")
        self.load(0, weights)
        with torch.no_grad():
            output = self.blocks[0](*call[0][0], **call[0][1])
        self.unload(0)
        return isinstance(output, tuple)

    def _record(self, sample: Inputs) -> torch.Tensor:
        def stub(i: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                first, rest, named = _split(args, kwargs)
                if i == 0:
                    start.append(first)
                self._calls[i].append((rest, named))
                if i == len(self.blocks) - 1:
                    raise _EnoughError  # the head is not needed, and a large vocabulary makes it the dearest layer
                return (first,) if self._tuples else first

            return record

        start: list[torch.Tensor] = []
        with suppress(_EnoughError):
            self._forward(sample, stub)
        return start[0]

    def load(self, i: int, weights: Weights) -> nn.Module:
        """Fill block i and return it."""
        fill(self.blocks[i], f"{self.prefix}.{i}.", weights)
        return self.blocks[i]

    def unload(self, i: int) -> None:
        """Empty block i."""
        empty(self.blocks[i])

    def run(self, i: int, hidden: torch.Tensor, sample: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Block i on `hidden`, called as for input number `sample`; floats are cast to `dtype` if given."""
        hidden, rest, named = _cast((hidden, *self._calls[i][sample]), dtype)
        with torch.no_grad():
            output = self.blocks[i](hidden, *rest, **named)
        return output[0] if self._tuples else output

    def head(self, hidden: torch.Tensor, sample: int) -> torch.Tensor:
        """What the model makes of the last block's output: its logits, or else its last hidden state."""

        def stub(i: int) -> Callable[..., Any]:
            def give(*args: Any, **kwargs: Any) -> Any:
                value = hidden if i == len(self.blocks) - 1 else _split(args, kwargs)[0]
                return (value,) if self._tuples else value

            return give

        output = self._forward(self.inputs[sample], stub)
        result: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
        return result


@dataclass(frozen=True)
class BlockCalls:
    """Block i and what it is called with, as `statistics.Calls`."""

    stream: BlockStream
    i: int

    @property
    def name(self) -> str:
        return f"{self.stream.prefix}.{self.i}"

    def groups(self, block: nn.Module) -> list[Group]:
        """Statistics of the linear layers of the block as it is now."""
        return observe(block, [partial(self.stream.run, self.i, h, j) for j, h in enumerate(self.stream.hidden)])

    def run(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The block's output for the first window."""
        return self.stream.run(self.i, self.stream.hidden[0], 0, dtype)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """(hidden states, other positional arguments, other named arguments) of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A nest of tuples, lists and dicts with its floating-point tensors in `dtype`; unchanged for None."""
    if dtype is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
