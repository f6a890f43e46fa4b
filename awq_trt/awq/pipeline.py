"""The loop over the blocks: read, observe, search, write, and run the rounded block for the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from awq_trt.awq.blocks import BlockStream, fill
from awq_trt.awq.calls import BlockCalibrator, Share
from awq_trt.awq.distributed import Ranks
from awq_trt.awq.estimate import Budget, StageTimer, Usage, extrapolate, resident_bytes, trim_heap
from awq_trt.awq.head import Tail, nearest_head
from awq_trt.awq.plan import Plan
from awq_trt.awq.resume import Folds, WorkDirectory, read_json_or_none, write_json
from awq_trt.awq.search import quantize_block, round_block
from awq_trt.awq.states import States, StatesWriter
from awq_trt.checkpoint.experts import expert_of
from awq_trt.checkpoint.model import empty_model, find_blocks
from awq_trt.checkpoint.writer import Writer
from awq_trt.files import remove
from awq_trt.linear import CHUNK, QuantizedLinear, row_chunks

LARGE = 1 << 24
"""Bytes of a tensor outside the blocks that gets a shard of its own, so that no two are in memory together."""
PIECES = 8
"""Copies of a piece of the head, in fp32, that rounding it takes."""
REHEARSED = 2
"""Windows of the rehearsal."""


@dataclass(frozen=True)
class Job:
    """What the functions of this file need. console: None is silent, as it is on ranks other than 0."""

    plan: Plan
    work: WorkDirectory
    ranks: Ranks
    budget: Budget
    console: Console | None

    def writer(self) -> Writer:
        """Writes shards of the result."""
        return Writer(self.work.result, self.plan.checkpoint, self.plan.save_format)


def awq_blocks(job: Job) -> Usage | None:
    """Quantize the blocks that are not finished yet; returns what rank 0 expects the whole run to take."""
    plan, work, ranks = job.plan, job.work, job.ranks
    share = Share(len(plan.inputs), ranks, work.scratch)
    done = first_block(job, share)
    expected = None
    with ranks.fail_together():
        if ranks.rank == 0:
            write_outside(job)
            check_head(job)
        stream = record(job, share, keep=done == 0)
    states = States(work.states(done))
    with ranks.fail_together():
        if ranks.rank == 0 and done < plan.steps:
            expected = rehearse(job, stream, done, states)
            announce(job, expected, done)
    bytes_each = sum(file.stat().st_size for file in work.states(done))
    keep = expected is not None and job.budget.spare(expected.bytes, 2 * bytes_each)
    keep = ranks.broadcast(keep)
    folds = Folds.from_json(work.block_reports()[-1]["folds"]) if done and ranks.rank == 0 else Folds()
    for i in steps(job, done):
        with ExitStack() as stack:
            into: StatesWriter | None = None
            if i + 1 < plan.steps:
                path = work.new_states(i + 1, ranks.rank)
                into = stack.enter_context(StatesWriter(path, len(share.windows), keep))
            if i < plan.blocks:
                calls = BlockCalibrator(stream, i, share, states)
                report = process(plan, calls, job.writer(), folds, into)
            else:
                report = process_head(plan, stream, share, states, job.writer(), StageTimer())
        with ranks.fail_together():
            if report is not None:
                work.finish_block(i, report)
        work.forget_states(i + 1)
        if into is not None:
            states = States(work.states(i + 1), into.kept)
    return expected


def first_block(job: Job, share: Share) -> int:
    """The block to go on with: behind the finished ones if every rank finds the states of its windows, else 0."""
    done: int = job.ranks.broadcast(job.work.finished if job.ranks.rank == 0 else None)
    if 0 < done < job.plan.steps:
        states = States(job.work.states(done))
        if not all(job.ranks.all_gather(all(window in states for window in share.windows))):
            with job.ranks.fail_together():
                if job.ranks.rank == 0:
                    job.work.restart()
            return 0
    return done


def record(job: Job, share: Share, keep: bool) -> BlockStream:
    """Note what blocks are called with, and `keep` the states that go into block 0."""
    plan, windows = job.plan, share.windows
    with ExitStack() as stack:
        writer = None
        if keep:
            writer = stack.enter_context(StatesWriter(job.work.new_states(0, job.ranks.rank), len(windows)))

        def sink(number: int, states: torch.Tensor) -> None:
            if writer is not None:
                writer.add(windows[number], states)

        inputs = [plan.inputs[w] for w in windows]
        return BlockStream(plan.checkpoint, inputs, dtype=plan.dtype, device=plan.device, sink=sink)


def process(
    plan: Plan, calls: BlockCalibrator, writer: Writer, folds: Folds, into: StatesWriter | None
) -> dict[str, Any] | None:
    """One block, from the checkpoint to the shard; its report on rank 0, None on the others.

    Args:
        into: takes what the rounded block makes of its inputs; None behind the last block.
    """
    ranks, clock, stream = calls.share.ranks, calls.clock, calls.stream
    with ranks.fail_together(), clock.stage("load"):
        block = stream.load(calls.i, plan.checkpoint)
    with clock.stage("search"):
        result = calls.searched(block, lambda: quantize_block(block, calls, plan.settings, folds))
    with ranks.fail_together(), clock.stage("write"):
        if result is not None:
            layers = {name: on_cpu(layer) for name, layer in result.layers.items()}
            writer.add_block(f"block-{calls.i:05}", calls.name, parameters(block), layers)
            if into is not None:
                put_rounded(block, result.layers, stream.dtype)
    if into is not None:
        with clock.stage("advance"):
            calls.advance(block, into)
    stream.unload(calls.i)
    trim_heap()
    if result is None:
        return None
    reports = [asdict(report) for report in result.reports]
    return {"layers": reports, "pre_scales": count_pre_scales(result.layers), "folds": folds.to_json()}


def process_head(
    plan: Plan,
    stream: BlockStream,
    share: Share,
    states: States,
    writer: Writer,
    clock: StageTimer,
    rows: int | None = None,
) -> dict[str, Any] | None:
    """The head, like a block: from the checkpoint to the shard; its report on rank 0, None on the others.

    Args:
        states: behind the last block. rows: of the head that are rounded in a rehearsal, None for all.
    """
    ranks, head, report = share.ranks, plan.head or "", None
    with ExitStack() as stack:
        with ranks.fail_together(), clock.stage("load"):
            tail = stack.enter_context(Tail(stream, plan.checkpoint, head, plan.norms))
        with clock.stage("observe"):
            group = tail.group(share, states)
        with ranks.fail_together():
            if group is not None:
                result = tail.quantize(group, states[0], plan.settings, clock, rows)
                trim_heap()
                with clock.stage("write"):
                    writer.add_block("head", "", result.norms, {head: result.layer})
                scaled = count_pre_scales({head: result.layer})
                report = {"layers": [asdict(result.report)], "pre_scales": scaled, "folds": {}}
    trim_heap()
    return report


def rounded_blocks(job: Job) -> Usage | None:
    """Round the layers of all blocks that are not finished yet to nearest, and the head where that is asked for."""
    plan, work = job.plan, job.work
    model = empty_model(plan.checkpoint.config)
    _, blocks = find_blocks(model)
    write_outside(job)
    expected = None
    for i in steps(job, work.finished):
        begin = job.budget.took()
        if i == plan.blocks:
            round_head(job, model)
            continue
        name, block = f"{plan.prefix}.{i}", blocks[i]
        fill(block, f"{name}.", plan.checkpoint)
        layers = round_block(block, plan.settings)
        job.writer().add_block(f"block-{i:05}", name, parameters(block), layers)
        block.to_empty(device="meta")
        work.finish_block(i, {"layers": [], "pre_scales": count_pre_scales(layers), "folds": {}})
        if expected is None:
            took = job.budget.took()
            n, k = (0, 0) if plan.head is None else shape_of(model, plan.head)
            left = plan.blocks - i + n * k / sum(p.numel() for p in block.parameters())
            seconds = begin.seconds + (took.seconds - begin.seconds) * left
            expected = Usage(seconds, max(took.bytes, resident_bytes("VmRSS") + head_bytes(n, k)))
            announce(job, expected, i)
    return expected


def round_head(job: Job, model: nn.Module) -> None:
    """Round the head of the model (empty) to nearest; the last step."""
    plan, checkpoint, head = job.plan, job.plan.checkpoint, job.plan.head or ""
    layer = nearest_head(checkpoint, head, shape_of(model, head), plan.settings)
    norms = {name: checkpoint.tensor(name) for name in plan.norms}
    job.writer().add_block("head", "", norms, {head: layer})
    job.work.finish_block(plan.blocks, {"layers": [], "pre_scales": 0, "folds": {}})


def check_head(job: Job) -> None:
    """Read the head once, so that NaN in it is found now and not hours later."""
    plan = job.plan
    if plan.head is not None and job.work.finished < plan.blocks:
        n, k = shape_of(empty_model(plan.checkpoint.config), plan.head)
        for rows in row_chunks(n, k):
            plan.checkpoint.rows(f"{plan.head}.weight", torch.arange(rows.start, rows.stop))


def shape_of(model: nn.Module, layer: str) -> tuple[int, int]:
    """(N, K) of a linear layer."""
    n, k = model.get_parameter(f"{layer}.weight").shape
    return n, k


def write_outside(job: Job) -> None:
    """Write what is outside the blocks, as it is: large tensors to shards of their own, the others to one."""
    plan, writer = job.plan, job.writer()
    small = {}
    for number, name in enumerate(plan.outside):
        label = f"outside-{number:05}"
        if writer.has(label):
            continue
        tensor = plan.checkpoint.tensor(name)
        if tensor.nbytes < LARGE:
            small[name] = tensor
        else:
            writer.add_block(label, "", {name: tensor})
    if small and not writer.has("outside"):
        writer.add_block("outside", "", small)


def parameters(block: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a block by their names in it."""
    return {name: p.data.cpu() for name, p in block.named_parameters()}


def on_cpu(layer: QuantizedLinear) -> QuantizedLinear:
    """The same layer, its tensors on the CPU."""
    named = {n: t.cpu() for n in ("q", "scales", "zeros", "pre_scale") if (t := getattr(layer, n)) is not None}
    return replace(layer, **named)


def count_pre_scales(layers: Mapping[str, QuantizedLinear]) -> int:
    """How many of the layers carry a pre-scale."""
    return sum(layer.pre_scale is not None for layer in layers.values())


def put_rounded(block: nn.Module, layers: Mapping[str, QuantizedLinear], dtype: torch.dtype) -> None:
    """Give a block the values of its quantized layers, pre-scales included; parameters in the compute dtype."""
    for name, layer in layers.items():
        weight = layer.dequantize().float()
        linear = block.get_submodule(name)
        linear.weight.data = weight if layer.pre_scale is None else weight * layer.pre_scale.float()
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)


def rehearse(job: Job, stream: BlockStream, done: int, states: States) -> Usage:
    """Measure one block, the largest, with two windows, and throw the result away; what it took is kept for resuming.

    Raises:
        KeepError: the run needs more memory than the limit allows.
    """
    plan, work = job.plan, job.work
    sizes = [sum(p.numel() for p in block.parameters()) for block in stream.blocks]
    i = max(range(plan.blocks), key=sizes.__getitem__)
    head = (0, 0) if plan.head is None else shape_of(stream.model, plan.head)
    least = max(least_bytes(stream.blocks[i], plan.dtype), head_bytes(*head))
    job.budget.check(resident_bytes("VmRSS") + least)
    known = read_json_or_none(work.path / "rehearsal.json")
    if known is None:
        share = Share(min(REHEARSED, len(stream.inputs)), Ranks(), work.scratch)
        calls = BlockCalibrator(stream, i, share, states)
        folder = work.scratch / "rehearsal"
        with StatesWriter(work.scratch / "rehearsal.safetensors", share.total) as into:
            process(plan, calls, Writer(folder, plan.checkpoint, plan.save_format), Folds(), into)
        remove(folder)
        each, once = extrapolate(calls.clock, share.total, len(stream.inputs))
        known = {"each": each, "once": once, "head": 0.0, "bytes": job.budget.took().bytes}
        if plan.head is not None:
            took = rehearse_head(job, stream, share, states)
            known |= {"head": took.seconds, "bytes": max(known["bytes"], took.bytes)}
        write_json(work.path / "rehearsal.json", known)
    job.budget.check(known["bytes"])
    blocks = known["each"] * sum(sizes[done:]) / sizes[i] + (known["once"] if done < plan.blocks else 0)
    return Usage(job.budget.took().seconds + blocks + known["head"], known["bytes"])


def rehearse_head(job: Job, stream: BlockStream, share: Share, states: States) -> Usage:
    """What the head will take, from a few of its rows and two windows, and from the bytes of all rows once rounded."""
    plan, clock = job.plan, StageTimer()
    n, k = shape_of(stream.model, plan.head or "")
    rows = next(row_chunks(n, k)).stop
    folder = job.work.scratch / "rehearsal"
    begin = resident_bytes("VmRSS")
    process_head(plan, stream, share, states, Writer(folder, plan.checkpoint, plan.save_format), clock, rows)
    remove(folder)
    parts = {"round": n / rows, "write": n / rows, "observe": len(stream.inputs) / share.total}
    seconds = sum(seconds * parts.get(stage, 1.0) for stage, seconds in clock.seconds.items())
    return Usage(seconds, max(job.budget.took().bytes, begin + head_bytes(n, k)))


def head_bytes(n: int, k: int) -> int:
    """What a head [n, k] takes at its peak: a byte for each weight, and H and a piece in work, or the packed words."""
    return n * k + max(12 * k * k + PIECES * 4 * CHUNK, n * k // 2) if n else 0


def least_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """What one block takes at the very least: its parameters, and one Hessian for each width, of each expert."""
    widths = {(expert_of(block, n), m.in_features) for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    return sum(p.numel() for p in block.parameters()) * dtype.itemsize + 4 * sum(k * k for _, k in widths)


def announce(job: Job, expected: Usage, done: int) -> None:
    """The line printed before the work starts."""
    if job.console is None:
        return
    plan, ranks = job.plan, job.ranks
    group = "whole row" if plan.settings.group_size == -1 else f"group {plan.settings.group_size}"
    kind = "symmetric" if plan.settings.symmetric else "asymmetric"
    what = f"AWQ on {len(plan.inputs)} calibration inputs" if plan.inputs else "rounding to nearest"
    where = f" in {str(plan.dtype).removeprefix('torch.')} on {plan.device.type}" if plan.inputs else ""
    shared = f", shared by {ranks.world} processes" if ranks.world > 1 else ""
    again = f" {done} of {plan.steps} blocks are finished by an earlier run." if done else ""
    job.console.print(
        f"{len(plan.names)} layers to INT4 ({kind}, {group}) by {what}{where}{shared}, {len(plan.left)} stay in float."
        f"{again} Estimate: {max(expected.seconds, 1):.0f} s, {expected.bytes / 2**20:.0f} MiB.",
        highlight=False,
    )


@contextmanager
def _bar(job: Job, done: int) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=job.console or Console(quiet=True), disable=job.console is None) as progress:
        progress.add_task("Quantizing blocks", total=job.plan.steps, completed=done)
        yield progress


def steps(job: Job, done: int) -> Iterator[int]:
    """The blocks that are not finished, behind a progress bar."""
    with _bar(job, done) as progress:
        for i in range(done, job.plan.steps):
            yield i
            progress.advance(progress.task_ids[0])
