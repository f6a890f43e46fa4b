"""The loop over the blocks: read, observe, search, write, and run the rounded block for the next one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from awq_trt.awq.blocks import BlockStream
from awq_trt.awq.calibrator import BlockCalibrator
from awq_trt.awq.distributed import Ranks
from awq_trt.awq.estimate import Budget, StageTimer, Usage, resident_bytes, trim_heap
from awq_trt.awq.fold import Fold
from awq_trt.awq.head import quantize_head, sampled_head
from awq_trt.awq.hessian import Group
from awq_trt.awq.ranges import Ranges, refuse_large_weights
from awq_trt.awq.resume import States, WorkDirectory, read_json_or_none, write_json
from awq_trt.awq.search import LayerReport, quantize_block
from awq_trt.awq.task import QuantizeTask
from awq_trt.checkpoint.experts import expert_of
from awq_trt.checkpoint.writer import Writer
from awq_trt.linear import CHUNK, QuantizedLinear, row_chunks
from awq_trt.publishing import remove

LARGE = 1 << 24
"""Bytes of a tensor outside the blocks that gets a shard of its own, so that no two are in memory together."""
PIECES = 8
"""Copies of a piece of the head, in fp32, that rounding it takes."""
DRY_WINDOWS = 2
"""Calibration windows of the dry run."""
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@dataclass(frozen=True)
class Run:
    """A task being done by this process."""

    task: QuantizeTask
    work: WorkDirectory
    ranks: Ranks
    budget: Budget
    console: Console | None  # None is silent, as on ranks other than 0

    @property
    def writer(self) -> Writer:
        """Writes shards of the result."""
        return Writer(self.work.result, self.task.checkpoint, self.task.config.save_format)

    def steps(self, done: int) -> Iterator[int]:
        """The blocks, and the head as one more, that are not finished, behind a progress bar."""
        silent = self.console is None
        with Progress(*COLUMNS, console=self.console or Console(quiet=True), disable=silent) as progress:
            total = self.task.steps
            yield from progress.track(range(done, total), total, completed=done, description="Quantizing blocks")


def quantize_blocks(run: Run) -> Usage | None:
    """Quantize the blocks that are not finished yet; returns what rank 0 expects the whole run to take.

    Without calibration inputs there are no windows, so that no layer is seen and all are rounded to nearest.
    """
    task, work, ranks = run.task, run.work, run.ranks
    windows = ranks.windows(len(task.inputs))
    done = first_block(run, windows)
    expected = None
    with ranks.fail_together():
        if ranks.rank == 0:
            write_outside(run)
            check_head(run)
        inputs = [task.inputs[window] for window in windows]
        stream = BlockStream(task.checkpoint, inputs, dtype=task.config.compute_dtype, device=task.device)
        states = work.states(done)
        for window, state in zip(windows, stream.record(), strict=True):
            if done == 0:
                states.put(window, state)
    with ranks.fail_together():
        if ranks.rank == 0 and done == 0 and windows:
            run_in_float(run, stream, states)
        if ranks.rank == 0 and done < task.steps:
            expected = dry_run(run, stream, done, states)
            announce(run, expected, done)
    keep = ranks.broadcast(expected is not None and run.budget.spare(expected.bytes, 2 * states.bytes))
    reports = work.block_reports()
    folds = {key: fold and Fold(**fold) for key, fold in reports[-1]["folds"].items()} if reports else {}
    for i in run.steps(done):
        following = work.states(i + 1, keep=keep) if i + 1 < task.steps else None
        calibrator = BlockCalibrator(stream, i, states, windows, ranks, StageTimer())
        report = process(task, calibrator, run.writer, folds, following)
        with ranks.fail_together():
            if report is not None:
                work.finish_block(i, report)
        work.forget_states(i + 1)
        states = following or states
    return expected


def first_block(run: Run, windows: range) -> int:
    """The block to go on with: behind the finished ones if every rank finds the states of its windows, else 0."""
    done: int = run.ranks.broadcast(run.work.finished)
    if 0 < done < run.task.steps:
        states = run.work.states(done)
        if not all(run.ranks.all_gather(all(window in states for window in windows))):
            with run.ranks.fail_together():
                if run.ranks.rank == 0:
                    run.work.restart()
            return 0
    return done


def process(
    task: QuantizeTask,
    calibrator: BlockCalibrator,
    writer: Writer,
    folds: dict[str, Fold | None],
    following: States | None,
    head_rows: int | None = None,
) -> dict[str, Any] | None:
    """One block, or the head, from the checkpoint to the shard; its report on rank 0, None on the others.

    Args:
        following: takes what the rounded block makes of its inputs; None behind the last block.
        head_rows: how many rows of the head are rounded, None for all.
    """
    ranks, timer, report = calibrator.ranks, calibrator.timer, None
    with ExitStack() as stack:
        with ranks.fail_together(), timer.stage("load"):
            module = stack.enter_context(loaded(task, calibrator))
        groups = calibrator.observe(module)
        with ranks.fail_together():
            calibrator.ranges.refuse_float16(task.checkpoint.source, task.checkpoint.dtype)
            if ranks.rank == 0 and calibrator.is_head:
                report = process_head(task, calibrator, groups, writer, head_rows)
            elif ranks.rank == 0:
                report = process_block(task, calibrator, module, groups, writer, folds)
        if following is not None:
            calibrator.advance(module, following)
            with ranks.fail_together():
                calibrator.ranges.refuse_float16(task.checkpoint.source, task.checkpoint.dtype)
    trim_heap()
    largest = max(ranks.all_gather((calibrator.ranges.largest, calibrator.ranges.module)))
    if report is not None:
        report["largest_value"] = largest
    return report


@contextmanager
def loaded(task: QuantizeTask, calibrator: BlockCalibrator) -> Iterator[nn.Module]:
    """Inside, the block has its weights; for the head, the model has a sample of the head's."""
    stream, i = calibrator.stream, calibrator.i
    if calibrator.is_head:
        with sampled_head(task, stream) as model:
            yield model
    else:
        block = stream.load(i, task.checkpoint)
        refuse_large_weights(block, f"{stream.prefix}.{i}.", task.checkpoint.source, task.checkpoint.dtype)
        yield block
        stream.unload(i)


def process_block(
    task: QuantizeTask,
    calibrator: BlockCalibrator,
    block: nn.Module,
    groups: list[Group],
    writer: Writer,
    folds: dict[str, Fold | None],
) -> dict[str, Any]:
    """Search, round and write a block, and leave its rounded values in it."""
    name, timer = calibrator.name, calibrator.timer
    names, config, dtype = task.names_in(name), task.config, task.checkpoint.dtype
    with timer.stage("search"):
        layers, reports = quantize_block(
            block, groups, calibrator.first_output, folds, names=names, config=config, dtype=dtype
        )
    with timer.stage("write"):
        floats = {n: p.data.cpu() for n, p in block.named_parameters()}
        writer.add_block(f"block-{calibrator.i:05}", name, floats, {n: m.cpu() for n, m in layers.items()})
        for layer, value in layers.items():
            weight, s = value.dequantize().float(), value.pre_scale
            block.get_submodule(layer).weight.data = weight if s is None else weight * s.float()
        block.to(calibrator.stream.dtype)
    return step_report(layers.values(), reports, folds, f"{name}.")


def process_head(
    task: QuantizeTask, calibrator: BlockCalibrator, groups: list[Group], writer: Writer, rows: int | None
) -> dict[str, Any]:
    """Search, round and write the head, or its first `rows` rows."""
    layer, norms, reports = quantize_head(task, calibrator, groups, rows)
    with calibrator.timer.stage("write"):
        writer.add_block("head", "", norms, {task.head or "": layer})
    return step_report([layer], reports, {})


def step_report(
    layers: Collection[QuantizedLinear], reports: list[LayerReport], folds: Mapping[str, Fold | None], prefix: str = ""
) -> dict[str, Any]:
    """What is kept of a block; `prefix` makes names of the model of names in the block."""
    rows = [asdict(report) for report in reports]
    for row in rows:
        row["name"] = prefix + row["name"]
        row["folded_into"] = row["folded_into"] and prefix + row["folded_into"]
    places = {key: fold and asdict(fold) for key, fold in folds.items()}
    return {"layers": rows, "pre_scales": sum(m.pre_scale is not None for m in layers), "folds": places}


def check_head(run: Run) -> None:
    """Read the head once, so that NaN in it is found now and not hours later."""
    if run.task.head is not None and run.work.finished < run.task.blocks:
        for rows in row_chunks(*run.task.head_shape):
            run.task.checkpoint.rows(f"{run.task.head}.weight", torch.arange(rows.start, rows.stop))


def write_outside(run: Run) -> None:
    """Write what is outside the blocks, as it is: large tensors to shards of their own, the others to one."""
    writer, small = run.writer, {}
    for number, name in enumerate(run.task.outside):
        label = f"outside-{number:05}"
        if writer.has(label):
            continue
        tensor = run.task.checkpoint.tensor(name)
        if tensor.nbytes < LARGE:
            small[name] = tensor
        else:
            writer.add_block(label, "", {name: tensor})
    if small and not writer.has("outside"):
        writer.add_block("outside", "", small)


def run_in_float(run: Run, stream: BlockStream, states: States) -> None:
    """Run the blocks on the first window before any of them is searched, where the engine is to compute in float16.

    Raises:
        AwqTrtError: what they hold or compute does not fit float16.
    """
    checkpoint, hidden, ranges = run.task.checkpoint, states[0], Ranges()
    for i in range(run.task.blocks) if checkpoint.dtype == torch.float16 else ():
        block = stream.load(i, checkpoint)
        refuse_large_weights(block, f"{stream.prefix}.{i}.", checkpoint.source, checkpoint.dtype)
        with ranges.watching(block, f"{stream.prefix}.{i}."):
            hidden = stream.run(i, hidden, 0)
        stream.unload(i)
        ranges.refuse_float16(checkpoint.source, checkpoint.dtype)


def dry_run(run: Run, stream: BlockStream, done: int, states: States) -> Usage:
    """What the whole run will take: the largest block is quantized with two windows, timed, and thrown away.

    The measurement is kept for resuming.

    Raises:
        KeepError: the run needs more memory than the limit allows.
    """
    task, work, (n, k) = run.task, run.work, run.task.head_shape
    sizes = [sum(p.numel() for p in block.parameters()) for block in stream.blocks]
    i = max(range(task.blocks), key=sizes.__getitem__)
    least = max(least_bytes(stream.blocks[i], stream.dtype, bool(task.inputs)), head_bytes(n, k))
    run.budget.check(resident_bytes("VmRSS") + least)
    known = read_json_or_none(work.path / "dry_run.json")
    if known is None:
        windows = range(min(DRY_WINDOWS, len(stream.inputs)))
        more = len(stream.inputs) / max(len(windows), 1)
        writer = Writer(work.scratch / "result", task.checkpoint, task.config.save_format)
        following = States(work.scratch / "states")
        block, head = (
            BlockCalibrator(
                stream, j, {w: stream.like_input(j, states[w], w) for w in windows}, windows, Ranks(), StageTimer()
            )
            for j in (i, task.blocks)
        )
        process(task, block, writer, {}, following)
        once = block.timer.seconds.get("prove", 0.0)  # part of the search of the first block
        known = {"each": block.timer.total(observe=more, advance=more, prove=-1), "once": once, "head": 0.0}
        known["bytes"] = run.budget.used().bytes
        if task.head is not None:
            begin, rows = resident_bytes("VmRSS"), next(row_chunks(n, k)).stop
            process(task, head, writer, {}, None, rows)
            known["head"] = head.timer.total(observe=more, round=n / rows, write=n / rows)
            known["bytes"] = max(run.budget.used().bytes, begin + head_bytes(n, k))
        remove(work.scratch)
        write_json(work.path / "dry_run.json", known)
    run.budget.check(known["bytes"])
    blocks = known["each"] * sum(sizes[done:]) / sizes[i] + (known["once"] if done < task.blocks else 0)
    return Usage(run.budget.used().seconds + blocks + known["head"], known["bytes"])


def head_bytes(n: int, k: int) -> int:
    """What a head [n, k] takes at its peak: a byte for each weight, and H and a piece in work, or the packed words."""
    return n * k + max(12 * k * k + PIECES * 4 * CHUNK, n * k // 2) if n else 0


def least_bytes(block: nn.Module, dtype: torch.dtype, calibrated: bool) -> int:
    """What one block takes at the very least: its parameters, and one Hessian for each width, of each expert."""
    widths = {(expert_of(block, n), m.in_features) for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    hessians = 4 * sum(k * k for _, k in widths) if calibrated else 0
    return sum(p.numel() for p in block.parameters()) * dtype.itemsize + hessians


def announce(run: Run, expected: Usage, done: int) -> None:
    """The line printed before the work starts."""
    if run.console is None:
        return
    task, config = run.task, run.task.config
    group = "whole row" if config.group_size == -1 else f"group {config.group_size}"
    kind = "symmetric" if config.symmetric else "asymmetric"
    what = f"AWQ on {len(task.inputs)} calibration inputs" if task.inputs else "rounding to nearest"
    where = f" in {str(config.compute_dtype).removeprefix('torch.')} on {task.device.type}" if task.inputs else ""
    shared = f", shared by {run.ranks.world} processes" if run.ranks.world > 1 else ""
    again = f" {done} of {task.steps} blocks are finished by an earlier run." if done else ""
    run.console.print(
        f"{len(task.names)} layers to INT4 ({kind}, {group}) by {what}{where}{shared}, {len(task.left)} stay in float."
        f"{again} Estimate: {max(expected.seconds, 1):.0f} s, {expected.bytes / 2**20:.0f} MiB.",
        highlight=False,
    )
