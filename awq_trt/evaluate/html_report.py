"""One page about a model that was quantized and built: pipeline, layers, accuracy, sizes, memory, speed, launch lines.

A single file that loads nothing: style, script and drawings are inside, and its content security policy forbids
everything else. What is in it comes from awq_trt.json, the plan's sidecar and records of measurements; all of it is
text to the template (data/report.html.j2), which escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from awq_trt.awq import report
from awq_trt.checkpoint.quantized import REPORT
from awq_trt.engine import memory, sidecar, trtexec
from awq_trt.errors import AwqTrtError
from awq_trt.evaluate import svg_chart
from awq_trt.evaluate.speed_tables import Cell, Speed, Table, number_cell, read_speeds
from awq_trt.evaluate.svg_chart import Chart, Series, chart
from awq_trt.files import PACKAGE, replacing
from awq_trt.serve.triton.repository import launch_plan

TEMPLATE = PACKAGE / "data" / "report.html.j2"


def write_html_report(
    path: Path,
    *,
    awq_dir: Path | None = None,
    onnx: Path | None = None,
    engine: Path | None = None,
    accuracy: Mapping[str, Any] | None = None,
    records: Sequence[Path] = (),
) -> None:
    """Write the page. Something to report on is needed: a quantized directory, a plan, or both.

    Args:
        path: the .html file. awq_dir: quantized directory; None takes the one that the plan's sidecar points to, if
            it is there. onnx: the ONNX file, for its size where there is no plan. engine: the plan, beside its sidecar.
        accuracy: what the verification measured; None takes the sidecar's. records: files of measurements, see
            speed_tables.py.

    Raises:
        AwqTrtError: a missing or damaged file, or a directory without awq_trt.json.
    """
    content = None
    if engine is not None:
        if not engine.is_file():
            raise AwqTrtError(f"{engine}: no such file. Give the path of a plan.")
        content = sidecar.read_sidecar(sidecar.path_of(engine))
        awq_dir = awq_dir or _awq_dir(engine, content)
    if content is None and awq_dir is None:
        raise AwqTrtError("nothing to report on: give a quantized directory, or a plan.")
    foreign = engine is not None and awq_dir is not None and not (awq_dir / REPORT).is_file()
    quantized = None if awq_dir is None or foreign else read_awq_report(awq_dir)
    speeds = read_speeds(records)
    text = render(quantized, awq_dir, onnx, content, engine, accuracy, speeds)
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def read_awq_report(directory: Path) -> dict[str, Any]:
    """awq_trt.json of a quantized directory.

    Raises:
        AwqTrtError: it is missing or damaged.
    """
    path = directory / REPORT
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AwqTrtError(
            f"{directory}: no {REPORT} here: another tool quantized it, or it is no such directory."
        ) from error
    except (OSError, ValueError) as error:
        raise AwqTrtError(f"{path}: cannot be read ({error}). Quantize again.") from error
    if not isinstance(found, dict) or not isinstance(found.get("layers"), list):
        raise AwqTrtError(f"{path}: has no list of layers. Quantize again.")
    return found


def render(
    quantized: Mapping[str, Any] | None,
    awq_dir: Path | None,
    onnx: Path | None,
    content: Mapping[str, Any] | None,
    engine: Path | None,
    accuracy: Mapping[str, Any] | None,
    speeds: Sequence[Speed],
) -> str:
    """The page's text, from what the files held; None for what there is not."""
    accuracy = accuracy or (content or {}).get("accuracy")
    dtype = (content or {}).get("model", {}).get("dtype") or _dtype(awq_dir)
    layers = (quantized or {}).get("layers", [])
    left = (content or {}).get("left_in_float") or (quantized or {}).get("left_in_float") or {}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        title=(engine or awq_dir or Path()).name,
        source=(quantized or {}).get("source"),
        created=(content or {}).get("created"),
        pipeline=_pipeline(quantized, awq_dir, onnx, content, engine),
        tiles=_tiles(layers, accuracy, content, left),
        warnings=_warnings(layers, content, dtype),
        settings=_settings(quantized, content, dtype),
        accuracy=_accuracy(accuracy),
        agreement=(accuracy or {}).get("onnx"),
        charts=_charts(layers, dtype),
        layers=_layers(layers),
        left=_left(left),
        sizes=_sizes(awq_dir, content),
        memory=_memory(content),
        profiles=_profiles(content),
        cache=_cache(content),
        speeds=speeds,
        launch=_launch(content, engine),
        chart_size=(svg_chart.WIDTH, svg_chart.HEIGHT, svg_chart.LEFT, svg_chart.RIGHT, svg_chart.BOTTOM),
        knows_layers=quantized is not None,
    )


def _awq_dir(engine: Path, content: Mapping[str, Any]) -> Path | None:
    """The quantized directory of a plan: the one that has its tokenizer."""
    tokenizer = content["model"].get("tokenizer")
    if not isinstance(tokenizer, str):
        return None
    found = engine.parent / tokenizer
    return found if (found / REPORT).is_file() else None


def _dtype(awq_dir: Path | None) -> str:
    """Of the activations, from config.json."""
    try:
        config = json.loads(((awq_dir or Path()) / "config.json").read_text())
    except (OSError, ValueError):
        return "float16"
    return str(config.get("dtype") or config.get("torch_dtype") or "float16")


def _pipeline(
    quantized: Mapping[str, Any] | None,
    awq_dir: Path | None,
    onnx: Path | None,
    content: Mapping[str, Any] | None,
    engine: Path | None,
) -> list[dict[str, str]]:
    """The boxes of the drawing: what, name, and sizes."""
    boxes = []
    if quantized is not None:
        boxes.append({"what": "checkpoint", "name": str(quantized.get("source", "?")), "size": ""})
    if awq_dir is not None:
        boxes.append({"what": "quantized", "name": awq_dir.name, "size": size(_folder_bytes(awq_dir))})
    if content is not None and engine is not None:
        sizes = content["sizes"]
        both = sizes.get("onnx", 0) + sizes.get("onnx_data", 0)
        boxes.append({"what": "ONNX", "name": str(content["model"].get("onnx", "?")), "size": size(both)})
    elif onnx is not None:
        files = [file for file in (onnx, onnx.with_name(onnx.name + ".data")) if file.is_file()]
        boxes.append({"what": "ONNX", "name": onnx.name, "size": size(sum(f.stat().st_size for f in files))})
    if content is not None and engine is not None:
        boxes.append({"what": "TensorRT plan", "name": engine.name, "size": size(sizes["plan"])})
    return boxes


def _tiles(
    layers: Sequence[report.Layer],
    accuracy: Mapping[str, Any] | None,
    content: Mapping[str, Any] | None,
    left: Mapping[str, str],
) -> list[tuple[str, str]]:
    """The numbers to see first: value and what it is."""
    held_out = (accuracy or {}).get("held_out") or {}
    tiles = []
    rounded = [row for name, row in held_out.items() if name not in ("float", "rounding")]
    if rounded and rounded[-1].get("perplexity") is not None:
        before = held_out.get("float", {}).get("perplexity")
        more = f" (+{rounded[-1]['perplexity'] - before:.2f})" if before is not None else ""
        tiles.append((f"{rounded[-1]['perplexity']:.2f}{more}", "perplexity, and above the float model"))
    if rounded:
        tiles.append((f"{rounded[-1]['top1']:.1%}", "same next token as the float model"))
    count = len(layers) or len((content or {}).get("quantized", []))
    tiles.append((f"{count}", f"layers in INT4, {len(left)} left in float"))
    if content is not None:
        tiles.append((size(content["sizes"]["plan"]), "plan"))
    return tiles


def _warnings(layers: Sequence[report.Layer], content: Mapping[str, Any] | None, dtype: str) -> list[str]:
    found = report.warnings(layers, [x["name"] for x in layers], dtype)
    if content is not None:
        found += [f"TensorRT: {text}" for text in content["build"].get("warnings", [])]
        found += launch_plan(content).warnings
    return found


def _settings(
    quantized: Mapping[str, Any] | None, content: Mapping[str, Any] | None, dtype: str
) -> list[tuple[str, str]]:
    """Names and values."""
    found = []
    if quantized is not None:
        calibration = quantized.get("calibration") or {}
        group = quantized.get("group_size")
        found += [
            ("method", str(quantized.get("method", "?"))),
            ("group", "whole row" if group == -1 else str(group)),
            ("zero points", "no (symmetric)" if quantized.get("symmetric") else "yes"),
            ("clip", _yes(quantized.get("clip"))),
            ("error feedback", _yes(quantized.get("feedback"))),
            (
                "calibration",
                f"{calibration.get('source')}, {calibration.get('windows')} × {calibration.get('length')} tokens",
            ),
        ]
    found.append(("activations", dtype))
    if content is not None:
        versions, plugin = content["versions"], content["plugin"]
        found += [
            ("built by", f"{versions.get('runtime')} {versions.get('runtime_version')}"),
            ("compute capability", ", ".join(content["gpu_architectures"])),
            ("model type", str(content["model"].get("model_type", "?"))),
            ("logits", {"last": "of the last token", "all": "of every token"}.get(content["model"].get("logits"), "-")),
        ]
        if plugin is not None:
            inside = "inside the plan" if plugin["embedded"] else plugin["path"]
            found.append(
                ("plugin", f"{plugin['version']}, {plugin['layers']} nodes, {inside}, SHA-256 {plugin['sha256']}")
            )
    return found


def _accuracy(accuracy: Mapping[str, Any] | None) -> Table | None:
    held_out = (accuracy or {}).get("held_out") or {}
    if not held_out:
        return None
    rows = tuple(
        (Cell(str(name)), number_cell(row.get("perplexity"), ".2f"), number_cell(row.get("top1"), ".1%"))
        for name, row in held_out.items()
    )
    caption = f"On held-out text ({(accuracy or {}).get('text', '?')})"
    return Table(caption, ("weights", "perplexity", "same next token as float"), rows)


def _charts(layers: Sequence[report.Layer], dtype: str) -> list[Chart]:
    """The panels of report.plot, over the blocks."""
    kinds, behind = report.by_kind(layers), report.blocks(layers)
    found = []
    for label, field, scale in report.PANELS:
        series = []
        for i, (name, members) in enumerate(kinds.items()):
            series.append(Series(name, *report.curve(members, field, behind), color=i))
            if field == "error":
                series.append(Series("", *report.curve(members, "error_rounding", behind), color=i, thin=True))
        ends = field == "largest_activation" and dtype == "float16"
        mark = (report.LARGEST_FLOAT16, "float16 ends") if ends else None
        drawn = chart(label, "block", series, log_y=scale == "log", mark=mark)
        if drawn is not None:
            found.append(drawn)
    return found


def _layers(layers: Sequence[report.Layer]) -> Table:
    columns = ("layer", "alpha", "clip", "scale in", "error, rounded", "error now", "tokens", "largest |x|")
    rows = []
    for layer in layers:
        name, _, alpha, clip, where, rounded, now, tokens, largest = report.cells(layer["name"], [layer])
        keys = (layer["alpha"], layer.get("clip", 1.0), None, layer["error_rounding"], layer["error"], layer["tokens"])
        cells = zip((alpha, clip, where, rounded, now, tokens), keys, strict=True)
        rows.append((Cell(name), *(Cell(t, v) for t, v in cells), Cell(largest, layer["largest_activation"])))
    return Table("Relative error of each layer's output, before and after", columns, tuple(rows))


def _left(left: Mapping[str, str]) -> Table:
    rows = tuple((Cell(str(name)), Cell(str(why))) for name, why in left.items())
    return Table("Layers that stay in 16 bits", ("layer", "why"), rows)


def _sizes(awq_dir: Path | None, content: Mapping[str, Any] | None) -> list[tuple[str, str, float]]:
    """What, how large in words, and in parts of the largest."""
    found: list[tuple[str, int]] = []
    if awq_dir is not None:
        found.append(("quantized directory", _folder_bytes(awq_dir)))
    if content is not None:
        names = {
            "quantized_weights": "INT4 weights, scales and zeros",
            "other_weights": "other weights",
            "onnx": "ONNX graph",
            "onnx_data": "ONNX data",
            "plan": "plan",
            "plugin": "of it the plugin" if (content["plugin"] or {}).get("embedded") else "plugin",
        }
        found += [(text, content["sizes"].get(key) or 0) for key, text in names.items() if content["sizes"].get(key)]
    largest = max((value for _, value in found), default=1)
    return [(name, size(value), round(100 * value / max(largest, 1), 2)) for name, value in found]


def _memory(content: Mapping[str, Any] | None) -> Table | None:
    """What a GPU must have for the largest batch."""
    if content is None:
        return None
    sizes, (cache, io) = content["sizes"], memory.cache_and_io(content)
    parts = {
        "weights": sizes["quantized_weights"] + sizes["other_weights"],
        "KV cache": cache,
        "inputs and outputs": io,
    }
    if sizes.get("activations") is not None:
        parts["activations (estimate)"] = sizes["activations"]
    parts["together"] = sum(parts.values())
    rows = tuple((Cell(name), Cell(size(value), value)) for name, value in parts.items())
    return Table(f"GPU memory for a batch of {memory.max_batch(content)}", ("for", "size"), rows)


def _profiles(content: Mapping[str, Any] | None) -> list[Table]:
    """Shapes of each profile; inputs of the same shapes, as the caches of the layers, share a row."""
    tables = []
    for index, profile in enumerate((content or {}).get("profiles", [])):
        same: dict[tuple[str, ...], list[str]] = {}
        for name, shapes in profile["inputs"].items():
            key = tuple(" × ".join(map(str, shapes[which])) or "scalar" for which in ("min", "opt", "max"))
            same.setdefault(key, []).append(name)
        rows = tuple((Cell(report.listed(names, 1)), *map(Cell, key)) for key, names in same.items())
        tables.append(Table(f"Profile {index}: {profile['name']}", ("input", "smallest", "tuned for", "largest"), rows))
    return tables


def _cache(content: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the KV cache is, in words."""
    cache = (content or {}).get("model", {}).get("kv_cache")
    if not cache or content is None:
        return []
    total = size(memory.cache_and_io(content)[0])
    if cache.get("kind") != "fixed":
        return [("kind", "dynamic: past in, longer past out"), ("largest", total)]
    shapes: dict[str, int] = {}
    for layer in cache["layers"]:
        window = f", window {layer['window']}" if layer.get("window") else ""
        text = f"{layer['kv_heads']} heads × {layer['slots']} slots × {layer['head_dim']}{window}"
        shapes[text] = shapes.get(text, 0) + 1
    return [
        ("kind", "fixed: written in place, never copied"),
        ("tokens of a sequence", str(cache["capacity"])),
        ("new tokens of a call", str(cache["prefill_chunk"])),
        ("layers", "; ".join(f"{count} of {text}" for text, count in shapes.items())),
        ("dtype", str(cache["dtype"])),
        (f"for a batch of {memory.max_batch(content)}", total),
    ]


def _launch(content: Mapping[str, Any] | None, engine: Path | None) -> list[tuple[str, str]]:
    """What a line does, and the line."""
    if content is None or engine is None:
        return []
    served = launch_plan(content)
    lines = [(f"time profile {p['name']}", trtexec.command(engine, p["name"])) for p in content["profiles"]]
    lines += [("serve with Triton", served.command or ""), ("serve with Triton in a container", served.docker or "")]
    return [(what, line) for what, line in lines if line]


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _yes(value: Any) -> str:
    return "yes" if value else "no"


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
