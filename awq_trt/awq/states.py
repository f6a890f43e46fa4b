"""Hidden states between two blocks: one tensor per calibration window, in a safetensors file, read window by window."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from awq_trt.checkpoint.safetensors import DTYPES

HEADER_BYTES = 192
"""Room kept in the header for one window: the header is written last, when the shapes are known."""


class StatesWriter:
    """Writes the states of some windows as they come; the file is there whole or not at all. A context manager.

    Attributes:
        kept: window -> states, those that stay in memory too; None where memory is too small for that.
    """

    def __init__(self, path: Path, windows: int, keep: bool = False) -> None:
        self.path = path
        self.kept: dict[int, torch.Tensor] | None = {} if keep else None
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._start = 8 + -(-HEADER_BYTES * (windows + 1) // 64) * 64
        self._file.seek(self._start)
        self._entries: dict[str, object] = {}
        self._end = 0

    def add(self, window: int, states: torch.Tensor) -> None:
        """Write the states of one window, any shape."""
        value = states.detach().contiguous()
        begin, self._end = self._end, self._end + value.nbytes
        self._entries[str(window)] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, self._end],
        }
        self._file.write(value.cpu().flatten().view(torch.uint8).numpy().data)
        if self.kept is not None:
            self.kept[window] = value

    def __enter__(self) -> StatesWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            header = json.dumps(self._entries).encode().ljust(self._start - 8)
            self._file.seek(0)
            self._file.write(struct.pack("<Q", len(header)) + header)
        self._file.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)


class States:
    """The states of windows 0..n-1, or some of them, from the files that several processes wrote."""

    def __init__(self, paths: list[Path], kept: dict[int, torch.Tensor] | None = None) -> None:
        self._kept = kept or {}
        self._files: dict[int, Path] = {}
        for path in paths:
            try:
                with safe_open(str(path), framework="pt") as handle:
                    self._files.update({int(name): path for name in handle.keys()})  # noqa: SIM118
            except (OSError, SafetensorError, ValueError):
                continue  # what is not whole is not there; `__contains__` tells

    def __contains__(self, window: int) -> bool:
        return window in self._kept or window in self._files

    def __getitem__(self, window: int) -> torch.Tensor:
        """The states of one window, in memory of their own (the bits of a product may depend on alignment)."""
        if window in self._kept:
            return self._kept[window]
        with safe_open(str(self._files[window]), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(str(window))
        return tensor.clone()
