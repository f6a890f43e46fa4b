"""Checkpoint in, AWQ checkpoint out: the public function. What is done to each block is in pipeline.py."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from awq_trt.awq.distributed import compute_device, join_ranks
from awq_trt.awq.estimate import Budget, Usage
from awq_trt.awq.pipeline import Job, awq_blocks, rounded_blocks
from awq_trt.awq.plan import make_plan, work_key
from awq_trt.awq.resume import WorkDirectory
from awq_trt.awq.search import EFFORTS, LayerReport
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import CARRY_PRE_SCALES
from awq_trt.checkpoint.reader import Checkpoint
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
    *,
    method: str = "awq",
    effort: str = "default",
    clip: bool | None = None,
    feedback: bool | None = None,
    refit: bool = False,
    group_size: int | None = None,
    symmetric: bool = False,
    pre_scale: bool = True,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int = 512,
    save_format: str = "awq",
    lm_head: str = "float",
    memory: int | None = None,
    resume: bool = True,
    device: str = "auto",
    compute_dtype: torch.dtype = torch.float32,
    console: Console | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of the model's blocks to INT4 and write a Hugging Face directory.

    Called by each of the processes that torchrun starts, it shares the calibration windows between them.

    Args:
        model: a directory, .gguf file, hub id, or an open Checkpoint.
        output: directory, replaced as a whole at the end. Until then the work is in `.<name>.partial` beside it, from
            which a run that was killed goes on.
        method: "awq" searches scales on calibration inputs; "rtn" rounds to nearest and needs none.
        effort: "fast", "default" or "best"; see awq.EFFORTS. It says what the options are that are None by default:
            clip, search the range of every group; feedback, round with error feedback; samples.
        refit: with feedback, least-squares scales after rounding: less error on the calibration text, not elsewhere.
        group_size: 32, 64, 128 or -1 (whole row); None takes the largest of 128, 64, 32 that divides every K.
        symmetric: no zero points. pre_scale: allow scales that no operator before the layer can absorb, if
            `save_format` carries them.
        calibration: text file, directory, `datasets` id or .npz of model inputs; None takes the text in the package.
        samples, length: number of calibration windows and tokens per window.
        save_format: a key of quantized.SAVE_FORMATS.
        lm_head: "float", or "int4" to quantize the layer that makes logits, too; then it no longer shares its weight
            with the embedding, which stays in float.
        memory: bytes that this process may take, None for no limit. States stay in memory where it has room for them.
        resume: go on with the work of a killed run, if checkpoint, settings and calibration inputs are the same.
        device: "cpu", "cuda", or "auto": the GPU where there is one. compute_dtype: of the blocks' forward, float32 or
            bfloat16; second moments are fp32 in any case.
        console: for estimate and progress; None is silent.

    Raises:
        AwqTrtError: bad weights or calibration inputs, no layer that the kernels can run, no head, too little memory.
    """
    budget = Budget.begin(memory)
    ranks = join_ranks(device)
    console = console if ranks.rank == 0 else None
    with ranks.fail_together():
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        carried = pre_scale and save_format in CARRY_PRE_SCALES
        means = EFFORTS[effort]
        options = {
            "group_size": group_size,
            "symmetric": symmetric,
            "pre_scale": carried,
            "clip": means.clip if clip is None else clip,
            "feedback": means.feedback if feedback is None else feedback,
            "refit": refit,
        }
        samples = means.windows if samples is None else samples
        compute = (compute_dtype, compute_device(device))
        plan = make_plan(checkpoint, options, method, calibration, samples, length, compute, save_format, lm_head)
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
