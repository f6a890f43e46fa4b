"""Running a method in its child process, and scoring what it delivered with the one function that scores all."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from awq_trt.awq.blocks import Inputs
from awq_trt.checkpoint.open import open_checkpoint
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import Predictions, eager_predictions
from awq_trt.evaluate.evaluate import open_weights
from bench.environments import NotInstalledError, interpreter
from bench.methods import Method
from bench.prepare import save_ids

CHILD = Path(__file__).with_name("child.py")
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is the same for every method.

    Attributes:
        model: directory with the float weights. cache: where everything is kept. threads: of every process.
        text: calibration text. calibration: number of windows -> that many of it.
        windows: how many of them a method gets unless it says otherwise. held_out: windows to score with.
        reference: predictions of the float model on them.
    """

    model: Path
    cache: Path
    threads: int
    group_size: int
    text: Path
    calibration: Any
    windows: int
    held_out: list[Inputs]
    reference: Predictions


def run_method(bench: Bench, method: Method) -> dict[str, Row]:
    """The rows of one method, by name; a row with "error" where it could not be run."""
    if method.module is None:
        return {method.name: scores(bench.reference, bench.reference)}
    output = bench.cache / "work" / method.name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    try:
        python = interpreter(method.environment, bench.cache)
        result = run_child(bench, method, method.windows or bench.windows, python, output)
        delivered: list[str] = result.pop("delivered")
        found = {}
        for folder in delivered:
            name = method.name if folder == delivered[0] else f"{method.name}-exported"
            found[name] = result | score(bench, output / folder)
        return found
    except (NotInstalledError, ChildError) as error:
        return {method.name: {"error": str(error)}}
    finally:
        shutil.rmtree(output, ignore_errors=True)


class ChildError(Exception):
    """A method failed; the message is the end of what it printed."""


def run_child(bench: Bench, method: Method, windows: int, python: str, output: Path) -> Row:
    """Run the method in a process of its own and return what it measured.

    Raises:
        ChildError: the process failed.
    """
    samples = bench.calibration(windows)
    job = {
        "module": method.module,
        "model": str(bench.model),
        "ids": str(save_ids(samples, output / "ids.npy")),
        "text": str(bench.text),
        "output": str(output),
        "group_size": bench.group_size,
        "symmetric": method.symmetric,
        "threads": bench.threads,
        **dict(method.options),
    }
    (output / "job.json").write_text(json.dumps(job))
    threads = str(bench.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(CHILD), str(output / "job.json")],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=environment,
        cwd=output,
    )
    if done.returncode:
        raise ChildError(f"exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    result: Row = json.loads((output / "result.json").read_text())
    return result


def score(bench: Bench, directory: Path) -> Row:
    """Scores of a directory with rounded fp32 weights, or of a quantized one in any format that is read."""
    try:
        return scores(eager_predictions(open_weights(str(directory)), bench.held_out), bench.reference)
    except AwqTrtError as error:
        return {"error": f"its result cannot be read: {error}"}


def scores(found: Predictions, reference: Predictions) -> Row:
    """Perplexity, its increase over the float model and that increase's standard error over windows, agreement."""
    accuracy = found.compared(reference)
    if accuracy.perplexity is None:
        raise AwqTrtError("this model predicts no next token, so there is no perplexity to compare methods by.")
    differences = [a - b for a, b in zip(found.losses, reference.losses, strict=True)]
    spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    increase = accuracy.perplexity - math.exp(statistics.fmean(reference.losses))
    return {
        "perplexity": round(accuracy.perplexity, 4),
        "increase": round(increase, 4),
        "increase_error": round(accuracy.perplexity * spread, 4),
        "top1": round(accuracy.top1, 4),
    }


def float_predictions(model: Path, held_out: list[Inputs], cache: Path, key: str) -> Predictions:
    """Predictions of the float model, kept in the cache under `key`."""
    path = cache / "predictions" / f"{key}.pt"
    if not path.exists():
        found = eager_predictions(open_checkpoint(model), held_out)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([found.losses, found.chosen], path)
        return found
    losses, chosen = torch.load(path, weights_only=True)
    return Predictions(losses, chosen)
