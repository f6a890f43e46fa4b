"""Perplexity and agreement of one model at every stage: float, rounded, quantized by any tool, exported to ONNX.

All read the same windows of the same text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from awq_trt.awq.calibration import HELD_OUT_TEXT, calibration_inputs
from awq_trt.awq.outside import Weights
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import QuantizedCheckpoint, is_quantized, open_quantized
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import Predictions, eager_predictions, is_causal_lm, predictions, rounded_like
from awq_trt.evaluate.lm_eval import run_tasks
from awq_trt.evaluate.verify import onnx_outputs

Row = dict[str, Any]


def evaluate(
    models: Sequence[str | Path],
    *,
    float_model: str | Path | None = None,
    text: str | Path | None = None,
    samples: int = 8,
    length: int = 512,
    tasks: Sequence[str] = (),
    task_options: dict[str, Any] | None = None,
) -> dict[str, Row]:
    """Measure models of one architecture side by side.

    Args:
        models: directories (float, or quantized in any format that is read), .gguf or .onnx files.
        float_model: what agreement is measured against; None takes the first of `models`. With it and a quantized
            directory, plain rounding with the directory's settings is measured too.
        text: file, directory, `datasets` id, or .npz of model inputs; None takes the held-out text in the package.
        samples, length: number of windows, and tokens in each.
        tasks: names of lm_eval tasks to run as well on everything but ONNX files. task_options: see `run_tasks`.

    Returns:
        Name -> {"perplexity" (None for models that predict no next token), "top1", "seconds", "tasks"}, the reference
        first, in the order of `models` ("float" and "rounding" before them).

    Raises:
        AwqTrtError: a model or a text that cannot be read, or inputs that a model cannot take.
    """
    opened = {str(m): Path(m) if str(m).endswith(".onnx") else open_weights(str(m)) for m in models}
    todo: dict[str, Weights | Path] = {}
    if float_model is not None:
        todo["float"] = original = open_weights(str(float_model))
        quantized = next((m for m in opened.values() if isinstance(m, QuantizedCheckpoint)), None)
        if isinstance(original, Checkpoint) and quantized is not None:
            todo["rounding"] = rounded_like(quantized, original)
    todo |= opened
    known = [m for m in todo.values() if isinstance(m, (Checkpoint, QuantizedCheckpoint))]
    if not known:
        raise AwqTrtError(f"{models[0]}: an ONNX file has no tokenizer; give the model it came from as float_model.")
    tokenizer = next((m.tokenizer for m in known if m.tokenizer is not None), None)
    inputs = calibration_inputs(text or HELD_OUT_TEXT, tokenizer, samples, length)

    rows: dict[str, Row] = {}
    reference: Predictions | None = None
    for name, model in todo.items():
        started = time.monotonic()
        if isinstance(model, Path):
            found = predictions(onnx_outputs(model, inputs), inputs, is_causal_lm(known[0].config))
        else:
            found = eager_predictions(model, inputs)
        reference = reference or found
        if [len(c[0]) for c in found.chosen] != [len(c[0]) for c in reference.chosen]:
            raise AwqTrtError(f"{name}: its outputs have other shapes than those of {next(iter(todo))}.")
        rows[name] = {**asdict(found.compared(reference)), "seconds": round(time.monotonic() - started, 1)}
        if tasks and not isinstance(model, Path):
            rows[name]["tasks"] = run_tasks(model, tokenizer, tasks, **(task_options or {}))
    return rows


def open_weights(path: str) -> Checkpoint | QuantizedCheckpoint:
    """A float checkpoint or a quantized one, whichever it is."""
    return open_quantized(path) if is_quantized(path) else open_checkpoint(path)
