"""A checkpoint as a table of functions, one per parameter, that read that parameter and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from safetensors import safe_open

from awq_trt.checkpoint.experts import Part
from awq_trt.errors import AwqTrtError

Reader = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk.

    Attributes:
        source: what the user named (path or hub id), for messages.
        config: its transformers configuration.
        dtype: the dtype its activations will have in the engine: the checkpoint's own if 16-bit, else float16.
        readers: parameter name (of `empty_model`) -> function that reads it, in the orientation of `empty_model`.
        tokenizer: the model's tokenizer, or None (vision models).
        transposed: parameters that are stored as [in, out] (GPT-2's Conv1D) and read as [out, in].
        files: everything on disk that the weights come from.
        keys: parameter -> what transformers, and so other tools, call it in a file, where that is another name.
        note: what of the checkpoint is left out, for people; "" where nothing is.
    """

    source: str
    config: transformers.PretrainedConfig
    dtype: torch.dtype
    readers: Mapping[str, Reader]
    tokenizer: Any = None
    transposed: frozenset[str] = field(default_factory=frozenset)
    files: tuple[Path, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

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
        return self._finite(name, reader.rows(index)) if isinstance(reader, RowReader) else self.tensor(name)[index]

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if bad := not_finite(tensor):
            raise AwqTrtError(
                f"{self.source}: tensor {name} holds {bad} NaN or Inf values; such a model cannot be quantized. "
                "Download it again, or save it in a dtype that can hold its weights."
            )
        return tensor


@runtime_checkable
class RowReader(Protocol):
    """A reader that can also give single rows."""

    def __call__(self) -> torch.Tensor:
        """The whole tensor."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows int64 [R] of it."""


def not_finite(tensor: torch.Tensor) -> int:
    """How many values are NaN or Inf; looks at 2^22 values at a time, because a mask of all of them is large."""
    if not tensor.is_floating_point():
        return 0
    rows = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
    pieces = rows.split(max(1, (1 << 22) // max(rows[:1].numel(), 1)))
    return sum(
        int((~torch.isfinite(p)).sum())
        for p in pieces
        if p.numel() and not all(torch.isfinite(bound) for bound in p.aminmax())
    )


@dataclass(frozen=True)
class SafetensorsReader:
    """Reads one tensor of a file, of this shape, through a memory map, which lives as long as the tensor."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        with safe_open(str(self.file), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(self.key)
        return tensor

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self()[index]

    def item(self, i: int) -> torch.Tensor:
        """tensor[i], reading nothing else."""
        with safe_open(str(self.file), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_slice(self.key)[i]
        return tensor


@dataclass(frozen=True)
class PartReader:
    """Reads one expert's part of a fused parameter."""

    read: Reader
    part: Part

    def __call__(self) -> torch.Tensor:
        expert = self.part.expert
        return self.part.of(self.read.item(expert) if isinstance(self.read, SafetensorsReader) else self.read()[expert])
