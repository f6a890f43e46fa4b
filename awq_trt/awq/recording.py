"""What the blocks of a model are called with, noted during one forward in which none of them computes.

In place of a block's output the model gets tensors of the same shape full of NaN. A later call that holds one of them,
the very object, is noted as reading that output; one that holds NaN otherwise was computed from outputs outside the
blocks, and such a model cannot be run block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from awq_trt.checkpoint.model import check_order
from awq_trt.errors import AwqTrtError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments; an `Output` where they hold what a block returns."""
COMPARED = 4
"""Tensors of a shape that those of further windows are compared with; where each window has its own, none is equal."""


@dataclass(frozen=True, order=True)
class Output:
    """One leaf of what a block returns, as it is found in the call of a later one."""

    block: int
    leaf: int


HIDDEN = Output(-1, 0)
"""The hidden states: of block 0 what the model makes of its inputs, of others what the block before returns first."""


@dataclass(frozen=True)
class Form:
    """What a block returns, without the values."""

    leaves: tuple[Any, ...]  # tensors are on the meta device
    spec: TreeSpec  # of the containers that the leaves are in

    @classmethod
    def of(cls, output: Any) -> Form:
        """The form of an output.

        Raises:
            AwqTrtError: there is no tensor in it.
        """
        leaves, spec = tree_flatten(output)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise AwqTrtError(f"a block returns {type(output).__name__} without a tensor in it")
        return cls(tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in leaves), spec)

    @property
    def hidden(self) -> int:
        """Which leaf holds the hidden states: the first tensor."""
        return next(j for j, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor))

    def filled(self, hidden: torch.Tensor | None = None) -> Any:
        """An output of this form with these hidden states; tensors are full of NaN (integers: 0) otherwise."""

        def empty(j: int, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if j == self.hidden:
                return torch.full_like(leaf, torch.nan, device="cpu") if hidden is None else hidden
            value = torch.nan if leaf.is_floating_point() else 0
            return torch.full((), value, dtype=leaf.dtype).expand(leaf.shape)  # takes no memory

        return tree_unflatten([empty(j, leaf) for j, leaf in enumerate(self.leaves)], self.spec)


class EnoughError(Exception):
    """Ends a forward behind its blocks: the head is not needed, and with a large vocabulary it costs the most."""


class UnknownError(Exception):
    """Ends a forward at a call of a kind that is in no form yet."""

    def __init__(self, kind: str, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(kind)
        self.kind, self.block, self.args_, self.kwargs = kind, block, args, kwargs


def kind(block: nn.Module) -> str:
    """Blocks of one kind return the same when they are called alike."""
    return repr((type(block).__name__, [tuple(p.shape) for p in block.parameters()]))


class Recording:
    """The calls of one forward. `stub(i)` takes the place of block i's forward.

    Args:
        names, kinds: of the blocks, see `kind`. where: what calls them, for messages. forms: kind of call -> what it
            returns.
        known: (shape, dtype) -> tensors of earlier windows, which equal ones of this window are replaced by.
    """

    def __init__(
        self,
        names: list[str],
        kinds: list[str],
        where: str,
        forms: dict[str, Form],
        known: dict[Any, list[torch.Tensor]],
    ) -> None:
        self.calls: list[Call] = []
        self.forms: list[Form] = []  # of the calls
        self.start = torch.empty(0)  # the hidden states that go into block 0
        self._names, self._kinds, self._where, self._forms, self._known = names, kinds, where, forms, known
        self._made: dict[int, tuple[torch.Tensor, Output]] = {}  # id of a tensor made here -> it, what it stands for
        self._hidden: torch.Tensor | None = None  # the hidden states that go into the block being called
        self._same: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id of a tensor of this window -> it, as noted

    def stub(self, i: int) -> Callable[..., Any]:
        """A forward that notes its arguments and computes nothing."""

        def note(*args: Any, **kwargs: Any) -> Any:
            check_order(self._where, self._names, i, len(self.calls))
            if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
                raise ValueError(f"{self._names[i]} is called with a weight that has no values")
            kind = repr((self._kinds[i], tree_map(_described, (args, kwargs))))
            if kind not in self._forms:
                raise UnknownError(kind, i, args, kwargs)
            self._take_hidden(i, _hidden(args, kwargs))
            self.calls.append(tree_map(self._noted, (args, kwargs)))
            self.forms.append(self._forms[kind])
            output = self.forms[i].filled()
            for j, leaf in enumerate(tree_leaves(output)):
                if isinstance(leaf, torch.Tensor):
                    self._made[id(leaf)] = leaf, Output(i, j)
            return output

        return note

    @property
    def complete(self) -> bool:
        """Whether all blocks were called."""
        return len(self.calls) == len(self._names)

    def _take_hidden(self, i: int, hidden: torch.Tensor | None) -> None:
        """Note which tensor the hidden states are."""
        if hidden is None:
            raise AwqTrtError(f"{self._where} calls {self._names[i]} without hidden states.")
        self._hidden = hidden
        if i == 0:
            self.start = hidden
        elif id(hidden) not in self._made or self._made[id(hidden)][1] != Output(i - 1, self.forms[i - 1].hidden):
            raise AwqTrtError(
                f"{self._where} computes something between {self._names[i - 1]} and {self._names[i]}; only models "
                "whose blocks read what the block before returned can be run block by block."
            )

    def _noted(self, leaf: Any) -> Any:
        """A leaf of a call as it is kept."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf is self._hidden:
            return HIDDEN
        if id(leaf) in self._made:
            return self._made[id(leaf)][1]
        if id(leaf) not in self._same:
            if leaf.is_floating_point() and leaf.isnan().any():
                raise AwqTrtError(
                    f"{self._where} calls {self._names[len(self.calls)]} with something that it computes from what "
                    "earlier blocks return; such a model cannot be run block by block."
                )
            kept = self._known.setdefault((leaf.shape, leaf.dtype), [])
            found = next((t for t in kept if torch.equal(t, leaf)), None)
            if found is None and len(kept) < COMPARED:
                kept.append(leaf)
            self._same[id(leaf)] = (leaf, leaf if found is None else found)
        return self._same[id(leaf)][1]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states among the arguments of a block: so named, or the first floats."""
    values = (*args, *([kwargs["hidden_states"]] if "hidden_states" in kwargs else []), *kwargs.values())
    return next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)


def _described(leaf: Any) -> Any:
    """What the form of a block's output may depend on in an argument."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), str(leaf.dtype)
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__
