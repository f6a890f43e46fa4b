"""What a quantization is going to do, from the configuration and the calibration inputs alone; no weight is read."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from awq_trt.awq.blocks import Inputs
from awq_trt.awq.calibration import DEFAULT_TEXT, calibration_inputs
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.distributed import compute_device
from awq_trt.awq.hessian import scaled_weight
from awq_trt.awq.resume import content_digest, environment, inputs_digest
from awq_trt.checkpoint.experts import left_alone
from awq_trt.checkpoint.model import empty_model, find_blocks, most_tokens, persistent_buffers, quantizable_linears
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.files import package_version
from awq_trt.layout import GROUP_SIZES

OUTSIDE = "outside the repeated blocks (embeddings and heads stay in float)"


@dataclass(frozen=True)
class QuantizeTask:
    """What is to be done, before anything is read or written."""

    checkpoint: Checkpoint  # where the head will be INT4, with a head of its own (untied)
    config: QuantizeConfig  # all fields set
    prefix: str  # name of the list of blocks
    blocks: int  # how many
    names: tuple[str, ...]  # layers that will be INT4
    left: dict[str, str]  # layer -> why it stays in float
    head: str | None  # the one of `names` that is the head
    head_shape: tuple[int, int]  # (N, K) of it; (0, 0) without
    norms: tuple[str, ...]  # parameters that are written with the head, see `norms_outside`
    outside: tuple[str, ...]  # other parameters and buffers outside the blocks
    inputs: list[Inputs]  # calibration windows; [] for plain rounding
    device: torch.device  # where blocks are run and rounded
    report: dict[str, Any]  # what awq_trt.json will say besides the layers

    @property
    def steps(self) -> int:
        """Of the quantization: the blocks, and then the head, if it is to be INT4."""
        return self.blocks + (self.head is not None)

    def names_in(self, prefix: str) -> set[str]:
        """The layers of a block that will be INT4, by their names in it."""
        return {name.removeprefix(f"{prefix}.") for name in self.names if name.startswith(f"{prefix}.")}

    def key(self) -> dict[str, Any]:
        """All that the result depends on: work begun under another key is of no use."""
        return {
            "checkpoint": content_digest(self.checkpoint.files),
            "calibration": inputs_digest(self.inputs),
            "settings": {k: str(v) for k, v in asdict(self.config).items()} | {"dtype": str(self.checkpoint.dtype)},
            "device": self.device.type,
            "report": self.report,
            **environment(),
        }


def make_task(checkpoint: Checkpoint, config: QuantizeConfig) -> QuantizeTask:
    """Look at everything but the weights.

    Args:
        config: as `QuantizeConfig.resolved` returns it; group_size None takes what `default_group_size` says.

    Raises:
        AwqTrtError: no blocks, no layer that can be quantized, no head for lm_head="int4", unusable calibration inputs.
    """
    model = empty_model(checkpoint.config)
    head = head_of(model) if config.lm_head == "int4" else None
    if head is None and config.lm_head == "int4":
        raise AwqTrtError(
            f"{checkpoint.source}: {type(model).__name__} has no linear layer that makes logits over the vocabulary; "
            'leave lm_head="float".'
        )
    inside = quantizable_linears(model)
    if config.group_size is None:
        config = replace(config, group_size=default_group_size([*inside.values(), *([head[1]] if head else [])]))
    left = {n: OUTSIDE for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in inside}
    if head is not None:
        reason = config.unsupported_reason(head[1], checkpoint.dtype, padded=True)
        if reason is None:
            del left[head[0]]
            checkpoint = untied(checkpoint)
            model = empty_model(checkpoint.config)
        else:
            left[head[0]], head = reason, None
    left |= reasons_for_float(model, config, checkpoint.dtype)
    names = tuple(n for n in [*inside, *([head[0]] if head else [])] if n not in left)
    if not names:
        reasons = "; ".join(sorted(set(left.values())))
        raise AwqTrtError(f"{checkpoint.source}: no layer can be quantized with these settings: {reasons}.")
    inputs: list[Inputs] = []
    if config.method == "awq":
        length = config.calibration_length
        length = min(length, most_tokens(checkpoint.config) or length)
        samples = config.calibration_samples or 1
        inputs = calibration_inputs(config.calibration or DEFAULT_TEXT, checkpoint.tokenizer, samples, length)
    prefix, blocks = find_blocks(model)
    norms = norms_outside(model, prefix) if head else []
    apart = {*norms, *([f"{head[0]}.weight"] if head else [])}
    outside = sorted(n for n, _ in model.named_parameters() if not n.startswith(f"{prefix}.") and n not in apart)
    report = {
        "awq_trt": package_version(),
        "source": checkpoint.source,
        "note": checkpoint.note,
        "method": config.method,
        "clip": config.clip,
        "feedback": config.error_compensation,
        "refit": config.refit,
        "symmetric": config.symmetric,
        "group_size": config.group_size,
        "lm_head": "int4" if head else "float",
        "calibration": {
            "source": str(config.calibration or "package default"),
            "windows": len(inputs),
            "length": config.calibration_length,
        },
        "left_in_float": left,
    }
    return QuantizeTask(
        checkpoint=checkpoint,
        config=config,
        prefix=prefix,
        blocks=len(blocks),
        names=names,
        left=left,
        head=head and head[0],
        head_shape=(head[1].out_features, head[1].in_features) if head else (0, 0),
        norms=tuple(norms),
        outside=(*outside, *(b for b in persistent_buffers(model) if b in checkpoint.readers)),
        inputs=inputs,
        device=compute_device(config.device),
        report=report,
    )


def head_of(model: transformers.PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """Name and layer of what turns the last hidden states into logits over the vocabulary; None where there is none."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None) if isinstance(head, nn.Linear) else None
    return None if name is None else (name, head)


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with a head of its own, where it shares its weight with the embedding: both are read from there.

    Raises:
        AwqTrtError: the architecture has no such form.
    """
    shared = empty_model(checkpoint.config)
    if not _is_tied(shared):
        return checkpoint
    config = copy.deepcopy(checkpoint.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    model = empty_model(config)
    first = {id(p): n for n, p in shared.named_parameters()}
    names = {n: first[id(p)] for n, p in shared.named_parameters(remove_duplicate=False)}
    wanted = [n for n, _ in model.named_parameters() if n not in checkpoint.readers]
    if _is_tied(model) or not set(wanted) <= set(names):
        raise AwqTrtError(
            f"{checkpoint.source}: {type(shared).__name__} cannot have a head apart from its embedding; leave the head "
            'in float (lm_head="float").'
        )
    readers = {**checkpoint.readers, **{n: checkpoint.readers[names[n]] for n in wanted}}
    return replace(checkpoint, config=config, readers=readers)


def _is_tied(model: transformers.PreTrainedModel) -> bool:
    """Whether the weight of the head has another name, too."""
    found = head_of(model)
    weight = None if found is None else found[1].weight
    return sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1


def norms_outside(model: nn.Module, prefix: str) -> list[str]:
    """Parameters of the norms outside the blocks `prefix`: small, and one of them may take the head's scale."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear) and scaled_weight(module) is not None
        if not name.startswith(f"{prefix}.")
        for parameter, _ in module.named_parameters(recurse=False)
    ]


def reasons_for_float(model: nn.Module, config: QuantizeConfig, dtype: torch.dtype) -> dict[str, str]:
    """The modules inside the blocks that stay in float, with the reason; `dtype` is that of the activations."""
    linears, alone = quantizable_linears(model), left_alone(model)
    found = {n: alone.get(n) or config.unsupported_reason(m, dtype) for n, m in linears.items()}
    prefix = f"{find_blocks(model)[0]}."
    return {n: why for n, why in (found | alone).items() if why is not None and n.startswith(prefix)}


def default_group_size(linears: list[nn.Linear]) -> int:
    """The largest of 128, 64, 32 that divides the input features of every layer that can be INT4 at all; 32 if none."""
    smallest = min(GROUP_SIZES)
    widths = [linear.in_features for linear in linears if linear.in_features % smallest == 0]
    fitting = (g for g in GROUP_SIZES if widths and all(width % g == 0 for width in widths))
    return max(fitting, default=smallest)
