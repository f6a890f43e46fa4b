"""A picture of a record: the fraction of the floor and the speed-up over cuBLAS, by shape and number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.gemm.measure import Row
from bench.gemm.methods import CUBLAS, METHODS
from bench.gemm.targets import best

COLUMNS = 4
MOST_TICKS = 8


def draw(record: dict[str, Any], path: Path) -> None:
    """Write it: two panels per shape, the fraction of the floor above, a line per method (its fastest variant), over
    the logarithm of the number of tokens.

    Args:
        path: .svg, .png or .pdf.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[Row] = record["rows"]
    sizes = [(s["n"], s["k"]) for s in record["settings"]["shapes"]]
    tokens = record["settings"]["tokens"]
    ticks = [m for m in tokens if m.bit_count() == 1][:: 1 if len(tokens) <= MOST_TICKS else 2] or tokens
    high, wide = -(-len(sizes) // COLUMNS), min(COLUMNS, len(sizes))
    figure, axes = plt.subplots(2 * high, wide, figsize=(3.6 * wide, 5 * high), squeeze=False, layout="constrained")
    cublas = best(rows, (CUBLAS,))
    for index, (n, k) in enumerate(sizes):
        top, below = axes[2 * (index // COLUMNS)][index % COLUMNS], axes[2 * (index // COLUMNS) + 1][index % COLUMNS]
        for number, method in enumerate(METHODS):
            cells = {m: r for (rn, rk, m), r in best(rows, (method.name,)).items() if (rn, rk) == (n, k)}
            style = {"marker": "o", "markersize": 3, "color": f"C{number}", "label": method.name}
            known = [m for m in tokens if "fraction_of_floor" in cells.get(m, {})]
            top.plot(known, [cells[m]["fraction_of_floor"] for m in known], **style)
            known = [m for m in tokens if m in cells and (n, k, m) in cublas]
            faster = [cublas[n, k, m]["us"] / cells[m]["us"] for m in known]
            below.plot(known, faster, **style)
        top.set(title=f"{n}x{k}", ylim=(0, 1.05))
        for axis in (top, below):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, ticks)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        below.set(ylim=(0, None), xlabel="tokens")
    for axis in axes.flat[:]:
        axis.set_visible(bool(axis.get_lines()))
    axes[0][0].set_ylabel("fraction of the floor")
    axes[1][0].set_ylabel("times faster than cuBLAS")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS))
    where = ", ".join(gpu.get("name", "") for gpu in record["hardware"]) or "no GPU"
    figure.suptitle(f"{where}, {record['settings']['dtype']}, {record['date'][:10]}")
    figure.savefig(path)
    plt.close(figure)
