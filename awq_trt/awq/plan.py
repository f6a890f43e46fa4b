"""What a quantization is going to do, from the configuration and the calibration inputs alone; no weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq_trt.awq.blocks import Inputs
from awq_trt.awq.calibration import DEFAULT_TEXT, calibration_inputs
from awq_trt.awq.head import head_of, norms_outside, untied
from awq_trt.awq.resume import content_digest, environment, tensors_digest
from awq_trt.awq.search import Settings
from awq_trt.checkpoint.experts import left_alone
from awq_trt.checkpoint.model import empty_model, find_blocks, persistent_buffers
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.files import package_version
from awq_trt.layout import GROUP_SIZES

OUTSIDE = "outside the repeated blocks (embeddings and heads stay in float)"
LM_HEAD = ("float", "int4")
"""What the layer that makes logits can be; embeddings stay in float."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, before anything is read or written.

    Attributes:
        checkpoint: where the head will be INT4, with a head of its own (head.untied).
        prefix: name of the list of blocks. blocks: how many. names: layers that will be INT4. left: layer -> why not.
        head: the one of them that is the head, or None. norms: parameters that are written with it, see head.py.
        outside: other parameters and buffers outside the blocks. inputs: calibration windows, [] for plain rounding.
        dtype, device: what blocks compute in, and where. save_format: see writer.SAVE_FORMATS.
        report: what awq_trt.json will say besides the layers.
    """

    checkpoint: Checkpoint
    settings: Settings
    prefix: str
    blocks: int
    names: tuple[str, ...]
    left: dict[str, str]
    head: str | None
    norms: tuple[str, ...]
    outside: tuple[str, ...]
    inputs: list[Inputs]
    dtype: torch.dtype
    device: torch.device
    save_format: str
    report: dict[str, Any]

    @property
    def steps(self) -> int:
        """Of the quantization: the blocks, and then the head, if it is to be INT4."""
        return self.blocks + (self.head is not None)


def make_plan(
    checkpoint: Checkpoint,
    options: dict[str, Any],
    method: str,
    calibration: str | Path | None,
    samples: int,
    length: int,
    compute: tuple[torch.dtype, torch.device],
    save_format: str,
    lm_head: str = "float",
) -> Plan:
    """Look at everything but the weights.

    Args:
        options: fields of `Settings` besides dtype; group_size None takes what `default_group_size` says.
        calibration, samples, length, save_format, lm_head: as for `quantize`. compute: dtype and device.

    Raises:
        AwqTrtError: no blocks, no layer that can be quantized, no head for `lm_head`, unusable calibration inputs.
    """
    if lm_head not in LM_HEAD:
        raise AwqTrtError(f"lm_head {lm_head!r} is not one of {', '.join(LM_HEAD)}.")
    network = empty_model(checkpoint.config)
    head = head_of(network) if lm_head == "int4" else None
    if head is None and lm_head == "int4":
        raise AwqTrtError(
            f"{checkpoint.source}: {type(network).__name__} has no linear layer that makes logits over the vocabulary; "
            "leave out --lm-head int4."
        )
    prefix, blocks = find_blocks(network)
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    inside = {n: m for n, m in linears.items() if n.startswith(f"{prefix}.")}
    if options["group_size"] is None:
        options = options | {"group_size": default_group_size(inside | dict([head] if head else []))}
    settings = Settings(dtype=checkpoint.dtype, **options)
    left = {n: OUTSIDE for n in linears if n not in inside}
    if head is not None and (reason := settings.why_float(head[1], padded=True)) is not None:
        left[head[0]], head = reason, None
    elif head is not None:
        del left[head[0]]
        checkpoint = untied(checkpoint)
        network = empty_model(checkpoint.config)
    left |= {n: reason for n, m in inside.items() if (reason := settings.why_float(m)) is not None}
    left |= {n: reason for n, reason in left_alone(network).items() if n.startswith(f"{prefix}.")}
    names = tuple(n for n in [*inside, *([head[0]] if head else [])] if n not in left)
    if not names:
        reasons = "; ".join(sorted(set(left.values())))
        raise AwqTrtError(f"{checkpoint.source}: no layer can be quantized with these settings: {reasons}.")
    inputs: list[Inputs] = []
    if method == "awq":
        longest = getattr(checkpoint.config, "max_position_embeddings", None) or length
        inputs = calibration_inputs(calibration or DEFAULT_TEXT, checkpoint.tokenizer, samples, min(length, longest))
    norms = norms_outside(network, prefix) if head else []
    apart = {*norms, *([f"{head[0]}.weight"] if head else [])}
    outside = sorted(n for n, _ in network.named_parameters() if not n.startswith(f"{prefix}.") and n not in apart)
    buffers = [b for b in persistent_buffers(network) if b in checkpoint.readers]
    report = {
        "awq_trt": package_version(),
        "source": checkpoint.source,
        "note": checkpoint.note,
        "method": method,
        "clip": settings.clip,
        "feedback": settings.feedback,
        "refit": settings.refit,
        "symmetric": settings.symmetric,
        "group_size": settings.group_size,
        "lm_head": "int4" if head else "float",
        "calibration": {"source": str(calibration or "package default"), "windows": len(inputs), "length": length},
        "left_in_float": left,
    }
    places = (prefix, len(blocks), names, left, head and head[0], tuple(norms), (*outside, *buffers))
    return Plan(checkpoint, settings, *places, inputs, *compute, save_format, report)


def work_key(plan: Plan) -> dict[str, Any]:
    """All that the result depends on: work begun under another key is of no use."""
    settings = {k: str(v) for k, v in asdict(plan.settings).items()}
    return {
        "checkpoint": content_digest(plan.checkpoint.files),
        "calibration": tensors_digest(plan.inputs),
        "settings": settings | {"dtype": str(plan.checkpoint.dtype), "save_format": plan.save_format},
        "compute": f"{plan.dtype} on {plan.device.type}",
        "report": plan.report,
        **environment(),
    }


def default_group_size(linears: dict[str, nn.Linear]) -> int:
    """The largest of 128, 64, 32 that divides the input features of every layer; 32 where none does."""
    widths = {linear.in_features for linear in linears.values()}
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if all(k % g == 0 for k in widths)), min(GROUP_SIZES))
