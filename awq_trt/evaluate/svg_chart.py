"""Line charts as plain numbers: where lines, points and ticks go. The template data/report.html.j2 draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 36
"""Of a chart, in the units of its viewBox; margins for the ticks."""
COLORS = 8
"""The template has so many; after them lines begin again, dashed."""


@dataclass(frozen=True)
class Series:
    """One line. label: "" leaves it out of the legend. color: from 0. thin: a dotted line without points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    thin: bool = False


@dataclass(frozen=True)
class Tick:
    """A line across the chart: where it is, and what is written beside it."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A value of a line, and what to say of it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series in the chart's units: `path` is an SVG path."""

    label: str
    path: str
    points: tuple[Point, ...]
    color: int
    dashed: bool
    thin: bool


@dataclass(frozen=True)
class Chart:
    """Everything the template needs. `mark`: a horizontal line with its text, or None."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    mark: Tick | None

    @property
    def description(self) -> str:
        """The chart in words."""
        names = [line.label for line in self.lines if line.label]
        return f"Line chart over {self.x_label}: {', '.join(names)}. The values are in the tables."


def chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    log_x: bool = False,
    log_y: bool = False,
    mark: tuple[float, str] | None = None,
) -> Chart | None:
    """Lay out a chart; None where no value can be drawn (none at all, or none above zero on a logarithmic axis).

    Args:
        mark: a value on the y axis to draw a line at, if it is within reach of the data, and its text.
    """

    def can(x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)

    kept = [[(x, y) for x, y in zip(s.x, s.y, strict=True) if can(x, y)] for s in series]
    points = [point for line in kept for point in line]
    if not points:
        return None
    x_axis = _Axis([x for x, _ in points], log_x, LEFT, WIDTH - RIGHT)
    values = [y for _, y in points]
    if mark is not None and mark[0] > 0 and max(values) * 30 > mark[0]:
        values.append(mark[0])
    else:
        mark = None
    y_axis = _Axis(values, log_y, HEIGHT - BOTTOM, TOP)
    lines = []
    for one, line in zip(series, kept, strict=True):
        places = [(x_axis.at(x), y_axis.at(y)) for x, y in line]
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
        words = [f"{one.label}, {x_label} {x:g}: {y:.4g}" for x, y in line]
        shown = tuple(Point(round(x, 1), round(y, 1), text) for (x, y), text in zip(places, words, strict=True))
        dashed = one.color >= COLORS
        lines.append(Line(one.label, path, () if one.thin else shown, one.color % COLORS, dashed, one.thin))
    marked = None if mark is None else Tick(y_axis.at(mark[0]), mark[1])
    return Chart(title, x_label, x_axis.ticks(whole=True), y_axis.ticks(), tuple(lines), marked)


class _Axis:
    """From values to places between `start` and `end`, both ends of an axis."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.log, self.low, self.high, self.start, self.end = log, low, high, start, end
        if not log and low > 0 and low < 0.4 * high:
            self.low = 0.0

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, whole: bool = False) -> tuple[Tick, ...]:
        """At most ten round numbers; `whole` ones only."""
        found = self._log_ticks() if self.log else self._linear_ticks(whole)
        return tuple(Tick(self.at(v), f"{v:g}") for v in found)

    def _linear_ticks(self, whole: bool) -> list[float]:
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(found) <= 10:
                break
        return found or [self.low, self.high]
