"""The head of a language model, quantized: one linear layer with a row for each token, outside the blocks.

Its weight may be larger than any block, so it is never in memory as floats. A sample of its rows stands in for it while
what is behind the blocks (final norm, head) is run: that is enough for H = X^T X, to prove where a scale can be folded,
and to search the scale. Then its rows are read, rounded and forgotten piece by piece.

A head that shares its weight with the embedding gets one of its own (task.untied); the embedding stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.calibrator import BlockCalibrator
from awq_trt.awq.fold import find_fold
from awq_trt.awq.hessian import Group
from awq_trt.awq.search import LayerReport, quantize_group
from awq_trt.awq.task import QuantizeTask
from awq_trt.errors import AwqTrtError
from awq_trt.linear import QuantizedLinear, quantize_weight, row_chunks

SAMPLE = 1 << 20
"""Weights of the head that are in memory as floats while the end of the model is run: whole rows, a multiple of 8."""


@contextmanager
def sampled_head(task: QuantizeTask, stream: BlockStream) -> Iterator[nn.Module]:
    """Inside, a layer with a few of its rows is the head of the stream's model, which is yielded."""
    model, name = stream.model, task.head or ""
    head: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
    n, k = task.head_shape
    count = max(8, min(n, SAMPLE // k) // 8 * 8)
    sample = nn.Linear(k, count, bias=head.bias is not None, device="meta")
    for kind in [kind for kind, _ in sample.named_parameters()]:
        value = task.checkpoint.rows(f"{name}.{kind}", torch.arange(count) * n // count)
        setattr(sample, kind, nn.Parameter(value.float(), requires_grad=False))
    model.set_submodule(name, sample)
    try:
        yield model
    finally:
        model.set_submodule(name, head)
        stream.outside.empty()


def round_rows(
    task: QuantizeTask, round: Callable[[torch.Tensor], QuantizedLinear], rows: int | None = None
) -> QuantizedLinear:
    """The head, its weight read and rounded piece by piece.

    Args:
        round: fp32 [R, K], which it may change -> the layer of these rows. rows: how many of them, None for all.
    """
    n, k = rows or task.head_shape[0], task.head_shape[1]
    q, scales, zeros = torch.empty(n, k, dtype=torch.uint8), [], []
    for piece in row_chunks(n, k):
        index = torch.arange(piece.start, piece.stop)
        part = round(task.checkpoint.rows(f"{task.head}.weight", index).float()).cpu()
        q[piece] = part.q
        scales.append(part.scales)
        zeros += [] if part.zeros is None else [part.zeros]
    return QuantizedLinear(q, torch.cat(scales), torch.cat(zeros) if zeros else None, part.group_size)


def quantize_head(
    task: QuantizeTask, calibrator: BlockCalibrator, groups: list[Group], rows: int | None = None
) -> tuple[QuantizedLinear, dict[str, torch.Tensor], list[LayerReport]]:
    """AWQ on the head, inside `sampled_head`; without calibration inputs, rounding to nearest.

    Args:
        groups: of the model's layers. rows: how many are rounded, None for all.

    Returns:
        The layer, the parameters `task.norms` with its scale folded in, and the report of the layer if it was searched.

    Raises:
        AwqTrtError: the model does not call its head.
    """
    model, device, name = calibrator.stream.model, calibrator.stream.device, task.head or ""
    config, dtype, checkpoint = task.config, task.checkpoint.dtype, task.checkpoint
    if not task.inputs:
        group_size = config.group(task.head_shape[1])
        layer = round_rows(task, lambda weight: quantize_weight(weight, group_size, config.symmetric, dtype), rows)
        return layer, {n: checkpoint.tensor(n) for n in task.norms}, []
    seen = next((g for g in groups if name in g.linears), None)
    if seen is None:
        raise AwqTrtError(f'{type(model).__name__} never calls its head {name}: leave it in float (lm_head="float").')
    linears = {name: seen.linears[name]}
    group = Group(linears, [n for n in seen.before if f"{n}.weight" in task.norms], seen.statistics)
    fold = find_fold(model, group, calibrator.first_output)
    with calibrator.timer.stage("search"):
        linears[name].to(device)
        found = quantize_group(model, group, fold, names={name}, config=config, dtype=dtype)
    s, reports = found.best.s, list(found.reports.values())
    with calibrator.timer.stage("round"):
        layer = round_rows(task, lambda weight: found.rounder.round(weight.to(device).mul_(s))[0], rows)
    now = dict(model.named_parameters())  # those that were not run are still empty
    norms = {n: checkpoint.tensor(n) if now[n].is_meta else now[n].data for n in task.norms}
    return replace(layer, pre_scale=found.pre_scale).cpu(), norms, reports
