"""Triton model repository for a plan: `<repo>/<name>/config.pbtxt` and `<repo>/<name>/1/model.plan`.

The text follows Triton's model_config.proto; what each field does was read in triton-inference-server/tensorrt_backend:

* `max_batch_size` is the profiles' largest batch, and the batch dimension is left out of every `dims`, where all inputs
  and outputs begin with it. Only requests of equal shapes are batched, so every row keeps its own cache length.
* One instance serves all profiles; the backend picks the one that admits a request's shapes, so a request with an empty
  cache runs in the prefill profile and one with a cache in the decode profile.
* No CUDA graphs: the backend captures fixed shapes, and the cache grows by one token with every request.
* An embedded plugin is host code inside the plan: it loads with `version-compatible=true`. The other option,
  `plugins=`, only opens a library (src/tensorrt.cc) and counts on it to register itself, which ours does not.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_trt import sidecar
from awq_trt.errors import AwqTrtError
from awq_trt.files import replacing

DATA_TYPES = {
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
"""Our name of a dtype to the one in Triton's TYPE_*."""

OURS = {"config.pbtxt", "1", "1/model.plan", "1/model.plan.json"}


@dataclass(frozen=True)
class TritonReport:
    """Where the model lies, the line that serves it (None where Triton cannot), and why it may not work."""

    model: Path
    command: str | None
    warnings: tuple[str, ...]


def write_triton_repo(engine_path: Path, repo_dir: Path, *, model_name: str | None = None) -> TritonReport:
    """Make a model repository for a plan, from its sidecar; the line to launch it is put into the sidecar too.

    The plan is hard-linked where possible, else copied; a model of the same name is replaced whole.

    Args:
        engine_path: the plan. repo_dir: the repository, made if it is missing. model_name: None is the plan's stem.

    Raises:
        AwqTrtError: no plan or sidecar, a bad name, a dtype Triton has not, or foreign files in the model's folder.
    """
    if not engine_path.is_file():
        raise AwqTrtError(f"{engine_path}: no such file. Build the engine first.")
    content = sidecar.read_sidecar(sidecar.path_of(engine_path))
    name = engine_path.stem if model_name is None else model_name
    if not name or name.startswith(".") or "/" in name:
        raise AwqTrtError(
            f"{name!r} cannot be a Triton model's name: it is a folder's name and may not begin with a dot."
        )
    model = repo_dir / name
    foreign = sorted(str(p.relative_to(model)) for p in model.rglob("*") if str(p.relative_to(model)) not in OURS)
    if foreign or model.is_file():
        raise AwqTrtError(
            f"{model} holds something else already ({', '.join(foreign[:3]) or 'it is a file'}). "
            "Choose another model name, or remove it."
        )
    text = config(name, content)
    plugin = content["plugin"]
    launched = launch(
        content["versions"].get("runtime", ""),
        None if plugin is None else Path(plugin["path"]),
        plugin is not None and plugin["embedded"],
        str(repo_dir.resolve()),
    )
    content["launch"]["triton"] = launched
    with replacing(model) as (folder,):
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text)
        try:
            os.link(engine_path, folder / "1" / "model.plan")
        except OSError:  # another file system, or one without links
            shutil.copyfile(engine_path, folder / "1" / "model.plan")
        sidecar.write(folder / "1" / "model.plan.json", content)
    sidecar.update(engine_path, launch=content["launch"])
    return TritonReport(model, launched["command"], tuple(launched["warnings"]))


def config(name: str, content: dict[str, Any]) -> str:
    """The text of config.pbtxt from a sidecar's content."""
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


def launch(runtime: str, plugin: Path | None, embedded: bool, repository: str = "MODEL_REPOSITORY") -> dict[str, Any]:
    """How to serve a plan: {"command": the tritonserver line or None, "warnings": [why it cannot be served]}."""
    warnings = []
    if runtime != "tensorrt":
        warnings.append(
            "Triton's TensorRT backend loads plans of TensorRT only, and this one was built by TensorRT-RTX. "
            "Build it with --runtime tensorrt on the GPU it is to run on."
        )
    if plugin is not None and not embedded:
        warnings.append(
            "Triton cannot load this plan: its option plugins= opens a library without registering its plugins. "
            "Build the engine with the plugin embedded, which is the default."
        )
    words = ["tritonserver", f"--model-repository={repository}"]
    if plugin is not None:
        words.append("--backend-config=tensorrt,version-compatible=true")
    return {"command": None if warnings else shlex.join(words), "warnings": warnings}


def _tensor(tensor: dict[str, Any], batched: bool) -> str:
    dtype = DATA_TYPES.get(tensor["dtype"])
    if dtype is None:
        raise AwqTrtError(
            f"tensor {tensor['name']!r} is {tensor['dtype']}; Triton's TensorRT backend has no such type."
        )
    dims = ", ".join(str(d) for d in tensor["shape"][1 if batched else 0 :])
    return f"  {{ name: {json.dumps(tensor['name'])} data_type: TYPE_{dtype} dims: [ {dims} ] }}"
