"""H = X^T X of a layer's inputs X: all that the search needs to know of the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class HessianAccumulator:
    """Sums over the calibration tokens x [K] that one or several layers read."""

    hessian: torch.Tensor  # sum of x^T x, fp32 [K, K]; gone once taken
    total_abs: torch.Tensor  # sum of |x|, fp32 [K]
    tokens: int = 0
    largest: float = 0.0  # the largest |x| (fp16 ends at 65504); NaN or Inf where one was seen

    @classmethod
    def zero(cls, k: int, device: torch.device | str = "cpu") -> HessianAccumulator:
        """Of no token, for K = `k` channels."""
        return cls(torch.zeros(k, k, device=device), torch.zeros(k, device=device))

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., K]. Below its diagonal panels the Hessian is wrong until `mirror` is called."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.total_abs)
        if not len(x):
            return
        for columns in _panels(x.shape[1]):
            self.hessian[columns, columns.start :].addmm_(x[:, columns].t(), x[:, columns.start :])
        self.total_abs += torch.linalg.vector_norm(x, 1, dim=0)
        low, high = (float(bound) for bound in x.aminmax())
        self.tokens += len(x)
        self.largest = max(self.largest, -low, high) if low == low else low  # NaN stays NaN

    def mirror(self) -> None:
        """Copy the upper panels of the Hessian below the diagonal."""
        for columns in _panels(len(self.hessian)):
            self.hessian[columns.stop :, columns] = self.hessian[columns, columns.stop :].t()

    def all_reduce(self) -> None:
        """Add the sums of all processes of the group; each of them gets the result."""
        counts = torch.tensor([self.tokens, self.largest], dtype=torch.float64, device=self.hessian.device)
        for tensor in (self.hessian, self.total_abs, counts[:1]):
            dist.all_reduce(tensor)
        dist.all_reduce(counts[1:], dist.ReduceOp.MAX)
        self.tokens, self.largest = int(counts[0]), float(counts[1])

    def take(self) -> torch.Tensor:
        """The Hessian, [K, K], which is then the caller's to change: this object has none any more."""
        hessian = self.hessian
        del self.hessian
        return hessian


def _panels(k: int) -> list[slice]:
    """The columns 0..k in at most 8 slices of at least 128: x^T x is symmetric, so that 9/16 of it are enough."""
    step = max(128, -(-k // 8))
    return [slice(i, min(i + step, k)) for i in range(0, k, step)]
