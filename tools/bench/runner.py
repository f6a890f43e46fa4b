"""Running a method in a child process that has what it needs, and scoring what it delivered."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from awq_trt.awq.blocks import Inputs
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate.accuracy import Predictions, eager_predictions
from awq_trt.evaluate.evaluate import open_weights
from bench.machine import CommandError, run
from bench.methods import PEERS, Method

EXPORTED = "-exported"
"""Ends the name of a row that a method delivered in its own export format."""
CHILD = Path(__file__).with_name("child.py")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is the same for every method."""

    model: Path  # directory with the float weights
    cache: Path  # where everything is kept
    threads: int  # of every process
    group_size: int
    text: Path  # calibration text
    calibration: Callable[[int], list[Inputs]]  # so many windows of it
    windows: int  # how many of them a method gets unless it says otherwise
    held_out: list[Inputs]  # windows to score with
    reference: Predictions  # of the float model on them


def torch_pin() -> str:
    """The line of tools/constraints.txt that every environment shares."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))


def interpreter(name: str | None, cache: Path) -> str:
    """Path of the Python that has a peer (None: this one). A peer is installed on first use, into a virtual environment
    of its own, so that its pins of other packages do not meet ours.

    Raises:
        CommandError: pip could not.
    """
    if name is None:
        return sys.executable
    requirements = [*PEERS[name], torch_pin()]
    key = hashlib.sha256(" ".join([*requirements, sys.version]).encode()).hexdigest()[:8]
    folder = cache / "environments" / f"{name}-{key}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        run([python, "-m", "pip", "install", "-q", *requirements])
        complete.touch()
    return str(python)


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
            name = method.name if folder == delivered[0] else method.name + EXPORTED
            found[name] = result | score(bench, output / folder)
        return found
    except CommandError as error:
        return {method.name: {"error": str(error)}}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def run_child(bench: Bench, method: Method, windows: int, python: str, output: Path) -> Row:
    """Run the method in a process of its own and return what it measured.

    Raises:
        CommandError: the process failed.
    """
    ids = np.concatenate([sample["input_ids"].numpy() for sample in bench.calibration(windows)])
    np.save(output / "ids.npy", ids)  # int64 [windows, length]
    job = {
        "module": method.module,
        "model": str(bench.model),
        "ids": str(output / "ids.npy"),
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
    run([python, CHILD, output / "job.json"], env=environment, cwd=output)
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
