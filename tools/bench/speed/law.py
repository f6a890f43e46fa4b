"""Time of a product as a law of four numbers, fitted to measured times.

    t = start + ((bytes / (fb bandwidth))^p + (flops / (fp peak))^p)^(1/p)

The roofline, with a corner as round as it is measured to be (p = 1: bytes and arithmetic take turns; p = infinity: the
longer hides the other), with the fractions of bandwidth and peak that are reached, and a start that no size takes away.
Waves of tiles are not in it, nor that another kernel takes over at some number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

GUESS = (3.0, 0.8, 0.7, 2.0)
LOWEST, HIGHEST = (0.05, 0.01, 0.01, 0.05), (1e3, 2.0, 2.0, 30.0)
"""Of start_us, the fractions, and sharpness - 1: a number that the times say nothing about stays within."""
STEPS = 100


@dataclass(frozen=True)
class Law:
    """start_us: microseconds. bandwidth_fraction, peak_fraction: of what was measured. sharpness: p."""

    start_us: float
    bandwidth_fraction: float
    peak_fraction: float
    sharpness: float

    def us(self, bytes_us: Array | float, flops_us: Array | float) -> Array:
        """Microseconds of calls whose bytes take `bytes_us` at the full bandwidth, the arithmetic `flops_us` at the
        peak."""
        b, f = np.asarray(bytes_us) / self.bandwidth_fraction, np.asarray(flops_us) / self.peak_fraction
        longer, shorter = np.maximum(b, f), np.minimum(b, f)
        return self.start_us + longer * (1 + (shorter / longer) ** self.sharpness) ** (1 / self.sharpness)


def law_of(logs: Array) -> Law:
    """From the logarithms of start, the fractions, and sharpness - 1."""
    start, bandwidth, peak, sharp = np.exp(logs).tolist()
    return Law(start, bandwidth, peak, 1 + sharp)


def fit(bytes_us: Array, flops_us: Array, us: Array) -> Law:
    """The law with the least sum of squared logarithms of predicted over measured: Levenberg's and Marquardt's method.

    Args:
        bytes_us, flops_us, us: [cells], as in `Law.us`; us: what was measured.
    """

    def off(logs: Array) -> Array:
        return np.log(law_of(logs).us(bytes_us, flops_us) / us)

    low, high, logs = np.log(LOWEST), np.log(HIGHEST), np.log(GUESS)
    damping, error = 1e-2, off(logs)
    for _ in range(STEPS):
        slopes = np.stack([(off(logs + 1e-6 * unit) - error) / 1e-6 for unit in np.eye(len(logs))], 1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -slopes.T @ error)
        tried = np.clip(logs + step, low, high)
        if (new := off(tried)) @ new < error @ error:
            logs, error, damping = tried, new, damping / 5
        else:
            damping *= 5
    return law_of(logs)
