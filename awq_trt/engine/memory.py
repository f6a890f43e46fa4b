"""How much GPU memory a plan takes besides its weights: KV cache, inputs and outputs, activations.

Cache, inputs and outputs follow exactly from the sidecar. Activations are TensorRT's secret until the plan is loaded
(ICudaEngine.device_memory_size_v2), so they are estimated from the graph: the most that tensors between the first and
the last operator that needs them take together, at the largest shapes, when operators run in the file's order.
TensorRT fuses operators, whose results are then never stored, so the estimate is rather too large; but an Attention
operator is taken for a fused one, which stores no scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from awq_trt.export.metadata import Profile, fixed_cache_facts
from awq_trt.export.operator import OP_TYPE

VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity")
"""Operators whose result is their first input, under another shape."""

SMALL_WORKSPACE, LARGE_WORKSPACE = 48 << 20, 160 << 20
SMALL_TOKENS, LARGE_TOKENS = 33, 1024
"""Bytes of workspace that W4A16Gemm may ask for, and from how many tokens on (plugins/plan)."""


def workspace_bytes(tokens: int) -> int:
    """The most that W4A16Gemm asks for, in calls of up to this many tokens; all layers share it."""
    return LARGE_WORKSPACE if tokens >= LARGE_TOKENS else SMALL_WORKSPACE if tokens >= SMALL_TOKENS else 0


def activation_bytes(onnx_path: Path, profiles: Sequence[Profile]) -> int | None:
    """Estimate for the largest profile, with the plugin's workspace; None where shapes are unknown."""
    model = onnx.load(str(onnx_path), load_external_data=False)
    found = [_peak(_at_largest(model, profile).graph) for profile in profiles]
    return None if None in found else max(x for x in found if x is not None)


def _at_largest(model: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """The model with every shape that follows from the largest shapes of its inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    sizes: dict[str, int] = {}
    for value in copy.graph.input:
        _, _, largest = profile.shapes.get(value.name, ((), (), ()))
        for dim, size in zip(value.type.tensor_type.shape.dim, largest, strict=False):
            if dim.dim_param:
                sizes[dim.dim_param] = max(size, sizes.get(dim.dim_param, 0))
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    known = [value for value in copy.graph.value_info if _bytes(value) is not None]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(known)
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):  # a foreign operator; a file beyond protobuf's 2 GB
        return copy


def _peak(graph: onnx.GraphProto) -> int | None:
    """Most bytes of intermediate tensors at a time; None where a shape is unknown."""
    values = {v.name: v for v in (*graph.value_info, *graph.output)}
    outside = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    root: dict[str, str] = {}  # a view -> the tensor that holds its data
    last: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        if node.op_type in VIEWS and node.input[0] not in outside:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
        last |= {root.get(name, name): i for name in node.input}
    live: dict[str, int] = {}
    peak = tokens = 0
    for i, node in enumerate(graph.node):
        for name in filter(None, node.output):
            size = _bytes(values[name]) if name in values else None
            if size is None:
                return None
            if name not in outside and name not in root:
                live[name] = size
            if node.op_type == OP_TYPE:
                tokens = max(tokens, _rows(values[name]))
        peak = max(peak, sum(live.values()))
        for name in {root.get(name, name) for name in (*node.input, *node.output)}:
            if last.get(name, i) <= i:
                live.pop(name, None)
    return peak + workspace_bytes(tokens)


def _sizes(value: onnx.ValueInfoProto) -> list[int] | None:
    kind = value.type.tensor_type
    known = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim)
    return [dim.dim_value for dim in kind.shape.dim] if known else None


def _bytes(value: onnx.ValueInfoProto) -> int | None:
    sizes = _sizes(value)
    if sizes is None:
        return None
    return math.prod(sizes) * int(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize)


def _rows(value: onnx.ValueInfoProto) -> int:
    return math.prod((_sizes(value) or [0])[:-1])


ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int64": 8, "int32": 4, "int8": 1, "uint8": 1,
              "bool": 1}  # fmt: skip


def cache_and_io(sidecar: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the KV cache, and of the other inputs and outputs, at the largest shapes of any profile.

    A fixed cache is one buffer for past and present. A dynamic one is two: past in, longer past out.

    Args:
        sidecar: content of a plan's sidecar.
    """
    fixed = bool(fixed_cache_facts(sidecar["model"]))
    pasts, others = 0, 0
    for profile in sidecar["profiles"]:
        dims: dict[str, int] = {}
        for tensor in sidecar["inputs"]:
            dims |= zip(map(str, tensor["dims"]), profile["inputs"][tensor["name"]]["max"], strict=True)
        past = other = 0
        for tensor in (*sidecar["inputs"], *sidecar["outputs"]):
            sizes = [d if isinstance(d, int) else dims.get(d, 1) for d in tensor["dims"]]
            size = math.prod(sizes) * ITEM_BYTES.get(tensor["dtype"], 4)
            if tensor["name"].startswith("present.") and fixed:
                continue  # the buffer of its past
            if tensor["name"].startswith(("past_key_values.", "present.")):
                past += size
            else:
                other += size
        pasts, others = max(pasts, past), max(others, other)
    return pasts, others


def max_batch(sidecar: Mapping[str, Any]) -> int:
    """The largest batch of any profile; 1 where the batch is not a dimension of its own."""
    batched = [t for t in sidecar["inputs"] if t["dims"] and t["dims"][0] == "batch_size"]
    return max((p["inputs"][t["name"]]["max"][0] for p in sidecar["profiles"] for t in batched), default=1)
