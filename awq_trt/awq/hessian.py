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
class HessianAccumulator:
    """What calibration leaves of one input of K channels.

    Attributes:
        hessian: sum of x^T x over the tokens, fp32 [K, K]. total_abs: sum of |x|, fp32 [K]. tokens: how many.
        largest: the largest |x| seen (fp16 ends at 65504; NaN or Inf where one was seen).
    """

    hessian: torch.Tensor
    total_abs: torch.Tensor
    tokens: int = 0
    largest: float = 0.0

    @classmethod
    def zero(cls, k: int, device: torch.device | str = "cpu") -> HessianAccumulator:
        """Of nothing, for K = `k` channels."""
        return cls(torch.zeros(k, k, device=device), torch.zeros(k, device=device))

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., K]."""
        self.add_upper(x)
        self.mirror()

    def add_upper(self, x: torch.Tensor) -> None:
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

    def mirror(self) -> None:
        """Copy the upper panels of the Hessian below the diagonal."""
        for columns in panels(len(self.hessian)):
            self.hessian[columns.stop :, columns] = self.hessian[columns, columns.stop :].t()

    def plus(self, other: HessianAccumulator) -> None:
        """Add another sum, in place."""
        self.hessian += other.hessian
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
    """A sum whose Hessian waits in a file."""

    file: Path
    small: tuple[torch.Tensor, int, float]

    @classmethod
    def of(cls, sums: HessianAccumulator, file: Path) -> Parked:
        """Write the Hessian of a sum; the caller lets go of it."""
        with file.open("wb") as out:
            for piece in sums.hessian.view(-1).split(PIECE):
                out.write(piece.cpu().numpy().data)
        return cls(file, (sums.total_abs, sums.tokens, sums.largest))

    def add_to(self, sums: HessianAccumulator) -> None:
        """Add it to another sum, piece by piece, and delete the file."""
        buffer = torch.empty(PIECE)
        with self.file.open("rb") as file:
            for piece in sums.hessian.view(-1).split(PIECE):
                part = buffer[: len(piece)]
                file.readinto(part.numpy().data.cast("B"))
                piece += part.to(piece.device)
        sums._plus_small(*self.small)
        self.file.unlink()

    def load(self) -> HessianAccumulator:
        """Back into memory."""
        total_abs = self.small[0]
        sums = HessianAccumulator.zero(len(total_abs), total_abs.device)
        self.add_to(sums)
        return sums
