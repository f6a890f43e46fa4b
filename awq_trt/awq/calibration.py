"""Calibration inputs: text cut into windows of tokens, or arrays of model inputs for models that read no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from awq_trt.checkpoint.directory import token_ids
from awq_trt.errors import AwqTrtError, brief
from awq_trt.files import PACKAGE
from awq_trt.schema import regular_file

DATA = PACKAGE / "data"
DEFAULT_TEXT = DATA / "calibration.txt"
HELD_OUT_TEXT = DATA / "heldout.txt"
MAX_CHARACTERS = 2_000_000
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")


def read_text(source: str | Path) -> str:
    """The text of a file, of every text file of a directory, or of a `datasets` id (its column `text`).

    A dataset id is `name` or `name:configuration`; its train split is streamed until 2 million characters are there. Of
    files the first 2 million characters are read.

    Raises:
        AwqTrtError: nothing readable there.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES)
        if not files:
            raise AwqTrtError(f"{source}: no {', '.join(TEXT_SUFFIXES)} file in this directory to calibrate on.")
        texts, left = [], MAX_CHARACTERS
        for file in files:
            texts.append(_beginning(file, left))
            left -= len(texts[-1])
        return "\n\n".join(filter(None, texts))
    return _beginning(path, MAX_CHARACTERS) if path.exists() else _dataset_text(str(source))


def _beginning(file: Path, characters: int) -> str:
    """The first characters of a text file: as many as a dataset is read for, so that no file fills the memory."""
    with regular_file(file).open(errors="replace") as text:
        return text.read(characters)


def _dataset_text(name: str) -> str:
    missing = f"{name}: no such file or directory, and not a dataset that could be read"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AwqTrtError(f"{missing}: for hub datasets run `pip install datasets` first.") from error
    identifier, _, configuration = name.partition(":")
    try:
        stream = load_dataset(identifier, configuration or None, split="train", streaming=True)
        parts: list[str] = []
        characters = 0
        for row in stream:
            parts.append(row["text"])
            characters += len(parts[-1])
            if characters > MAX_CHARACTERS:
                break
    except Exception as error:
        raise AwqTrtError(f"{missing}: {brief(error)}") from error
    return "\n\n".join(parts)


def windows(source: str | Path, tokenizer: Any, samples: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Cut a text into at most `samples` windows of `length` tokens, spread evenly over the text.

    Returns:
        One dict per window: {"input_ids": int64 [1, length]}.

    Raises:
        AwqTrtError: no tokenizer, or a text shorter than one window.
    """
    if tokenizer is None:
        raise AwqTrtError(
            f"{source}: this model has no tokenizer to read a text with. Give its inputs in calibration as a .npz "
            '(one array per model input, samples first), or round without searching: method="rtn".'
        )
    text = read_text(source)
    ids = token_ids(tokenizer, text, return_attention_mask=False, verbose=False) if text.strip() else []
    if len(ids) < length:
        raise AwqTrtError(
            f"{source}: {len(ids)} tokens of text, but one calibration window needs {length}. "
            "Give more text, or shorter windows (calibration_length)."
        )
    count = min(samples, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [{"input_ids": torch.tensor(ids[s : s + length]).unsqueeze(0)} for s in starts]


def arrays(source: str | Path, samples: int) -> list[dict[str, torch.Tensor]]:
    """Model inputs from a .npz: one array per argument of the model's forward, samples along the first axis.

    Floating-point arrays come in fp32, whatever their dtype: float64 is NumPy's own, float16 what an engine reads.

    Raises:
        AwqTrtError: not a .npz of arrays (pickled objects are refused), or arrays of different lengths.
    """
    try:
        with np.load(regular_file(Path(source)), allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]) for name in file.files}
            inputs = {name: array.float() if array.is_floating_point() else array for name, array in found.items()}
        counts = {name: len(array) for name, array in inputs.items()}
    except AwqTrtError:
        raise
    except Exception as error:
        raise AwqTrtError(f"{source}: not a .npz of plain arrays: {brief(error)}") from error
    if not counts or len(set(counts.values())) != 1 or 0 in counts.values():
        raise AwqTrtError(f"{source}: every array needs the same, non-zero number of samples; there are {counts}.")
    count = min(samples, next(iter(counts.values())))
    return [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(count)]


def calibration_inputs(source: str | Path, tokenizer: Any, samples: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Calibration inputs of either kind: `arrays` for a .npz, else `windows` of text."""
    if str(source).endswith(".npz"):
        return arrays(source, samples)
    return windows(source, tokenizer, samples, length)
