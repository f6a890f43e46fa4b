"""Which quantized layers become one W4A16Gemm: those that read the same tensor (Q, K, V; gate, up) and agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs
import torch

from awq_trt import layout
from awq_trt.linear import QuantizedLinear

MAX_OUTPUTS = 4
"""Layers that one W4A16Gemm computes at most."""


@dataclass(frozen=True)
class FusedNode:
    """A node that is several layers: its `name` in the graph, the names of its `layers`, the out_features of each."""

    name: str
    layers: tuple[str, ...]
    splits: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A quantized layer in a graph.

    Attributes:
        name: of the module. nodes: the products that apply its weight. biases: what is added to each, [] or [bias].
    """

    name: str
    linear: QuantizedLinear
    nodes: list[gs.Node]
    biases: list[list[gs.Constant]]


def same_input(graph: gs.Graph, nodes: Mapping[str, list[gs.Node]]) -> list[list[str]]:
    """The weights that are applied to the same tensor, in the order of the graph.

    Args:
        nodes: name of a weight -> the products that apply it. One with several is alone in its list.
    """
    place = {id(node): i for i, node in enumerate(graph.nodes)}  # without those of subgraphs: they stay alone too
    together: defaultdict[str | int, list[str]] = defaultdict(list)
    for name, (node, *others) in nodes.items():
        together[name if others or id(node) not in place else id(node.inputs[0])].append(name)
    return [sorted(names, key=lambda name: place.get(id(nodes[name][0]), 0)) for names in together.values()]


def agreeing(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Sort layers that read the same tensor into groups that one node can compute; a full group comes at once."""
    waiting: list[list[Layer]] = []
    for layer in layers:
        at = next((i for i, group in enumerate(waiting) if _agree(group, layer)), len(waiting))
        if at == len(waiting):
            waiting.append([])
        waiting[at].append(layer)
        if len(waiting[at]) == MAX_OUTPUTS:
            yield waiting.pop(at)
    yield from waiting


def _agree(group: list[Layer], layer: Layer) -> bool:
    """Whether a layer can join others: what a node has one of must be equal, and the kernels take the rows of each."""
    a, b = group[0].linear, layer.linear
    n, k = sum(member.linear.q.shape[0] for member in (*group, layer)), b.q.shape[1]
    return (
        (a.q.shape[1], a.group_size, a.scales.dtype) == (k, b.group_size, b.scales.dtype)
        and (a.zeros is None) == (b.zeros is None)
        and any(group[0].biases) == any(layer.biases)
        and _equal(a.pre_scale, b.pre_scale)
        and not any(linear.q.shape[0] % layout.STORED for linear in (a, b))
        and layout.supports(n, k, b.group_size, str(b.scales.dtype).removeprefix("torch."))
    )


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def stacked(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Layers [N0, K], [N1, K], ... that agree, as one [N0 + N1 + ..., K]."""
    if len(linears) == 1:
        return linears[0]
    zeros = [linear.zeros for linear in linears if linear.zeros is not None]
    q, scales = torch.cat([linear.q for linear in linears]), torch.cat([linear.scales for linear in linears])
    return replace(linears[0], q=q, scales=scales, zeros=torch.cat(zeros) if zeros else None)
