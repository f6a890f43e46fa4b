"""transformers' own model of a checkpoint: what it loads, tensor by tensor, and what it computes. For float_model.py.

A process of its own: its memory is free again afterwards, and nothing that this package does to transformers in the
parent is in it. No tensor comes from this package's reader.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from awq_trt.awq.ranges import Ranges
from awq_trt.checkpoint.model import main_output, persistent_buffers
from awq_trt.checkpoint.submodels import model_class
from awq_trt.engine.child import Send, run_job
from awq_trt.errors import AwqTrtError, brief
from awq_trt.evaluate.accuracy import predictions

PIECE = 1 << 22
"""Numbers that are hashed at once."""


def digest(pieces: Iterator[torch.Tensor]) -> str:
    """Hash of a tensor's values in fp32, whatever their dtype; of its pieces in order."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        for part in piece.detach().reshape(-1).split(PIECE):
            found.update(part.contiguous().float().numpy().tobytes() if part.is_floating_point() else _integers(part))
    return found.hexdigest()


def _integers(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().to(torch.int64).numpy().tobytes()


def load(job: dict[str, Any], **options: Any) -> transformers.PreTrainedModel:
    """The model, or the part of it that the job asks for, by `from_pretrained`.

    A GGUF file's configuration is that of the job: transformers passes over some of its keys, and over rope_freqs.
    """
    path, trust = Path(job["path"]), {"trust_remote_code": job["trust_remote_code"]}
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    place = str(path.parent if path.is_file() else path)
    config = _config_of(job) if gguf else transformers.AutoConfig.from_pretrained(place, **trust)
    options |= {"pretrained_model_name_or_path": place, "use_safetensors": True, "config": config, **trust, **gguf}
    if config.architectures == [job["architecture"]]:
        return _loaded(model_class(config), options)
    part_config = _config_of(job)
    part = model_class(part_config)
    try:
        return _loaded(part, options | {"config": part_config})
    except (AwqTrtError, RuntimeError, ValueError):  # its names are others in the file of the whole
        return _part(part, part_config, _loaded(model_class(config), options))


def _config_of(job: dict[str, Any]) -> transformers.PretrainedConfig:
    own: Any = getattr(importlib.import_module(job["config"]["module"]), job["config"]["class"])
    config: transformers.PretrainedConfig = own.from_dict(job["config"]["values"])
    return config


def _loaded(cls: Any, options: dict[str, Any]) -> transformers.PreTrainedModel:
    model, info = cls.from_pretrained(**options, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise AwqTrtError(f"it finds no {missing[0]}")
    return model.eval()


def _part(cls: Any, config: transformers.PretrainedConfig, whole: Any) -> transformers.PreTrainedModel:
    """The model of a class whose modules are those of a whole one: the part itself, or its base model and its head."""
    if found := next((m for m in whole.modules() if type(m) is cls), None):
        return found
    with torch.device("meta"):
        model = cls._from_config(config)
    base, name = type(model.base_model), model.base_model_prefix
    inner = next((m for m in whole.modules() if type(m) is base), None)
    if inner is None or model.get_output_embeddings() is None or whole.get_output_embeddings() is None:
        raise AwqTrtError(f"{type(whole).__name__} holds no {cls.__name__}")
    setattr(model, name, inner)
    model.set_output_embeddings(whole.get_output_embeddings())
    return model.eval()


@contextmanager
def _streamed(digests: dict[int, tuple[Any, str]]) -> Iterator[None]:
    """Inside, `from_pretrained` hands over one tensor after the other, and none is kept.

    Args:
        digests: id of the empty parameter that stands for a tensor -> that parameter, digest of the tensor.
    """
    original: Callable[..., None] = core_model_loading.set_param_for_module

    def hash_and_forget(model: Any, name: str, value: torch.Tensor, *rest: Any) -> None:
        module, _, key = name.rpartition(".")
        if key in model.get_submodule(module)._buffers:
            original(model, name, value, *rest)
            return
        empty = torch.nn.Parameter(value.to("meta"), requires_grad=False)
        digests[id(empty)] = empty, digest(iter([value]))
        original(model, name, empty, *rest)

    core_model_loading.set_param_for_module = hash_and_forget  # type: ignore[assignment]
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else threads read ahead
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = original
        del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def work(job: dict[str, Any], send: Send) -> dict[str, Any]:
    """Load the model and run it.

    Args:
        job: path (directory or .gguf), architecture, config (of a part or a GGUF file: module, class, values),
            trust_remote_code; whole: whether it fits in memory, and is run; inputs: safetensors file with
            `<held_out|short>.<i>.<name>`; causal; output: safetensors file to write.

    Returns:
        digests: parameter or persistent buffer -> `digest`; not_run: why not, with the shapes of an input; or where it
        was run, losses, and the largest value of its activations with its place. The file then has `chosen.<i>` of the
        held-out inputs, `logits.<i>` of the short.
    """
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    streamed: dict[int, tuple[Any, str]] = {}
    if job["whole"]:
        model = load(job, dtype=torch.float32)
    else:
        with _streamed(streamed):
            model = load(job, dtype="auto")
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: model.get_buffer(name) for name in persistent_buffers(model)}
    known: dict[int, str] = {key: value for key, (_, value) in streamed.items()}
    digests = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:
            known[id(tensor)] = digest(iter([tensor]))
        digests[name] = known[id(tensor)]
    if not job["whole"]:
        return {"digests": digests}
    inputs: dict[str, dict[int, dict[str, torch.Tensor]]] = {"held_out": {}, "short": {}}
    for key, tensor in load_file(job["inputs"]).items():
        kind, number, name = key.split(".", 2)
        inputs[kind].setdefault(int(number), {})[name] = tensor
    held_out, short = ([samples[i] for i in range(len(samples))] for samples in inputs.values())
    ranges = Ranges()
    try:
        with ranges.watching(model):
            found = predictions((run(model, sample) for sample in held_out), held_out, job["causal"])
            logits = {f"logits.{i}": run(model, sample).contiguous() for i, sample in enumerate(short)}
    except Exception as error:
        shapes = {name: list(tensor.shape) for name, tensor in [*held_out, *short][0].items()}
        return {"digests": digests, "not_run": f"such as {shapes}: {brief(error)}"}
    chosen = {f"chosen.{i}": value.contiguous() for i, value in enumerate(found.chosen)}
    save_file(logits | chosen, job["output"])
    return {"digests": digests, "losses": found.losses, "largest": [ranges.largest, ranges.module]}


@torch.inference_mode()
def run(model: transformers.PreTrainedModel, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (or last hidden states), in fp32."""
    arguments: dict[str, Any] = dict(sample)
    if getattr(model.config, "use_cache", None) is not None:
        arguments["use_cache"] = False
    output = model(**arguments, return_dict=True)
    result: torch.Tensor = output[main_output(output)]
    return result.float()


if __name__ == "__main__":
    run_job(work)
