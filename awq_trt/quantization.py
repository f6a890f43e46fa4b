"""Checkpoint in, AWQ checkpoint out: blocks are read, searched, rounded and written one after the other."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from awq_trt.awq import ALPHAS, LayerReport, Settings, quantize_block, round_block
from awq_trt.blocks import BlockCalls, BlockStream, Inputs, fill, find_blocks
from awq_trt.calibration import DEFAULT_TEXT, calibration_inputs
from awq_trt.checkpoint import Checkpoint, empty_model, open_checkpoint, persistent_buffers
from awq_trt.errors import AwqTrtError
from awq_trt.files import replacing
from awq_trt.fold import Fold
from awq_trt.layout import GROUP_SIZES
from awq_trt.linear import QuantizedLinear
from awq_trt.plugin import package_version
from awq_trt.quantized_checkpoint import Writer

PATCHES = 256
"""Tokens that an image is taken for in the estimate."""
OUTSIDE = "outside the repeated blocks (embeddings and heads stay in float)"


@dataclass(frozen=True)
class QuantizeReport:
    """What was written.

    Attributes:
        directory: the quantized checkpoint. group_size: -1 for the whole row. quantized: layers that are INT4 now.
        layers: what the search found, for each layer that saw calibration inputs. left_in_float: layer -> reason.
        pre_scales: how many layers carry a pre-scale.
    """

    directory: Path
    group_size: int
    quantized: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    left_in_float: dict[str, str]
    pre_scales: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run will take, computed before it starts: peak memory above the interpreter's, and seconds."""

    memory_bytes: int
    seconds: float


def quantize(
    model: Checkpoint | str | Path,
    output: Path,
    *,
    method: str = "awq",
    group_size: int | None = None,
    symmetric: bool = False,
    pre_scale: bool = True,
    calibration: str | Path | None = None,
    samples: int = 8,
    length: int = 512,
    console: Console | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of the model's blocks to INT4 and write a Hugging Face directory.

    Args:
        model: a directory, .gguf file, hub id, or an open Checkpoint.
        output: directory, replaced as a whole at the end.
        method: "awq" searches scales on calibration inputs; "rtn" rounds to nearest and needs none.
        group_size: 32, 64, 128 or -1 (whole row); None takes the largest of 128, 64, 32 that divides every K.
        symmetric: no zero points. pre_scale: allow scales that no operator before the layer can absorb.
        calibration: text file, directory, `datasets` id or .npz of model inputs; None takes the text in the package.
        samples, length: number of calibration windows and tokens per window.
        console: for estimate and progress; None is silent.

    Raises:
        AwqTrtError: bad weights or calibration inputs, or no layer that the kernels can run.
    """
    started = time.monotonic()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    network = empty_model(checkpoint.config)
    prefix, blocks = find_blocks(network)
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    inside = {n: m for n, m in linears.items() if n.startswith(f"{prefix}.")}
    settings = Settings(
        default_group_size(inside) if group_size is None else group_size,
        symmetric,
        checkpoint.dtype,
        pre_scale,
    )
    left = {n: OUTSIDE for n in linears if n not in inside}
    left |= {n: reason for n, m in inside.items() if (reason := settings.why_float(m)) is not None}
    names = tuple(n for n in inside if n not in left)
    if not names:
        reasons = "; ".join(sorted(set(left.values())))
        raise AwqTrtError(f"{checkpoint.source}: no layer can be quantized with these settings: {reasons}.")

    inputs: list[Inputs] = []
    if method == "awq":
        longest = getattr(checkpoint.config, "max_position_embeddings", None) or length
        inputs = calibration_inputs(calibration or DEFAULT_TEXT, checkpoint.tokenizer, samples, min(length, longest))
    if console:
        console.print(describe(estimate(network, inputs), settings, len(names), len(left), len(inputs)))
    with replacing(output) as [directory]:
        writer = Writer(directory, checkpoint)
        outside = {n for n, _ in network.named_parameters() if not n.startswith(f"{prefix}.")}
        buffers = [b for b in persistent_buffers(network) if b in checkpoint.readers]
        writer.add("outside", {n: checkpoint.tensor(n) for n in sorted(outside) + buffers})
        stream = BlockStream(checkpoint, inputs) if inputs else None
        layers: list[LayerReport] = []
        pre_scales = 0
        folds: dict[Any, Fold | None] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console or Console(quiet=True), disable=console is None) as progress:
            for i in progress.track(range(len(blocks)), description="Quantizing blocks"):
                name = f"{prefix}.{i}"
                if stream:
                    block = stream.load(i, checkpoint)
                    result = quantize_block(block, BlockCalls(stream, i), settings, folds)
                    quantized = result.layers
                    layers += result.reports
                else:
                    block = blocks[i]
                    fill(block, f"{name}.", checkpoint)
                    quantized = round_block(block, settings)
                pre_scales += sum(q.pre_scale is not None for q in quantized.values())
                writer.add_block(f"block-{i:05}", name, {n: p.data for n, p in block.named_parameters()}, quantized)
                if stream:
                    advance(stream, i, block, quantized)
                    stream.unload(i)
                else:
                    block.to_empty(device="meta")
        report = {
            "awq_trt": package_version(),
            "source": checkpoint.source,
            "method": method,
            "symmetric": symmetric,
            "group_size": settings.group_size,
            "calibration": {"source": str(calibration or "package default"), "windows": len(inputs), "length": length},
            "layers": [asdict(layer) for layer in layers],
            "left_in_float": left,
        }
        writer.finish(settings.group_size, symmetric, report)
    return QuantizeReport(
        output, settings.group_size, names, tuple(layers), left, pre_scales, time.monotonic() - started
    )


def default_group_size(linears: dict[str, nn.Linear]) -> int:
    """The largest of 128, 64, 32 that divides the input features of every layer; 32 where none does."""
    widths = {linear.in_features for linear in linears.values()}
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if all(k % g == 0 for k in widths)), min(GROUP_SIZES))


def advance(stream: BlockStream, i: int, block: nn.Module, quantized: dict[str, QuantizedLinear]) -> None:
    """Replace the hidden states by what the rounded block makes of them: the next block sees the error to come."""
    for name, layer in quantized.items():
        weight = layer.dequantize().float()
        linear = block.get_submodule(name)
        linear.weight.data = weight if layer.pre_scale is None else weight * layer.pre_scale.float()
    stream.hidden = [stream.run(i, hidden, sample) for sample, hidden in enumerate(stream.hidden)]


def estimate(model: nn.Module, inputs: list[Inputs]) -> Estimate:
    """Peak memory above the interpreter's, and seconds, from the sizes of the model and this machine's speed."""
    prefix, blocks = find_blocks(model)
    outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{prefix}."))
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    tokens = sum(
        max(t.numel() for t in sample.values() if t.dim() == 2) if any(t.dim() == 2 for t in sample.values()) else 256
        for sample in inputs
    )
    linears = [m for m in blocks[0].modules() if isinstance(m, nn.Linear)]
    widths = [m.in_features for m in linears]
    hessians = sum(k * k for k in set(widths)) * 2
    hidden = tokens * min(widths, default=0) * 2
    memory = 4 * (outside + 3 * max(sizes) + hessians + hidden) if inputs else 4 * (outside + 2 * max(sizes))
    a = torch.rand(512, 1024)
    begin = time.perf_counter()
    for _ in range(4):
        a @ a.t()
    speed = 4 * 2 * 512 * 512 * 1024 / (time.perf_counter() - begin)
    per_block = sum(2 * m.out_features * m.in_features * (2 * tokens + len(ALPHAS) * m.in_features) for m in linears)
    per_block += 2 * tokens * hessians
    return Estimate(memory, len(blocks) * per_block / speed * 1.5 if inputs else 0.05 * len(blocks))


def describe(found: Estimate, settings: Settings, quantized: int, left: int, windows: int) -> str:
    """The line printed before the work starts."""
    group = "whole row" if settings.group_size == -1 else f"group {settings.group_size}"
    kind = "symmetric" if settings.symmetric else "asymmetric"
    what = f"AWQ on {windows} calibration inputs" if windows else "rounding to nearest"
    return (
        f"{quantized} layers to INT4 ({kind}, {group}) by {what}, {left} stay in float. Estimate: "
        f"{max(found.seconds, 1):.0f} s, {found.memory_bytes / 2**20:.0f} MiB above the interpreter."
    )
