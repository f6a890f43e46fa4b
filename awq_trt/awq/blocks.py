"""Running a model one block at a time, with the weights of one block in memory.

Transformers are a list of like blocks between an embedding and a head. `BlockStream` finds that list, records once
what every block is called with (masks, rotary tables), and then runs block i on the hidden states that block i-1
left. What a model is called does not matter; that it has such a list does, and that each block is called once, on what
the block before it returned. A block may return more than hidden states, and a later one may read that (T5's position
bias): then it is carried from block to block with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from awq_trt.awq.outside import Outside, Weights, fill
from awq_trt.awq.recording import HIDDEN, Call, EnoughError, Form, Output, Recording, UnknownError, kind
from awq_trt.checkpoint.model import check_order, empty_model, find_blocks, main_output
from awq_trt.errors import AwqTrtError

Inputs = dict[str, torch.Tensor]
State = tuple[torch.Tensor, ...]
"""What goes into a block: hidden states, then what earlier blocks returned besides and it or a later one reads."""


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
        self._where = f"{type(self.model).__name__}: its forward"
        self._names = [f"{self.prefix}.{i}" for i in range(len(self.blocks))]
        self._block_kinds = [kind(block) for block in self.blocks]
        self.inputs = inputs
        self.dtype, self.device = dtype, torch.device(device)  # of a block that is loaded, and of what it computes
        self.outside = Outside(self.model, self.blocks, weights)  # fp32 on the CPU, only while a forward runs
        self._weights = weights
        self._calls: list[list[Call]] = []  # per input and block
        self._forms: list[list[Form]] = []  # what these calls return
        self._fills_all = False  # the model uses a weight without calling its module

    def record(self) -> Iterator[State]:
        """Note what the blocks are called with for each input, and yield what goes into block 0.

        Raises:
            AwqTrtError: the model cannot be run on these inputs, or not block by block.
        """
        known: dict[Any, list[torch.Tensor]] = {}
        forms: dict[str, Form] = {}
        for sample in self.inputs:
            recording = self._record(sample, forms, known)
            self._calls.append(recording.calls)
            self._forms.append(recording.forms)
            yield (recording.start.to(self.dtype),)
        self.outside.empty()

    def _record(self, sample: Inputs, forms: dict[str, Form], known: dict[Any, list[torch.Tensor]]) -> Recording:
        """One input's calls. A kind of call not met before ends the forward, is tried, and the forward begins anew."""
        while True:
            recording = Recording(self._names, self._block_kinds, self._where, forms, known)
            handle = register_module_forward_pre_hook(partial(self._end, recording))
            try:
                self._forward(sample, recording.stub)
            except EnoughError:
                return recording
            except UnknownError as call:
                forms[call.kind] = self._form(call.block, call.args_, call.kwargs)
            except AwqTrtError:
                raise
            except Exception as error:
                if recording.complete:
                    return recording  # what follows the blocks is not to be run
                if self._fills_all:
                    shapes = {n: list(t.shape) for n, t in sample.items()}
                    raise AwqTrtError(
                        f"{type(self.model).__name__}: the model could not be run on the calibration inputs {shapes}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                self._fills_all = True
                self.outside.fill_all()
            else:
                if recording.complete:
                    return recording
                raise AwqTrtError(f"{self._where} never calls {self._names[len(recording.calls)]}.")
            finally:
                handle.remove()

    def _end(self, recording: Recording, module: nn.Module, _: Any) -> None:
        """A hook before every module: ends a forward that is past its blocks."""
        if recording.complete and all(module is not block for block in self.blocks):
            raise EnoughError

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

    def _form(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
        """What block i returns when it is called so: tried on a copy on the meta device, or, where that fails because
        its shapes depend on values, in earnest. A copy, because some blocks keep what they compute (GPT-J)."""
        with torch.no_grad():
            try:
                empty = copy.deepcopy(self.blocks[i]).to("meta")
                return Form.of(empty(*_to(args, device="meta"), **_to(kwargs, device="meta")))
            except Exception:
                block = copy.deepcopy(self.blocks[i])
                fill(block, f"{self.prefix}.{i}.", self._weights)
            args, kwargs = tree_map(_ordinary, (args, kwargs))
            try:
                return Form.of(block(*args, **kwargs))
            except Exception as error:
                raise AwqTrtError(
                    f"{type(self.model).__name__}: {self.prefix}.{i} could not be run on what its forward gives it: "
                    f"{type(error).__name__}: {error}"
                ) from error

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

    def carried(self, i: int, sample: int) -> list[Output]:
        """What earlier blocks return, besides hidden states, that block i or a later one reads: the rest of a `State`
        that goes into block i."""
        leaves = tree_leaves(self._calls[sample][i:])
        return sorted({leaf for leaf in leaves if isinstance(leaf, Output) and 0 <= leaf.block < i})

    def like_input(self, i: int, state: State, sample: int) -> State:
        """Hidden states as block i gets them, made of those of another block: repeated, or cut. For a dry run."""
        if i == 0:
            return state
        form = self._forms[sample][i - 1]
        shape = form.leaves[form.hidden].shape
        values = state[0].flatten()
        return (values.repeat(-(-shape.numel() // len(values)))[: shape.numel()].reshape(shape), *state[1:])

    def run(self, i: int, state: State, sample: int) -> State:
        """Block i on `state`, called as for input number `sample`, floats in the dtype of the block's parameters."""
        values = {HIDDEN: state[0], **dict(zip(self.carried(i, sample), state[1:], strict=False))}

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Output):
                return leaf
            if leaf in values:
                return values[leaf]
            made = self._forms[sample][leaf.block].leaves[leaf.leaf]
            return torch.zeros_like(made, device="cpu")  # a dry run of this block, which comes without

        dtype = next((p.dtype for p in self.blocks[i].parameters()), self.dtype)
        args, kwargs = _to(tree_map(value, self._calls[sample][i]), dtype, self.device)
        with torch.no_grad():
            leaves = tree_leaves(self.blocks[i](*args, **kwargs))
        values |= {Output(i, j): leaf for j, leaf in enumerate(leaves)}
        hidden = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        return (hidden, *(values[output] for output in self.carried(i + 1, sample)))

    def head(self, state: State, sample: int) -> torch.Tensor:
        """What the model makes of the last block's output: its logits, or else embeddings or the last hidden state.

        Raises:
            AwqTrtError: it reads what other blocks return, too.
        """
        hidden = state[0].to("cpu", torch.float32)
        last = len(self.blocks) - 1
        called: list[int] = []

        def stub(i: int) -> Callable[..., Any]:
            def give(*args: Any, **kwargs: Any) -> Any:
                check_order(self._where, self._names, i, len(called))
                called.append(i)
                return self._forms[sample][i].filled(hidden if i == last else None)

            return give

        if self._fills_all:
            self.outside.fill_all()
        try:
            output = self._forward(self.inputs[sample], stub)
        except AwqTrtError:
            raise
        except Exception as error:
            if self._fills_all:
                raise AwqTrtError(
                    f"{type(self.model).__name__}: what follows {self.prefix}.{last} could not be run on its output: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._fills_all = True
            return self.head(state, sample)
        result: torch.Tensor = output[main_output(output)]
        if result.isnan().any() and not hidden.isnan().any():
            raise AwqTrtError(
                f"{type(self.model).__name__}: its output is computed from more than what {self.prefix}.{last} "
                "returns, so that it cannot be run block by block."
            )
        return result


def _to(value: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
    """A nest of containers with its tensors on `device`, the floating-point ones in `dtype`."""

    def moved(leaf: Any) -> Any:
        return leaf.to(device, dtype if leaf.is_floating_point() else None) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(moved, value)


def _ordinary(leaf: Any) -> Any:
    """A tensor without the NaN of `Form.filled`."""
    is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.nan_to_num() if is_float else leaf
