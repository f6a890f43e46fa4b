"""What the benchmark compares, as a table."""

from __future__ import annotations

from dataclasses import dataclass

PEERS = {
    "modelopt": ("nvidia-modelopt==0.47.0", "transformers==5.23.0", "accelerate==1.15.0", "requests==2.34.2"),
    "llmcompressor": ("llmcompressor==0.14.0.1",),
}
"""Environment -> what pip installs into it; torch comes from tools/constraints.txt, so that none brings CUDA along."""


@dataclass(frozen=True)
class Method:
    """One row of the table (two, where a method delivers its result before and after its own export)."""

    name: str  # for --methods and the table
    module: str | None  # file in this folder; None for the float model itself
    symmetric: bool = False  # no zero points
    options: tuple[tuple[str, str | None], ...] = ()  # what the module's `quantize` wants to know besides
    environment: str | None = None  # key of PEERS; None for the environment of the benchmark
    windows: int | None = None  # calibration windows if not those of --windows


OURS = "method_awq_trt"
ROUNDING, FAST, DEFAULT, BEST = (
    (("method", method), ("effort", effort))
    for method, effort in (("rtn", None), ("awq", "fast"), ("awq", "default"), ("awq", "best"))
)
METHODS = (
    Method("float", None),
    Method("rounding", OURS, False, ROUNDING),
    Method("rounding-symmetric", OURS, True, ROUNDING),
    Method("llm-awq", "llm_awq"),
    Method("llm-awq-symmetric", "llm_awq", True),
    Method("fast", OURS, False, FAST),
    Method("default", OURS, False, DEFAULT),
    Method("best", OURS, False, BEST),
    Method("best-symmetric", OURS, True, BEST),
    Method("best-48", OURS, False, BEST, windows=48),
    Method("modelopt-awq-lite", "method_modelopt", True, (), "modelopt"),
    Method("llm-compressor-awq", "method_llmcompressor", False, (("method", "awq"),), "llmcompressor"),
    Method("llm-compressor-gptq", "method_llmcompressor", False, (("method", "gptq"),), "llmcompressor"),
)

GROUPS = {
    "all": tuple(m.name for m in METHODS),
    "cheap": ("float", "rounding", "rounding-symmetric", "fast", "default"),
    "ours": ("float", "fast", "default", "best", "best-symmetric", "best-48"),
    "peers": ("float", "modelopt-awq-lite", "llm-compressor-awq", "llm-compressor-gptq"),
}


TARGETS = (
    ("default", "llm-awq", "increase", 0.95),
    ("best", "llm-awq", "increase", 0.70),
    ("best-48", "llm-awq", "increase", 0.60),
    ("best-symmetric", "modelopt-awq-lite", "increase", 0.70),
    ("default", "llm-awq", "seconds", 0.25),
    ("default", "modelopt-awq-lite", "seconds", 1.0),
    ("best", "llm-awq", "seconds", 1.0),
    ("best-48", "llm-awq", "seconds", 1.0),
)
"""(row, reference, column, limit): the most that `column` of `row` may be over that of `reference`."""


def chosen(names: list[str]) -> list[Method]:
    """The methods of some names and groups, in the order of the table.

    Raises:
        KeyError: there is no such name.
    """
    wanted = {n for name in names for n in GROUPS.get(name, (name,))}
    if unknown := wanted - set(GROUPS["all"]):
        raise KeyError(
            f"no method or group {', '.join(sorted(unknown))}; there are the methods {', '.join(GROUPS['all'])} "
            f"and the groups {', '.join(GROUPS)}"
        )
    return [m for m in METHODS if m.name in wanted]


def targets(rows: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """What the limits say of some rows; only pairs that are both there."""
    found: list[dict[str, object]] = []
    for row, reference, column, limit in TARGETS:
        value, base = (rows.get(name, {}).get(column) for name in (row, reference))
        if value is not None and base:
            ratio = round(value / base, 3)
            what = f"{column} of {row} / {reference}"
            found.append({"what": what, "ratio": ratio, "limit": limit, "met": value / base <= limit})
    return found
