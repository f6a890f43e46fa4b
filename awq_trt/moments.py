"""Second moments of activations: all that the search needs to know of the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

PIECE = 1 << 22
"""Values moved between file and memory at once."""


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as fp32 [tokens, K]."""
    return x.detach().reshape(-1, x.shape[-1]).float()


@dataclass
class Statistics:
    """What calibration leaves of one input of K channels.

    Attributes:
        hessian: sum of x^T x over the tokens, fp32 [K, K]. total_abs: sum of |x|, fp32 [K]. tokens: how many.
        largest: the largest |x| seen (fp16 ends at 65504; NaN or Inf where one was seen).
        cross: sum of (x_float - x)^T x, fp32 [K, K], where x_float is the same input in the float model; or None.
    """

    hessian: torch.Tensor
    total_abs: torch.Tensor
    tokens: int = 0
    largest: float = 0.0
    cross: torch.Tensor | None = None

    @classmethod
    def zero(cls, k: int, device: torch.device | str = "cpu", cross: bool = False) -> Statistics:
        """Of nothing, for K = `k` channels."""
        square = torch.zeros(k, k, device=device)
        return cls(square, torch.zeros(k, device=device), cross=torch.zeros_like(square) if cross else None)

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None = None) -> None:
        """Add activations [..., K]; `x_float`, of the same shape, are those of the float model."""
        self.add_upper(x, x_float)
        self.mirror()

    def add_upper(self, x: torch.Tensor, x_float: torch.Tensor | None = None) -> None:
        """`add`, but the Hessian is only right in and above its diagonal panels until `mirror` is called."""
        x = rows_of(x)
        if not len(x):
            return
        for columns in panels(x.shape[1]):
            self.hessian[columns, columns.start :].addmm_(x[:, columns].t(), x[:, columns.start :])
        self.total_abs += torch.linalg.vector_norm(x, 1, dim=0)
        low, high = (float(bound) for bound in x.aminmax())
        self.tokens += len(x)
        self.largest = max(self.largest, -low, high) if low == low else low  # NaN stays NaN
        if self.cross is not None and x_float is not None and x_float.shape[:-1].numel() == len(x):
            self.cross.addmm_((rows_of(x_float) - x).t(), x)

    def mirror(self) -> None:
        """Copy the upper panels of the Hessian below the diagonal."""
        for columns in panels(len(self.hessian)):
            self.hessian[columns.stop :, columns] = self.hessian[columns, columns.stop :].t()

    def tensors(self) -> list[torch.Tensor]:
        """What is large."""
        return [self.hessian] if self.cross is None else [self.hessian, self.cross]

    def plus(self, other: Statistics) -> None:
        """Add another sum, in place."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine += its
        self._plus_small(other.total_abs, other.tokens, other.largest)

    def _plus_small(self, total_abs: torch.Tensor, tokens: int, largest: float) -> None:
        self.total_abs += total_abs
        self.tokens += tokens
        self.largest = max(self.largest, largest) if largest == largest else largest


def panels(k: int) -> list[slice]:
    """The columns 0..k in at most 8 slices of at least 128: x^T x is symmetric, so that 9/16 of it are enough."""
    step = max(128, -(-k // 8))
    return [slice(i, min(i + step, k)) for i in range(0, k, step)]


@dataclass
class Parked:
    """A sum whose large tensors wait in a file."""

    file: Path
    small: tuple[torch.Tensor, int, float]
    with_cross: bool

    @classmethod
    def of(cls, sums: Statistics, file: Path) -> Parked:
        """Write the large tensors of a sum; the caller lets go of it."""
        with file.open("wb") as out:
            for tensor in sums.tensors():
                for piece in tensor.view(-1).split(PIECE):
                    out.write(piece.cpu().numpy().data)
        return cls(file, (sums.total_abs, sums.tokens, sums.largest), sums.cross is not None)

    def add_to(self, sums: Statistics) -> None:
        """Add it to another sum, piece by piece, and delete the file."""
        buffer = torch.empty(PIECE)
        with self.file.open("rb") as file:
            for tensor in sums.tensors():
                for piece in tensor.view(-1).split(PIECE):
                    part = buffer[: len(piece)]
                    file.readinto(part.numpy().data.cast("B"))
                    piece += part.to(piece.device)
        sums._plus_small(*self.small)
        self.file.unlink()

    def load(self) -> Statistics:
        """Back into memory."""
        total_abs = self.small[0]
        sums = Statistics.zero(len(total_abs), total_abs.device, self.with_cross)
        self.add_to(sums)
        return sums
