"""Running a model one block at a time, with the weights of one block in memory.

Transformers are a list of like blocks between an embedding and a head. `BlockStream` finds that list, records once
what every block is called with (masks, rotary tables), and then runs block i on the hidden states that block i-1
left. What a model is called does not matter; that it has such a list does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from awq_trt.checkpoint.model import empty_model, find_blocks, main_output
from awq_trt.errors import AwqTrtError

Inputs = dict[str, torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments
COMPARED = 4
"""Tensors of a shape that those of further windows are compared with; where each window has its own, none is equal."""


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


class _CalledError(Exception):
    """Ends a forward at a block's call; carries its arguments."""


class BlockStream:
    """The model around the blocks; the blocks, empty; and, once recorded, what each is called with for each input."""

    def __init__(
        self,
        weights: Weights,
        inputs: list[Inputs],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = empty_model(weights.config)
        self.prefix, self.blocks = find_blocks(self.model)  # the module list and its name ("model.layers")
        self.inputs = inputs
        self.dtype, self.device = dtype, torch.device(device)  # of a block that is loaded, and of what it computes
        self.outside = Outside(self.model, self.blocks, weights)  # fp32 on the CPU, only while a forward runs
        self._weights = weights
        self._calls: list[list[Call]] = [[] for _ in self.blocks]  # per block and input, without the hidden states
        self._tuples = False  # whether blocks return the hidden states first in a tuple, or alone

    def record(self) -> Iterator[torch.Tensor]:
        """Note what the blocks are called with for each input, and yield the hidden states that go into block 0.

        Raises:
            AwqTrtError: the model cannot be run on these inputs.
        """
        known: dict[Any, list[torch.Tensor]] = {}
        for number, sample in enumerate(self.inputs):
            if number == 0:
                self._tuples = self._returns_tuple(sample)
            yield self._record(sample, known).to(self.dtype)
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

    def _returns_tuple(self, sample: Inputs) -> bool:
        """Whether blocks return a tuple: run block 0 once to see, on the meta device where that works."""
        try:
            call = self._first_call(sample)
            usable = not any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(call))
        except AwqTrtError:
            raise
        except Exception:
            usable = False
        if not usable:  # a weight is used without its module: fill all of them, and try again
            self.outside.fill_all()
            try:
                call = self._first_call(sample)
            except Exception as error:
                raise AwqTrtError(
                    f"{type(self.model).__name__}: the model could not be run on the calibration inputs "
                    f"{ {n: list(t.shape) for n, t in sample.items()} }: {type(error).__name__}: {error}"
                ) from error
        if call is None:
            raise AwqTrtError(f"{type(self.model).__name__}: its forward never calls {self.prefix}.0.")
        (args, kwargs), block = call, self.blocks[0]
        with torch.no_grad():
            try:
                output = block(*_to(args, device="meta"), **_to(kwargs, device="meta"))
            except Exception:  # its buffers are on the CPU, or its shapes depend on values: run it in earnest
                fill(block, f"{self.prefix}.0.", self._weights)
                output = block(*args, **kwargs)
                self.unload(0)
        return isinstance(output, tuple)

    def _first_call(self, sample: Inputs) -> Call | None:
        """The arguments of the first call of a block; None where there is none."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _CalledError(args, kwargs)

        try:
            self._forward(sample, lambda i: stop)
        except _CalledError as called:
            args, kwargs = called.args
            return args, kwargs
        return None

    def _record(self, sample: Inputs, known: dict[Any, list[torch.Tensor]]) -> torch.Tensor:
        """Note what the blocks are called with for one input; returns the states that go into block 0."""
        same: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        start: list[torch.Tensor] = []

        def stub(i: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = _split(args, kwargs)
                start.append(hidden)
                self._calls[i].append(tree_map(lambda t: _deduplicated(t, known, same), (rest, named)))
                if i == len(self.blocks) - 1:
                    raise _CalledError  # the head is not needed, and with a large vocabulary it costs the most
                return (hidden,) if self._tuples else hidden

            return record

        with suppress(_CalledError):
            self._forward(sample, stub)
        return start[0]

    def load(self, i: int, weights: Weights) -> nn.Module:
        """Fill block i."""
        fill(self.blocks[i], f"{self.prefix}.{i}.", weights, self.dtype, self.device)
        return self.blocks[i]

    def unload(self, i: int) -> None:
        """Put block i back on the meta device: its memory is free again."""
        for module in self.blocks[i].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def run(self, i: int, hidden: torch.Tensor, sample: int) -> torch.Tensor:
        """Block i on `hidden`, called as for input number `sample`, floats in the dtype of the block's parameters."""
        dtype = next((p.dtype for p in self.blocks[i].parameters()), self.dtype)
        hidden, rest, named = _to((hidden, *self._calls[i][sample]), dtype, self.device)
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


def _to(value: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
    """A nest of containers with its tensors on `device`, the floating-point ones in `dtype`."""

    def moved(leaf: Any) -> Any:
        return leaf.to(device, dtype if leaf.is_floating_point() else None) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(moved, value)


def _deduplicated(
    value: Any, known: dict[Any, list[torch.Tensor]], same: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> Any:
    """A tensor, replaced by an earlier one that equals it: masks and rotary tables are those of other windows.

    Args:
        known: (shape, dtype) -> the tensors kept so far. same: id of a tensor of this window -> it, the one kept.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in same:
        kept = known.setdefault((value.shape, value.dtype), [])
        found = next((t for t in kept if torch.equal(t, value)), None)
        if found is None and len(kept) < COMPARED:
            kept.append(value)
        same[id(value)] = (value, value if found is None else found)
    return same[id(value)][1]
