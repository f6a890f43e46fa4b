"""Checkpoint in, AWQ checkpoint out: the public function. What is done to each block is in pipeline.py."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.distributed import Ranks, join_ranks
from awq_trt.awq.estimate import Budget, Usage
from awq_trt.awq.pipeline import Run, quantize_blocks
from awq_trt.awq.resume import WorkDirectory
from awq_trt.awq.search import LayerReport
from awq_trt.awq.task import make_task
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.outputs import Output
from awq_trt.publishing import check_outputs


@dataclass(frozen=True)
class QuantizeReport:
    """What was written."""

    directory: Path  # the quantized checkpoint
    group_size: int  # -1 for the whole row
    quantized: tuple[str, ...]  # layers that are INT4 now
    head: str | None  # the one of them that makes logits
    layers: tuple[LayerReport, ...]  # what the search found, for each layer that saw calibration inputs
    left_in_float: dict[str, str]  # layer -> reason
    pre_scales: int  # how many layers carry a pre-scale
    largest_value: tuple[float, str]  # |x| of all that layers and norms read and gave, and the module; 0 without inputs
    seconds: float  # of this run
    estimate: Usage | None  # as printed before the first block; None where an earlier run had finished all of them
    actual: Usage  # as measured at the end


def quantize(
    model: Checkpoint | str | Path,
    output: Path,
    config: QuantizeConfig | None = None,
    *,
    memory: int | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of the model's blocks to INT4 and write a Hugging Face directory.

    Called by each of the processes that torchrun starts, it shares the calibration windows between them.

    Args:
        model: a directory, .gguf file, hub id, or an open Checkpoint.
        output: directory; one that an earlier run wrote is replaced as a whole at the end. Until then the work is in
            `.<name>.partial` beside it, from which a run that was killed goes on.
        config: see QuantizeConfig; None is all defaults.
        memory: bytes that this process may take, None for no limit. States stay in memory where it has room for them.
        resume: go on with the work of a killed run, if checkpoint, settings and calibration inputs are the same.
        console: for estimate and progress; None is silent.

    Raises:
        AwqTrtError: a value of `config` that is not allowed, bad weights or calibration inputs, no layer that the
            kernels can run, no head, too little memory; something would be lost at `output`, or another run writes
            there.
    """
    config = config or QuantizeConfig()
    budget = Budget.begin(memory)
    ranks = join_ranks(config.device)
    console = console if ranks.rank == 0 else None
    with ranks.fail_together():
        if ranks.rank == 0:
            check_outputs([Output(output, directory=True)], [] if isinstance(model, Checkpoint) else [Path(model)])
        config = config.resolved()
        task = make_task(model if isinstance(model, Checkpoint) else open_checkpoint(model), config)
    files = task.checkpoint.files
    sources = [*files, *(file.parent for file in files if file.name == "config.json")]
    with ExitStack() as stack:
        with ranks.fail_together():
            key = task.key() if ranks.rank == 0 else {}
            work = WorkDirectory(output, key, sources=sources, resume=resume, console=console)
            if ranks.rank == 0:
                stack.enter_context(work)
        with ranks.fail_together():
            work.make_folders()
        run = Run(task, work, ranks if task.inputs else Ranks(), budget, console)
        report: dict[str, Any] | None = ranks.broadcast(work.report())
        expected = None
        if report is None:
            if task.inputs or ranks.rank == 0:
                expected = quantize_blocks(run)
            steps = work.block_reports()
            layers = [row for step in steps for row in step["layers"]]
            largest = max(((0.0, ""), *(tuple(step["largest_value"]) for step in steps)))
            found = {
                "layers": layers,
                "pre_scales": sum(step["pre_scales"] for step in steps),
                "largest_value": largest,
            }
            report = ranks.broadcast(task.report | found)
            with ranks.fail_together():
                if ranks.rank == 0:
                    run.writer.finish(task.config.group_size or -1, task.config.symmetric, report)
        with ranks.fail_together():
            if ranks.rank == 0:
                work.publish(report)
    if ranks.rank:
        work.leave()
    used = budget.used()
    return QuantizeReport(
        directory=output,
        group_size=task.config.group_size or -1,
        quantized=task.names,
        head=task.head,
        layers=tuple(LayerReport(**row) for row in report["layers"]),
        left_in_float=task.left,
        pre_scales=report["pre_scales"],
        largest_value=tuple(report["largest_value"]),
        seconds=used.seconds,
        estimate=expected,
        actual=used,
    )
