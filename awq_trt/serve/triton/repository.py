"""Triton model repository for a model: `<repo>/<name>/config.pbtxt` and `<repo>/<name>/1/`.

A decoder with a fixed KV cache becomes a model of the Python backend that generates text (model.py), with its
tokenizer and the code it needs. Everything else becomes a `tensorrt_plan` for Triton's TensorRT backend.

Why a fixed cache does not go to the TensorRT backend, read in its sources of July 2026 (src/instance_state.cc of
triton-inference-server/tensorrt_backend): when a model is loaded, each input and output gets a buffer of its own for
good (InitializeExecuteInputBinding and ...OutputBinding: cudaMalloc, setTensorAddress), and the inputs of each request
are gathered into them (Run: BackendInputCollector::ProcessTensor). TensorRT's KV_CACHE_UPDATE wants the input and the
output of a cache at one address, so such a plan cannot run there. With another plan implicit state would not help:
`use_same_buffer_for_input_output` (core, src/sequence_state.cc) saves one of the two buffers that hold a state between
requests, but with every token all of it is copied to the backend's input, and from its output
(BackendOutputResponder::ProcessStateTensor); server#7643 asks for better and is open. Tensors that a front model passes
(BLS) are copied in the same places. In the Python backend our process owns the cache; only text crosses processes.

What the fields of a tensorrt_plan do was read in the same place:

* `max_batch_size` is the profiles' largest batch, and the batch dimension is left out of every `dims`, where all inputs
  and outputs begin with it. Only requests of equal shapes are batched, so every row keeps its own cache length.
* One instance serves all profiles; the backend picks the one that admits a request's shapes, so a request with an empty
  cache runs in the prefill profile and one with a cache in the decode profile.
* No CUDA graphs: the backend captures fixed shapes, and the cache grows by one token with every request.
* An embedded plugin is host code inside the plan: it loads with `version-compatible=true`. The other option,
  `plugins=`, only opens a library (src/tensorrt.cc) and counts on it to register itself, which ours does not.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from awq_trt.engine import sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.export.metadata import external_files, fixed_cache_facts, read_graph
from awq_trt.files import PACKAGE, replacing
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

OURS = (
    "config.pbtxt",
    "1",
    "1/model.plan",
    "1/model.plan.json",
    "1/model.py",
    "1/awq_trt.zip",
    "1/__pycache__*",
    "1/tokenizer*",
    "1/*.onnx",
    "1/*.onnx.data",
    "warmup*",
)
"""Patterns of what a model's folder may hold to be replaced."""

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


class Launch(NamedTuple):
    """The lines that serve a model, None where Triton cannot."""

    command: str | None  # for a machine with Triton
    docker: str | None  # the same in a container, whose tag is for the user to choose
    warnings: tuple[str, ...]  # why Triton cannot serve it


@dataclass(frozen=True)
class TritonReport:
    """What was written, and how to serve it; see `Launch`."""

    model: Path  # the model's folder
    command: str | None
    docker: str | None
    warnings: tuple[str, ...]


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
    has a second link, even where it is the first that is loaded. A model of the same name is replaced whole.

    Args:
        engine_path: the plan; or an ONNX decoder with a fixed cache, which then runs on the CPU in ONNX Runtime.
        repo_dir: the repository, made if it is missing. model_name: None is the plan's stem.
        tokenizer: directory with the files of a decoder's tokenizer; None is the one that the model names.
        parameters: of a decoder, names in PARAMETERS, instead of the defaults in config.pbtxt.

    Raises:
        AwqTrtError: no plan or sidecar, a bad name or parameter, a dtype Triton has not, no tokenizer, an ONNX file
            that cannot generate, or foreign files in the model's folder.
    """
    if not engine_path.is_file():
        raise AwqTrtError(f"{engine_path}: no such file. Build the engine first.")
    name = engine_path.stem if model_name is None else model_name
    if not name or name.startswith(".") or "/" in name:
        raise AwqTrtError(
            f"{name!r} cannot be a Triton model's name: it is a folder's name and may not begin with a dot."
        )
    unknown = sorted(set(parameters or {}) - set(PARAMETERS))
    if unknown:
        raise AwqTrtError(f"{unknown[0]!r} is not a parameter of a generating model; {', '.join(PARAMETERS)} are.")
    model = repo_dir / name
    _check_folder(model)
    if engine_path.suffix == ".onnx":
        return _write_onnx(engine_path, model, tokenizer, dict(parameters or {}))
    content = sidecar.read_sidecar(sidecar.path_of(engine_path))
    generates = is_generating(content["model"])
    if not generates and (tokenizer is not None or parameters):
        raise AwqTrtError(f"{engine_path} does not generate text: it takes neither a tokenizer nor parameters.")
    inside = content
    if generates:
        source = _tokenizer(engine_path, content["model"], tokenizer)
        text = generating_config(name, "model.plan", content["model"], "GPU", dict(parameters or {}))
        inside = content | {"model": content["model"] | {"tokenizer": "tokenizer"}}
    else:
        text = config(name, content)
    with replacing(model) as (folder,):
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text)
        _link(engine_path, folder / "1" / "model.plan")
        sidecar.write(folder / "1" / "model.plan.json", inside)
        if generates:
            _write_runtime(folder, source)
    return TritonReport(model, *launch_plan(content, str(repo_dir.resolve())))


def _write_onnx(path: Path, model: Path, tokenizer: Path | None, parameters: dict[str, str]) -> TritonReport:
    from awq_trt.serve.decoder import fixed_cache

    facts = read_graph(path).metadata
    fixed_cache(path, facts)
    source = _tokenizer(path, facts, tokenizer)
    text = generating_config(model.name, path.name, facts, "CPU", parameters)
    with replacing(model) as (folder,):
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text)
        for file in (path, *external_files(path)):
            shutil.copyfile(file, folder / "1" / file.name)
        _write_runtime(folder, source)
    return TritonReport(model, *_launch("onnxruntime", "", [], str(model.parent.resolve())))


def is_generating(facts: dict[str, Any]) -> bool:
    """Whether a model's facts (of a sidecar's "model", or an ONNX file) are those of a decoder with a fixed cache."""
    return bool(fixed_cache_facts(facts))


def config(name: str, content: dict[str, Any]) -> str:
    """The text of a tensorrt_plan's config.pbtxt, from a sidecar's content."""
    tensors = [*content["inputs"], *content["outputs"]]
    batched = all(t["dims"] and t["dims"][0] == "batch_size" for t in tensors)
    largest = max(shapes["max"][0] for p in content["profiles"] for shapes in p["inputs"].values()) if batched else 0
    lines = [f"name: {json.dumps(name)}", 'platform: "tensorrt_plan"', f"max_batch_size: {largest}"]
    lines.append('default_model_filename: "model.plan"')
    for kind in ("input", "output"):
        items = [_tensor(t, batched) for t in content[kind + "s"]]
        lines += [f"{kind} [", ",\n".join(items), "]"]
    profiles = ", ".join(f'"{i}"' for i in range(len(content["profiles"])))
    lines.append(f"instance_group [ {{ count: 1 kind: KIND_GPU profile: [ {profiles} ] }} ]")
    if largest > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def generating_config(name: str, file: str, facts: dict[str, Any], kind: str, parameters: dict[str, str]) -> str:
    """The text of a generating model's config.pbtxt.

    Args:
        file: the plan or ONNX file, in the version's folder. facts: of the model. kind: "GPU", an instance on each GPU
            that Triton sees, or "CPU". parameters: instead of the defaults.
    """
    capacity = facts["kv_cache"]["capacity"]
    defaults = {key: capacity if value is None else min(value, capacity) for key, value in LIMITS.items()}
    defaults |= {"max_queue": LIMITS["max_queue"], "max_prompt_tokens": capacity - 1}
    settings = {"model": file} | dict.fromkeys(PARAMETERS, "") | {k: str(v) for k, v in defaults.items()} | parameters
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "# Requests run side by side in the rows of the KV cache, whenever they come, so there is no batcher.",
        "max_batch_size: 1",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: 1 kind: KIND_{kind} }} ]",
        "input [",
        ",\n".join(
            f'  {{ name: "{n}" data_type: TYPE_{t} dims: [ {d} ] optional: true }}' for n, (t, d) in FIELDS.items()
        ),
        "]",
        "output [",
        ",\n".join(f'  {{ name: "{n}" data_type: TYPE_{t} dims: [ 1 ] }}' for n, t in OUTPUTS.items()),
        "]",
        "# The file; the Python that runs the engine (empty: Triton's own); rows and threads of ONNX Runtime; limits.",
    ]
    lines += [f'parameters {{ key: "{k}" value {{ string_value: {json.dumps(v)} }} }}' for k, v in settings.items()]
    lines.append('model_warmup [ { name: "hello" batch_size: 1')
    for n, (t, _) in WARMUP.items():
        lines.append(f'  inputs {{ key: "{n}" value {{ data_type: TYPE_{t} dims: [ 1 ] input_data_file: "{n}" }} }}')
    lines.append("} ]")
    return "\n".join(lines) + "\n"


def launch_plan(content: Mapping[str, Any], repository: str = "MODEL_REPOSITORY") -> Launch:
    """How to serve a plan, from its sidecar's content, and why it cannot be served."""
    runtime, plugin = content["versions"].get("runtime", ""), content["plugin"]
    if is_generating(content["model"]):
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
    if runtime:
        serve = f"pip install {shlex.join(packages(runtime, version))} && {serve}"
    gpus = [] if runtime == "onnxruntime" else ["--gpus", "all"]
    ports = [word for port in (8000, 8001, 8002) for word in ("-p", f"{port}:{port}")]
    container = ["docker", "run", "--rm", "-it", *gpus, "--shm-size", SHARED_MEMORY, *ports]
    container += ["-v", f"{repository}:/models", IMAGE, "sh", "-c", serve]
    command = shlex.join(["tritonserver", f"--model-repository={repository}", *options])
    return Launch(command, shlex.join(container), ())


def packages(runtime: str, version: str) -> list[str]:
    """What pip has to install for a generating model, beside what Triton's images have.

    numpy stays below 2: the Python backend of Triton before 24.12 or so crashes on strings with a newer one.
    """
    wheel = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}.get(runtime, runtime)
    return ["numpy<2", "onnx", "torch", "transformers", wheel + (f"=={version}" if version else "")]


def _write_runtime(folder: Path, tokenizer: Path) -> None:
    """What a generating model needs beside its config and its file."""
    (folder / "1" / "model.py").write_text(MODEL_PY)
    with zipfile.ZipFile(folder / "1" / "awq_trt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for source in sorted(PACKAGE.rglob("*.py")):
            inside = zipfile.ZipInfo(source.relative_to(PACKAGE.parent).as_posix())
            archive.writestr(inside, source.read_bytes(), zipfile.ZIP_DEFLATED)
    shutil.copytree(tokenizer, folder / "1" / "tokenizer", ignore=_not_of_a_tokenizer)
    (folder / "warmup").mkdir()
    for name, (_, data) in WARMUP.items():
        (folder / "warmup" / name).write_bytes(data)


def _not_of_a_tokenizer(directory: str, names: list[str]) -> list[str]:
    """For copytree: weights, subfolders, hidden files of a checkpoint. What a tokenizer reads is text or its model."""
    texts = (".json", ".jinja", ".txt", ".model")
    return [n for n in names if not n.endswith(texts) or n.startswith(".") or n.endswith(".index.json")]


def _tokenizer(path: Path, facts: dict[str, Any], given: Path | None) -> Path:
    named = facts.get("tokenizer")
    if given is None and named is None:
        raise AwqTrtError(f"{path} names no tokenizer; say where its files are (tokenizer=).")
    folder = path.parent / str(named) if given is None else given
    if not folder.is_dir():
        raise AwqTrtError(f"{folder}: no such directory. It should hold the tokenizer of {path}.")
    return folder


def _check_folder(model: Path) -> None:
    inside = sorted(str(p.relative_to(model)) for p in model.rglob("*"))
    foreign = [name for name in inside if not any(fnmatch.fnmatch(name, pattern) for pattern in OURS)]
    if foreign or model.is_file():
        raise AwqTrtError(
            f"{model} holds something else already ({', '.join(foreign[:3]) or 'it is a file'}). "
            "Choose another model name, or remove it."
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _tensor(tensor: dict[str, Any], batched: bool) -> str:
    dtype = DATA_TYPES.get(tensor["dtype"])
    if dtype is None:
        raise AwqTrtError(
            f"tensor {tensor['name']!r} is {tensor['dtype']}; Triton's TensorRT backend has no such type."
        )
    dims = ", ".join(str(d) for d in tensor["shape"][1 if batched else 0 :])
    return f"  {{ name: {json.dumps(tensor['name'])} data_type: TYPE_{dtype} dims: [ {dims} ] }}"
