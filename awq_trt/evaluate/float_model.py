"""The float model that a result is measured against: transformers' own, by `from_pretrained`, in a process of its own.

This package's reader and its block-by-block pass are what is judged, so neither can be the judge. Every tensor that
transformers loads must be the one that the reader gives, and on a short text both must compute the same. A model that
does not fit in memory is compared tensor by tensor as transformers' loader hands them over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from awq_trt.awq.blocks import Inputs
from awq_trt.awq.ranges import Ranges
from awq_trt.checkpoint.experts import Part, parts_of
from awq_trt.checkpoint.model import empty_model, persistent_buffers
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.engine.child import run_child
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import Predictions, eager_outputs, is_causal_lm
from awq_trt.evaluate.float_process import digest
from awq_trt.publishing import scratch

SPARE = 0.7
"""Part of the free memory that a float model may take; activations and logits need some, too."""
SAME = 5e-3
"""Most that two fp32 computations of one model differ by: |difference| / |logits|, 1e-6 as a rule."""


@dataclass(frozen=True)
class FloatModel:
    """What transformers' model of a checkpoint gives."""

    judge: str  # how it was asked, for people
    predictions: Predictions | None  # of the held-out inputs; None where it was not run


def judge(
    original: Checkpoint, held_out: Sequence[Inputs], short: Sequence[Inputs], *, memory: int | None = None
) -> FloatModel:
    """Compare what is read of a checkpoint with what transformers loads, and run transformers' model.

    Args:
        held_out: inputs for perplexity and choices. short: inputs whose every logit is compared.
        memory: bytes that the process may take, None for what is free.

    Raises:
        AwqTrtError: they differ; transformers cannot load it; its activations do not fit a float16 engine.
    """
    parameters = sum(p.numel() for p in empty_model(original.config).parameters())
    whole = bool(short) and 4 * parameters < SPARE * min(free_memory(), memory or free_memory())
    version = f"transformers {transformers.__version__}"
    path = next((file.parent for file in original.files if file.name == "config.json"), original.files[0])
    is_gguf = path.is_file()
    if is_gguf and len(original.files) > 1:
        return FloatModel("none: transformers reads no GGUF file in parts", None)
    if is_gguf and not whole:
        return FloatModel(f"none: transformers reads a GGUF file whole, and {parameters} weights do not fit", None)
    with scratch() as folder:
        kinds = {"held_out": held_out, "short": short}
        tensors = {
            f"{kind}.{i}.{name}": tensor.clone(memory_format=torch.contiguous_format)
            for kind, samples in kinds.items()
            for i, sample in enumerate(samples)
            for name, tensor in sample.items()
        }
        save_file(tensors, folder / "inputs")
        job = {
            "path": str(path.resolve()),
            "architecture": (original.config.architectures or [""])[0],
            "config": {
                "module": type(original.config).__module__,
                "class": type(original.config).__qualname__,
                "values": original.config.to_dict(),
            },
            "trust_remote_code": type(original.config).__module__.startswith("transformers_modules."),
            "whole": whole,
            "causal": is_causal_lm(original.config),
            "inputs": str(folder / "inputs"),
            "output": str(folder / "output"),
        }
        outcome, status, printed = run_child("awq_trt.evaluate.float_process", job)
        if "done" not in outcome:
            last = printed.strip().splitlines()[-1:] if status >= 0 else [f"it was ended by signal {-status}"]
            why = " ".join(str(outcome.get("failed") or " ".join(last)).split())
            raise AwqTrtError(
                f"{original.source}: {version} does not load this checkpoint, so that there is nothing to compare what "
                f"was read with: {why[:500]}. (verify=False skips the comparison.)"
            )
        done = outcome["done"]
        compare_tensors(original, done["digests"])
        if not whole:
            return FloatModel(f"{version}, tensor by tensor", None)
        if why := done.get("not_run"):
            raise AwqTrtError(
                f"{original.source}: {version} loads this checkpoint but does not run it on the inputs, {why}"
            )
        found = load_file(folder / "output")
    Ranges(*done["largest"]).refuse_float16(original.source, original.dtype)
    ours = torch.cat([x.flatten() for x in eager_outputs(original, short)])
    theirs = torch.cat([found[f"logits.{i}"].flatten() for i in range(len(short))])
    difference = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-15))
    if not difference < SAME:
        raise AwqTrtError(
            f"{original.source}: run block by block, the model computes something else than {version} (relative "
            f"difference {difference:.1e}); please report this with the model's name."
        )
    chosen = [found[f"chosen.{i}"] for i in range(len(held_out))]
    how = " with the configuration that was read of the file" if is_gguf else ""
    return FloatModel(f"{version}, from_pretrained{how}", Predictions(done["losses"], chosen))


def compare_tensors(original: Checkpoint, digests: dict[str, str]) -> None:
    """Every tensor that transformers loaded against what the reader gives under that name.

    Raises:
        AwqTrtError: one differs, or holds NaN or Inf.
    """
    model = empty_model(original.config)
    named = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    stacked: dict[str, dict[str, Part]] = {}
    for name, part in parts_of(model).items():
        stacked.setdefault(part.fused, {})[name] = part
    single = {name: first[id(p)] for name, p in named.items() if name not in parts_of(model)}
    buffers = {name: model.get_buffer(name) for name in persistent_buffers(model)}
    expected = {*single, *stacked, *buffers}
    wrong = sorted(expected ^ digests.keys())
    known: dict[str, str] = {}
    for name in sorted(expected & digests.keys()):
        key = single.get(name, name)
        if key not in known:
            known[key] = digest(_pieces(original, key, stacked.get(name), buffers))
        if known[key] != digests[name]:
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise AwqTrtError(
            f"{original.source}: {wrong[0]}{more}: what was read is not what transformers {transformers.__version__} "
            "loads; please report this with the model's name."
        )


def _pieces(
    original: Checkpoint, name: str, parts: dict[str, Part] | None, buffers: dict[str, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """A tensor as transformers has it: as the file has it, and experts stacked."""
    if parts is None:
        value = buffers[name] if name not in original.readers and name in buffers else original.tensor(name)
        yield value.t() if name in original.transposed else value
        return
    shape = next(iter(parts.values())).shape
    for expert in range(shape[0]):
        stack = torch.zeros(shape[1:])
        for layer, part in parts.items():
            if part.expert == expert:
                turned = stack.t() if part.transposed and stack.dim() == 2 else stack
                turned[part.rows] = original.tensor(layer).float()
        yield stack


def free_memory() -> int:
    """Bytes that a new process can have: what the machine has free, or the container's limit leaves."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free
