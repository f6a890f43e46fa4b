"""What quantizing found for each layer, for people: a table, warnings, and a plot.

The data are the rows of "layers" in awq_trt.json (`awq.LayerReport` as plain dicts), so that a report can be
made at any time from a quantized directory.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from awq_trt.awq.ranges import LARGEST_FLOAT16, NEAR
from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output
from awq_trt.publishing import check_outputs, publishing

Layer = Mapping[str, Any]

FEW = 1 / 16
"""A layer (an expert) was calibrated on too little if it saw fewer than this part of the most that any layer saw ..."""
FEW_TOKENS = 256
"""... and fewer tokens than this."""
WORST = 5


def kind(name: str) -> str:
    """The name of a layer without the numbers of its block and expert: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    head, _, tail = re.sub(r"\.\d+(?=\.)", ".*", name).partition(".*.")
    return tail or head


def block(name: str, behind: int = 0) -> int:
    """The first number in the name of a layer: model.layers.3.mlp.up_proj -> 3; `behind` for a head, which has none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else behind


def blocks(layers: Sequence[Layer]) -> int:
    """How many blocks the layers are of."""
    return max((block(layer["name"]) for layer in layers), default=0) + 1


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers of one kind together, in the order of the model."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(kind(layer["name"]), []).append(layer)
    return kinds


def warnings(
    layers: Sequence[Layer], quantized: Collection[str], dtype: str, largest: tuple[float, str] = (0.0, "")
) -> list[str]:
    """What a user should know before trusting the result.

    Args:
        layers: rows of the report. quantized: names of all layers that are INT4 now. dtype: of the activations.
        largest: value that any module gave or read, and which one (`Ranges`).
    """
    found = []
    large = [(x["largest_activation"], x["name"]) for x in layers]
    large = [x for x in dict.fromkeys([tuple(largest), *large]) if x[0] > NEAR * LARGEST_FLOAT16]
    if large and dtype == "float16":
        top = max(value for value, _ in large)
        found.append(
            f"activations reach {top:.0f}, and float16 ends at {LARGEST_FLOAT16:.0f}: the engine may overflow to NaN "
            f'in {listed([name for _, name in large])}. Use dtype="bfloat16".'
        )
    unseen = sorted(set(quantized) - {x["name"] for x in layers}) if layers else []
    if unseen:
        found.append(
            f"no calibration token reached {listed(unseen)}: rounded to nearest without a search. "
            "Calibrate on more or other text (`calibration`, `calibration_samples`)."
        )
    most = max((x["tokens"] for x in layers), default=0)
    few = [x for x in layers if x["tokens"] < min(FEW * most, FEW_TOKENS)]
    if few:
        least = min(x["tokens"] for x in few)
        found.append(
            f"few calibration tokens ({least} and up, of {most}) reached {listed([x['name'] for x in few])}. "
            "Raise calibration_samples."
        )
    return found


def listed(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def table(layers: Sequence[Layer], *, full: bool = False) -> Table:
    """The report as a table: one line per kind of layer and one for each of the worst layers; `full`, one per layer."""
    found = Table(title="Relative error of each layer's output")
    found.add_column("layer", overflow="fold", min_width=24)
    found.add_column("layers", justify="right")
    for column in ("alpha", "clip", "scale in"):
        found.add_column(column, no_wrap=True)
    for column in ("rounding", "now", "tokens", "largest |x|"):
        found.add_column(column, justify="right")
    for name, members in {x["name"]: [x] for x in layers}.items() if full else by_kind(layers).items():
        found.add_row(*cells(name, members))
    if not full and len(layers) > WORST:
        found.add_section()
        for layer in sorted(layers, key=lambda x: -x["error"])[:WORST]:
            found.add_row(*cells(layer["name"], [layer]))
    return found


def cells(name: str, layers: Sequence[Layer]) -> list[str]:
    """Of one layer, or of several of a kind: then medians, and the range where it tells more."""
    alphas = [x["alpha"] for x in layers]
    spread = f" ({min(alphas):.2f}–{max(alphas):.2f})" if len(layers) > 1 else ""
    return [
        name,
        str(len(layers)),
        f"{statistics.median(alphas):.2f}{spread}",
        f"{statistics.fmean(x.get('clip', 1.0) for x in layers):.2f}",
        ", ".join(sorted({where(x) for x in layers} - {"-"})) or "-",
        f"{statistics.median(x['error_rounding'] for x in layers):.4f}",
        f"{statistics.median(x['error'] for x in layers):.4f}",
        str(min(x["tokens"] for x in layers)),
        f"{max(x['largest_activation'] for x in layers):.1f}",
    ]


def where(layer: Layer) -> str:
    """Where the scale of a layer went: the operator it is folded into, or a pre-scale, or "-" for none."""
    if layer["alpha"] == 0:
        return "-"
    return "pre-scale" if layer["folded_into"] is None else str(layer["folded_into"]).rpartition(".")[2]


PANELS = (
    ("relative output error (dotted: rounding to nearest)", "error", "log"),
    ("alpha", "alpha", "linear"),
    ("clipping ratio, mean of the groups", "clip", "linear"),
    ("largest activation", "largest_activation", "log"),
)


MARK = "awq_trt report"
"""In the metadata of every plot."""
METADATA = {"svg": {"Creator": MARK, "Date": None}, "pdf": {"Creator": MARK}, "png": {"Software": MARK}}


def output(path: Path) -> Output:
    """A plot to write."""
    return Output(path, mark=MARK.encode())


def plot(layers: Sequence[Layer], path: Path, title: str, dtype: str) -> None:
    """Draw the layers into a file, whose suffix says in which format.

    Raises:
        AwqTrtError: see `drawn`; something would be lost at `path`, or another run writes there.
    """
    check_outputs([output(path)])
    drawing = drawn(layers, path.suffix.removeprefix("."), title, dtype)
    with publishing(output(path)) as (file,):
        file.write_bytes(drawing)


def drawn(layers: Sequence[Layer], format: str, title: str, dtype: str) -> bytes:
    """Error, alpha, clipping and largest activation over the blocks.

    Args:
        format: "svg", "png" or "pdf".

    Raises:
        AwqTrtError: nothing to draw, another format, or matplotlib is not there.
    """
    if format not in METADATA:
        raise AwqTrtError(f"a plot cannot be a {format or 'file without a suffix'}: write {', '.join(METADATA)}.")
    if not layers:
        raise AwqTrtError("nothing to plot: the layers were rounded without a search, so nothing is known of them.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AwqTrtError("plots need matplotlib: pip install 'awq_trt[plot]' (or matplotlib).") from error
    behind = blocks(layers)
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title)
    for axes, (label, field, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for i, (name, members) in enumerate(by_kind(layers).items()):
            color = f"C{i % 10}"
            axes.plot(*curve(members, field, behind), ".-", label=name, color=color, linewidth=1)
            if field == "error":
                axes.plot(*curve(members, "error_rounding", behind), ":", color=color, linewidth=1)
        if field == "largest_activation" and dtype == "float16":
            axes.axhline(LARGEST_FLOAT16, color="black", linewidth=1)
            axes.text(0, LARGEST_FLOAT16, "float16 ends", va="bottom", fontsize="small")
        axes.set(title=label, xlabel="block", yscale=scale)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format=format, metadata=METADATA[format])
    return file.getvalue()


def curve(layers: Sequence[Layer], field: str, behind: int = 0) -> tuple[list[int], list[float]]:
    """Block numbers and a field of the layers of one kind: where a block has many (experts), their mean or largest.

    A head stands at `behind`.
    """
    values: dict[int, list[float]] = {}
    for layer in layers:
        values.setdefault(block(layer["name"], behind), []).append(float(layer.get(field, 1.0)))
    reduce = max if field == "largest_activation" else statistics.fmean
    return list(values), [reduce(v) for v in values.values()]
