"""The head of a language model, quantized: one linear layer with a row for each token, outside the blocks.

Its weight may be larger than any block, so it is never in memory as floats. A sample of its rows stands in for it while
what is behind the blocks (final norm, head) is run: that is enough for H = X^T X, to prove where a scale can be folded,
and to search the scale. Then its rows are read, rounded and forgotten piece by piece.

A head that shares its weight with the embedding gets one of its own (`untied`); the embedding stays in float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import transformers
from torch import nn

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.calibrator import BlockCalibrator
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.fold import find_fold
from awq_trt.awq.observe import Group, scaled_weight
from awq_trt.awq.search import LayerReport, constraint, search
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear, row_chunks

SAMPLE = 1 << 20
"""Weights of the head that are in memory as floats while the end of the model is run: whole rows, a multiple of 8."""


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


@contextmanager
def sampled_head(stream: BlockStream, checkpoint: Checkpoint, name: str) -> Iterator[nn.Module]:
    """Inside, a layer with a few of its rows is the head of the stream's model, which is yielded."""
    model = stream.model
    head: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
    n, k = head.out_features, head.in_features
    count = max(8, min(n, SAMPLE // k) // 8 * 8)
    sample = nn.Linear(k, count, bias=head.bias is not None, device="meta")
    for kind in [kind for kind, _ in sample.named_parameters()]:
        value = checkpoint.rows(f"{name}.{kind}", torch.arange(count) * n // count)
        setattr(sample, kind, nn.Parameter(value.float(), requires_grad=False))
    model.set_submodule(name, sample)
    try:
        yield model
    finally:
        model.set_submodule(name, head)
        stream.outside.empty()


def round_rows(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], round: Callable[[torch.Tensor], QuantizedLinear]
) -> QuantizedLinear:
    """The layer `name`, its weight read and rounded piece by piece.

    Args:
        shape: (N, K) of the layer, or fewer rows. round: fp32 [R, K], which it may change -> the layer of these rows.
    """
    n, k = shape
    q = torch.empty(n, k, dtype=torch.uint8)
    scales, zeros = [], []
    for piece in row_chunks(n, k):
        part = round(checkpoint.rows(f"{name}.weight", torch.arange(piece.start, piece.stop)).float())
        q[piece] = part.q
        scales.append(part.scales.cpu())
        zeros += [] if part.zeros is None else [part.zeros.cpu()]
    return QuantizedLinear(q, torch.cat(scales), torch.cat(zeros) if zeros else None, part.group_size)


def quantize_head(
    calibrator: BlockCalibrator,
    groups: list[Group],
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    name: str,
    norms: Collection[str],
    shape: tuple[int, int],
) -> tuple[QuantizedLinear, dict[str, torch.Tensor], LayerReport]:
    """AWQ on the head `name`, inside `sampled_head`.

    Args:
        groups: of the model's layers. norms: see `norms_outside`. shape: (N, K) of the head, or fewer rows to round.

    Returns:
        The layer, the norms with its scale folded in, and the report of the layer.

    Raises:
        AwqTrtError: the model does not call its head.
    """
    model, device = calibrator.stream.model, calibrator.stream.device
    seen = next((g for g in groups if name in g.linears), None)
    if seen is None:
        raise AwqTrtError(f'{type(model).__name__} never calls its head {name}: leave it in float (lm_head="float").')
    linears = {name: seen.linears[name]}
    group = Group(linears, [n for n in seen.before if f"{n}.weight" in norms], seen.statistics)
    fold = find_fold(model, group, calibrator.first_output)
    with calibrator.timer.stage("search"):
        linears[name].to(device)
        constrain = constraint(model, fold, config, checkpoint.dtype)
        found = search(linears, group.statistics, config, checkpoint.dtype, constrain)
    s = found.best.s
    with calibrator.timer.stage("round"):
        layer = round_rows(checkpoint, name, shape, lambda weight: found.rounder.round(weight.to(device).mul_(s))[0])
    report = found.reports[name]
    if found.best.scaled and fold is not None:
        fold.apply(model, s.cpu())
        report = replace(report, folded_into=fold.into)
    elif found.best.scaled:
        layer = replace(layer, pre_scale=(1 / s).to(checkpoint.dtype).cpu())
    now = dict(model.named_parameters())  # those that were not run are still empty
    return layer, {n: checkpoint.tensor(n) if now[n].is_meta else now[n].data for n in norms}, report
