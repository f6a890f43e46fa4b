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
    """A node that computes several layers."""

    name: str  # of the node
    layers: tuple[str, ...]
    splits: tuple[int, ...]  # out_features of each layer


@dataclass(frozen=True, eq=False)
class Layer:
    """A quantized layer in a graph."""

    name: str  # of the module
    linear: QuantizedLinear
    nodes: list[gs.Node]  # the products that apply its weight
    biases: list[list[gs.Constant]]  # what is added to each product, [] or [bias]


def same_input(graph: gs.Graph, nodes: Mapping[str, list[gs.Node]]) -> list[list[str]]:
    """Sort weights by the tensor they are applied to; in a list they are in the order of the graph.

    Args:
        nodes: weight -> the products that apply it. A weight of several products, or of a subgraph's, stays alone.
    """
    index = {id(node): i for i, node in enumerate(graph.nodes)}
    together: defaultdict[str | int, list[str]] = defaultdict(list)
    for name, (node, *others) in nodes.items():
        together[name if others or id(node) not in index else id(node.inputs[0])].append(name)
    return [sorted(names, key=lambda name: index.get(id(nodes[name][0]), 0)) for names in together.values()]


def agreeing(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Sort layers that read the same tensor into groups that one node can compute; a full group comes at once."""
    groups: list[list[Layer]] = []
    for layer in layers:
        at = next((i for i, group in enumerate(groups) if _agree(group, layer)), len(groups))
        if at == len(groups):
            groups.append([])
        groups[at].append(layer)
        if len(groups[at]) == MAX_OUTPUTS:
            yield groups.pop(at)  # nothing here holds its layers any longer
    yield from groups


def _agree(group: list[Layer], layer: Layer) -> bool:
    """Whether a layer can join others: a node has one K, group size, dtype and pre-scale, and zeros and biases for all
    rows or none; the kernels want rows in multiples of 8, and not too many."""
    a, b = group[0].linear, layer.linear
    n, k = sum(member.linear.q.shape[0] for member in (*group, layer)), b.q.shape[1]
    return (
        (a.q.shape[1], a.group_size, a.scales.dtype) == (k, b.group_size, b.scales.dtype)
        and (a.zeros is None) == (b.zeros is None)
        and any(group[0].biases) == any(layer.biases)
        and (a.pre_scale is None) == (b.pre_scale is None)
        and (a.pre_scale is None or b.pre_scale is None or torch.equal(a.pre_scale, b.pre_scale))
        and not any(linear.q.shape[0] % layout.STORED for linear in (a, b))
        and layout.supports(n, k, b.group_size, str(b.scales.dtype).removeprefix("torch."))
    )


def stacked(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Layers [N0, K], [N1, K], ... that agree, as one [N0 + N1 + ..., K]."""
    if len(linears) == 1:
        return linears[0]
    zeros = [linear.zeros for linear in linears if linear.zeros is not None]
    q, scales = torch.cat([linear.q for linear in linears]), torch.cat([linear.scales for linear in linears])
    return replace(linears[0], q=q, scales=scales, zeros=torch.cat(zeros) if zeros else None)
