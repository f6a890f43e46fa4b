"""`out.plan.json`, the file beside every plan that says what is in it and where it runs: facts, no command lines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, Required, TypedDict

from awq_trt.engine import memory
from awq_trt.engine.plugin import library_version
from awq_trt.errors import AwqTrtError
from awq_trt.export.facts import FusedLayers, ModelFacts, QuantizedLayer, Verification
from awq_trt.export.metadata import GraphFacts, Profile, Tensor
from awq_trt.files import package_version, sha256, verify
from awq_trt.outputs import Output, file_name
from awq_trt.schema import Bytes, Name, Size, check, read_json

SCHEMA, READ = 2, (1, 2)
"""Raised when a key changes its meaning or goes away; new keys do not raise it. Schema 1 also had launch lines."""

ADVICE = "Build the engine again."

MARK = b'"gpu_architectures": ['
"""In every sidecar."""

MODEL_FACTS = ("model_type", "format", "dtype", "kv_cache", "logits", "vocab_size", "generation", "tokenizer")
"""What the exporter wrote into the ONNX file and whoever runs the plan needs."""


class Versions(TypedDict):
    """What made the plan."""

    awq_trt: Name
    runtime: Name
    runtime_version: Name
    onnx_opset: Size


class Described(TypedDict):
    """An input or output."""

    name: Name
    dtype: Annotated[Name, Field(pattern="^[a-z0-9]{1,16}$")]
    shape: Annotated[list[Annotated[int, Field(ge=-1, le=2**31 - 1)]], Field(max_length=8)]  # -1 for a dynamic one
    dims: Annotated[list[Size | Name], Field(max_length=8)]  # the same with the names of the dynamic ones


class Shapes(TypedDict):
    """Of an input, in an optimization profile."""

    min: list[Size]
    opt: list[Size]
    max: list[Size]


class DescribedProfile(TypedDict):
    """An optimization profile."""

    name: Name
    inputs: dict[Name, Shapes]


class Library(TypedDict):
    """The plugin library that the plan was built with."""

    file: Name
    path: Name
    sha256: Name
    version: Name
    embedded: bool
    layers: Size


class Sizes(TypedDict):
    """In bytes."""

    plan: Bytes
    onnx: Bytes
    onnx_data: Bytes
    quantized_weights: Bytes
    other_weights: Bytes
    plugin: NotRequired[Bytes | None]
    activations: NotRequired[Bytes | None]


class Build(TypedDict):
    """How it was built."""

    seconds: float
    peak_bytes: Bytes
    strongly_typed: bool
    gpu: NotRequired[Name | None]
    warnings: NotRequired[list[str]]
    sha256: NotRequired[dict[Name, Name | None]]  # of the "plan", and of the "onnx_data" that it was made from


class Model(ModelFacts, total=False):
    """The ONNX file's name, and what its metadata say."""

    onnx: Required[Name]


class Sidecar(TypedDict):
    """The file, its keys in their order; it may have more."""

    schema: int
    created: Name
    versions: Versions
    gpu_architectures: list[Name]
    model: Model
    profiles: Annotated[list[DescribedProfile], Field(min_length=1, max_length=16)]
    inputs: Annotated[list[Described], Field(min_length=1)]
    outputs: Annotated[list[Described], Field(min_length=1)]
    quantized: list[QuantizedLayer]
    fused: list[FusedLayers]
    left_in_float: dict[Name, Name]
    plugin: Library | None
    sizes: Sizes
    build: Build
    accuracy: Verification | None


@dataclass(frozen=True)
class EngineReport:
    """What was built."""

    engine: Path  # the plan
    sidecar: Path
    runtime: str  # Python module that built it
    runtime_version: str
    architectures: tuple[str, ...]  # compute capabilities like "8.6"
    profiles: tuple[Profile, ...]
    plugin_layers: int  # W4A16Gemm layers of the engine, each one layer of the model or several
    plugin_embedded: bool
    plan_bytes: int
    seconds: float  # of the build
    peak_bytes: int  # resident memory of the child process
    warnings: tuple[str, ...]  # TensorRT's, without the ones at every build
    gpu: str | None = None  # that it was tuned on; None for TensorRT-RTX
    plan_sha256: str | None = None


def path_of(engine_path: Path) -> Path:
    """Where the sidecar of a plan lies."""
    return engine_path.with_name(engine_path.name + ".json")


def output(engine_path: Path) -> Output:
    """A plan to write, with the sidecar, which names it, the script that times it and the inputs of that script."""
    scripts = (file_name(engine_path).with_suffix(f".trtexec.{kind}") for kind in ("sh", "bin"))
    return Output(path_of(engine_path), (engine_path, *scripts), MARK)


def describe(
    report: EngineReport, graph: GraphFacts, plugin: Path | None, accuracy: dict[str, Any] | None
) -> dict[str, Any]:
    """The sidecar's content: plain data, ready for JSON.

    Args:
        report: of the build. graph: the ONNX file it was built from. plugin: the library it was built with, or None.
        accuracy: what the verification measured, or None where it did not run.
    """
    facts = graph.metadata
    model = {key: facts[key] for key in MODEL_FACTS if key in facts}
    if model.get("tokenizer") is not None:  # relative to the ONNX file; here to the plan
        folder = graph.path.resolve().parent
        model["tokenizer"] = os.path.relpath(folder / model["tokenizer"], report.engine.resolve().parent)
    library = plugin and {
        "file": plugin.name,
        "path": str(plugin.resolve()),
        "sha256": sha256(plugin),
        "version": library_version(plugin),
        "embedded": report.plugin_embedded,
        "layers": report.plugin_layers,
    }
    sizes = {
        "plan": report.plan_bytes,
        "onnx": graph.onnx_bytes,
        "onnx_data": graph.data_bytes,
        "quantized_weights": graph.quantized_bytes,
        "other_weights": graph.float_bytes,
        "plugin": plugin and plugin.stat().st_size,
        "activations": memory.activation_bytes(graph.path, report.profiles),  # estimate; see memory.py
    }
    digests = {"plan": report.plan_sha256, "onnx_data": facts.get("data", {}).get("sha256")}
    build = {"seconds": round(report.seconds, 1), "peak_bytes": report.peak_bytes, "strongly_typed": True}
    versions = {"runtime": report.runtime, "runtime_version": report.runtime_version, "onnx_opset": graph.opset}
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"awq_trt": package_version(), **versions},
        "gpu_architectures": list(report.architectures),
        "model": {"onnx": graph.path.name, **model},
        "profiles": [
            {"name": p.name, "inputs": {n: {"min": s[0], "opt": s[1], "max": s[2]} for n, s in p.shapes.items()}}
            for p in report.profiles
        ],
        "inputs": [_tensor(t) for t in graph.inputs],
        "outputs": [_tensor(t) for t in graph.outputs],
        "quantized": facts.get("quantized", []),
        "fused": facts.get("fused", []),
        "left_in_float": facts.get("left_in_float", {}),
        "plugin": library,
        "sizes": sizes,
        "build": {**build, "gpu": report.gpu, "warnings": list(report.warnings), "sha256": digests},
        "accuracy": accuracy,
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.dims), "dims": list(tensor.shape)}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a sidecar as JSON, keys in their order, two spaces of indentation, small things on one line."""
    path.write_text(_pretty(content) + "\n")


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read and check a sidecar (`path_of(engine_path)`).

    Raises:
        AwqTrtError: missing, not JSON, of another schema, a key missing or of the wrong type, or made for another plan
            than the one that lies beside it now.
    """
    if not path.exists():
        raise AwqTrtError(f"{path}: no such file. It is written beside the plan; keep the two together.")
    content: dict[str, Any] = read_json(path, dict[str, Any], ADVICE)
    if (schema := content.get("schema")) not in READ:
        raise AwqTrtError(f"{path}: schema {schema!r}, this version reads {SCHEMA}. {ADVICE}")
    check(content, Sidecar, str(path), ADVICE)
    _check_shapes(content, path)
    plan = path.with_name(path.name.removesuffix(".json"))
    if plan.is_file() and plan.stat().st_size != content["sizes"]["plan"]:
        raise AwqTrtError(
            f"{path}: describes a plan of {content['sizes']['plan']} bytes, but {plan.name} has "
            f"{plan.stat().st_size}. The two are not from the same build; build the engine again."
        )
    digest = content["build"].get("sha256", {}).get("plan")  # older versions wrote none
    if digest and plan.is_file():
        verify(plan, digest, path)
    return content


def _check_shapes(content: dict[str, Any], path: Path) -> None:
    """Every profile has shapes for every input, with as many sizes as the input has dimensions."""
    for tensor in (*content["inputs"], *content["outputs"]):
        if len(tensor["shape"]) != len(tensor["dims"]) or (tensor["name"] == "input_ids" and len(tensor["dims"]) != 2):
            raise AwqTrtError(f"{path}: tensor {tensor['name']!r} has the shape {tensor['shape']}. {ADVICE}")
    ranks = {tensor["name"]: len(tensor["dims"]) for tensor in content["inputs"]}
    for profile in content["profiles"]:
        found = {name: {len(sizes) for sizes in shapes.values()} for name, shapes in profile["inputs"].items()}
        if found != {name: {rank} for name, rank in ranks.items()}:
            raise AwqTrtError(f"{path}: profile {profile['name']!r} does not fit the inputs. {ADVICE}")


def _pretty(value: Any, indent: str = "") -> str:
    """JSON in which whatever fits into a line of 120 characters takes one: a model has hundreds of shapes."""
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or (indent and len(indent) + len(short) < 112):
        return short
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, inner)}" for k, v in value.items()]
    else:
        items = [_pretty(v, inner) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"
