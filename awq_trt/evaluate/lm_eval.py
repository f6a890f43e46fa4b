"""EleutherAI's lm_eval on weights of ours, through its own interface. It is an optional package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awq_trt.awq.outside import Weights, fill
from awq_trt.checkpoint.model import empty_model
from awq_trt.errors import AwqTrtError


def run_tasks(
    weights: Weights, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, include: Path | None = None
) -> dict[str, dict[str, float]]:
    """Run tasks on the whole model in fp32, which must fit in memory.

    Args:
        tasks: names of lm_eval tasks. limit: documents per task, None for all.
        include: directory with further task files (.yaml).

    Returns:
        Task -> metric -> value, as lm_eval names them ("acc,none", "acc_stderr,none").

    Raises:
        AwqTrtError: lm_eval is not installed, does not know a task, or failed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AwqTrtError(f"lm_eval tasks need another package: pip install lm_eval   ({error})") from error
    model = empty_model(weights.config)
    fill(model, "", weights)
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=list(tasks),
            limit=limit,
            task_manager=TaskManager(include_path=None if include is None else str(include)),
        )
    except Exception as error:
        raise AwqTrtError(
            f"lm_eval {', '.join(tasks)} on {weights.source}: {type(error).__name__}: {error}. "
            "`lm_eval ls tasks` lists the tasks it has; most download their data from the hub."
        ) from error
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        for task, metrics in found["results"].items()
    }
