"""Which attention a builder has no kernel for, found out by building that attention alone, in a second or less.

TensorRT-RTX 1.7 has none for fewer than 4 query heads, and none for some widths of heads (README.md). Such an attention
is written out (export/attention.py) in what the builder gets; the ONNX file stays as it is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import onnx

from awq_trt.engine.build_run import run_build
from awq_trt.engine.runtimes import RTX_ARCHITECTURES
from awq_trt.errors import AwqTrtError
from awq_trt.export.attention import Attention, alone, attentions, write_out
from awq_trt.publishing import scratch

LONGEST = 1024
"""New tokens of a call that a kernel is asked for; the scores of more would need more memory than they tell."""


def without_kernel(graph: onnx.GraphProto, runtime: str, architectures: tuple[str, ...] = ()) -> list[Attention]:
    """The kinds of Attention in a graph that must be written out for a builder.

    Args:
        runtime: Python module of the builder. architectures: compute capabilities, for tensorrt_rtx; none is
            `RTX_ARCHITECTURES`.

    Raises:
        AwqTrtError: the builder can build one neither as it is nor written out; with its own words.
    """
    if runtime == "tensorrt_rtx":
        architectures = architectures or RTX_ARCHITECTURES
    kinds = sorted({kind for _, kind in attentions(graph)})
    return [kind for kind in kinds if not _has_kernel(kind, runtime, architectures)]


@cache
def _has_kernel(kind: Attention, runtime: str, architectures: tuple[str, ...]) -> bool:
    model = alone(kind)
    if _trouble(model, kind, runtime, architectures) is None:
        return True
    write_out(model.graph, [kind])
    if trouble := _trouble(model, kind, runtime, architectures):
        raise AwqTrtError(f"{runtime} has no kernel for {kind}, and cannot build it written out either: {trouble}")
    return False


def _trouble(model: onnx.ModelProto, kind: Attention, runtime: str, architectures: tuple[str, ...]) -> str | None:
    """Why an engine of this graph cannot be built, None if it can."""
    longest = min(LONGEST, kind.slots)
    with scratch() as folder:
        file = folder / "attention.onnx"
        file.write_bytes(model.SerializeToString())
        job: dict[str, Any] = {
            "runtime": runtime,
            "onnx": str(file),
            "plan": str(folder / "plan"),
            "plugin": None,
            "plugin_nodes": 0,
            "embed_plugin": False,
            "profiles": [_profile(model.graph, 1), _profile(model.graph, longest)],
            "architectures": list(architectures),
            "timing_cache": None,
        }
        try:
            run_build(job, quiet=True, on_event=None)
        except AwqTrtError as error:
            return str(error).removeprefix(f"{file}: no engine was built. ")
    return None


def _profile(graph: onnx.GraphProto, longest: int) -> dict[str, list[list[int]]]:
    """Smallest, tuned and largest shape of every input, for calls of up to `longest` new tokens."""
    sizes = [{"batch_size": 1, "sequence_length": 1}, *[{"batch_size": 2, "sequence_length": longest}] * 2]
    return {
        value.name: [[size.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim] for size in sizes]
        for value in graph.input
    }


def prepared(model: onnx.ModelProto, runtime: str, architectures: tuple[str, ...], place: Path) -> list[str]:
    """Write a model at `place` for a builder that lacks a kernel; returns a note for each, [] if it lacks none.

    Then nothing is written, and the model is what the builder gets.
    """
    lacking = without_kernel(model.graph, runtime, architectures)
    notes = [
        f"{runtime} has no kernel for {kind}: plain products stand for it, {write_out(model.graph, [kind])} times."
        for kind in lacking
    ]
    if lacking:
        place.write_bytes(model.SerializeToString())
    return notes
