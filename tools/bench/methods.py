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
    """One row of the table (two, where a method delivers its result before and after its own export).

    Attributes:
        name: for --methods and the table. module: file in this folder, None for the float model itself.
        symmetric: no zero points. options: what the module's `quantize` wants to know besides.
        environment: key of PEERS, None for the environment of the benchmark.
        windows: calibration windows if not those of --windows.
    """

    name: str
    module: str | None
    symmetric: bool = False
    options: tuple[tuple[str, str | None], ...] = ()
    environment: str | None = None
    windows: int | None = None


def ours(name: str, effort: str, symmetric: bool = False, windows: int | None = None) -> Method:
    """A row of this package at some effort."""
    return Method(name, "method_awq_trt", symmetric, (("method", "awq"), ("effort", effort)), None, windows)


def rounding(name: str, symmetric: bool) -> Method:
    """A row of rounding to nearest, as this package does it."""
    return Method(name, "method_awq_trt", symmetric, (("method", "rtn"), ("effort", None)))


METHODS = (
    Method("float", None),
    rounding("rounding", False),
    rounding("rounding-symmetric", True),
    Method("llm-awq", "method_llm_awq"),
    Method("llm-awq-symmetric", "method_llm_awq", True),
    ours("fast", "fast"),
    ours("default", "default"),
    ours("best", "best"),
    ours("best-symmetric", "best", symmetric=True),
    ours("best-48", "best", windows=48),
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


@dataclass(frozen=True)
class Target:
    """A ratio of two rows that has a limit: `column` of `row` over that of `reference`."""

    row: str
    reference: str
    column: str
    limit: float


TARGETS = (
    Target("default", "llm-awq", "increase", 0.95),
    Target("best", "llm-awq", "increase", 0.70),
    Target("best-48", "llm-awq", "increase", 0.60),
    Target("best-symmetric", "modelopt-awq-lite", "increase", 0.70),
    Target("default", "llm-awq", "seconds", 0.25),
    Target("default", "modelopt-awq-lite", "seconds", 1.0),
    Target("best", "llm-awq", "seconds", 1.0),
    Target("best-48", "llm-awq", "seconds", 1.0),
)


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
    for target in TARGETS:
        values = [rows.get(name, {}).get(target.column) for name in (target.row, target.reference)]
        if values[0] is not None and values[1]:
            ratio = values[0] / values[1]
            found.append(
                {
                    "what": f"{target.column} of {target.row} / {target.reference}",
                    "ratio": round(ratio, 3),
                    "limit": target.limit,
                    "met": ratio <= target.limit,
                }
            )
    return found
