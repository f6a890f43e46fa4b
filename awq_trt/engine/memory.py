"""How much GPU memory a plan takes besides its weights: KV cache, inputs and outputs, activations.

Cache, inputs and outputs follow exactly from the sidecar. Activations are TensorRT's secret until the plan is loaded
(ICudaEngine.device_memory_size_v2), so they are estimated from the graph: the most that tensors between the first and
the last operator that needs them take together, at the largest shapes, when operators run in the file's order.
TensorRT fuses operators, whose results are then never stored, so the estimate is rather too large; but an Attention
operator is taken for a fused one, which stores no scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from awq_trt.export.metadata import Profile, fixed_cache_facts
from awq_trt.export.onnx_file import open_onnx
from awq_trt.export.operator import OP_TYPE

VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity")
"""Operators whose result is their first input, under another shape."""

SMALL_WORKSPACE, LARGE_WORKSPACE = 48 << 20, 160 << 20
SMALL_TOKENS, LARGE_TOKENS = 33, 1024
"""Bytes of workspace that W4A16Gemm may ask for, all layers together, and from how many tokens on (plugins/plan)."""


def activation_bytes(onnx_path: Path, profiles: Sequence[Profile]) -> int | None:
    """Estimate for the largest profile, with the plugin's workspace; None where shapes are unknown."""
    model = open_onnx(onnx_path)
    found = [_peak(_at_largest(model, profile)) for profile in profiles]
    return None if None in found else max(x for x in found if x is not None)


def _at_largest(model: onnx.ModelProto, profile: Profile) -> onnx.GraphProto:
    """The graph with every shape that follows from the largest shapes of its inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    sizes: dict[str, int] = {}
    for value in graph.input:
        _, _, largest = profile.shapes.get(value.name, ((), (), ()))
        for dim, size in zip(value.type.tensor_type.shape.dim, largest, strict=False):
            if dim.dim_param:
                sizes[dim.dim_param] = max(size, sizes.get(dim.dim_param, 0))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    known = [value for value in graph.value_info if _sizes(value) is not None]
    del graph.value_info[:]
    graph.value_info.extend(known)
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError):  # a foreign operator; a file beyond protobuf's 2 GB
        return graph


def _peak(graph: onnx.GraphProto) -> int | None:
    """Most bytes of intermediate tensors at a time; None where a shape is unknown."""
    values = {v.name: v for v in (*graph.value_info, *graph.output)}
    outside = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    root: dict[str, str] = {}  # a view -> the tensor that holds its data
    last: dict[str, int] = {}  # tensor -> the last operator that reads it
    for i, node in enumerate(graph.node):
        if node.op_type in VIEWS and node.input and node.output and node.input[0] not in outside:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
        last |= {root.get(name, name): i for name in node.input}
    live: dict[str, int] = {}  # bytes of the tensors that are stored
    peak = tokens = 0
    for i, node in enumerate(graph.node):
        for name in filter(None, node.output):
            sizes = _sizes(values[name]) if name in values else None
            if sizes is None:
                return None
            if name not in outside and name not in root:
                item = onnx.helper.tensor_dtype_to_np_dtype(values[name].type.tensor_type.elem_type).itemsize
                live[name] = math.prod(sizes) * int(item)
            if node.op_type == OP_TYPE:
                tokens = max(tokens, math.prod(sizes[:-1]))
        peak = max(peak, sum(live.values()))
        for name in {root.get(name, name) for name in (*node.input, *node.output)}:
            if last.get(name, i) <= i:
                live.pop(name, None)
    return peak + (LARGE_WORKSPACE if tokens >= LARGE_TOKENS else SMALL_WORKSPACE if tokens >= SMALL_TOKENS else 0)


def _sizes(value: onnx.ValueInfoProto) -> list[int] | None:
    """The shape, None where a part of it is unknown."""
    kind = value.type.tensor_type
    known = kind.elem_type and kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim)
    return [dim.dim_value for dim in kind.shape.dim] if known else None


def cache_and_io(sidecar: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the KV cache, and of the other inputs and outputs, at the largest shapes of any profile.

    A fixed cache is one buffer for past and present. A dynamic one is two: past in, longer past out.

    Args:
        sidecar: content of a plan's sidecar.
    """
    tensors = [*sidecar["inputs"], *sidecar["outputs"]]
    if fixed_cache_facts(sidecar["model"]):
        tensors = [t for t in tensors if not t["name"].startswith("present.")]
    caches, others = [0], [0]
    for profile in sidecar["profiles"]:
        dims: dict[Any, int] = {}
        for tensor in sidecar["inputs"]:
            dims |= zip(tensor["dims"], profile["inputs"][tensor["name"]]["max"], strict=True)
        sums = [0, 0]
        for tensor in tensors:
            bits = int(re.sub(r"\D", "", tensor["dtype"]) or 8)  # "bool" is the one without a number
            size = math.prod(d if isinstance(d, int) else dims.get(d, 1) for d in tensor["dims"]) * bits // 8
            sums[not tensor["name"].startswith(("past_key_values.", "present."))] += size
        caches.append(sums[0])
        others.append(sums[1])
    return max(caches), max(others)


def max_batch(sidecar: Mapping[str, Any]) -> int:
    """The largest batch of any profile; 1 where the batch is not a dimension of its own."""
    batched = [t for t in sidecar["inputs"] if t["dims"] and t["dims"][0] == "batch_size"]
    return max((p["inputs"][t["name"]]["max"][0] for p in sidecar["profiles"] for t in batched), default=1)
