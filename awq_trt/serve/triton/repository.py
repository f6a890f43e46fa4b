"""Triton model repository for a model: `<repo>/<name>/config.pbtxt` and `<repo>/<name>/1/`.

A decoder with a fixed KV cache becomes a model of the Python backend that generates text (model.py), with its
tokenizer and the code it needs. Everything else becomes a `tensorrt_plan` for Triton's TensorRT backend, which cannot
bind both sides of a cache to one memory (../README.md says where that was read).

Of a tensorrt_plan, `max_batch_size` is the profiles' largest batch, and the batch dimension is left out of every
`dims`, where all inputs and outputs begin with it. One instance serves all profiles: the backend picks the one that
admits a request's shapes. An embedded plugin is host code inside the plan, which loads with `version-compatible=true`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_trt.engine import sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import external_files, fixed_cache_facts, read_graph
from awq_trt.files import PACKAGE
from awq_trt.outputs import Output, sign
from awq_trt.publishing import check_outputs, publishing
from awq_trt.schema import regular_file
from awq_trt.serve.decoder import fixed_cache, tokenizer_folder
from awq_trt.serve.triton.model import FIELDS, LIMITS, OUTPUTS

DATA_TYPES = {
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
"""Our name of a dtype to the one in Triton's TYPE_*."""

PARAMETERS = ("python", "max_batch", "threads", *LIMITS)
"""Of a generating model's config.pbtxt; see model.LIMITS and supervisor.Engine."""

TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Of what a tokenizer reads: text, or its model."""

MODEL_PY = '''"""Generates text: serve/triton/model.py of awq_trt.zip beside this file. Settings: ../config.pbtxt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().with_name("awq_trt.zip")))
from awq_trt.serve.triton.model import TritonPythonModel  # noqa: E402, F401
'''

WARMUP = {"text_input": ("STRING", struct.pack("<I", 5) + b"Hello"), "max_tokens": ("INT32", struct.pack("<i", 4))}
"""The request that Triton makes before it calls the model ready; the bytes are those of Triton's raw tensors."""

IMAGE = "nvcr.io/nvidia/tritonserver:YY.MM-py3"
SHARED_MEMORY = "256m"
"""Of the container. Triton's Python backend asks for 2 MiB for each model instance; responses need little more."""


@dataclass(frozen=True)
class Launch:
    """The lines that serve a model, None where Triton cannot."""

    command: str | None  # for a machine with Triton
    docker: str | None  # the same in a container, whose tag is for the user to choose
    warnings: tuple[str, ...]  # why Triton cannot serve it


@dataclass(frozen=True)
class TritonReport(Launch):
    """What was written, and how to serve it."""

    model: Path  # the model's folder


def write_triton_repo(
    engine_path: Path,
    repo_dir: Path,
    *,
    model_name: str | None = None,
    tokenizer: Path | None = None,
    parameters: Mapping[str, str] | None = None,
) -> TritonReport:
    """Make a model repository for a plan, from its sidecar.

    A plan is hard-linked where possible, else copied. An ONNX file and its data are copied: onnx.load refuses data that
    has a second link, even where it is the first that is loaded. A model of the same name that an earlier run wrote is
    replaced whole.

    Args:
        engine_path: the plan; or an ONNX decoder with a fixed cache, which then runs on the CPU in ONNX Runtime.
        repo_dir: the repository, made if it is missing. model_name: None is the plan's stem.
        tokenizer: directory with the files of a decoder's tokenizer; None is the one that the model names.
        parameters: of a decoder, names in PARAMETERS, instead of the defaults in config.pbtxt.

    Raises:
        AwqTrtError: no plan or sidecar, a bad name or parameter, a dtype Triton has not, no tokenizer, an ONNX file
            that cannot generate; something would be lost in the model's folder, or another run writes there.
    """
    if not engine_path.is_file():
        raise AwqTrtError(f"{engine_path}: no such file. Build the engine first.")
    name, parameters = engine_path.stem if model_name is None else model_name, dict(parameters or {})
    if not name or name.startswith(".") or "/" in name:
        raise AwqTrtError(
            f"{name!r} cannot be a Triton model's name: it is a folder's name and may not begin with a dot."
        )
    for key in parameters:
        if key not in PARAMETERS:
            raise AwqTrtError(f"{key!r} is not a parameter of a generating model; {', '.join(PARAMETERS)} are.")
    model, repository = repo_dir / name, str(repo_dir.resolve())
    sources = [engine_path, *([tokenizer] if tokenizer else [])]
    check_outputs([Output(model, directory=True)], sources)
    if engine_path.suffix == ".onnx":
        facts = read_graph(engine_path).metadata
        fixed_cache(engine_path, facts)
        file, launch = engine_path.name, _launch("onnxruntime", "", [], repository)
    else:
        content = sidecar.read_sidecar(sidecar.path_of(engine_path))
        facts, file, launch = content["model"], "model.plan", launch_plan(content, repository)
    generates = bool(fixed_cache_facts(facts))
    if generates:
        source = tokenizer_folder(engine_path, facts, tokenizer)
        sources.append(source)
        text = _generating_config(name, file, facts["kv_cache"]["capacity"], parameters)
    elif tokenizer is not None or parameters:
        raise AwqTrtError(f"{engine_path} does not generate text: it takes neither a tokenizer nor parameters.")
    else:
        text = _plan_config(name, content)
    with publishing(Output(model, directory=True), sources) as (folder,):
        version = folder / "1"
        version.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text)
        if file == "model.plan":
            _link(engine_path, version / file)
            content["model"] |= {"tokenizer": "tokenizer"} if generates else {}
            sidecar.write(version / "model.plan.json", content)
        else:
            for path in (engine_path, *external_files(engine_path)):
                shutil.copyfile(regular_file(path), version / path.name)
        if generates:
            (version / "model.py").write_text(MODEL_PY)
            with zipfile.ZipFile(version / "awq_trt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(PACKAGE.rglob("*.py")):
                    entry = zipfile.ZipInfo(path.relative_to(PACKAGE.parent).as_posix())  # without times: same bytes
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
            (version / "tokenizer").mkdir()
            for path in source.iterdir():  # not the weights of a checkpoint, nor hidden files
                if path.suffix in TOKENIZER_SUFFIXES and not path.name.startswith(".") and ".index." not in path.name:
                    shutil.copyfile(regular_file(path), version / "tokenizer" / path.name)
            (folder / "warmup").mkdir()
            for key, (_, data) in WARMUP.items():
                (folder / "warmup" / key).write_bytes(data)
        sign(folder)
    return TritonReport(launch.command, launch.docker, launch.warnings, model)


def _plan_config(name: str, content: dict[str, Any]) -> str:
    """The text of a tensorrt_plan's config.pbtxt, from a sidecar's content."""
    tensors = [*content["inputs"], *content["outputs"]]
    batched = all(t["dims"] and t["dims"][0] == "batch_size" for t in tensors)
    largest = max(shapes["max"][0] for p in content["profiles"] for shapes in p["inputs"].values()) if batched else 0
    lines = [f"name: {json.dumps(name)}", 'platform: "tensorrt_plan"', f"max_batch_size: {largest}"]
    lines.append('default_model_filename: "model.plan"')
    for kind in ("input", "output"):
        items = []
        for tensor in content[kind + "s"]:
            if (dtype := DATA_TYPES.get(tensor["dtype"])) is None:
                raise AwqTrtError(
                    f"tensor {tensor['name']!r} is {tensor['dtype']}; Triton's TensorRT backend has no such type."
                )
            dims = ", ".join(str(d) for d in tensor["shape"][1 if batched else 0 :])
            items.append(f"  {{ name: {json.dumps(tensor['name'])} data_type: TYPE_{dtype} dims: [ {dims} ] }}")
        lines += [f"{kind} [", ",\n".join(items), "]"]
    profiles = ", ".join(f'"{i}"' for i in range(len(content["profiles"])))
    lines.append(f"instance_group [ {{ count: 1 kind: KIND_GPU profile: [ {profiles} ] }} ]")
    if largest > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _generating_config(name: str, file: str, capacity: int, parameters: dict[str, str]) -> str:
    """The text of a generating model's config.pbtxt.

    Args:
        file: the plan (an instance on each GPU that Triton sees) or ONNX file, in the version's folder.
        capacity: tokens of a row of the cache. parameters: instead of the defaults.
    """
    defaults = {key: str(capacity if value is None else min(value, capacity)) for key, value in LIMITS.items()}
    defaults |= {"max_queue": str(LIMITS["max_queue"]), "max_prompt_tokens": str(capacity - 1)}
    settings = {"model": file} | dict.fromkeys(PARAMETERS, "") | defaults | parameters
    inputs = [f'  {{ name: "{n}" data_type: TYPE_{t} dims: [ {d} ] optional: true }}' for n, (t, d) in FIELDS.items()]
    outputs = [f'  {{ name: "{n}" data_type: TYPE_{t} dims: [ 1 ] }}' for n, t in OUTPUTS.items()]
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "# Requests run side by side in the rows of the KV cache, whenever they come, so there is no batcher.",
        "max_batch_size: 1",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: 1 kind: KIND_{'GPU' if file == 'model.plan' else 'CPU'} }} ]",
        *("input [", ",\n".join(inputs), "]"),
        *("output [", ",\n".join(outputs), "]"),
        "# The file; the Python that runs the engine (empty: Triton's own); rows and threads of ONNX Runtime; limits.",
    ]
    lines += [f'parameters {{ key: "{k}" value {{ string_value: {json.dumps(v)} }} }}' for k, v in settings.items()]
    lines.append('model_warmup [ { name: "hello" batch_size: 1')
    for n, (t, _) in WARMUP.items():
        lines.append(f'  inputs {{ key: "{n}" value {{ data_type: TYPE_{t} dims: [ 1 ] input_data_file: "{n}" }} }}')
    return "\n".join([*lines, "} ]"]) + "\n"


def launch_plan(content: Mapping[str, Any], repository: str = "MODEL_REPOSITORY") -> Launch:
    """How to serve a plan, from its sidecar's content, and why it cannot be served."""
    runtime, plugin = content["versions"].get("runtime", ""), content["plugin"]
    if fixed_cache_facts(content["model"]):
        return _launch(runtime, content["versions"].get("runtime_version", ""), [], repository)
    warnings = []
    if runtime != "tensorrt":
        warnings.append(
            "Triton's TensorRT backend loads plans of TensorRT only, and this one was built by TensorRT-RTX. "
            "Build it with TensorRT on the GPU it is to run on."
        )
    if plugin is not None and not plugin["embedded"]:
        warnings.append(
            "Triton cannot load this plan: its option plugins= opens a library without registering its plugins. "
            "Build the engine with the plugin embedded, which is the default."
        )
    if warnings:
        return Launch(None, None, tuple(warnings))
    options = [] if plugin is None else ["--backend-config=tensorrt,version-compatible=true"]
    return _launch("", "", options, repository)


def _launch(runtime: str, version: str, options: list[str], repository: str) -> Launch:
    """The lines that serve a repository. runtime: of a generating model, "" for a plan in the TensorRT backend."""
    serve = shlex.join(["tritonserver", "--model-repository=/models", *options])
    if runtime:  # numpy stays below 2: the Python backend of Triton before 24.12 or so crashes on strings with a newer
        wheel = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}.get(runtime, runtime)
        packages = ["numpy<2", "onnx", "pydantic", "torch", "transformers", wheel + (f"=={version}" if version else "")]
        serve = f"pip install {shlex.join(packages)} && {serve}"
    gpus = [] if runtime == "onnxruntime" else ["--gpus", "all"]
    ports = [word for port in (8000, 8001, 8002) for word in ("-p", f"{port}:{port}")]
    container = ["docker", "run", "--rm", "-it", *gpus, "--shm-size", SHARED_MEMORY, *ports]
    container += ["-v", f"{repository}:/models", IMAGE, "sh", "-c", serve]
    command = shlex.join(["tritonserver", f"--model-repository={repository}", *options])
    return Launch(command, shlex.join(container), ())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
