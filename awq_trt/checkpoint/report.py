"""awq_trt.json, beside the weights: settings, what the search found per layer, and why layers stayed in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from awq_trt.errors import AwqTrtError
from awq_trt.schema import Bytes, Name, read_json

REPORT = "awq_trt.json"


class Layer(TypedDict):
    """A row of "layers", as `search.LayerReport`."""

    name: Name
    alpha: float
    weights: NotRequired[bool]
    folded_into: Name | None
    error_rounding: float
    error: float
    clip: float
    feedback: NotRequired[bool]
    tokens: Bytes
    largest_activation: float


class Calibration(TypedDict):
    """What it was calibrated on."""

    source: Name
    windows: Bytes
    length: Bytes


class Report(TypedDict, total=False):
    """The file; it has more keys, and may have fewer."""

    source: Name
    method: Name
    clip: bool
    feedback: bool
    symmetric: bool
    group_size: int | None
    calibration: Calibration
    left_in_float: dict[Name, Name]
    layers: list[Layer]


def read_report(directory: Path, *, whole: bool = False) -> dict[str, Any]:
    """What `quantize` wrote into a directory; {} where another tool wrote it.

    Args:
        whole: it must be there, with all that a page about it shows.

    Raises:
        AwqTrtError: the file is damaged.
    """
    path = directory / REPORT
    if not path.exists() and not whole:
        return {}
    report: dict[str, Any] = read_json(path, Report, "Quantize again.")
    if missing := [key for key in Report.__annotations__ if whole and key not in report]:
        raise AwqTrtError(f"{path}: key {missing[0]!r} is missing. Quantize again.")
    return report
