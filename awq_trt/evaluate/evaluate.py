"""Perplexity and agreement of one model at every stage: float, rounded, quantized by any tool, exported to ONNX.

All read the same windows of the same text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from awq_trt.awq.blocks import Inputs, Weights
from awq_trt.awq.calibration import HELD_OUT_TEXT, calibration_inputs
from awq_trt.awq.config import QuantizeConfig
from awq_trt.awq.task import head_of
from awq_trt.checkpoint.model import empty_model
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.checkpoint.quantized import QuantizedCheckpoint, is_quantized, open_quantized
from awq_trt.checkpoint.reader import Checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import Predictions, RoundedWeights, eager_predictions, is_causal_lm, predictions
from awq_trt.evaluate.lm_eval import run_tasks
from awq_trt.evaluate.verify import onnx_session, run_onnx

Opened = Checkpoint | QuantizedCheckpoint
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
    paths = [str(m) for m in models]
    opened = {p: open_weights(p) for p in paths if not p.endswith(".onnx")}
    original = None if float_model is None else open_weights(str(float_model))
    known = [w for w in (original, *opened.values()) if w is not None]
    if not known:
        raise AwqTrtError(f"{paths[0]}: an ONNX file has no tokenizer; name the model it came from too, with --float.")
    tokenizer = next((w.tokenizer for w in known if w.tokenizer is not None), None)
    inputs = calibration_inputs(text or HELD_OUT_TEXT, tokenizer, samples, length)
    todo: dict[str, Weights | Path] = {}
    if original is not None:
        todo["float"] = original
        if isinstance(original, Checkpoint) and (first := first_settings(opened)) is not None:
            config, dtype = first
            todo["rounding"] = RoundedWeights(replace(original, dtype=dtype), config, head=first_head(opened))
    todo |= {p: opened.get(p) or Path(p) for p in paths}

    rows: dict[str, Row] = {}
    reference: Predictions | None = None
    for name, weights in todo.items():
        started = time.monotonic()
        found = predict(weights, inputs, is_causal_lm(known[0].config))
        reference = reference or found
        if [len(c[0]) for c in found.chosen] != [len(c[0]) for c in reference.chosen]:
            raise AwqTrtError(f"{name}: its outputs have other shapes than those of {next(iter(todo))}.")
        rows[name] = {**asdict(found.compared(reference)), "seconds": round(time.monotonic() - started, 1)}
        if tasks and not isinstance(weights, Path):
            rows[name]["tasks"] = run_tasks(weights, tokenizer, tasks, **(task_options or {}))
    return rows


def open_weights(path: str) -> Opened:
    """A float checkpoint or a quantized one, whichever it is."""
    return open_quantized(path) if is_quantized(path) else open_checkpoint(path)


def first_settings(opened: dict[str, Opened]) -> tuple[QuantizeConfig, torch.dtype] | None:
    """Group size, symmetry and dtype of the first quantized checkpoint; None where there is none."""
    for checkpoint in opened.values():
        if isinstance(checkpoint, QuantizedCheckpoint):
            linear = next(iter(checkpoint.linears.values()))
            group = checkpoint.scheme.group_size or linear.group_size
            return QuantizeConfig(group_size=group, symmetric=linear.zeros is None), checkpoint.dtype
    return None


def first_head(opened: dict[str, Opened]) -> bool:
    """Whether the layer that makes logits is quantized in the first quantized checkpoint."""
    checkpoint = next(c for c in opened.values() if isinstance(c, QuantizedCheckpoint))
    head = head_of(empty_model(checkpoint.config))
    return head is not None and head[0] in checkpoint.linears


def predict(model: Weights | Path, inputs: Sequence[Inputs], causal: bool) -> Predictions:
    """Predictions of weights in fp32, or of an ONNX file in ONNX Runtime."""
    if isinstance(model, Path):
        return predictions(onnx_outputs(model, inputs), inputs, causal)
    return eager_predictions(model, inputs)


def onnx_outputs(path: Path, inputs: Sequence[Inputs]) -> Iterator[torch.Tensor]:
    """First output of an ONNX file for each input in turn, in fp32.

    Raises:
        AwqTrtError: ONNX Runtime cannot load it, or its output is not finite.
    """
    session = onnx_session(path, all_logits=True)
    for sample in inputs:
        first = next(iter(run_onnx(session, {n: t.numpy() for n, t in sample.items()}).values()))
        output = torch.from_numpy(first).float()
        if not torch.isfinite(output).all():
            raise AwqTrtError(f"{path}: its output has NaN or Inf: float16 overflowed; export with --dtype bfloat16.")
        yield output
