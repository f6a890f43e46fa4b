"""A checkpoint as a table of functions, one per parameter, that read that parameter and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from awq_trt.errors import AwqTrtError

Reader = Callable[[], torch.Tensor]
"""Reads one tensor. One that can read single rows for less has a method `rows`: int64 [R] -> [R, ...]."""


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk."""

    source: str  # what the user named (path or hub id), for messages
    config: transformers.PretrainedConfig
    dtype: torch.dtype  # of the activations in the engine: the checkpoint's own if 16-bit, else float16
    readers: Mapping[str, Reader]  # parameter of `empty_model` -> what reads it, in the orientation it has there
    tokenizer: Any = None  # None for models that read no text
    transposed: frozenset[str] = frozenset()  # parameters stored as [in, out] (GPT-2's Conv1D) and read as [out, in]
    files: tuple[Path, ...] = ()  # everything on disk that the weights come from
    keys: Mapping[str, str] = field(default_factory=dict)  # parameter -> its name in files, where that is another
    note: str = ""  # what of the checkpoint is left out, for people

    def tensor(self, name: str) -> torch.Tensor:
        """Read one parameter, in the dtype of the file; from safetensors it is a memory map of the file, not a copy.

        Raises:
            AwqTrtError: it is missing, or holds NaN or Inf.
        """
        if name not in self.readers:
            raise AwqTrtError(f"{self.source}: the tensor {name} is missing; download the checkpoint again.")
        return self._finite(name, self.readers[name]())

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Some rows of a parameter (int64 [R] -> [R, ...]), reading no more than them where the file allows it.

        Raises:
            AwqTrtError: they hold NaN or Inf.
        """
        reader = self.readers[name]
        return self._finite(name, reader.rows(index) if hasattr(reader, "rows") else reader()[index])

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        pieces = rows.split(max(1, (1 << 22) // max(rows[:1].numel(), 1)))  # a mask of a whole tensor is large
        bad = sum(int((~p.isfinite()).sum()) for p in pieces if not all(bound.isfinite() for bound in p.aminmax()))
        if bad:
            raise AwqTrtError(
                f"{self.source}: tensor {name} holds {bad} NaN or Inf values; such a model cannot be quantized. "
                "Download it again, or save it in a dtype that can hold its weights."
            )
        return tensor
