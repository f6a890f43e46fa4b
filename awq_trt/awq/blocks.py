"""Running a model one block at a time, with the weights of one block in memory.

Transformers are a list of like blocks between an embedding and a head. `BlockStream` finds that list, records once
what every block is called with (masks, rotary tables), and then runs block i on the hidden states that block i-1
left. What a model is called does not matter; that it has such a list does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from awq_trt.awq.outside import Outside, Weights, read_parameter
from awq_trt.checkpoint.model import empty_model, find_blocks, main_output
from awq_trt.errors import AwqTrtError

Inputs = dict[str, torch.Tensor]
COMPARED = 4
"""Tensors of a shape that those of further windows are compared with; where each window has its own, none is equal."""


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


def empty(module: nn.Module) -> None:
    """Back to the meta device: the memory is free again."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class _EnoughError(Exception):
    """Ends a forward early."""


class BlockStream:
    """The model around the blocks; the blocks, empty; and what each block is called with for each input.

    Attributes:
        prefix: module name of the list of blocks ("model.layers"). blocks: the list.
        dtype, device: of a block that is loaded, and of what it computes.
        outside: fills the modules around the blocks, with fp32 on the CPU, when a forward calls them.
        hidden: per input, the hidden states that go into block 0; [] where a `sink` took them.
    """

    def __init__(
        self,
        weights: Weights,
        inputs: list[Inputs],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        sink: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self.model = empty_model(weights.config)
        self.prefix, self.blocks = find_blocks(self.model)
        self.inputs, self.dtype, self.device = inputs, dtype, torch.device(device)
        self.hidden: list[torch.Tensor] = []
        self.outside = Outside(self.model, self.blocks, weights)
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.blocks]
        self._tuples: bool = self._returns_tuple(weights) if inputs else False
        known: dict[Any, list[torch.Tensor]] = {}
        for number, sample in enumerate(inputs):
            states = self._record(sample, known)
            if sink is None:
                self.hidden.append(states)
            else:
                sink(number, states.to(dtype))
        self.outside.empty()

    def _forward(self, sample: Inputs, stub: Callable[[int], Callable[..., Any]]) -> Any:
        """The model's forward with every block i replaced by stub(i)."""
        for i, block in enumerate(self.blocks):
            block.forward = stub(i)
        try:
            arguments: dict[str, Any] = dict(sample)
            if getattr(self.model.config, "use_cache", None) is not None:
                arguments["use_cache"] = False
            with torch.no_grad(), self.outside:
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
            with suppress(_EnoughError):
                self._forward(self.inputs[0], stub)
        except AwqTrtError:
            raise
        except Exception:
            call.clear()
        if not call or _any_meta(call[0]):  # a weight is used without its module: fill all of them, and try again
            call.clear()
            self.outside.fill_all()
            self._forward_or_explain(stub)
        if not call:
            raise AwqTrtError(f"{type(self.model).__name__}: its forward never calls {self.prefix}.0.")
        (args, kwargs), block = call[0], self.blocks[0]
        try:
            with torch.no_grad():
                output = block(*_to(args, device="meta"), **_to(kwargs, device="meta"))
        except Exception:  # its buffers are on the CPU, or its shapes depend on values: run it in earnest
            fill(block, f"{self.prefix}.0.", weights)
            with torch.no_grad():
                output = block(*args, **kwargs)
            self.unload(0)
        return isinstance(output, tuple)

    def _forward_or_explain(self, stub: Callable[[int], Callable[..., Any]]) -> None:
        try:
            with suppress(_EnoughError):
                self._forward(self.inputs[0], stub)
        except Exception as error:
            raise AwqTrtError(
                f"{type(self.model).__name__}: the model could not be run on the calibration inputs "
                f"{ {n: list(t.shape) for n, t in self.inputs[0].items()} }: {type(error).__name__}: {error}"
            ) from error

    def _record(self, sample: Inputs, known: dict[Any, list[torch.Tensor]]) -> torch.Tensor:
        """Note what the blocks are called with for one input; returns the states that go into block 0."""
        same: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def stub(i: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                first, rest, named = _split(args, kwargs)
                if i == 0:
                    start.append(first)
                self._calls[i].append(_deduplicated((rest, named), known, same))
                if i == len(self.blocks) - 1:
                    raise _EnoughError  # the head is not needed, and a large vocabulary makes it the dearest layer
                return (first,) if self._tuples else first

            return record

        start: list[torch.Tensor] = []
        with suppress(_EnoughError):
            self._forward(sample, stub)
        return start[0]

    def load(self, i: int, weights: Weights) -> nn.Module:
        """Fill block i."""
        fill(self.blocks[i], f"{self.prefix}.{i}.", weights, self.dtype, self.device)
        return self.blocks[i]

    def unload(self, i: int) -> None:
        """Free block i."""
        empty(self.blocks[i])

    def run(self, i: int, hidden: torch.Tensor, sample: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Block i on `hidden`, called as for input number `sample`; floats are cast to `dtype`, or to the block's."""
        own = next((p.dtype for p in self.blocks[i].parameters()), self.dtype)
        hidden, rest, named = _to((hidden, *self._calls[i][sample]), dtype or own, self.device)
        with torch.no_grad():
            output = self.blocks[i](hidden, *rest, **named)
        return output[0] if self._tuples else output

    def head(self, hidden: torch.Tensor, sample: int) -> torch.Tensor:
        """What the model makes of the last block's output: its logits, or else embeddings or the last hidden state."""

        def stub(i: int) -> Callable[..., Any]:
            def give(*args: Any, **kwargs: Any) -> Any:
                value = hidden if i == len(self.blocks) - 1 else _split(args, kwargs)[0]
                return (value,) if self._tuples else value

            return give

        output = self._forward(self.inputs[sample], stub)
        result: torch.Tensor = output[main_output(output)]
        return result


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """(hidden states, other positional arguments, other named arguments) of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A nest of tuples, lists and dicts with its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value


def _any_meta(value: Any) -> bool:
    """Whether a tensor of a nest has no values."""
    found: list[bool] = []
    _map(value, lambda t: found.append(t.is_meta) or t)  # type: ignore[func-returns-value]
    return any(found)


def _to(value: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
    """A nest with its tensors on `device`, the floating-point ones in `dtype`."""
    return _map(value, lambda t: t.to(device, dtype if t.is_floating_point() else None))


def _deduplicated(
    value: Any, known: dict[Any, list[torch.Tensor]], same: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> Any:
    """A nest with every tensor replaced by one that equals it: masks and rotary tables are those of other windows.

    Args:
        known: (shape, dtype) -> the tensors kept so far. same: id of a tensor of this window -> it, the one kept.
    """

    def first(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in same:
            kept = known.setdefault((tensor.shape, tensor.dtype), [])
            found = next((t for t in kept if torch.equal(t, tensor)), None)
            if found is None and len(kept) < COMPARED:
                kept.append(tensor)
            same[id(tensor)] = (tensor, tensor if found is None else found)
        return same[id(tensor)][1]

    return _map(value, first)
