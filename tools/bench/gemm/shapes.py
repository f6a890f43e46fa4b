"""Which products are timed, what each must move through memory, and how many copies of the weights that takes.

y[M, N] = x[M, K] . W[N, K]^T          W in 4 bits, a scale (and a zero point) per group of columns
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

TOKENS = (1, 2, 4, 8, 16, 24, 32)
"""Of decoding: a token for each sequence of a batch."""
PREFILL = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
RANGES = {"decode": TOKENS, "prefill": PREFILL, "all": (*TOKENS, *PREFILL)}


@dataclass(frozen=True)
class Model:
    """A decoder with a gated MLP: the widths of its layers."""

    hidden: int
    query: int  # of all query heads
    key: int  # of all key heads
    mlp: int
    group_size: int = 128  # for its weights

    def layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (N, K) of the linear layers of a block; those that read the same input are one."""
        return {
            "qkv": (self.query + 2 * self.key, self.hidden),
            "o": (self.hidden, self.query),
            "gate_up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }


MODELS = {
    "Llama-3.1-8B": Model(4096, 4096, 1024, 14336),
    "Llama-3.1-70B": Model(8192, 8192, 1024, 28672),
    "Qwen3-8B": Model(4096, 4096, 1024, 12288),
    "SmolLM2-135M": Model(576, 576, 192, 1536, group_size=64),  # 576 = 9 * 64
}

HEADLINE = ((4096, 4096), (4096, 14336), (8192, 28672))
"""(N, K) that the targets name; timed before all others."""


@dataclass(frozen=True)
class Shape:
    """N output features, K input features, `group_size` columns per scale, and the layers that have this shape."""

    n: int
    k: int
    group_size: int
    layers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """N x K, as everywhere in the results."""
        return f"{self.n}x{self.k}"

    def weight_bytes(self, symmetric: bool) -> int:
        """Bytes of the nibbles, the scales and, unless symmetric, the zero points."""
        groups = self.n * self.k // self.group_size
        return self.n * self.k // 2 + 2 * groups + (0 if symmetric else math.ceil(groups / 2))

    def bytes(self, tokens: int, symmetric: bool) -> int:
        """The fewest bytes one product moves: the weights, x and y once each."""
        return self.weight_bytes(symmetric) + 2 * tokens * (self.n + self.k)

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of one product."""
        return 2 * tokens * self.n * self.k

    def floor_us(self, tokens: int, symmetric: bool, bandwidth: float, peak: float = math.inf) -> float:
        """Microseconds: the bytes at a bandwidth, bytes per second, or the arithmetic at a peak, flops per second."""
        return max(self.bytes(tokens, symmetric) / bandwidth, self.flops(tokens) / peak) * 1e6


def shapes(models: Iterable[str] = MODELS) -> list[Shape]:
    """The different shapes of some models' layers, those of the targets first, then in the order of the models."""
    layers: dict[tuple[int, int, int], list[str]] = {}
    for name in models:
        for layer, (n, k) in MODELS[name].layers().items():
            layers.setdefault((n, k, MODELS[name].group_size), []).append(f"{name} {layer}")
    found = [Shape(n, k, g, tuple(names)) for (n, k, g), names in layers.items()]
    return sorted(found, key=lambda s: HEADLINE.index((s.n, s.k)) if (s.n, s.k) in HEADLINE else len(HEADLINE))


def rotations(copy_bytes: int, l2_bytes: int, factor: float, limit_bytes: int) -> int:
    """How many copies (of the weights, or of all that a call touches) to go through, so that none is in the L2 cache
    when its turn comes again.

    Two at least, `factor` times the cache together, but no more than `limit_bytes` (then perhaps one only).
    """
    wanted = max(2, math.ceil(factor * l2_bytes / copy_bytes))
    return max(1, min(wanted, limit_bytes // copy_bytes))
