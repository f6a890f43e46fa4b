"""Opening an ONNX file that anyone may have written: what is read of it afterwards is there and fits together.

Its weights are not read. Source of the rules: ONNX IR (tensors, external data), operator.py (W4A16Gemm).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import _get_all_tensors

from awq_trt.errors import AwqTrtError, brief
from awq_trt.export.operator import ATTRIBUTES, OP_TYPE, OPTIONAL_INPUTS
from awq_trt.files import inside
from awq_trt.layout import padded_features, unsupported_reason
from awq_trt.schema import regular_file

MAX_BYTES = (1 << 31) - 1
"""Of a protobuf message."""
LARGEST = 1 << 48
"""Bytes of a tensor at most, and its largest dimension: far beyond any, and sums of them are still exact."""
MOST_DIMS = 64
"""Of a tensor: far beyond any."""
LEAST = {"batch_dims": 0, "axis": -MOST_DIMS, "axes": -MOST_DIMS, "perm": 0}
"""Attribute that counts dimensions -> its least value."""
FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4)
NUMBERS = {number for name, number in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING")}


@dataclass(frozen=True)
class Place:
    """Where a tensor's data lie in an external file."""

    location: str  # relative to the ONNX file
    offset: int
    length: int  # in bytes, which are those of its shape and type


def open_onnx(path: Path) -> onnx.ModelProto:
    """A model without its external data.

    Raises:
        AwqTrtError: no such file, none of ONNX, one whose tensors or W4A16Gemm nodes are not what they say, or whose
            external data lie in another folder.
    """
    if regular_file(path).stat().st_size > MAX_BYTES:
        raise AwqTrtError(f"{path}: larger than an ONNX file can be (2 GiB). Give the path of an ONNX file.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf raises its own DecodeError, whose class differs between implementations
        raise AwqTrtError(f"{path}: not an ONNX file, or cut short ({brief(error)}). Export it again.") from error
    if not model.graph.node:
        raise AwqTrtError(f"{path}: not an ONNX model: it holds no operators. Export it again.")
    if trouble := next(_troubles(model), None):
        raise AwqTrtError(f"{path}: {trouble}. Export it again.")
    external_tensors(model, path)  # none may lie in another folder
    return model


def place_of(tensor: TensorProto) -> Place:
    """Of a tensor with external data.

    Raises:
        AwqTrtError: the description is not complete.
    """
    found = {entry.key: entry.value for entry in tensor.external_data}
    location, offset, length = (found.get(key, "") for key in ("location", "offset", "length"))
    size = tensor_bytes(tensor)
    whole = all(number.isascii() and number.isdigit() and len(number) < 19 for number in (offset or "0", length or "0"))
    if len(location) > 4096 or not whole or int(length or size) != size:
        described = ", ".join(f"{key} {value[:40]!r}" for key, value in found.items())
        raise AwqTrtError(f"external data of tensor {tensor.name[:200]!r} ({size} bytes): {described or 'no place'}.")
    return Place(location, int(offset or 0), size)


def tensor_bytes(tensor: TensorProto) -> int:
    """Size of a tensor's data, from its shape and type; 4-bit types are packed two to a byte."""
    if tensor.data_type in FOUR_BITS:
        return -(-math.prod(tensor.dims) // 2)
    return math.prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _troubles(model: onnx.ModelProto) -> Iterator[str]:
    """What is wrong with a model, a sentence each without its full stop."""
    graph = model.graph
    if any(isinstance(text, bytes) for text in _texts(model)):  # what protobuf gives for bytes that are no UTF-8
        yield "a name in it is no text"
        return
    for tensor in _get_all_tensors(model):
        name = f"tensor {tensor.name[:200]!r}"
        if tensor.data_type == TensorProto.STRING:
            continue
        if tensor.data_type not in NUMBERS:
            yield f"{name} is of the unknown type {tensor.data_type}"
        elif any(not 0 <= dim <= LARGEST for dim in tensor.dims) or tensor_bytes(tensor) > LARGEST:
            yield f"{name} has the shape {list(tensor.dims)[:8]}"
        elif tensor.data_location == TensorProto.EXTERNAL:
            try:
                place_of(tensor)
            except AwqTrtError as error:
                yield str(error).removesuffix(".")
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != tensor_bytes(tensor):
            yield f"{name} has {len(tensor.raw_data)} bytes and the shape {list(tensor.dims)[:8]}"
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind, name = value.type.tensor_type, f"tensor {value.name[:200]!r}"
        if value.type.HasField("tensor_type") and kind.elem_type not in TensorProto.DataType.values():
            yield f"{name} is of the unknown type {kind.elem_type}"
        if any(dim.HasField("dim_value") and not 0 <= dim.dim_value < 2**31 for dim in kind.shape.dim):
            yield f"{name} has the shape {[dim.dim_value or dim.dim_param for dim in kind.shape.dim][:8]}"
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:  # ONNX Runtime does not look at all of them before it uses them
            least = LEAST.get(attribute.name)
            numbers = list(attribute.ints) or [attribute.i]
            if least is not None and not least <= min(numbers) <= max(numbers) <= MOST_DIMS:
                yield f"node {node.name[:200]} ({node.op_type[:200]}) has the {attribute.name} {numbers[:8]}"
        if node.op_type == OP_TYPE:
            name = f"{node.name[:200]} ({OP_TYPE})"
            yield from (f"node {name} {trouble}" for trouble in _node_troubles(node, constants))


def _texts(model: onnx.ModelProto) -> Iterator[Any]:
    """Every string that is read here or by those who open a file through this."""
    graph = model.graph
    for node in graph.node:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in _get_all_tensors(model):
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    yield from (text for entry in model.metadata_props for text in (entry.key, entry.value))
    yield from (opset.domain for opset in model.opset_import)


def _node_troubles(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> Iterator[str]:
    attributes = {a.name: a for a in node.attribute}
    wrong = [n for n in ATTRIBUTES if n not in attributes or attributes[n].type != onnx.AttributeProto.INT]
    if wrong:
        yield f"has no attribute {wrong[0]!r} of the type INT32"
        return
    n, k, group, *has = (attributes[name].i for name in ATTRIBUTES)
    splits = list(attributes["splits"].ints) if "splits" in attributes else [n]
    if not (0 < n < 2**31 and 0 < k < 2**31 and group > 0 and set(has) <= {0, 1}):
        yield f"has {', '.join(f'{name} {attributes[name].i}' for name in ATTRIBUTES)}"
        return
    if reason := unsupported_reason(padded_features(n), k, group):
        yield f"cannot be run: {reason}"
        return
    if len(node.input) != 3 + sum(has) or len(node.output) != len(splits) or sum(splits) != n or min(splits) < 1:
        described = f"{len(node.input)} inputs and {len(node.output)} outputs"
        yield f"has {described}; its attributes need {3 + sum(has)} inputs, and outputs of {n} features together"
        return
    tiles, groups = -(-n // 16), k // group
    shapes: dict[str, tuple[list[int], Any]] = {
        "qweight": ([tiles, -(-k // 64), 32, 4], TensorProto.INT32),
        "scales": ([tiles, groups, 8, 2], None),
        "zeros": ([tiles, groups, 2], TensorProto.INT32),
        "bias": ([n], None),
        "pre_scale": ([k], None),
    }
    names = ["qweight", "scales", *(name for name, there in zip(OPTIONAL_INPUTS, has, strict=True) if there)]
    for part, input in zip(names, node.input[1:], strict=True):
        shape, kind = shapes[part]
        found = constants.get(input)
        if found is None or list(found.dims) != shape or (kind is not None and found.data_type != kind):
            yield f"has no constant {part} of the shape {shape}"


def check_external_data(model: onnx.ModelProto, path: Path) -> int:
    """Bytes in all external data files.

    Raises:
        AwqTrtError: one is missing, or shorter than the tensors that lie in it.
    """
    sizes: dict[Path, int] = {}
    for tensor, file in external_tensors(model, path):
        place = place_of(tensor)
        if file not in sizes:
            if not file.exists():
                raise AwqTrtError(f"{path}: its weights are in {file}, which is missing. Put it beside the ONNX file.")
            sizes[file] = regular_file(file).stat().st_size
        end = place.offset + place.length
        if sizes[file] < end:
            raise AwqTrtError(
                f"{file}: {sizes[file]} bytes, but tensor {tensor.name!r} ends at byte {end}: the file is cut short. "
                "Copy it again, or export again."
            )
    return sum(sizes.values())


def external_tensors(model: onnx.ModelProto, path: Path) -> list[tuple[TensorProto, Path]]:
    """The tensors of an ONNX file whose data lie in another one (initializers, constants of nodes and functions), and
    where that is.

    Args:
        path: of the ONNX file.

    Raises:
        AwqTrtError: outside of its folder.
    """
    external = (t for t in _get_all_tensors(model) if t.data_location == TensorProto.EXTERNAL)
    return [(tensor, inside(path.parent, place_of(tensor).location, str(path))) for tensor in external]
