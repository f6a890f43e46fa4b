"""The facts of an ONNX file that an engine is built from, read without its weights, and its optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from awq_trt.errors import AwqTrtError
from awq_trt.export.facts import Metadata
from awq_trt.export.onnx_file import check_external_data, external_tensors, open_onnx, tensor_bytes
from awq_trt.export.operator import OP_TYPE
from awq_trt.files import verify
from awq_trt.outputs import Output, file_name
from awq_trt.schema import parse_json

METADATA_KEY = PRODUCER = "awq_trt"

MARK = b"\x12\x07" + PRODUCER.encode()
"""In the first bytes of our ONNX files: field 2, producer_name, of seven bytes."""

MAX_SEQ = 2048
"""Default number of tokens, for graphs without a fixed cache."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A graph input or output; `shape` holds sizes, or the name of a dynamic dimension; dtype like "float16"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> Shape:
        """The shape with -1 for every dynamic dimension, as TensorRT and Triton write it."""
        return tuple(d if isinstance(d, int) else -1 for d in self.shape)


@dataclass(frozen=True)
class Profile:
    """One optimization profile: the smallest, the tuned and the largest shape of every input."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class GraphFacts:
    """An ONNX file without its weights; sizes in bytes."""

    path: Path
    opset: int
    inputs: tuple[Tensor, ...]  # in the graph's order, without the initializers that are listed as inputs too
    outputs: tuple[Tensor, ...]
    metadata: dict[str, Any]  # what the exporter wrote under METADATA_KEY; {} for a foreign file
    plugin_nodes: int  # W4A16Gemm nodes, each one layer or several
    quantized_bytes: int  # their packed weights, scales, zeros, biases and pre-scales
    float_bytes: int  # every other initializer
    onnx_bytes: int  # the file
    data_bytes: int  # its external data files


def read_graph(path: Path) -> GraphFacts:
    """Read an ONNX file and check that its external data is complete and the one it was written with.

    Raises:
        AwqTrtError: no such file, not an ONNX file, or external data missing, too short, outside of its folder or of
            another export.
    """
    model = open_onnx(path)
    graph = model.graph
    sizes = {t.name: tensor_bytes(t) for t in graph.initializer}
    quantized = {i for n in graph.node if n.op_type == OP_TYPE for i in n.input[1:] if i in sizes}
    data_bytes, metadata = check_external_data(model, path), graph_metadata(model, path)
    if known := metadata.get("data"):  # older versions wrote none
        for file in sorted({file for _, file in external_tensors(model, path)}):
            verify(file, known["sha256"], path)
    return GraphFacts(
        path=path,
        opset=next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        inputs=tuple(_tensor(v) for v in graph.input if v.name not in sizes),
        outputs=tuple(_tensor(v) for v in graph.output),
        metadata=metadata,
        plugin_nodes=sum(n.op_type == OP_TYPE for n in graph.node),
        quantized_bytes=sum(sizes[name] for name in quantized),
        float_bytes=sum(size for name, size in sizes.items() if name not in quantized),
        onnx_bytes=path.stat().st_size,
        data_bytes=data_bytes,
    )


def data_path(path: Path) -> Path:
    """Where the weights of an ONNX file of ours lie."""
    return path.with_name(path.name + ".data")


def output(path: Path) -> Output:
    """An ONNX file to write, with its weights."""
    return Output(file_name(path), (data_path(path),), MARK)


def external_files(path: Path) -> list[Path]:
    """The files that hold an ONNX file's external data."""
    return sorted({file for _, file in external_tensors(open_onnx(path), path)})


def optimization_profiles(graph: GraphFacts, max_batch: int, max_seq: int | None) -> tuple[Profile, ...]:
    """The profiles of a graph, made from its metadata and the names of its dynamic dimensions.

    A decoder gets two: "decode" for one new token and "prefill" for many. Where its KV cache is fixed, prefill is for
    up to a chunk, and the cache has its one size. Where it is dynamic (a dimension `past_sequence_length`), decode is
    for 1..max_seq-1 cached tokens, prefill for 1..max_seq new ones and an empty cache. Any other graph gets one,
    "default". TensorRT times its kernels at the tuned shape only; it is the full batch with half of the longest
    sequence, because that is where time is spent and both ends are within a factor of two of it. A fixed cache is
    tuned for a whole chunk: long prompts come in whole chunks.

    Args:
        max_seq: tokens, cached ones too; None is what the cache was exported for, or `MAX_SEQ`, or as many as there are
            learned positions for.

    Raises:
        AwqTrtError: a limit below 1 or beyond the learned positions, a decoder with max_seq below 2 or not that of its
            fixed cache, or a dimension of unknown meaning.
    """
    cache = fixed_cache_facts(graph.metadata)
    if max_seq is None:
        max_seq = cache["capacity"] if cache else min(MAX_SEQ, graph.metadata.get("max_positions") or MAX_SEQ)
    for name, value in (("max_batch", max_batch), ("max_seq", max_seq)):
        if value < 1:
            raise AwqTrtError(f"{name} is {value}; it must be at least 1.")
    if max_seq > (longest := graph.metadata.get("max_positions") or max_seq):
        raise AwqTrtError(f"max_seq is {max_seq}, and the model of {graph.path} has positions for {longest} tokens.")
    batch, sequence = (1, max_batch, max_batch), (1, -(-max_seq // 2), max_seq)
    if cache:
        if max_seq != cache["capacity"]:
            raise AwqTrtError(
                f"{graph.path} was exported with a KV cache for {cache['capacity']} tokens, and max_seq is {max_seq}: "
                "export it again with this max_seq, or leave it out."
            )
        chunk = cache["prefill_chunk"]
        ranges = {"decode": {"sequence_length": (1, 1, 1)}, "prefill": {"sequence_length": (1, chunk, chunk)}}
    elif any("past_sequence_length" in t.shape for t in graph.inputs):
        if max_seq < 2:
            raise AwqTrtError(
                "max_seq is 1; a decoder with a cache needs at least 2: one cached token and the new one."
            )
        past = (1, -(-(max_seq - 1) // 2), max_seq - 1)
        total = (past[0] + 1, past[1] + 1, past[2] + 1)
        names = ("sequence_length", "past_sequence_length", "total_sequence_length")
        ranges = {
            "decode": dict(zip(names, ((1, 1, 1), past, total), strict=True)),
            "prefill": dict(zip(names, (sequence, (0, 0, 0), sequence), strict=True)),
        }
    else:
        ranges = {"default": {"sequence_length": sequence}}
    return tuple(_profile(graph, name, {"batch_size": batch, **sizes}) for name, sizes in ranges.items())


def _profile(graph: GraphFacts, name: str, ranges: dict[str, tuple[int, int, int]]) -> Profile:
    shapes = {}
    for tensor in graph.inputs:
        for i, dim in enumerate(tensor.shape):
            if isinstance(dim, str) and dim not in ranges:
                known = ", ".join(ranges)
                called = f"is called {dim!r}" if dim else "has neither a size nor a name"
                raise AwqTrtError(
                    f"{graph.path}: dimension {i} of input {tensor.name!r} {called}. An optimization profile can only "
                    f"be made for the dynamic dimensions {known}: rename it, or export with a fixed size."
                )
        at = [tuple(ranges[d][i] if isinstance(d, str) else d for d in tensor.shape) for i in range(3)]
        shapes[tensor.name] = (at[0], at[1], at[2])
    return Profile(name, shapes)


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    names = {"float": "float32", "double": "float64"}
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
    return Tensor(value.name, names.get(dtype, dtype), shape)


def fixed_cache_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of a decoder's fixed KV cache ("capacity", "prefill_chunk", "layers"); {} for any other model.

    Args:
        facts: of the model: the metadata of an ONNX file, or "model" of a plan's sidecar.
    """
    cache = facts.get("kv_cache") or {}
    return cache if cache.get("kind") == "fixed" else {}


def graph_metadata(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """The facts that the exporter wrote into an ONNX file, {} for a foreign one; `path` is for messages.

    Raises:
        AwqTrtError: not readable.
    """
    text = {p.key: p.value for p in model.metadata_props}.get(METADATA_KEY, "{}")
    facts: dict[str, Any] = parse_json(text, Metadata, f"{path}: its metadata {METADATA_KEY!r}", "Export it again.")
    return facts
