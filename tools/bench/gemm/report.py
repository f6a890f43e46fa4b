"""The times of a record for people: fp16 against INT4 for each model, layer and number of tokens, as Markdown."""

from __future__ import annotations

from bench.gemm.measure import Row
from bench.gemm.methods import CUBLAS, OWN
from bench.gemm.record import Record
from bench.gemm.shapes import MODELS, Model
from bench.gemm.targets import Cell, best, geometric_mean

Times = dict[Cell, Row]


def markdown(record: Record) -> str:
    """The report; models of which no cell was measured are left out."""
    settings, rows = record["settings"], record["rows"]
    own, cublas, default = best(rows, (OWN,)), best(rows, (CUBLAS,)), best(rows, (OWN,), "default")
    where = ", ".join(gpu.get("name", "") for gpu in record["hardware"]) or "no GPU"
    lines = [f"# 16 bits against INT4, {where}, {settings['dtype']}, {record['date'][:10]}", ""]
    if settings["device"] == "cpu":
        lines += ["**Made up: a dry run on a CPU with layers of no model, every call counted as one microsecond.**", ""]
    if "device" in record:
        bandwidth, peak = (record["device"][what]["used"] for what in ("bandwidth", "peak"))
        lines += [f"Measured in the same run: {bandwidth / 1e9:.0f} GB/s, {peak / 1e12:.0f} TFLOP/s.", ""]
    lines += [
        "Each cell: µs of cuBLAS in 16 bits / µs in INT4 = how many times faster INT4 is; the median over replays of a",
        "CUDA graph, weights not in the cache. INT4 is the fastest tactic of each cell"
        + ("" if settings["symmetric"] else ", with zero points") + "; layers that read the same input are one.",
    ]  # fmt: skip
    slower = [default[c]["us"] / r["us"] for c, r in own.items() if c in default]
    if slower:
        lines += [f"The default tactic takes {geometric_mean(slower):.2f} times as long (geometric mean)."]
    for name, model in MODELS.items():
        lines += table(name, model, settings["tokens"], own, cublas)
    return "\n".join(lines) + "\n"


def table(name: str, model: Model, tokens: list[int], own: Times, cublas: Times) -> list[str]:
    """A model's table, a row for each number of tokens; nothing where there is no cell."""
    layers = model.layers()
    if not any((n, k, m) in own or (n, k, m) in cublas for n, k in layers.values() for m in tokens):
        return []
    heads = [f"{layer} {n}x{k}" for layer, (n, k) in layers.items()]
    lines = ["", f"## {name}, group {model.group_size}", "", f"| tokens | {' | '.join(heads)} | all four |"]
    lines.append("|---" * (len(layers) + 2) + "|")
    for m in tokens:
        rows = [(cublas.get((n, k, m)), own.get((n, k, m))) for n, k in layers.values()]
        pairs = [tuple(None if row is None else row["us"] for row in pair) for pair in rows]
        pairs.append(tuple(None if None in times else sum(times) for times in zip(*pairs, strict=True)))
        lines.append(f"| {m} | {' | '.join(text(*pair) for pair in pairs)} |")
    return lines


def text(cublas: float | None, own: float | None) -> str:
    """A cell: "12.30 / 4.10 = 3.00"; "-" for what was not measured."""
    ratio = f" = **{cublas / own:.2f}**" if cublas is not None and own is not None else ""
    return " / ".join("-" if t is None else f"{t:.{2 if t < 100 else 0}f}" for t in (cublas, own)) + ratio
