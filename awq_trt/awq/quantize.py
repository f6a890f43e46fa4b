"""Checkpoint in, AWQ checkpoint out: the public function. What is done to each block is in pipeline.py."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.distributed import compute_device, join_ranks
from awq_trt.awq.estimate import Budget, Usage
from awq_trt.awq.pipeline import Job, awq_blocks, rounded_blocks
from awq_trt.awq.plan import make_plan, work_key
from awq_trt.awq.resume import WorkDirectory
from awq_trt.awq.search import EFFORTS, LayerReport
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.checkpoint.writer import CARRY_PRE_SCALES
from awq_trt.files import remove


@dataclass(frozen=True)
class QuantizeReport:
    """What was written.

    Attributes:
        directory: the quantized checkpoint. group_size: -1 for the whole row. quantized: layers that are INT4 now.
        head: the one of them that makes logits, or None.
        layers: what the search found, for each layer that saw calibration inputs. left_in_float: layer -> reason.
        pre_scales: how many layers carry a pre-scale. seconds: of this run.
        estimate, actual: seconds and peak memory, as printed before the first block, and as measured at the end. None
            where nothing was left to do but to put the result of an earlier run in its place.
    """

    directory: Path
    group_size: int
    quantized: tuple[str, ...]
    head: str | None
    layers: tuple[LayerReport, ...]
    left_in_float: dict[str, str]
    pre_scales: int
    seconds: float
    estimate: Usage | None
    actual: Usage


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
        output: directory, replaced as a whole at the end. Until then the work is in `.<name>.partial` beside it, from
            which a run that was killed goes on.
        config: see QuantizeConfig; None is all defaults.
        memory: bytes that this process may take, None for no limit. States stay in memory where it has room for them.
        resume: go on with the work of a killed run, if checkpoint, settings and calibration inputs are the same.
        console: for estimate and progress; None is silent.

    Raises:
        AwqTrtError: bad weights or calibration inputs, no layer that the kernels can run, no head, too little memory.
    """
    config = config or QuantizeConfig()
    budget = Budget.begin(memory)
    ranks = join_ranks(config.device)
    console = console if ranks.rank == 0 else None
    with ranks.fail_together():
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        means = EFFORTS[config.effort]
        feedback = config.error_compensation
        options = {
            "group_size": config.group_size,
            "symmetric": config.symmetric,
            "pre_scale": config.pre_scale and config.save_format in CARRY_PRE_SCALES,
            "clip": means.clip if config.clip is None else config.clip,
            "feedback": means.feedback if feedback is None else feedback,
            "refit": config.refit,
        }
        samples = means.windows if config.calibration_samples is None else config.calibration_samples
        plan = make_plan(
            checkpoint,
            options,
            config.method,
            config.calibration,
            samples,
            config.calibration_length,
            (config.compute_dtype, compute_device(config.device)),
            config.save_format,
            config.lm_head,
        )
    with ExitStack() as stack:
        with ranks.fail_together():
            key = work_key(plan) if ranks.rank == 0 else {}
            work = WorkDirectory(output, key, resume=resume, console=console)
            if ranks.rank == 0:
                stack.enter_context(work)
        with ranks.fail_together():
            work.make_folders()
        job = Job(plan, work, ranks, budget, console)
        report: dict[str, Any] | None = ranks.broadcast(work.report() if ranks.rank == 0 else None)
        expected = None
        if report is None:
            if plan.inputs:
                expected = awq_blocks(job)
            elif ranks.rank == 0:
                expected = rounded_blocks(job)
            report = ranks.broadcast(plan.report | gathered(work) if ranks.rank == 0 else None)
            with ranks.fail_together():
                if ranks.rank == 0:
                    job.writer().finish(plan.settings.group_size, plan.settings.symmetric, report)
        with ranks.fail_together():
            if ranks.rank == 0:
                work.publish(report)
    if ranks.rank and not (work.path / "key.json").exists():
        remove(work.path)  # of a machine whose disk rank 0 does not see
    layers = tuple(LayerReport(**layer) for layer in report["layers"])
    took = budget.took()
    rest = (layers, plan.left, report["pre_scales"], took.seconds, expected, took)
    return QuantizeReport(output, plan.settings.group_size, plan.names, plan.head, *rest)


def gathered(work: WorkDirectory) -> dict[str, Any]:
    """What the reports of the blocks say together."""
    reports = work.block_reports()
    layers = [layer for report in reports for layer in report["layers"]]
    return {"layers": layers, "pre_scales": sum(report["pre_scales"] for report in reports)}
