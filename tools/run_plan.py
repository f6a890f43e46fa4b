"""Run a plan on random inputs in every optimization profile, and compare what comes out with its ONNX file.

    python tools/run_plan.py out.plan out.onnx

Prints one JSON object: {"ran": true, "agrees": bool, "profiles": [...]} or {"ran": false, "refusal": text}.
Started by tools/gpu_check.py in a process of its own, since a runtime may abort it. Needs awq_trt, the TensorRT that
built the plan, PyTorch with CUDA, and ONNX Runtime, where the reference runs in fp32.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from awq_trt.engine.sidecar import path_of, read_sidecar
from awq_trt.export.fp32 import float32_copy
from awq_trt.export.metadata import fixed_cache_facts
from awq_trt.serve.open import open_decoder
from awq_trt.serve.tensorrt import TensorRtPlan

TOLERANCE = {"float16": 0.02, "bfloat16": 0.06, "float32": 0.02}
"""Largest relative error, ||plan - onnx|| / ||onnx||: activations of this type through a whole network."""

Runs = Iterator[tuple[str, dict[str, Any], dict[str, Any]]]  # profile, the plan's outputs by name, the ONNX file's


def run_decoder(path: Path, onnx: Path, prompt: int = 64, new: int = 4) -> Runs:
    """Logits of a ragged batch: one prefill call, then decode calls on the cache that it left."""
    with open_decoder(path) as plan, open_decoder(onnx, max_batch=plan.max_batch) as reference:
        longest = min(prompt, plan.prefill_chunk, plan.capacity - new)
        ids = np.random.default_rng(0).integers(0, plan.vocab_size, (plan.max_batch, longest + new))
        lengths, one = np.maximum(1, longest - np.arange(len(ids))), np.ones(len(ids))
        calls = [("prefill", ids[:, :longest], 0 * one, lengths)]
        calls += [("decode", ids[:, [longest + i]], lengths + i, one) for i in range(new)]
        for profile, *call in calls:
            yield profile, {"logits": plan.run(0, *call)}, {"logits": reference.run(0, *call)}


def run_network(path: Path, onnx: Path, content: dict[str, Any]) -> Runs:
    """All outputs of any other graph, at the shapes that its profiles are tuned for."""
    plan = TensorRtPlan(path, content)
    with tempfile.TemporaryDirectory() as folder:
        float32_copy(onnx, Path(folder, "fp32.onnx"))
        session = onnxruntime.InferenceSession(Path(folder, "fp32.onnx"), providers=["CPUExecutionProvider"])
    for number, profile in enumerate(content["profiles"]):
        inputs, feeds = {}, {}
        for name, kind in ((tensor["name"], tensor["dtype"]) for tensor in content["inputs"]):
            shape = profile["inputs"][name]["opt"]
            ids = torch.ones(shape) if "mask" in name else torch.randint(50, shape)
            inputs[name] = (torch.randn(shape) if "float" in kind else ids).to(getattr(torch, kind))
            feeds[name] = (inputs[name].float() if "float" in kind else inputs[name]).numpy()
        found = {name: value.float().cpu().numpy() for name, value in plan.run(number, inputs).items()}
        yield profile["name"], found, dict(zip(found, session.run(list(found), feeds), strict=True))


def check(path: Path, onnx: Path) -> dict[str, Any]:
    """Relative error of every output in every call, and whether all are small."""
    content = read_sidecar(path_of(path))
    runs = run_decoder(path, onnx) if fixed_cache_facts(content["model"]) else run_network(path, onnx, content)
    tolerance, profiles, norm = TOLERANCE[content["model"].get("dtype", "float16")], [], np.linalg.norm
    for profile, found, wanted in runs:
        errors = {name: float(norm(found[name] - wanted[name]) / max(norm(wanted[name]), 1e-6)) for name in wanted}
        agrees = all(error <= tolerance for error in errors.values())
        profiles.append({"profile": profile, "relative_error": errors, "agrees": agrees})
    agrees = all(profile["agrees"] for profile in profiles)
    return {"ran": True, "agrees": agrees, "tolerance": tolerance, "profiles": profiles}


if __name__ == "__main__":
    try:
        answer = check(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # of TensorRT, CUDA or ONNX Runtime: the message is the result
        answer = {"ran": False, "refusal": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))
